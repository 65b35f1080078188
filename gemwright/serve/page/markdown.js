// Markdown as models write it, from text to DOM nodes.
//
// A model's words reach the page as text nodes alone: HTML is text, images are links, a link is http, https or mailto
// or else stays the text it was. Half-finished markdown is what a stream consists of, so everything unclosed has a
// meaning. Time is linear in the text for hostile input, too: patterns have bounds, nesting has a limit.

import { fill, make } from "./dom.js";

const NESTING = 8; // of quotes and lists
const MARKS = 16; // of emphasis in emphasis

const FENCE = /^(\s*)(`{3,}|~{3,}(?!~))([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/s;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+(.*))?$/s;
const TABLE_RULE = /^\|?(?: *:?-+:? *\|)* *:?-+:? *\|?$/;

/** The blocks of a text: {kind, key, end, ...}; `key` is equal for blocks that look the same. */
export function blocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const found = [];
  for (let at = 0; at < lines.length; ) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    let block = null;
    for (const read of READERS) block ??= read(lines, at);
    block.key = block.kind + lines.slice(at, block.end).join("\n");
    found.push(block);
    at = block.end;
  }
  return found;
}

/** What begins at a line, tried in this order: {kind, end, ...} with the line after its last, or null. */
const READERS = [code, heading, rule, quote, list, table, paragraph];

function code(lines, at) {
  const open = FENCE.exec(lines[at]);
  if (!open) return null;
  const [, space, mark, about] = open;
  const [language] = about.trim().split(/\s/, 1);
  const closes = (line) => {
    const end = line.trim();
    return end.length >= mark.length && end === mark[0].repeat(end.length);
  };
  let end = at + 1;
  while (end < lines.length && !closes(lines[end])) end++;
  const inner = lines.slice(at + 1, end).map((line) => dedent(line, space.length));
  return { kind: "code", end: end + 1, language, text: inner.join("\n") };
}

function heading(lines, at) {
  const match = HEADING.exec(lines[at]);
  return match && { kind: "heading", end: at + 1, level: match[1].length, text: match[2] };
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? { kind: "rule", end: at + 1 } : null;
}

function quote(lines, at) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  if (end === at) return null;
  return { kind: "quote", end, text: lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n") };
}

/** Items of one level; what is indented under an item is its content, nested lists among it. */
function list(lines, at) {
  const first = ITEM.exec(lines[at]);
  if (!first) return null;
  const ordered = first[2].length > 1; // a bullet is one character, a number with its dot more
  const level = first[1].length;
  const items = [];
  let inset = 0; // where the content of the present item begins
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    const indent = lines[end].search(/\S/);
    if (indent < 0) {
      let next = end;
      while (next < lines.length && !lines[next].trim()) next++;
      const goes = next < lines.length && (lines[next].search(/\S/) >= level + 2 || sibling(ITEM.exec(lines[next])));
      if (!goes) break;
      items.at(-1).push("");
      end = next;
      continue;
    }
    if (sibling(item) && !RULE.test(lines[end])) {
      inset = indent + item[2].length + 1;
      items.push([item[3] ?? ""]);
    } else if (end > at && (indent >= level + 2 || (lines[end - 1].trim() && !begins(lines, end)))) {
      items.at(-1).push(dedent(lines[end], inset));
    } else break;
    end++;
  }
  return { kind: "list", end, ordered, start: parseInt(first[2], 10), items: items.map((item) => item.join("\n")) };

  function sibling(item) {
    return item && item[1].length < level + 2 && item[2].length > 1 === ordered;
  }
}

function table(lines, at) {
  const under = lines[at + 1]?.trim();
  if (!lines[at].includes("|") || under === undefined || !TABLE_RULE.test(under)) return null;
  const head = cells(lines[at]);
  const aligns = cells(under).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null));
  if (aligns.length !== head.length) return null;
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|")) end++;
  return { kind: "table", end, head, aligns, rows: lines.slice(at + 2, end).map(cells) };
}

function paragraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines, end)) end++;
  return { kind: "paragraph", end, text: lines.slice(at, end).join("\n") };
}

/** Whether a line ends the paragraph before it; a number does so only as 1, since a sentence may wrap before a year. */
function begins(lines, at) {
  const line = lines[at];
  const item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) ||
    (item && /^([-*+]|1[.)])$/.test(item[2])) || table(lines, at) !== null;
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.replaceAll("\\|", "|").trim());
}

function dedent(line, most) {
  const indent = line.search(/\S/);
  return line.slice(indent < 0 ? most : Math.min(indent, most));
}

/** The node of a block, by its kind. */
const build = (block, depth = 0) => NODES[block.kind](block, depth);

const NODES = {
  paragraph: ({ text }) => directed(make("p"), inline(text)),
  heading: ({ level, text }) => directed(make(`h${Math.min(6, level + 2)}`), inline(text)),
  rule: () => make("hr"),
  quote: ({ text }, depth) => fill(make("blockquote"), within(text, depth)),
  list({ ordered, start, items }, depth) {
    const item = (text) => directed(make("li"), within(text, depth));
    return fill(ordered ? make("ol", { start }) : make("ul"), items.map(item));
  },
  table({ head, aligns, rows }) {
    const cell = (tag, text, n) => directed(make(tag, { class: aligns[n] }), inline(text));
    const row = (tag, texts) => fill(make("tr"), texts.slice(0, head.length).map((text, n) => cell(tag, text, n)));
    const body = fill(make("tbody"), rows.map((texts) => row("td", texts)));
    const whole = make("table", {}, make("thead", {}, row("th", head)), body);
    return make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Table" }, whole);
  },
  code({ language, text }) {
    const copy = make("button", { type: "button", class: "copy-code" }, "Copy");
    const head = make("div", { class: "code-head" }, make("span", {}, language || "code"), copy);
    return make("div", { class: "code" }, head, make("pre", { tabindex: 0, dir: "ltr" }, make("code", {}, text)));
  },
};

/** Left to right or right to left, as the text is. Told last: the browser looks for the direction at every child. */
function directed(node, children) {
  fill(node, children).dir = "auto";
  return node;
}

function within(text, depth) {
  return depth < NESTING ? blocks(text).map((block) => build(block, depth + 1)) : [make("p", {}, text)];
}

const TAGS = { "*": "em", _: "em", "**": "strong", __: "strong", "~~": "del" };
const TOKEN = new RegExp(
  [
    String.raw`\\([!-/:-@[-${"`"}{-~])`, // 1: an escaped character
    "(`+)", // 2: code
    String.raw`(\*+|_+|~~)`, // 3: emphasis
    // 4, 5: a link's words and address, which may hold pairs of parentheses
    String.raw`!?\[([^\[\]]{0,500})\]\(\s{0,9}<?([^\s<>()]{0,2000}(?:\([^\s()]{0,200}\)[^\s<>()]{0,200}){0,9})>?` +
      String.raw`(?:\s{1,9}"[^"]{0,500}")?\s{0,9}\)`,
    String.raw`\bhttps?:\/\/[^\s<>"'*${"`"}]{1,2000}`, // a bare address
    String.raw`\n`,
  ].join("|"),
  "g",
);

