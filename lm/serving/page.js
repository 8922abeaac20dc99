/* The page's behaviour, over the server's OpenAI-compatible endpoints.
 *
 * A conversation is a tree of messages: to regenerate or to edit adds a sibling, and each message
 * knows which of its children is shown. A text in completion mode is a list of tokens after a
 * prompt; a branch of it shares the tokens before the fork, the very objects, and the tokens say
 * by that identity where branches part. Text reaches the page as text nodes alone, never as markup.
 */

const ALTERNATIVES = 8; // likeliest tokens asked for at every place
const LOST = "The connection to the server was lost.";

// What can be set: [field of the API, label, value at the start, least, most, step, hint, neutral]. A value
// that is neutral, or a field left empty, is not sent.
const DIALS = [
  ["temperature", "Temperature", 1, 0, 2, 0.05, "0 takes the likeliest token", null],
  ["top_k", "Top-k", 0, 0, null, 1, "0 is off", 0],
  ["top_p", "Top-p", 1, 0.01, 1, 0.01, "", 1],
  ["min_p", "Min-p", 0, 0, 1, 0.01, "", 0],
  ["max_tokens", "Max tokens", 256, 1, null, 1, "", null],
  ["seed", "Seed", "", 0, null, 1, "Empty is a new one each time", null],
  ["repetition_penalty", "Repetition penalty", 1, 1, 2, 0.05, "", 1],
  ["presence_penalty", "Presence penalty", 0, -2, 2, 0.1, "", 0],
  ["frequency_penalty", "Frequency penalty", 0, -2, 2, 0.1, "", 0],
];

// ── The document ────────────────────────────────────────────────────────────────────────────────

const $ = (id) => document.getElementById(id);

