/* The server's side of the page: requests, the events of a stream, and the tokens in them. */

export const ALTERNATIVES = 8; // likeliest tokens asked for at every place
const LOST = "The connection to the server was lost.";

// ── The server ──────────────────────────────────────────────────────────────────────────────────

export class ServerError extends Error {
  constructor(message, status = 0, after = 0) {
    super(message);
    Object.assign(this, { status, after }); // HTTP's; 0: no answer. Seconds to wait.
  }
}

/** Posts `body`, or gets what there is; a `ServerError` of whatever is not an answer. */
export async function ask(path, key, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const { error = {} } = await response.json().catch(() => ({}));
  const message = error.message || `The server answered ${response.status}.`;
  throw new ServerError(message, response.status, Number(response.headers.get("Retry-After")));
}

/** The events of a stream, up to its [DONE]. */
export async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new ServerError(LOST);
      });
      if (done) throw new ServerError(LOST);
      const parts = (rest + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const text = data.map((line) => line.slice(5)).join("\n").trim();
        if (text === "[DONE]") return;
        if (!text) continue; // a comment, which keeps the connection
        const event = JSON.parse(text);
        if (event.error) throw new ServerError(event.error.message, 500);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// ── Tokens: {id, name, bytes, logprob, rank, top: likeliest tokens, piece: what it adds} ─────────

/** The tokens of a choice in a stream's event; a part of the text alone, where none are told. */
export function tokensOf(choice, text) {
  const told = choice.logprobs?.content;
  if (!told?.length) return text ? [{ plain: text, piece: text, top: [] }] : [];
  const one = ({ id, token, logprob, bytes }) =>
    ({ id, name: token, logprob, bytes: Uint8Array.from(bytes ?? []) });
  return told.map((entry) => {
    const token = { ...one(entry), rank: entry.rank, top: (entry.top_logprobs ?? []).map(one) };
    token.top.sort((a, b) => b.logprob - a.logprob);
    const place = token.top.findIndex((other) => same(other, token));
    if (place < 0) token.top.push({ ...token, top: [] });
    token.rank ??= place < 0 ? null : place + 1;
    return token;
  });
}

export const same = (a, b) => (a.id == null ? a.name === b.name : a.id === b.id);
export const percent = ({ logprob }) => {
  const share = 100 * Math.exp(logprob);
  return `${share >= 0.1 ? share.toFixed(1) : share >= 0.001 ? share.toPrecision(1) : "< 0.001"} %`;
};

/** A token's text, the hexadecimal bytes of a part of a character, or a special token's name. */
export function nameOf({ bytes, name }) {
  if (!bytes.length) return name;
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return [...bytes].map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join("·");
  }
}

/** A decoder that has read `tokens`: a character's bytes may come in several. */
export function decoderAfter(tokens) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  for (const token of tokens) if (!token.plain) decoder.decode(token.bytes, { stream: true });
  return decoder;
}

export const textOf = (tokens) => tokens.map((token) => token.piece).join("");

/** Makes a reply's tokens its text: a space that decoding drops goes, and so does a stop string. */
export function settle(reply, before) {
  let left = reply.text.length;
  const first = reply.tokens[before];
  if (left && first && !textOf(reply.tokens.slice(before)).startsWith(reply.text)) {
    first.piece = first.piece.trimStart();
  }
  for (let i = before; i < reply.tokens.length; i++) {
    const token = reply.tokens[i];
    if (left < token.piece.length || (!left && token.piece)) {
      token.piece = token.piece.slice(0, left);
      reply.tokens.length = i + (left > 0);
      return;
    }
    left -= token.piece.length;
  }
}
