/* The settings: what is sent with each request, and how the page looks; kept in the browser. */

import { $, el } from "./page_tokens.js";

// What can be set: [field of the API, label, value at the start, least, most, step, hint, neutral].
// A value that is neutral, or a field left empty, is not sent.
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

const memory = {
  get: (name) => { try { return localStorage.getItem(name); } catch { return null; } },
  set: (name, value) => { try { localStorage.setItem(name, value); } catch { /* not here */ } },
};

/** What the settings make of a request. */
export function sampling() {
  const fields = {};
  for (const [name, , , , , , , neutral] of DIALS) {
    const value = $(name).valueAsNumber;
    if (!Number.isNaN(value) && value !== neutral) fields[name] = value;
  }
  return fields;
}

/** Shows the settings, beside the text or, where there is no room, over it; or hides them. */
export function settings(shown) {
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
$("tints").addEventListener("change", () => {
  document.documentElement.classList.toggle("tinted", $("tints").checked);
});
$("dials").addEventListener("submit", (event) => event.preventDefault());
$("dials").addEventListener("change", () => memory.set("lm-settings",
  JSON.stringify(Object.fromEntries(kept().map((field) => [field.id, field.value])))));
$("dials").addEventListener("reset", () => setTimeout(() => {
  for (const field of kept()) field.dispatchEvent(new Event("input"));
  $("tints").dispatchEvent(new Event("change"));
  memory.set("lm-settings", "{}");
}));
matchMedia("(prefers-color-scheme: dark)").addEventListener(
  "change", () => theme(memory.get("lm-theme")));
matchMedia("(max-width: 60rem)").addEventListener("change", ({ matches }) => { // narrow now?
  const used = $("settings").contains(document.activeElement);
  settings(used || !(matches || $("settings").hidden));
});

document.documentElement.classList.add("tinted");
buildDials();
recall();
theme(memory.get("lm-theme"));
settings(innerWidth >= 1100);