/** Nodes and strings of a paragraph's text. */
function inline(text, links = true) {
  if (!/[\\`*_~[\n]|http/.test(text)) return [text]; // most cells of a table: TOKEN is compiled again for each text
  const frames = [{ mark: "", nodes: [] }]; // marks that are open, outermost first
  const ends = codeEnds(text);
  let at = 0;
  for (const token of text.matchAll(TOKEN)) {
    if (token.index < at) continue; // inside of a code span
    put(text.slice(at, token.index));
    at = token.index + token[0].length;
    const [whole, escaped, ticks, marks, words, address] = token;
    if (escaped) put(escaped);
    else if (ticks) {
      const end = ends.get(token.index);
      if (end === undefined) put(ticks);
      else {
        const inner = text.slice(at, end).replaceAll("\n", " ");
        const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
        put(make("code", {}, padded ? inner.slice(1, -1) : inner));
        at = end + ticks.length;
      }
    } else if (marks) emphasis(marks, text[token.index - 1] ?? " ", text[at] ?? " ");
    else if (whole === "\n") put(make("br"));
    else if (words !== undefined) put((links && link(address, words || address, whole)) || whole);
    else {
      const bare = trimmed(whole);
      put((links && link(bare, null, bare)) || bare);
      put(whole.slice(bare.length));
    }
  }
  put(text.slice(at));
  flatten(1);
  return frames[0].nodes;

  function put(item) {
    if (item !== "") frames.at(-1).nodes.push(item);
  }

  /** Marks that stay open are text. */
  function flatten(from) {
    const { nodes } = frames[from - 1];
    for (const frame of frames.splice(from)) {
      nodes.push(frame.mark);
      for (const node of frame.nodes) nodes.push(node);
    }
  }

  function emphasis(run, before, after) {
    const [one, two] = [run[0], run[0] + run[0]];
    const inWord = (side) => one === "_" && /[\p{L}\p{N}_]/u.test(side);
    const opens = /\S/.test(after) && !inWord(before);
    const closes = /\S/.test(before) && !inWord(after);
    for (let left = run.length; left > 0; ) {
      const wanted = left > 2 ? [frames.at(-1).mark, two, one] : left > 1 ? [two, one] : [one];
      const mark = closes && wanted.find((m) => m[0] === one && frames.some((frame) => frame.mark === m));
      if (mark) {
        flatten(frames.findLastIndex((frame) => frame.mark === mark) + 1);
        put(fill(make(TAGS[mark]), frames.pop().nodes));
        left -= mark.length;
      } else if (opens && frames.length <= MARKS) {
        frames.push({ mark: left > 1 ? two : one, nodes: [] });
        left -= Math.min(left, 2);
      } else {
        put(one.repeat(left));
        left = 0;
      }
    }
  }
}

/** Where a run of backticks begins -> where the next one of the same length does. */
function codeEnds(text) {
  const [ends, later] = [new Map(), new Map()];
  for (const run of [...text.matchAll(/`+/g)].reverse()) {
    ends.set(run.index, later.get(run[0].length));
    later.set(run[0].length, run.index);
  }
  return ends;
}

