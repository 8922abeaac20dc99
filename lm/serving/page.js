/* The page's behaviour, over the server's OpenAI-compatible endpoints.
 *
 * A conversation is a tree of messages: to regenerate or to edit adds a sibling, and each message
 * knows which of its children is shown. A text in completion mode is a list of tokens after a
 * prompt; a branch of it shares the tokens before the fork, the very objects, and the tokens say
 * by that identity where branches part. Text reaches the page as text nodes alone, never as markup.
 */

import {
  ALTERNATIVES, ServerError, ask, decoderAfter, events, nameOf, same, settle, textOf, tokensOf,
} from "./page_client.js";
import { sampling, settings } from "./page_settings.js";
import {
  $, cardOf, choices, el, focusToken, hideCard, icon, showCard, span, spanOf, tokenOf,
} from "./page_tokens.js";

const button = (label, onclick, { sign, ...attributes } = {}) =>
  el("button", { type: "button", class: "quiet", onclick, ...attributes },
    sign ? icon(sign) : null, label);

/** A textarea as tall as what it holds, up to a third of the window. */
function fit(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight, innerHeight / 3)}px`;
}

/** Tells a screen reader, politely. */
function say(text) {
  while ($("spoken").childElementCount > 40) $("spoken").firstChild.remove();
  $("spoken").append(el("p", {}, text));
}

// ── Writing ─────────────────────────────────────────────────────────────────────────────────────

let running = null; // {controller, reply} of the stream that is being read
const now = () => performance.now();

/** Streams one reply: `reply.tokens` grow, and the page with them. Returns whether it was whole. */
async function write(path, body, reply, again) {
  running?.controller.abort();
  if (!$("dials").checkValidity()) {
    settings(true);
    complain(new ServerError("A setting is out of its range.", 400), again);
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
    if (!$("model").value) await connect(); // who writes at once is faster than the list of models
    const fields = { model: $("model").value, ...body, ...sampling(), stream: true };
    fields.stream_options = { include_usage: true };
    fields.return_token_ids = true;
    for await (const event of events(await ask(path, $("key").value, fields, controller.signal))) {
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
  const { ttft } = times; // milliseconds
  const wait = ttft < 1000 ? `${Math.round(ttft)} ms` : `${(ttft / 1000).toFixed(1)} s`;
  const parts = [`first token ${wait}`];
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
  const rank = other.rank ?? place.top.indexOf(other) + 1;
  const token = { ...other, top: place.top, rank, taken: true };
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
      el("span", {}, `${one.tokens.length}`, el("span", { class: "unseen" }, " tokens"))),
      list(one));
    })) : null;
  };
  if (branches.length < 2) return el("div");
  return el("nav", { class: "branches", "aria-label": "Branches" },
    el("h2", {}, "Branches"), list(null));
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

/** Shows what came since, at the next frame; a reader at the end of the page stays there. */
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

Object.assign(choices, { written: writtenWith, follow });

// ── The bar, the field and the settings ─────────────────────────────────────────────────────────

function setMode(value) {
  document.documentElement.dataset.mode = value;
  const chatting = value === "chat";
  document.querySelector(`[name=mode][value=${value}]`).checked = true;
  $("welcome").querySelector("h2").textContent = chatting ? "Ask it something" : "Begin a text";
  $("welcome").querySelector("p").textContent = chatting
    ? "Point at any word of a reply to see how likely it was, and what else could have stood there."
    : "The model goes on from your words. Choose another alternative of any token to branch there.";
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
    const { data } = await (await ask("v1/models", $("key").value)).json();
    $("model").replaceChildren(...data.map(({ id, chat: chats }) =>
      el("option", { value: id, "data-chat": String(chats ?? true) }, id)));
    notify();
    fitModel();
  } catch (error) {
    complain(error, connect);
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
$("model").addEventListener("change", fitModel);
for (const radio of document.querySelectorAll("[name=mode]")) {
  radio.addEventListener("change", () => setMode(radio.value));
}
setMode("chat");
connect();
