// The chat page: which conversation is open, which answers are being written, and what the buttons do.

import * as api from "./api.js";
import { controls } from "./controls.js";
import { find, make } from "./dom.js";
import { save as saveFile } from "./export.js";
import { sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { trouble } from "./trouble.js";
import { Turn, submits } from "./turn.js";

const BUNDLED = "gemwright-mini"; // the name under which `gemwright serve` without a model serves
const TITLE = 60; // characters of a title made of the first turn
const KEEP_EVERY = 2000; // milliseconds between two times that a growing answer is kept

const running = new Map(); // id of a conversation -> what aborts its answer
const failed = new Map(); // id of a conversation -> what went wrong with its last answer
let chats = store.chats();
let chat = store.created();
let cards = [];
let turns = [];
let waiting = 0; // timer of the next try to reach the server
let following = true; // the log scrolls with the answer unless the reader has scrolled away

const scroll = find("#scroll");
const prompt = find("#prompt");
const page = {
  settings: store.settings(),
  get chat() {
    return chat;
  },
  keepSettings: () => guarded(() => store.keepSettings(page.settings)),
  systemChanged(text) {
    chat.system = text;
    if (chat.messages.length) keep(chat);
    showIntro();
  },
  keyChanged(key) {
    guarded(() => store.keepKey(key));
    connect();
  },
};
const openSettings = controls(page);
const list = sidebar({ open, rename, drop });

// --- the server -----------------------------------------------------------------------------------------------------

async function connect() {
  clearTimeout(waiting);
  try {
    cards = await api.models(store.key());
  } catch (error) {
    const { title, act } = trouble(error);
    if (act === "key") return notify("The server asks for an API key.", ["Enter the key", () => openSettings("#key")]);
    notify(error.status === 503 ? "The server is loading the model." : `${title}. Trying again.`);
    waiting = setTimeout(connect, 2000);
    return;
  }
  notify("");
  const known = cards.some((card) => card.id === page.settings.model);
  if (!known) page.settings.model = cards[0].id;
  const option = ({ id }) => make("option", { selected: id === page.settings.model }, id);
  find("#model").replaceChildren(...cards.map(option));
  showIntro();
  showRoom();
}

/** Answer the conversation's last turn; `instead` is the answer that a new one replaces once it has begun. */
async function answer(asked, instead = null) {
  const reply = { role: "assistant", content: "", model: page.settings.model };
  const body = { model: page.settings.model ?? undefined, messages: sent(asked), ...page.settings.controls };
  const stop = new AbortController();
  asked.messages.push(reply);
  failed.delete(asked.id);
  running.set(asked.id, stop);
  following = true;
  show(asked);
  announce("The model is answering.");
  const begun = performance.now();
  let kept = begun;
  try {
    for await (const chunk of api.chat(body, store.key(), stop.signal)) {
      const [choice] = chunk.choices;
      const now = performance.now();
      if (choice?.delta.content) {
        reply.content += choice.delta.content;
        reply.pieces = (reply.pieces ?? 0) + 1;
        reply.seconds = (now - begun) / 1000;
        reply.first ??= reply.seconds;
      }
      if (choice?.finish_reason) reply.finish = choice.finish_reason;
      if (chunk.usage) reply.usage = chunk.usage;
      if (now - kept > KEEP_EVERY) {
        keep(asked);
        kept = now;
      }
      grow(asked);
    }
  } catch (error) {
    reply.finish = stop.signal.aborted ? "stopped" : "broken";
    if (!stop.signal.aborted) failed.set(asked.id, error);
    if (error.status === 404) connect(); // the names that are served have changed
  }
  running.delete(asked.id);
  if (!reply.content && reply.finish !== "stop" && reply.finish !== "length") {
    asked.messages.pop();
    if (instead) asked.messages.push(instead);
  }
  asked.changed = Date.now();
  if (!asked.dropped) keep(asked);
  show(asked);
  if (asked === chat) announce(failed.has(asked.id) ? "" : `The model has answered: ${reply.content}`);
}

/** A conversation as the API takes it: turns alternate, so what was never answered is joined to the turn after it. */
function sent(asked) {
  const found = asked.system ? [{ role: "system", content: asked.system }] : [];
  for (const { role, content } of asked.messages) {
    if (role === "assistant" && !content) continue;
    if (role === "user" && found.at(-1)?.role === "user") found.at(-1).content += `\n\n${content}`;
    else found.push({ role, content });
  }
  return found;
}

// --- what the buttons do --------------------------------------------------------------------------------------------

function send(text) {
  if (running.has(chat.id) || !text.trim()) return false;
  if (!chat.messages.length) {
    chat.title ||= text.trim().split("\n", 1)[0].slice(0, TITLE);
    if (!chats.includes(chat)) chats.unshift(chat);
  }
  chat.changed = Date.now();
  chat.messages.push({ role: "user", content: text });
  keep(chat);
  answer(chat);
  return true;
}

const acts = {
  copy: (turn) => copy(turn.message.content),
  edit(turn, text) {
    if (running.has(chat.id)) return announce("The answer is still being written: stop it first.", true);
    chat.messages.length = chat.messages.indexOf(turn.message);
    send(text);
    focusPrompt();
  },
  again(turn) {
    const at = chat.messages.indexOf(turn.message);
    if (running.has(chat.id) || at < 0) return;
    chat.messages.length = at;
    answer(chat, turn.message);
    focusPrompt();
  },
};

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text); // there on https and localhost alone
    announce("Copied.", true);
  } catch {
    announce("This browser lets the page copy on https or localhost only.", true);
  }
}

