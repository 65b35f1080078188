// The list of conversations: open, search, rename, delete.

import { find, make, tool } from "./dom.js";

/** `acts`: {open(chat), rename(chat, title), drop(chat)}. Returns show(chats, current, running). */
export function sidebar(acts) {
  const search = find("#search");
  let shown = [[], null, new Map()];
  search.addEventListener("input", () => show(...shown));

  const drawer = (open) => {
    document.body.classList.toggle("drawer", open);
    find("#menu").setAttribute("aria-expanded", open);
    find(open ? "#new" : "#menu").focus();
  };
  find("#menu").addEventListener("click", () => drawer(!document.body.classList.contains("drawer")));
  find("#shade").addEventListener("click", () => drawer(false));

  function show(chats, current, running) {
    shown = [chats, current, running];
    const wanted = search.value.trim().toLowerCase();
    const has = (text) => text.toLowerCase().includes(wanted);
    const found = chats.filter((chat) => !wanted || has(chat.title) || chat.messages.some((m) => has(m.content)));
    find("#chats").replaceChildren(...found.map((chat) => row(chat, chat.id === current.id, running.has(chat.id))));
  }

  function row(chat, here, busy) {
    const about = { type: "button", class: "open", "aria-current": here ? "true" : null, title: chat.title };
    const open = make("button", { ...about, click: () => acts.open(chat) }, chat.title);
    const rename = () => {
      const field = make("input", { "aria-label": "Title", maxlength: 200 });
      field.value = chat.title;
      let done = false; // taking the field away blurs it
      const end = (title) => {
        if (done) return;
        done = true;
        acts.rename(chat, title.trim() || chat.title);
      };
      field.addEventListener("blur", () => end(field.value));
      field.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== "Escape") return;
        event.stopPropagation();
        end(event.key === "Enter" ? field.value : chat.title);
      });
      line.replaceChildren(field);
      field.select();
    };
    const line = make("li", { class: busy ? "busy" : null }, open,
      tool("edit", `Rename ${chat.title}`, rename), tool("delete", `Delete ${chat.title}`, () => acts.drop(chat)));
    return line;
  }

  return { show, close: () => document.body.classList.contains("drawer") && drawer(false) };
}
