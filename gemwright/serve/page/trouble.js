// What went wrong, in words that say what to do.

import { ApiError } from "./api.js";

/** {title, text, act}: `act` names the button that helps: retry, fresh or key. */
export function trouble(error) {
  const said = error.message.charAt(0).toUpperCase() + error.message.slice(1);
  if (!(error instanceof ApiError)) {
    return { title: "The connection to the server broke", text: said + ".", act: "retry" };
  }
  if (error.code === "context_length_exceeded") {
    const text = "Edit an earlier turn, lower “max tokens” in the settings, or begin a new conversation.";
    return { title: "This conversation does not fit the model's context", text: `${said}. ${text}`, act: "fresh" };
  }
  if (error.status === 401) return { title: "The server asks for an API key", text: said + ".", act: "key" };
  if (error.status === 429) return { title: "The server is busy", text: said + ".", act: "retry" };
  if (error.status === 503) return { title: "The server takes no requests now", text: said + ".", act: "retry" };
  if (error.status < 500) return { title: "The server refuses this request", text: said + ".", act: "retry" };
  return { title: "The server failed", text: said + ".", act: "retry" };
}