function open(one) {
  chat = one;
  following = true;
  list.close();
  showAll();
  focusPrompt();
}

function rename(one, title) {
  one.title = title;
  keep(one);
  showList();
}

function drop(one) {
  running.get(one.id)?.abort();
  one.dropped = true;
  guarded(() => store.drop(one));
  chats = chats.filter((other) => other !== one);
  if (one === chat) open(chats[0] ?? store.created());
  else showList();
  notify(`“${one.title}” is deleted.`, ["Undo", () => {
    delete one.dropped;
    chats = [...chats, one].sort((a, b) => b.changed - a.changed);
    keep(one);
    notify("");
    open(one);
  }]);
}

/** On a phone focus would bring up the keyboard. */
function focusPrompt() {
  if (matchMedia("(hover: hover)").matches) prompt.focus();
}

// --- what is shown --------------------------------------------------------------------------------------------------

function showAll() {
  turns = [];
  find("#log").replaceChildren();
  show(chat);
}

const showList = () => list.show(chats, chat, running);

/** Bring the log to the conversation's state; turns that are on the page stay. */
function show(changed) {
  showList();
  if (changed !== chat) return;
  const same = chat.messages.findIndex((message, n) => turns[n]?.message !== message);
  const stay = same < 0 ? chat.messages.length : same;
  for (const turn of turns.splice(stay)) turn.node.remove();
  for (const message of chat.messages.slice(stay)) turns.push(new Turn(message, acts));
  turns.forEach((turn, n) => {
    const last = n === turns.length - 1;
    if (n >= stay - 1 || last) turn.show({ last, running: last && running.has(chat.id) });
    if (!turn.node.isConnected) find("#log").append(turn.node);
  });
  const busy = running.has(chat.id);
  find("#log").setAttribute("aria-busy", busy);
  find("#send").hidden = busy;
  find("#stop").hidden = !busy;
  document.title = chat.title ? `${chat.title} · Gemwright` : "Gemwright";
  showIntro();
  showTrouble();
  showRoom();
  follow();
}

let frame = 0;

/** The answer has grown: show it with the next frame, however many tokens came since the last one. */
function grow(asked) {
  if (asked !== chat || frame) return;
  frame = requestAnimationFrame(() => {
    frame = 0;
    if (running.has(chat.id)) turns.at(-1).show({ running: true, last: true });
    follow();
  });
}

function follow() {
  if (following) scroll.scrollTop = scroll.scrollHeight;
  find("#latest").hidden = following;
}

const served = () => cards.find(({ id }) => id === page.settings.model);

