// A conversation as a file: JSON whose `messages` train and replay as they are, or Markdown to read.

export const FORMATS = {
  json: { type: "application/json", text: json },
  md: { type: "text/markdown", text: markdown },
};

function json(chat, { model, controls }) {
  const system = chat.system ? [{ role: "system", content: chat.system }] : [];
  const turns = chat.messages.map(({ role, content }) => ({ role, content }));
  const date = new Date(chat.created).toISOString();
  const head = { title: chat.title, model, created: date, sampling: controls };
  return JSON.stringify({ ...head, messages: [...system, ...turns] }, null, 2) + "\n";
}

function markdown(chat, { model }) {
  const system = chat.system ? ["## System", chat.system] : [];
  const turns = chat.messages.flatMap((m) => [m.role === "user" ? "## You" : `## ${m.model ?? model}`, m.content]);
  return [`# ${chat.title}`, ...system, ...turns].join("\n\n") + "\n";
}

/** Hand the file to the browser. */
export function save(chat, format, settings) {
  const { type, text } = FORMATS[format];
  const url = URL.createObjectURL(new Blob([text(chat, settings)], { type }));
  const name = chat.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "conversation";
  const link = document.createElement("a");
  link.href = url;
  link.download = `${name}.${format}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000); // the download may begin after the click
}
