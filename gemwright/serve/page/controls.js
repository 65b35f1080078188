// The settings: system text of the conversation, sampling controls, API key. Every change counts at once.

import { find, make } from "./dom.js";
import * as store from "./store.js";

// name in the API, label, range, what it does
const CONTROLS = [
  ["temperature", "Temperature", [0, 100], "0 takes the likeliest token; above 1 is wilder"],
  ["top_p", "Top-p", [0.001, 1], "the likeliest tokens that together have this probability"],
  ["top_k", "Top-k", [0], "the k likeliest tokens; 0: all"],
  ["min_p", "Min-p", [0, 1], "tokens with this share of the likeliest one's probability"],
  ["repetition_penalty", "Repetition penalty", [0.001, 10], "above 1 avoids what was said, the prompt included"],
  ["frequency_penalty", "Frequency penalty", [-2, 2], "for each time that the answer has a token"],
  ["presence_penalty", "Presence penalty", [-2, 2], "once, if the answer has a token"],
  ["max_tokens", "Max tokens", [1], "of an answer; empty: what the context has left"],
  ["seed", "Seed", [0, Number.MAX_SAFE_INTEGER], "the same seed gives the same answer"],
];
const WHOLE = ["top_k", "max_tokens", "seed"];

/** `page`: {settings, chat, systemChanged(), keyChanged()}. Returns the function that opens the dialog. */
export function controls(page) {
  const dialog = find("#settings");
  const inputs = CONTROLS.map(([name, label, [min, max], hint]) => {
    const id = `c-${name}`;
    const about = { id, placeholder: "default", "aria-describedby": `${id}-hint` };
    const step = WHOLE.includes(name) ? 1 : "any";
    const input = make("input", { type: "number", inputmode: "decimal", min, max, step, ...about });
    input.addEventListener("input", () => {
      input.setAttribute("aria-invalid", !input.validity.valid);
      if (input.value === "" || !input.validity.valid) delete page.settings.controls[name];
      else page.settings.controls[name] = input.valueAsNumber;
      page.keepSettings();
    });
    const words = make("p", { id: `${id}-hint`, class: "small" }, hint);
    find("#controls").append(make("div", { class: "control" }, make("label", { for: id }, label), input, words));
    return [name, input];
  });
  const show = () => {
    for (const [name, input] of inputs) {
      input.value = page.settings.controls[name] ?? "";
      input.removeAttribute("aria-invalid");
    }
  };
  find("#reset").addEventListener("click", () => {
    page.settings.controls = {};
    page.keepSettings();
    show();
  });
  find("#system").addEventListener("change", (event) => page.systemChanged(event.target.value.trim()));
  find("#key").addEventListener("change", (event) => page.keyChanged(event.target.value.trim()));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // its backdrop
  const open = (focus = "#system") => {
    show();
    find("#system").value = page.chat.system;
    find("#key").value = store.key();
    if (!dialog.open) dialog.showModal();
    find(focus).focus();
  };
  find("#open-settings").addEventListener("click", () => open());
  return open;
}