/** First line: what answers here. */
function showIntro() {
  const card = served();
  const lines = [];
  if (!chat.messages.length) lines.push(make("h1", {}, "What is on your mind?"));
  if (card && [card.id, card.parent].includes(BUNDLED)) {
    const load = make("code", {}, "gemwright serve google/gemma-2-2b-it");
    const size = "(135 million parameters): it shows how things work and gets facts wrong.";
    const how = "To talk with a real Gemma 2, start the server with its folder or hub name:";
    lines.push(make("p", {}, `${card.id} is the small model that comes with Gemwright ${size} ${how} `, load));
  } else if (card && !chat.messages.length) {
    const most = card.max_model_len.toLocaleString("en");
    lines.push(make("p", {}, `${card.id} reads and writes up to ${most} tokens in a conversation.`));
  }
  if (chat.system) {
    const about = { type: "button", class: "system", title: "Edit the system text", click: () => openSettings() };
    lines.push(make("button", about, make("b", {}, "System "), chat.system));
  }
  find("#intro").replaceChildren(...lines);
  find("#intro").classList.toggle("empty", !chat.messages.length);
}

function showTrouble() {
  const error = failed.get(chat.id);
  const place = find("#trouble");
  if (!error) return place.replaceChildren();
  const { title, text, act } = trouble(error);
  const retry = () => answer(chat);
  const buttons = {
    retry: ["Try again", retry],
    fresh: ["New conversation", () => open(store.created())],
    key: ["Enter the key", () => openSettings("#key")],
  };
  const names = act === "retry" ? ["retry"] : [act, "retry"];
  const shown = names.map((name) => make("button", { type: "button", click: buttons[name][1] }, buttons[name][0]));
  const box = make("div", { class: "box" }, make("strong", {}, title), make("p", {}, text));
  // where a part of the answer came, it is kept, and Regenerate is at its foot
  if (chat.messages.at(-1)?.role === "user") box.append(make("div", { class: "row" }, ...shown));
  place.replaceChildren(box);
}

/** How much of the context the conversation takes. */
function showRoom() {
  const card = served();
  const usage = chat.messages.findLast((message) => message.usage)?.usage;
  const number = (n) => n.toLocaleString("en");
  const told = card && usage && `${number(usage.total_tokens)} of ${number(card.max_model_len)} tokens`;
  find("#room").textContent = told || "";
}

/** A line above the conversation, with a button where there is something to do. */
function notify(text, [label, click] = []) {
  const place = find("#notice");
  place.hidden = !text;
  place.replaceChildren(text, ...(label ? [make("button", { type: "button", click }, label)] : []));
}

/** For screen readers; `visible` also shows it for a moment. */
function announce(text, visible = false) {
  find("#said").textContent = text;
  find("#said").classList.toggle("toast", visible);
  if (visible) setTimeout(() => find("#said").classList.remove("toast"), 2000);
}

const keep = (one) => guarded(() => store.keep(one));

function guarded(write) {
  try {
    write();
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
    notify(`This browser does not keep the conversation (${error.name}): export it, or delete others.`);
  }
}

// --- events ---------------------------------------------------------------------------------------------------------

function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`; // up to the height that the style sheet allows
}

find("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!send(prompt.value)) return;
  prompt.value = "";
  fit();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (!submits(event)) return;
  event.preventDefault();
  find("#composer").requestSubmit();
});
find("#stop").addEventListener("click", () => {
  running.get(chat.id)?.abort();
  focusPrompt();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || find("#settings").open) return;
  if (document.body.classList.contains("drawer")) list.close();
  else if (find("#export").open) find("#export").open = false;
  else running.get(chat.id)?.abort();
});
find("#new").addEventListener("click", () => open(store.created()));
find("#model").addEventListener("change", (event) => {
  page.settings.model = event.target.value;
  page.keepSettings();
  showIntro();
  showRoom();
});
for (const button of document.querySelectorAll("[data-format]")) {
  button.addEventListener("click", () => {
    find("#export").open = false;
    if (chat.messages.length) saveFile(chat, button.dataset.format, page.settings);
    else announce("There is nothing to export yet.", true);
  });
}
find("#theme").addEventListener("click", () => {
  const root = document.documentElement;
  const now = root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  guarded(() => localStorage.setItem("gemwright.theme", root.dataset.theme));
});
find("#log").addEventListener("click", (event) => {
  if (event.target.matches(".copy-code")) copy(event.target.closest(".code").querySelector("code").textContent);
});
scroll.addEventListener("scroll", () => {
  following = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
  find("#latest").hidden = following;
});
find("#latest").addEventListener("click", () => {
  following = true;
  follow();
});
addEventListener("pagehide", () => chats.filter(({ id }) => running.has(id)).forEach(keep));

if (chats.length) chat = chats[0];
showAll();
connect();
