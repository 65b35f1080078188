"""A model's words on the chat page: markdown as it should look, and hostile answers that execute nothing."""

from __future__ import annotations

import re
import time

import pytest
from page_fixtures import Desk, done, needs_chromium, say, told
from playwright.sync_api import Page, expect

pytestmark = needs_chromium


def rendered(page: Page, *texts: str) -> str:
    """What a text that grew through these states looks like: HTML with the plain attributes left out."""
    html: str = page.evaluate(
        """async (texts) => {
            const { Markdown } = await import("/markdown.js");
            const node = document.createElement("div");
            const markdown = new Markdown(node);
            for (const text of texts) markdown.show(text);
            return node.innerHTML;
        }""",
        texts,
    )
    html = re.sub(r' (dir|tabindex|title|target|rel|type|role|aria-label)="[^"]*"', "", html)
    html = re.sub(r' class="(wide|code|code-head|copy-code)"', "", html)
    html = re.sub(r"<div><div><span>(.*?)</span><button>Copy</button></div><pre><code>", r"<pre \1>", html)
    return (
        html.replace("</code></pre></div>", "</pre>")
        .replace("<div><table>", "<table>")
        .replace("</table></div>", "</table>")
    )


HOSTILE = {
    "script": "<script>window.owned = 1</script>",
    "image": "<img src=x onerror='window.owned = 1'> ![x](https://evil.invalid/x.png) ![x](javascript:window.owned=1)",
    "frames": "<iframe srcdoc='<script>top.owned = 1</script>'></iframe><svg onload=window.owned=1><style>*{color:red}",
    "links": "[a](javascript:window.owned=1) [b](JaVaScRiPt&colon;alert(1)) [c](data:text/html,<script>x</script>) "
    "[d](vbscript:x) <javascript:alert(1)> [e](  javascript:alert(1)) [f](\x01javascript:alert(1)) [g](/v1/models)",
    "code": "```<script>\n</code></pre><script>window.owned = 1</script>\n``` `<img src=x onerror=window.owned=1>`",
    "breakout": '[x](https://a.invalid/"onmouseover="window.owned=1) | <b>|\n|-|-|\n'
    '| <script>window.owned = 1</script> | "> |',
    "half": "**bold <b> [link](java\n\n```js\nwindow.owned = 1 // </script><script>window.owned = 1</script>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_executes_nothing_and_is_shown_as_text(page: Page, desk: Desk, name: str) -> None:
    text = HOSTILE[name]
    desk.scripts = [[text[n : n + 7] for n in range(0, len(text), 7)]]
    say(page, text)  # a user's own turn is no more trusted: it may have been pasted
    done(page)
    page.reload()  # what is kept is no more trusted than what comes
    expect(page.locator(".turn")).to_have_count(2)
    assert page.evaluate("window.owned") is None
    shown = page.locator("#log")
    assert shown.locator("script, img, iframe, style, object, embed, form, :not(.tools *) > svg").count() == 0
    for link in shown.locator("a").all():
        assert (link.get_attribute("href") or "").startswith("https://a.invalid/") or name == "image"
        assert (link.get_attribute("rel"), link.get_attribute("target")) == ("noopener noreferrer", "_blank")
    handlers = (
        "[...document.querySelectorAll('#log *')].filter(n => [...n.attributes].some(a => /^on|^style$/.test(a.name)))"
    )
    assert page.evaluate(f"{handlers}.length") == 0
    seen = page.locator(".assistant .body").inner_text() + " ".join(shown.locator(".code-head").all_inner_texts())
    for piece in ("<script>", "onerror", "<iframe", "javascript:", "vbscript:", "</code></pre>", "data:text/html"):
        assert (piece in text) <= (piece in seen), piece
    assert page.locator(".user .body").evaluate("node => node.textContent") == text


def test_characters_torn_by_the_network_come_whole(page: Page, desk: Desk) -> None:
    text = "\N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL} नमस्ते שלום\u202eevil\u202c e\u0301 \U0001d50a \0 \ufeff 한글"
    desk.scripts, desk.cut = [[text, text[::-1]]], 3
    say(page, text)
    done(page)
    assert told(page) == [text, text + text[::-1]]


MARKDOWN = {
    "a\nb": "<p>a<br>b</p>",
    "## T *x*\ntext": "<h4>T <em>x</em></h4><p>text</p>",
    "**a *b* c** ***d*** ~~e~~ 2 * 3 * 4": "<p><strong>a <em>b</em> c</strong> <strong><em>d</em></strong> "
    "<del>e</del> 2 * 3 * 4</p>",
    "snake_case_name _em_ __s__": "<p>snake_case_name <em>em</em> <strong>s</strong></p>",
    "open **bold and `code": "<p>open **bold and `code</p>",
    "*a **b*": "<p><em>a **b</em></p>",
    "`` a`b `` \\*no\\* `**x**`": "<p><code>a`b</code> *no* <code>**x**</code></p>",
    "> q\n> - x\n\nend": "<blockquote><p>q</p><ul><li><p>x</p></li></ul></blockquote><p>end</p>",
    "Here:\n1. a\n2. b": '<p>Here:</p><ol start="1"><li><p>a</p></li><li><p>b</p></li></ol>',
    "It was\n1986. A year.": "<p>It was<br>1986. A year.</p>",
    "1. a\n   - b\n     c\n2. d": '<ol start="1"><li><p>a</p><ul><li><p>b<br>c</p></li></ul></li>'
    "<li><p>d</p></li></ol>",
    "- a\n\n  ```\n  x\n   y\n  ```\n- b": "<ul><li><p>a</p><pre code>x\n y</pre></li><li><p>b</p></li></ul>",
    "~~~py\n```\n<x>\n~~~\n---": "<pre py>```\n&lt;x&gt;</pre><hr>",
    "|a|b|\n|:-:|--:|\n|`x`|1 \\| 2|3|": '<table><thead><tr><th class="center">a</th>'
    '<th class="right">b</th></tr></thead>'
    '<tbody><tr><td class="center"><code>x</code></td><td class="right">1 | 2</td></tr></tbody></table>',
    "see https://x.org/a_(b). <b>": '<p>see <a href="https://x.org/a_(b)">https://x.org/a_(b)</a>. &lt;b&gt;</p>',
    '[**w**](https://x.org "t") [n](ftp://x)': '<p><a href="https://x.org/"><strong>w</strong></a> [n](ftp://x)</p>',
    "[a [q](mailto:a@b.c)": '<p>[a <a href="mailto:a@b.c">q</a></p>',
    "![cat](https://x.org/c.png)": '<p><a href="https://x.org/c.png">cat</a></p>',
}


def test_markdown(page: Page) -> None:
    for text, html in MARKDOWN.items():
        assert rendered(page, text) == html, text


def test_an_answer_that_grew_looks_like_one_that_came_whole(page: Page) -> None:
    text = "\n\n".join(MARKDOWN)
    states = [text[:n] for n in range(0, len(text) + 1, 3)] + [text]
    for n in range(0, len(states), 17):
        assert rendered(page, *states[: n + 1]) == rendered(page, states[n]), states[n]


SIZE = 100_000
UNITS = ["*a ", "**a *b_ ", "[", "[a](", "> ", "|", "a\\", "![", "<a@", "~~a "]
HUGE = [
    *("x" + unit * (SIZE // len(unit)) for unit in UNITS),
    "x" + "*" * SIZE,
    "".join("`" * (n % 300) + "a" for n in range(SIZE // 150)),
    "- " * (SIZE // 2) + "x",
    "- a\n" + "\n" * SIZE + "b",
    "|a" * (SIZE // 4) + "\n" + "|-" * (SIZE // 4),
    "- " + " " * SIZE + "x",
    "` " + "a " * (SIZE // 2) + "b `",
    "https://" + ")" * SIZE,
    "#" + " #" * (SIZE // 2) + "x",
    "```\n" + "x\n" * (SIZE // 2),
    "```" + "a" * SIZE + "`",
    "~" * SIZE + "`",
    "- " + " " * SIZE + "x\u2028y",
]


def test_huge_hostile_markdown_takes_linear_time(page: Page) -> None:
    """A step that is quadratic in the text takes minutes at this size."""
    for text in HUGE:
        begun = time.monotonic()
        shown = page.evaluate(
            """async (text) => {
                const { Markdown } = await import("/markdown.js");
                const node = document.createElement("div");
                new Markdown(node).show(text);
                return node.textContent.length;
            }""",
            text,
        )
        assert time.monotonic() - begun < 10, text[:20]
        assert shown > 0, text[:20]


def test_a_huge_answer_streams(page: Page, desk: Desk) -> None:
    desk.scripts = [[f"Paragraph **{n}** of many.\n\n" * 20 for n in range(500)]]
    say(page, "Much")
    expect(page.locator(".assistant strong").last).to_have_text("499", timeout=20_000)
    done(page)
    assert page.locator(".assistant .body").evaluate("node => node.children.length") == 10_000
