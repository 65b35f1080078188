// What this browser keeps: a conversation an entry in localStorage, so that two tabs do not overwrite each other's.

const CHAT = "gemwright.chat.";
const SETTINGS = "gemwright.settings";
const KEY = "gemwright.key";

/** A conversation, kept once it has something to keep. `changed` orders the list. */
export function created() {
  // randomUUID exists on https and localhost alone; a server in the home network is neither
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", system: "", messages: [], created: Date.now(), changed: Date.now() };
}

/** All conversations, the latest first. An entry that is no conversation is passed over and stays. */
export function chats() {
  const names = tried(() => Object.keys(localStorage)) ?? [];
  const found = names.filter((name) => name.startsWith(CHAT)).map((name) => read(localStorage, name));
  return found.filter(valid).sort((a, b) => b.changed - a.changed);
}

function valid(chat) {
  const turn = (m) => ["user", "assistant"].includes(m?.role) && typeof m.content === "string";
  const texts = [chat?.id, chat?.title, chat?.system].every((text) => typeof text === "string");
  return texts && Array.isArray(chat.messages) && chat.messages.every(turn);
}

/** Keep a conversation. Throws DOMException where the browser has no room or keeps nothing. */
export const keep = (chat) => localStorage.setItem(CHAT + chat.id, JSON.stringify(chat));
export const drop = (chat) => localStorage.removeItem(CHAT + chat.id);

/** {model, controls}: the model's name and the sampling controls that differ from the server's. */
export function settings() {
  const kept = tried(() => read(localStorage, SETTINGS));
  return { model: kept?.model ?? null, controls: { ...kept?.controls } };
}

export const keepSettings = (settings) => localStorage.setItem(SETTINGS, JSON.stringify(settings));

/** The API key lives in the tab: it is gone when the tab is closed, and no other tab can read it. */
export const key = () => tried(() => sessionStorage.getItem(KEY)) ?? "";
export const keepKey = (value) => sessionStorage.setItem(KEY, value);

const read = (storage, name) => tried(() => JSON.parse(storage.getItem(name)));

/** Null where the browser keeps nothing for this page, or what it kept is broken: both read as absence. */
function tried(work) {
  try {
    return work();
  } catch {
    return null;
  }
}