/** An element; attributes that are false or null are left out, `onclick` and the like listen. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

const button = (label, onclick, { sign, ...attributes } = {}) =>
  el("button", { type: "button", class: "quiet", onclick, ...attributes }, sign ? icon(sign) : null, label);

/** A textarea as tall as what it holds, up to a third of the window. */
function fit(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, innerHeight / 3)}px`;
}

const memory = {
  get: (name) => { try { return localStorage.getItem(name); } catch { return null; } },
  set: (name, value) => { try { localStorage.setItem(name, value); } catch { /* a private window */ } },
};

/** Tells a screen reader, politely. */
function say(text) {
  while ($("spoken").childElementCount > 40) $("spoken").firstChild.remove();
  $("spoken").append(el("p", {}, text));
}

// ── The server ──────────────────────────────────────────────────────────────────────────────────

class ServerError extends Error {
  constructor(message, status = 0, after = 0) {
    super(message);
    Object.assign(this, { status, after }); // HTTP's; 0: no answer. Seconds to wait.
  }
}

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
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
async function* events(response) {
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

/** What the settings make of a request. */
function sampling() {
  const fields = {};
  for (const [name, , , , , , , neutral] of DIALS) {
    const value = $(name).valueAsNumber;
    if (!Number.isNaN(value) && value !== neutral) fields[name] = value;
  }
  return fields;
}

// ── Tokens: {id, name, bytes, logprob, rank, top: likeliest tokens, piece: its part of the text} ──

/** The tokens of a choice in a stream's event; a part of the text alone, where none are told. */
function tokensOf(choice, text) {
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

const same = (a, b) => (a.id == null ? a.name === b.name : a.id === b.id);
const percent = ({ logprob }) => {
  const share = 100 * Math.exp(logprob);
  return `${share >= 0.1 ? share.toFixed(1) : share >= 0.001 ? share.toPrecision(1) : "< 0.001"} %`;
};

/** A token's text, the hexadecimal bytes of a part of a character, or a special token's name. */
function nameOf({ bytes, name }) {
  if (!bytes.length) return name;
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return [...bytes].map((byte) => byte.toString(16).toUpperCase().padStart(2, "0")).join("·");
  }
}

/** How a token is written where its spaces count. */
function label(token) {
  const parts = nameOf(token).split(/([ \n\t])/).filter(Boolean);
  const blanks = { " ": "␣", "\n": "↵", "\t": "⇥" };
  return el("code", {}, ...parts.map((part) =>
    (blanks[part] ? el("span", { class: "blank" }, blanks[part]) : part)));
}

/** A decoder that has read `tokens`: a character's bytes may come in several. */
function decoderAfter(tokens) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  for (const token of tokens) if (!token.plain) decoder.decode(token.bytes, { stream: true });
  return decoder;
}

const textOf = (tokens) => tokens.map((token) => token.piece).join("");

/** Makes a reply's tokens its text: a space that decoding drops goes, and so does a stop string. */
function settle(reply, before) {
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

// ── Writing ─────────────────────────────────────────────────────────────────────────────────────

let running = null; // {controller, reply} of the stream that is being read
const now = () => performance.now();

/** Streams one reply: `reply.tokens` grow, and the page with them. Returns whether it was whole. */
async function write(path, body, reply, again) {
  running?.controller.abort();
  if (!$("dials").checkValidity()) {
    settings(true);
    $("dials").reportValidity();
    return false;
  }
  const controller = new AbortController();
  const mine = (running = { controller, reply });
  const before = reply.tokens.length, start = now();
  const decoder = decoderAfter(reply.tokens);
  const times = (reply.times = { first: null, last: null, count: 0 });
  let unsaid = "";
  Object.assign(reply, { text: "", finish: null });
  notify();
  draw();
  try {
    const fields = { model: $("model").value, ...body, ...sampling(), stream: true };
    fields.stream_options = { include_usage: true };
    fields.return_token_ids = true;
    for await (const event of events(await ask(path, fields, controller.signal))) {
      const choice = event.choices?.[0];
      if (!choice) continue;
      reply.promptIds ??= choice.prompt_token_ids ?? event.prompt_token_ids;
      const text = choice.text ?? choice.delta?.content ?? "";
      for (const token of tokensOf(choice, text)) {
        token.piece = token.plain ?? decoder.decode(token.bytes, { stream: true });
        reply.tokens.push(token);
        times.count += 1;
        times.last = now();
        times.first ??= times.last;
      }
      times.ttft = times.first && times.first - start;
      reply.text += text;
      unsaid += text;
      const sentence = unsaid.match(/^[^]*[.!?\n](?=\s)/)?.[0];
      if (sentence) {
        say(sentence);
        unsaid = unsaid.slice(sentence.length);
      }
      reply.finish = choice.finish_reason ?? reply.finish;
      grow(reply);
    }
    say(unsaid);
    return true;
  } catch (error) {
    if (error.name === "AbortError") {
      reply.finish = "stopped";
      say("Stopped.");
    } else {
      if (!(error instanceof ServerError)) console.error(error);
      reply.finish = "broken";
      if (running === mine) complain(error, again);
    }
    return false;
  } finally {
    settle(reply, before);
    if (running === mine) running = null;
    setTimeout(draw); // after the caller has taken away a reply that is empty
  }
}

function stats({ times, finish }) {
  if (!times?.first) return "";
  const rate = (times.count - 1) / (times.last - times.first);
  const ends = { length: "cut at the limit", stopped: "stopped", broken: "broken off" };
  const parts = [`first token ${Math.round(times.ttft)} ms`];
  if (times.count > 1 && Number.isFinite(rate)) parts.push(`${(1000 * rate).toFixed(1)} tokens/s`);
  parts.push(`${times.count} token${times.count === 1 ? "" : "s"}`, ...[ends[finish] ?? []].flat());
  return parts.join(" · ");
}

// ── What goes wrong, and what was undone ────────────────────────────────────────────────────────

let waiting = null; // a timer of the notice that is shown

function notify(text = "", actions = [], wrong = false) {
  clearInterval(waiting);
  $("notice").hidden = !text;
  $("notice").classList.toggle("wrong", wrong);
  $("notice").querySelector("p").textContent = text;
  $("notice").querySelector(".row").replaceChildren(...actions);
}

function complain(error, again) {
  const retry = el("button", { type: "button", class: "main", onclick: again }, "Try again");
  if (error.status === 401) {
    const key = el("input", { type: "password", "aria-label": "API key", placeholder: "API key" });
    const use = () => { $("key").value = key.value; again(); };
    key.addEventListener("keydown", (event) => {
      if (event.key === "Enter") { event.preventDefault(); use(); }
    });
    retry.addEventListener("click", use, { capture: true, once: true });
    retry.textContent = "Use this key";
    notify(error.message, [key, retry], true);
    return key.focus();
  }
  notify(error.message, [retry], true);
  if (error.after > 0) {
    let left = Math.ceil(error.after);
    const tick = () => {
      retry.disabled = left > 0;
      retry.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left-- <= 0) clearInterval(waiting);
    };
    tick();
    waiting = setInterval(tick, 1000);
  } else if (error.status === 0) {
    waiting = setInterval(async () => {
      if (!(await fetch("v1/models").catch(() => null))) return;
      notify("The server can be reached again.", [retry]);
    }, 2000);
  }
}

// ── Chat ────────────────────────────────────────────────────────────────────────────────────────

const node = (fields, parent = null) => {
  const made = { tokens: [], text: "", ...fields, parent, children: [], at: 0 };
  if (parent) parent.at = parent.children.push(made) - 1;
  return made;
};
let chat = node({});

/** The messages that are shown, in order. */
function path() {
  const found = [];
  for (let here = chat.children[chat.at]; here; here = here.children[here.at]) found.push(here);
  return found;
}

async function reply(parent) {
  const messages = [];
  for (let here = parent; here.role; here = here.parent) {
    messages.unshift({ role: here.role, content: here.text });
  }
  if ($("system").value.trim()) messages.unshift({ role: "system", content: $("system").value });
  const made = node({ role: "assistant" }, parent);
  const body = { messages, logprobs: true, top_logprobs: ALTERNATIVES };
  const whole = await write("v1/chat/completions", body, made, () => reply(parent));
  if (!whole && !made.tokens.length) { // nothing came: it leaves no empty reply behind
    parent.children = parent.children.filter((child) => child !== made);
    parent.at = Math.max(0, parent.children.length - 1);
    draw();
  }
}

function send(text) {
  reply(node({ role: "user", text }, path().at(-1) ?? chat));
}

function edited(message, text) {
  const made = node({ role: message.role, text }, message.parent);
  if (message.role === "user") reply(made);
  else draw();
}

function versions(message) {
  const { children, at } = message.parent;
  if (children.length < 2) return null;
  const go = (step, sign, name) => el("button", {
    type: "button", class: "quiet", "aria-label": name, disabled: !children[at + step],
    onclick: () => {
      message.parent.at += step;
      draw();
      const shown = message.parent.children[message.parent.at].view?.closest("article");
      const same = shown?.querySelector(`[aria-label="${name}"]`);
      (same?.disabled ? shown.querySelector(".versions :enabled") : same)?.focus();
    },
  }, icon(sign));
  return el("span", { class: "versions" }, go(-1, "left", "Earlier version"),
    `${at + 1} / ${children.length}`, go(1, "right", "Later version"));
}

function article(message) {
  const mine = message.role === "user";
  const text = el("div", { class: "text" });
  message.view = text;
  if (message.tokens.length || !mine) fill(message, message.tokens.length ? null : message.text);
  else text.textContent = message.text;
  const busy = running?.reply === message;
  const deeds = el("div", { class: "deeds" }, versions(message),
    mine || busy ? null : button("Regenerate", () => reply(message.parent), { sign: "again" }),
    busy ? null : button("Edit", () => edit(message, text), { sign: "edit" }),
    mine || busy ? null : copy(() => message.text),
    mine ? null : el("span", { class: "stats" }, busy ? "" : stats(message)));
  return el("article", { class: mine ? "you" : "model" },
    el("h2", { class: "unseen" }, mine ? "You" : "Model"), text, deeds);
}

/** Puts a field in the place of a message or prompt. */
function edit(message, place, done = (text) => edited(message, text)) {
  const area = el("textarea", { "aria-label": "Edit the text" });
  area.value = message.prompt ?? message.text;
  const save = () => area.value.trim() && done(area.value);
  const writes = message.role !== "assistant";
  const form = el("div", { class: "editor" }, area, el("div", { class: "row" },
    el("button", { type: "button", class: "main", onclick: save }, writes ? "Send" : "Save"),
    el("button", { type: "button", class: "plain", onclick: () => draw() }, "Cancel")));
  area.addEventListener("input", () => fit(area));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); draw(); $("prompt").focus(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      save();
    }
  });
  place.closest("article").replaceChildren(form);
  fit(area);
  area.focus();
}

const copy = (text) => !navigator.clipboard ? null : button("Copy", (event) => {
  navigator.clipboard.writeText(text()).then(() => say("Copied."));
  event.currentTarget.lastChild.textContent = "Copied";
}, { sign: "copy" });

// ── Completion ──────────────────────────────────────────────────────────────────────────────────

// Each: {prompt, promptIds, tokens, text, from: the branch it left or null, start: how many tokens
// it was given}; the last given one, if any, is the alternative that was taken.
let branches = [];
let branch = null;

function open(made) {
  branches.push(made);
  branch = made;
  return proceed();
}

/** Goes on with the branch that is shown. */
function proceed() {
  const { prompt, promptIds, tokens } = branch;
  const ids = tokens.map((token) => token.id);
  const known = promptIds && ids.every((id) => id != null);
  const body = { prompt: known ? [...promptIds, ...ids] : prompt + textOf(tokens) };
  body.logprobs = ALTERNATIVES;
  const again = () => { branch = made; proceed(); };
  const made = branch;
  return write("v1/completions", body, branch, again);
}

const begin = (prompt) => open({ prompt, tokens: [], text: "", from: null, start: 0 });

/** Draws anew all that the branch was not given. */
function redraw() {
  const { prompt, promptIds, tokens, start, from } = branch;
  return open({ prompt, promptIds, tokens: tokens.slice(0, start), from: from ?? branch, start });
}

/** The branches that hold the same text before token `i` of the one shown. */
const beside = (i) => branches.filter(({ prompt, tokens }) => tokens.length > i
  && (i ? tokens[i - 1] === branch.tokens[i - 1] : prompt === branch.prompt));
const writtenWith = (i, token) => beside(i).find(({ tokens }) => same(tokens[i], token));

/** Follows another token at place `i`: a branch that is there, or a new one. */
function follow(i, other, byKey) {
  const place = branch.tokens[i], there = writtenWith(i, other);
  if (same(place, other)) return;
  hideCard();
  if (there) visit(there);
  else take(place, i, other);
  if (byKey) focusToken(spanOf(branch.tokens[i]));
}

function take(place, i, other) {
  const token = { ...other, top: place.top, rank: place.top.indexOf(other) + 1, taken: true };
  const { prompt, promptIds } = branch, tokens = branch.tokens.slice(0, i);
  token.piece = decoderAfter(tokens).decode(token.bytes, { stream: true });
  say(`A new branch with ${nameOf(token)}.`);
  open({ prompt, promptIds, tokens: [...tokens, token], text: "", from: branch, start: i + 1 });
}

function visit(other) {
  branch = other;
  draw();
}

function sheet() {
  const text = el("div", { class: "text" });
  branch.view = text;
  fill(branch);
  const busy = running?.reply === branch, mine = branch;
  const deeds = el("div", { class: "deeds" },
    busy ? null : button("Continue", () => proceed(), { sign: "on" }),
    busy ? null : button("Regenerate", redraw, { sign: "again" }),
    busy ? null : button("Edit", () => edit(mine, text, begin),
      { sign: "edit", "aria-label": "Edit the prompt" }),
    busy ? null : copy(() => mine.prompt + textOf(mine.tokens)),
    el("span", { class: "stats" }, busy ? "" : stats(branch)));
  return el("article", { class: "sheet" }, el("h2", { class: "unseen" }, "Text"), text, deeds);
}

/** All branches as a nested list, each under the one it left. */
function tree() {
  const list = (from) => {
    const found = branches.filter((one) => one.from === from);
    return found.length ? el("ul", {}, ...found.map((one) => {
      const cut = Math.max(0, one.start - 1);
      const lead = from ? textOf(one.tokens.slice(Math.max(0, cut - 4), cut)) : one.prompt;
      const took = from && one.start > cut ? textOf(one.tokens.slice(cut, one.start)) : "";
      const rest = textOf(one.tokens.slice(from ? one.start : 0).slice(0, 24));
      const current = one === branch && "true";
      return el("li", {}, el("button", {
        type: "button", "aria-current": current, onclick: () => {
          visit(one);
          document.querySelector(".branches [aria-current]").focus();
        },
      }, el("span", {}, from ? "… " : "", lead, el("b", {}, took), rest),
      el("span", {}, `${one.tokens.length}`, el("span", { class: "unseen" }, " tokens"))), list(one));
    })) : null;
  };
  if (branches.length < 2) return el("div");
  return el("nav", { class: "branches", "aria-label": "Branches" }, el("h2", {}, "Branches"), list(null));
}

// ── Tokens on the page ──────────────────────────────────────────────────────────────────────────

const tokenOf = new WeakMap(); // of a span: [token, its number in the text]

function span(token, i) {
  if (token.plain) return document.createTextNode(token.plain);
  const [, blank, rest] = token.piece.match(/^( *)([^]*)$/); // the tint begins after the spaces
  const inner = rest ? [blank, el("i", {}, rest)] : [el("i", {}, blank)];
  const made = el("span", { class: "token", tabindex: i ? -1 : 0 }, ...inner);
  made.style.setProperty("--p", Math.exp(token.logprob).toFixed(3));
  if (!token.piece) made.lastChild.dataset.mark = token.bytes.length ? "·" : token.name;
  made.classList.toggle("line", /^\s*\n\s*$/.test(token.piece));
  made.classList.toggle("took", !!token.taken);
  tokenOf.set(made, [token, i]);
  return made;
}

/** Writes a reply's tokens into its view, all of them anew. */
function fill(reply, instead = null) {
  reply.view.replaceChildren(
    ...(reply.prompt != null ? [el("span", { class: "given" }, reply.prompt)] : []),
    ...(instead != null ? [instead] : []));
  reply.shown = 0;
  reply.view.classList.toggle("waiting", running?.reply === reply);
  added(reply);
  if (reply === branch && reply.prompt != null) {
    for (const one of reply.view.querySelectorAll(".token")) {
      one.classList.toggle("fork", beside(tokenOf.get(one)[1]).some(
        ({ tokens }) => tokens[tokenOf.get(one)[1]] !== tokenOf.get(one)[0]));
    }
  }
}

function added(reply) {
  for (; reply.shown < reply.tokens.length; reply.shown++) {
    reply.view.append(span(reply.tokens[reply.shown], reply.shown));
  }
}

let due = 0;

/** Shows what came since, at the next frame; stays at the end of the page if the reader is there. */
function grow(reply) {
  due ||= requestAnimationFrame(() => {
    due = 0;
    $("meter").textContent = running ? stats(reply) : "";
    if (!reply.view?.isConnected) return;
    const atEnd = scrollY + innerHeight > document.documentElement.scrollHeight - 80;
    added(reply);
    if (atEnd) scrollTo(0, document.documentElement.scrollHeight);
  });
}

const mode = () => document.documentElement.dataset.mode;

/** Everything anew: the text that is shown, and what can be done with it. */
function draw() {
  const chatting = mode() === "chat", held = document.activeElement;
  const shown = cardOf && tokenOf.get(cardOf)[0], focused = tokenOf.get(held)?.[0];
  hideCard();
  if (chatting) $("log").replaceChildren(...path().map(article));
  else $("log").replaceChildren(...(branch ? [sheet(), tree()] : []));
  $("welcome").hidden = chatting ? path().length > 0 : !!branch;
  $("log").setAttribute("aria-busy", !!running);
  $("stop").hidden = !running;
  $("send").hidden = !!running;
  if (!running) $("meter").textContent = "";
  if (held === $("stop") && !running) $("prompt").focus();
  if (focused) focusToken(spanOf(focused));
  if (!held.isConnected && document.activeElement === document.body) {
    $("prompt").focus({ preventScroll: true });
  }
  if (running && chatting) scrollTo(0, document.documentElement.scrollHeight);
  else if (shown && spanOf(shown)) showCard(spanOf(shown));
}

const spanOf = (token) =>
  [...document.querySelectorAll(".token")].find((one) => tokenOf.get(one)[0] === token);

// ── The card of a token ─────────────────────────────────────────────────────────────────────────

let cardOf = null; // the span whose card is shown
let leaving = 0;

function showCard(target) {
  clearTimeout(leaving);
  if (cardOf === target) return;
  hideCard();
  cardOf = target;
  const [token, i] = tokenOf.get(target);
  const branching = !!target.closest(".sheet");
  const rank = token.rank ?? `> ${ALTERNATIVES}`;
  const fact = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));
  const rows = token.top.map((other) => {
    const share = el("span", { class: "share" }, percent(other)), drawn = same(other, token);
    const row = el(branching ? "button" : "div", {
      type: branching && "button", class: drawn ? "drawn" : branching && writtenWith(i, other) && "written",
      "aria-current": drawn && "true", onclick: branching && ((event) => follow(i, other, !event.detail)),
    }, label(other), share);
    row.style.setProperty("--p", Math.exp(other.logprob));
    return el("li", {}, row);
  });
  $("card").replaceChildren(
    el("div", { class: "name" }, label(token),
      el("span", {}, token.id == null ? "" : `id ${token.id}`)),
    el("dl", {}, fact("Probability", percent(token)), fact("Rank", `${rank}`),
      fact("Log-prob.", token.logprob.toFixed(2))),
    el("ul", { "aria-label": "Alternatives" }, ...rows),
    ...(branching ? [el("p", { class: "hint" }, "Choose one to go on from there.")] : []));
  target.setAttribute("role", "button");
  target.setAttribute("aria-label", `${nameOf(token).trim() || label(token).textContent}, ${percent(token)}, rank ${rank}`);
  target.setAttribute("aria-describedby", "card");
  target.classList.add("shown");
  const card = $("card");
  card.hidden = false;
  const at = target.getClientRects()[0], gap = 8, { width, height } = card.getBoundingClientRect();
  const under = at.bottom + gap + height < innerHeight || at.top < innerHeight - at.bottom;
  const top = under ? at.bottom + gap : at.top - gap - height;
  card.style.top = `${Math.max(12, Math.min(top, innerHeight - height - 12))}px`;
  card.style.left = `${Math.max(12, Math.min(at.left, document.body.clientWidth - width - 12))}px`;
}

function hideCard() {
  clearTimeout(leaving);
  $("card").hidden = true;
  if (!cardOf) return;
  for (const name of ["role", "aria-label", "aria-describedby"]) cardOf.removeAttribute(name);
  cardOf.classList.remove("shown");
  cardOf = null;
}

const leave = () => {
  clearTimeout(leaving);
  leaving = setTimeout(() => {
    const held = document.activeElement;
    if (held !== cardOf && !$("card").contains(held)) hideCard();
  }, 180);
};

function focusToken(target) {
  if (!target) return;
  for (const one of target.parentNode.querySelectorAll('.token[tabindex="0"]')) one.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
}

function tokenKeys(event) {
  const here = event.target.closest(".token");
  if (!here || event.altKey || event.ctrlKey || event.metaKey) return;
  const all = [...here.parentNode.querySelectorAll(".token")], i = all.indexOf(here);
  const to = { ArrowRight: all[i + 1], ArrowLeft: all[i - 1], Home: all[0], End: all.at(-1) }[event.key];
  if (to) focusToken(to);
  else if (["Enter", " ", "ArrowDown"].includes(event.key)) {
    showCard(here);
    ($("card").querySelector("button") ?? $("card")).focus();
  } else if (event.key === "Escape" && !running) hideCard();
  else return;
  event.preventDefault();
}

function cardKeys(event) {
  const all = [...$("card").querySelectorAll("button")], i = all.indexOf(document.activeElement);
  if (event.key === "ArrowDown") all[i + 1]?.focus();
  else if (event.key === "ArrowUp" && i > 0) all[i - 1].focus();
  else if (["Escape", "Tab", "ArrowUp"].includes(event.key)) {
    const back = cardOf;
    focusToken(back);
    if (event.key === "Escape") hideCard();
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

$("log").addEventListener("pointerover", (event) => {
  const over = event.target.closest(".token");
  if (over && event.pointerType === "mouse") showCard(over);
  else if (cardOf) leave();
});
$("log").addEventListener("pointerleave", leave);
$("log").addEventListener("focusin", (event) => {
  const one = event.target.closest(".token");
  if (one) showCard(one);
});
$("log").addEventListener("click", (event) => {
  const one = event.target.closest(".token");
  if (one) showCard(one);
});
$("log").addEventListener("focusout", (event) => event.target.closest(".token") && leave());
$("log").addEventListener("keydown", tokenKeys);
$("card").addEventListener("keydown", cardKeys);
$("card").addEventListener("pointerenter", () => clearTimeout(leaving));
$("card").addEventListener("pointerleave", leave);
$("card").addEventListener("focusout", leave);
addEventListener("scroll", () => cardOf && !cardOf.matches(":focus") && hideCard(), { passive: true });
addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".token, #card")) hideCard();
});

// ── The bar, the field and the settings ─────────────────────────────────────────────────────────

function setMode(value) {
  document.documentElement.dataset.mode = value;
  const chatting = value === "chat";
  document.querySelector(`[name=mode][value=${value}]`).checked = true;
  $("welcome").querySelector("h2").textContent = chatting ? "Ask it something" : "Begin a text";
  $("welcome").querySelector("p").textContent = chatting
    ? "Replies appear as they are written. Point at any word to see how likely it was and what else the model had in mind."
    : "The model goes on from your words. Point at any token to see its alternatives, and choose one to branch from there.";
  $("prompt").placeholder = chatting ? "Message the model" : "Begin a text";
  $("prompt").setAttribute("aria-label", chatting ? "Message" : "Beginning of a text");
  $("new").setAttribute("aria-label", chatting ? "New chat" : "New text");
  draw();
}

/** A model without a chat template continues texts and does nothing else. */
function fitModel() {
  const chats = $("model").selectedOptions[0]?.dataset.chat !== "false";
  document.querySelector("[name=mode][value=chat]").disabled = !chats;
  if (!chats) setMode("completion");
}

async function connect() {
  try {
    const { data } = await (await ask("v1/models")).json();
    $("model").replaceChildren(...data.map(({ id, chat: chats }) =>
      el("option", { value: id, "data-chat": String(chats ?? true) }, id)));
    notify();
    fitModel();
  } catch (error) {
    complain(error, connect);
  }
}

function settings(shown) {
  const covers = matchMedia("(max-width: 60rem)").matches;
  $("settings").hidden = !shown;
  $("open").setAttribute("aria-expanded", shown);
  for (const other of [document.querySelector("header"), document.querySelector("main")]) {
    other.inert = shown && covers;
  }
  document.body.style.overflow = shown && covers ? "hidden" : "";
}

function theme(value) {
  if (value) document.documentElement.dataset.theme = value;
  const shown = value ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  $("theme").setAttribute("aria-pressed", shown === "dark");
}

function buildDials() {
  for (const [name, text, start, min, max, step, hint] of DIALS) {
    const number = el("input", {
      type: "number", id: name, value: start, min, max, step: step < 1 ? "any" : step,
      inputmode: step < 1 ? "decimal" : "numeric", "aria-describedby": hint ? `${name}-hint` : null,
    });
    const row = el("div", { class: "dial" }, el("label", { for: name }, text, hint
      ? el("small", { id: `${name}-hint` }, hint) : null), number);
    if (max != null) {
      const slide = { type: "range", value: start, min: min > 0 && max === 1 ? 0 : min, max, step };
      const range = el("input", { ...slide, "aria-label": `${text}, slider` });
      range.addEventListener("input", () => { number.value = Math.max(range.value, min); });
      number.addEventListener("input", () => { range.value = number.value; });
      row.append(range);
    }
    $("sampling").append(row);
  }
}

const kept = () => ["system", ...DIALS.map(([name]) => name)].map($);

function recall() {
  const saved = JSON.parse(memory.get("lm-settings") ?? "{}");
  for (const field of kept()) {
    if (saved[field.id] != null) field.value = saved[field.id];
    field.dispatchEvent(new Event("input"));
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (!text.trim() || running) return;
  $("prompt").value = "";
  fit($("prompt"));
  (mode() === "chat" ? send : begin)(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("prompt").addEventListener("input", () => fit($("prompt")));
$("stop").addEventListener("click", () => running?.controller.abort());
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  const covered = document.querySelector("main").inert;
  if (running) running.controller.abort();
  else if (covered) $("close").click();
  else hideCard();
});
$("new").addEventListener("click", () => {
  const old = { chat, branches, branch };
  running?.controller.abort();
  const back = (label, restore) => notify(label, [el("button", {
    type: "button", class: "plain", onclick: () => { restore(); notify(); draw(); },
  }, "Bring back the last one")]);
  if (mode() === "chat") {
    if (path().length) back("A new chat.", () => { chat = old.chat; });
    chat = node({});
  } else {
    if (branch) back("A new text.", () => { ({ branches, branch } = old); });
    [branches, branch] = [[], null];
  }
  draw();
  $("prompt").focus();
});
$("theme").addEventListener("click", () => {
  const value = $("theme").getAttribute("aria-pressed") === "true" ? "light" : "dark";
  memory.set("lm-theme", value);
  theme(value);
});
$("open").addEventListener("click", () => {
  settings($("settings").hidden);
  if (!$("settings").hidden) $("close").focus();
});
$("close").addEventListener("click", () => { settings(false); $("open").focus(); });
$("model").addEventListener("change", fitModel);
for (const radio of document.querySelectorAll("[name=mode]")) {
  radio.addEventListener("change", () => setMode(radio.value));
}
$("tints").addEventListener("change", () => {
  document.documentElement.classList.toggle("tinted", $("tints").checked);
});
$("dials").addEventListener("submit", (event) => event.preventDefault());
$("dials").addEventListener("change", () => memory.set("lm-settings",
  JSON.stringify(Object.fromEntries(kept().map((field) => [field.id, field.value])))));
$("dials").addEventListener("reset", () => setTimeout(() => {
  for (const field of kept()) field.dispatchEvent(new Event("input"));
  for (const name of ["change"]) $("tints").dispatchEvent(new Event(name));
  memory.set("lm-settings", "{}");
}));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(memory.get("lm-theme")));
matchMedia("(max-width: 60rem)").addEventListener("change", () => settings(!$("settings").hidden));

document.documentElement.classList.add("tinted");
buildDials();
recall();
theme(memory.get("lm-theme"));
settings(innerWidth >= 1100);
setMode("chat");
connect();