/** A link, whose tooltip tells where it goes; null where the address is none that is allowed. */
function link(address, words, source) {
  if (!/^(https?|mailto):/i.test(address) || !URL.canParse(address)) return null;
  const { href } = new URL(address);
  const shown = words === null ? [source] : inline(words, false);
  return directed(make("a", { href, title: href, target: "_blank", rel: "noopener noreferrer" }), shown);
}

/** A bare address without the sentence's punctuation. */
function trimmed(address) {
  let end = address.length;
  while (".,;:!?)]}".includes(address[end - 1]) && !(address[end - 1] === ")" && address.includes("("))) end--;
  return address.slice(0, end);
}

/** A text that grows, in a node: only what changed since the last time is built again. */
export class Markdown {
  constructor(node) {
    this.node = node;
    this.shown = [];
  }

  show(text) {
    const found = blocks(text);
    let same = 0;
    while (same < found.length && found[same].key === this.shown[same]?.key) same++;
    const [block, old] = [found[same], this.shown[same]];
    if (block?.kind === "code" && old?.kind === "code" && block.language === old.language) {
      this.node.children[same].querySelector("code").textContent = block.text; // its button and scrolling stay
      same++;
    }
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    for (const next of found.slice(same)) this.node.append(build(next));
    this.shown = found;
  }
}
