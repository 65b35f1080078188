// A turn of the conversation on the page: its text, what it cost, and what can be done with it.

import { fill, make, tool } from "./dom.js";
import { Markdown } from "./markdown.js";

/** `acts`: {copy(turn), edit(turn, text), again(turn)}. */
export class Turn {
  constructor(message, acts) {
    this.message = message;
    this.acts = acts;
    const mine = message.role === "user";
    this.body = make("div", { class: "body", dir: mine ? "auto" : null });
    this.facts = make("span", { class: "facts" });
    this.tools = make("div", { class: "tools" });
    const foot = make("div", { class: "foot" }, this.tools, this.facts);
    const name = mine ? "You" : message.model ?? "Answer";
    this.node = make("article", { class: `turn ${message.role}`, "aria-label": name }, this.body, foot);
    this.markdown = mine ? null : new Markdown(this.body);
  }

  /** Bring the page to the message's state. `running`: it is being written; `last`: nothing follows it. */
  show({ running = false, last = false } = {}) {
    const { message, acts } = this;
    if (this.node.classList.contains("editing")) return;
    if (this.markdown) this.markdown.show(message.content);
    else this.body.textContent = message.content;
    this.node.classList.toggle("running", running);
    this.facts.textContent = message.role === "user" ? "" : facts(message, running);
    const copy = tool("copy", "Copy", () => acts.copy(this));
    const edit = message.role === "user" && tool("edit", "Edit", () => this.edit());
    const again = message.role === "assistant" && last && tool("again", "Regenerate", () => acts.again(this));
    this.tools.replaceChildren();
    if (!running) fill(this.tools, [copy, edit, again].filter(Boolean));
  }

  /** Replace the text with a field; saving cuts the conversation after this turn. */
  edit() {
    const field = make("textarea", { "aria-label": "Edit your turn", rows: 3 });
    field.value = this.message.content;
    const cancel = () => {
      this.body.textContent = this.message.content;
      this.node.classList.remove("editing");
      this.tools.querySelector('[aria-label="Edit"]').focus();
    };
    const save = () => field.value.trim() && this.acts.edit(this, field.value);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") cancel();
      else if (submits(event)) save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const hint = make("span", { class: "facts" }, "What follows is replaced.");
    const buttons = make("div", { class: "row" },
      make("button", { type: "button", class: "primary", click: save }, "Send"),
      make("button", { type: "button", click: cancel }, "Cancel"), hint);
    this.body.replaceChildren(field, buttons);
    this.node.classList.add("editing");
    field.focus();
  }
}

/** Enter without Shift, and not the one that takes a word from an input method. */
export function submits(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing;
}

/** Tokens, speed, and why the answer ended where it is not plain. */
function facts(message, running) {
  const { usage, pieces = 0, first, seconds } = message;
  const told = [];
  const count = usage?.completion_tokens ?? pieces;
  const about = usage ? "" : "about "; // before the server has counted, an event stands for a token
  if (running && !pieces) return "Reading the conversation";
  if (count) told.push(`${about}${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}`);
  // the first token's time is the prompt's: speed is that of the others
  if (count > 1 && seconds > first) told.push(`${((count - 1) / (seconds - first)).toFixed(1)} tokens/s`);
  if (first !== undefined) told.push(`first after ${first.toFixed(2)} s`);
  if (usage && !running) told.push(`prompt ${usage.prompt_tokens.toLocaleString("en")}`);
  if (message.finish === "length") told.push("cut off at the token limit");
  if (message.finish === "stopped") told.push("stopped");
  if (message.finish === "broken") told.push("broken off");
  if (!running && !message.content.trim()) told.unshift("An empty answer");
  return told.join(" · ");
}
