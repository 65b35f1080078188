// The one way in which this page makes elements. Text becomes text nodes; nothing is ever parsed as markup.

export const find = (selector) => document.querySelector(selector);

/** An element; children are nodes or strings. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  return fill(node, children);
}

/** Append one by one: a hostile answer has more children than a call may have arguments. */
export function fill(node, children) {
  for (const child of children) node.append(child);
  return node;
}

/** An icon of the sprite in index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A small button with an icon; its label is its name for assistive technology and its tooltip. */
export function tool(name, label, click) {
  return make("button", { type: "button", class: "tool", "aria-label": label, title: label, click }, icon(name));
}
