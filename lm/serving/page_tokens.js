/* Tokens on the page: each a span that tells, pointed at or focused, what else was likely. */

import { ALTERNATIVES, nameOf, percent, same } from "./page_client.js";

/** What can be done with an alternative of the token at a place of the text; set by the page. */
export const choices = { written: () => false, follow: () => {} };

// ── The document ────────────────────────────────────────────────────────────────────────────────

export const $ = (id) => document.getElementById(id);

/** An element; attributes that are false or null are left out, `onclick` and the like listen. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** How a token is written where its spaces count. */
function label(token) {
  const parts = nameOf(token).split(/([ \n\t])/).filter(Boolean);
  const blanks = { " ": "␣", "\n": "↵", "\t": "⇥" };
  return el("code", {}, ...parts.map((part) =>
    (blanks[part] ? el("span", { class: "blank" }, blanks[part]) : part)));
}

// ── Tokens on the page ──────────────────────────────────────────────────────────────────────────

export const tokenOf = new WeakMap(); // of a span: [token, its number in the text]

export function span(token, i) {
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

export const spanOf = (token) =>
  [...document.querySelectorAll(".token")].find((one) => tokenOf.get(one)[0] === token);

// ── The card of a token ─────────────────────────────────────────────────────────────────────────

export let cardOf = null; // the span whose card is shown
let leaving = 0, shownAt = 0; // shownAt: how far the page was scrolled

export function showCard(target) {
  clearTimeout(leaving);
  if (cardOf === target) return;
  hideCard();
  cardOf = target;
  shownAt = scrollY;
  const [token, i] = tokenOf.get(target);
  const branching = !!target.closest(".sheet");
  const rank = token.rank ?? `> ${ALTERNATIVES}`;
  const fact = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));
  const rows = token.top.map((other) => {
    const share = el("span", { class: "share" }, percent(other)), drawn = same(other, token);
    const row = el(branching ? "button" : "div", {
      type: branching && "button",
      class: drawn ? "drawn" : branching && choices.written(i, other) && "written",
      "aria-current": drawn && "true",
      onclick: branching && ((event) => choices.follow(i, other, !event.detail)),
    }, label(other), share);
    row.style.setProperty("--p", Math.exp(other.logprob));
    return el("li", {}, row);
  });
  $("card").replaceChildren(
    el("div", { class: "name" }, label(token),
      el("span", {}, token.id == null ? "" : `id ${token.id}`)),
    el("dl", {}, fact("Probability", percent(token)), fact("Rank", `${rank}`),
      fact("Log-prob.", token.logprob.toPrecision(3))),
    el("ul", { "aria-label": "Alternatives" }, ...rows),
    ...(branching ? [el("p", { class: "hint" }, "Choose one to go on from there.")] : []));
  target.setAttribute("role", "button");
  const name = nameOf(token).trim() || label(token).textContent;
  target.setAttribute("aria-label", `${name}, ${percent(token)}, rank ${rank}`);
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

export function hideCard() {
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

export function focusToken(target) {
  if (!target) return;
  for (const one of target.parentNode.querySelectorAll('.token[tabindex="0"]')) one.tabIndex = -1;
  target.tabIndex = 0;
  target.focus();
}

function tokenKeys(event) {
  const here = event.target.closest(".token");
  if (!here || event.altKey || event.ctrlKey || event.metaKey) return;
  const all = [...here.parentNode.querySelectorAll(".token")], i = all.indexOf(here);
  const [next, last] = [all[i + 1], all.at(-1)];
  const to = { ArrowRight: next, ArrowLeft: all[i - 1], Home: all[0], End: last }[event.key];
  if (to) focusToken(to);
  else if (["Enter", " ", "ArrowDown"].includes(event.key)) {
    showCard(here);
    ($("card").querySelector("button") ?? $("card")).focus();
  } else return;
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
addEventListener("scroll", () => {
  // The event may be late, of a scroll before the card was there.
  if (scrollY !== shownAt && !cardOf?.matches(":focus")) hideCard();
}, { passive: true });
addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".token, #card")) hideCard();
});
