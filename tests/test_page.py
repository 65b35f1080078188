"""The chat page in a real Chromium: what its buttons and keys do, what it keeps, and how it looks.

Most tests talk with a desk that says what it is told, when it is told; one with the real server and a tiny model.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from page_fixtures import BUNDLED, Desk, done, kept, needs_chromium, say, told
from playwright.sync_api import BrowserContext, Page, expect
from serve_fixtures import CONTEXT, application, listening, tiny

pytestmark = needs_chromium


def test_a_conversation_with_the_real_server(context: BrowserContext, tmp_path: Path) -> None:
    lm = tiny(tmp_path / "model")
    turns = [{"role": "user", "content": "The capital of France"}]
    own = lm.generate(turns, system="Be brief.", temperature=0, max_new_tokens=9)
    with listening(application(lm)) as url:
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#intro")).to_contain_text(f"tiny reads and writes up to {CONTEXT} tokens")
        page.click("#open-settings")
        page.fill("#system", "Be brief.")
        page.fill("#c-temperature", "0")
        page.fill("#c-max_tokens", "9")
        page.press("#c-max_tokens", "Escape")
        say(page, "The capital of France")
        done(page)
        assert told(page) == ["The capital of France", own.text]
        expect(page.locator(".assistant .facts")).to_contain_text(f"{len(own.tokens)} tokens")
        total = own.prompt_tokens + len(own.tokens)
        expect(page.locator("#room")).to_have_text(f"{total} of {CONTEXT} tokens")
        say(page, "word " * CONTEXT)
        trouble = page.locator("#trouble")
        expect(trouble).to_contain_text("does not fit the model's context")
        expect(trouble).to_contain_text(f"the context holds {CONTEXT}")
        trouble.get_by_role("button", name="New conversation").click()
        expect(page.locator(".turn")).to_have_count(0)


def test_an_answer_appears_as_it_comes_and_stop_keeps_what_came(page: Page, desk: Desk) -> None:
    desk.scripts, desk.go = [["one ", "two ", "three"]], threading.Semaphore(0)
    say(page, "Count.")
    answer, facts = page.locator(".assistant .body"), page.locator(".assistant .facts")
    expect(facts).to_have_text("Reading the conversation")
    for shown in ("one", "one two"):
        desk.go.release()
        expect(answer).to_have_text(shown)
    expect(facts).to_contain_text("about 2 tokens")
    page.press("#prompt", "Escape")
    done(page)
    assert desk.left.wait(5), "the server was not told"
    assert told(page) == ["Count.", "one two "]
    expect(facts).to_contain_text("stopped")
    assert desk.asked[0] == {
        "model": BUNDLED,
        "messages": [{"role": "user", "content": "Count."}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_stopped_before_the_first_word_the_turn_stays_and_joins_the_next(page: Page, desk: Desk) -> None:
    desk.scripts, desk.go = [["never"], ["now"]], threading.Semaphore(0)
    say(page, "First.")
    page.click("#stop")
    done(page)
    assert told(page) == ["First."]
    desk.go = None
    say(page, "Second.")
    done(page)
    assert told(page) == ["First.", "Second.", "now"]
    assert desk.asked[1]["messages"] == [{"role": "user", "content": "First.\n\nSecond."}]


def test_regenerating_replaces_the_answer_once_there_is_another(page: Page, desk: Desk) -> None:
    desk.scripts = [["old"], ["new"], (429, {"message": "the queue is full"})]
    say(page, "Hello")
    done(page)
    page.get_by_label("Regenerate").click()
    expect(page.locator(".assistant .body")).to_have_text("new")
    done(page)
    assert told(page) == ["Hello", "new"]
    assert desk.asked[1] == desk.asked[0]
    page.get_by_label("Regenerate").click()
    expect(page.locator("#trouble")).to_contain_text("The queue is full.")
    assert told(page) == ["Hello", "new"]


def test_editing_a_turn_cuts_what_follows(page: Page, desk: Desk) -> None:
    desk.scripts = [["A"], ["B"], ["C"]]
    for text in ("first", "second"):
        say(page, text)
        done(page)
    page.get_by_label("Edit", exact=True).first.click()
    field = page.get_by_label("Edit your turn")
    expect(field).to_be_focused()
    field.press("Escape")
    assert told(page) == ["first", "A", "second", "B"]
    expect(page.get_by_label("Regenerate")).to_have_count(1)
    page.get_by_label("Edit", exact=True).first.click()
    field.fill("changed")
    field.press("Enter")
    done(page)
    expect(page.locator(".turn")).to_have_count(2)
    assert told(page) == ["changed", "C"]
    assert desk.asked[2]["messages"] == [{"role": "user", "content": "changed"}]


def test_a_turn_can_be_edited_while_its_answer_is_written(page: Page, desk: Desk) -> None:
    desk.scripts, desk.go = [["A"], ["B"]], threading.Semaphore(0)
    say(page, "first")
    page.get_by_label("Edit", exact=True).click()
    field = page.get_by_label("Edit your turn")
    field.fill("changed")
    field.press("Enter")
    expect(page.locator("#said")).to_contain_text("stop it first")
    page.click("#stop")
    done(page)
    expect(field).to_have_value("changed")
    desk.go = None
    field.press("Enter")
    expect(page.locator(".assistant .body")).to_have_text("B")
    done(page)
    assert told(page) == ["changed", "B"]


def test_conversations_are_kept_found_renamed_deleted_and_restored(page: Page, desk: Desk) -> None:
    desk.scripts = [["alpha"], ["beta"]]
    page.evaluate("localStorage.setItem('gemwright.chat.x', 'broken')")
    say(page, "Greek letters\nand more")
    done(page)
    page.click("#new")
    say(page, "The other one")
    done(page)
    titles = page.locator("#chats .open")
    expect(titles).to_have_text(["The other one", "Greek letters"])
    page.reload()
    expect(titles).to_have_text(["The other one", "Greek letters"])
    expect(page.locator(".assistant .body")).to_have_text("beta")
    page.fill("#search", "ALPHA")
    expect(titles).to_have_text(["Greek letters"])
    titles.click()
    expect(page.locator(".assistant .body")).to_have_text("alpha")
    page.get_by_label("Rename Greek letters").click()
    page.get_by_label("Title").fill("<b>Letters</b>")
    page.get_by_label("Title").press("Enter")
    expect(titles).to_have_text(["<b>Letters</b>"])
    page.fill("#search", "")
    page.get_by_label("Delete <b>Letters</b>").click()
    expect(titles).to_have_text(["The other one"])
    assert [chat["title"] for chat in kept(page)] == ["The other one"]
    page.get_by_text("Undo").click()
    expect(titles).to_have_text(["The other one", "<b>Letters</b>"])
    expect(page.locator(".assistant .body")).to_have_text("alpha")


def test_an_answer_goes_on_behind_another_conversation(page: Page, desk: Desk) -> None:
    desk.scripts, desk.go = [["slow ", "answer"], ["quick"]], threading.Semaphore(0)
    say(page, "Behind")
    desk.go.release()
    expect(page.locator(".assistant .body")).to_have_text("slow")
    page.click("#new")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#send")).to_be_visible()
    desk.go.release()
    expect(page.locator("#chats .busy")).to_have_count(0)
    page.locator("#chats .open").click()
    expect(page.locator(".assistant .body")).to_have_text("slow answer")


def test_export(page: Page, desk: Desk) -> None:
    desk.scripts = [["**bold** & <b>"]]
    page.click("#open-settings")
    page.fill("#system", "Be kind.")
    page.fill("#c-top_p", "0.5")
    page.fill("#c-seed", "-3")  # not allowed: neither kept nor sent
    page.press("#c-seed", "Escape")
    say(page, "A title: ü/x")
    done(page)
    files = {}
    for kind in ("JSON", "Markdown"):
        page.click("#export summary")
        with page.expect_download() as download:
            page.get_by_role("button", name=kind).click()
        files[download.value.suggested_filename] = Path(download.value.path()).read_text(encoding="utf-8")
    assert list(files) == ["A-title-ü-x.json", "A-title-ü-x.md"]
    exported = json.loads(files["A-title-ü-x.json"])
    assert exported.pop("created").startswith("20")
    assert exported == {
        "title": "A title: ü/x",
        "model": BUNDLED,
        "sampling": {"top_p": 0.5},
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "A title: ü/x"},
            {"role": "assistant", "content": "**bold** & <b>"},
        ],
    }
    assert exported["messages"][:2] == desk.asked[0]["messages"] and desk.asked[0]["top_p"] == 0.5
    assert "seed" not in desk.asked[0]
    body = f"# A title: ü/x\n\n## System\n\nBe kind.\n\n## You\n\nA title: ü/x\n\n## {BUNDLED}\n\n**bold** & <b>\n"
    assert files["A-title-ü-x.md"] == body


def test_copying_an_answer_and_a_code_block(page: Page, desk: Desk, context: BrowserContext) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    desk.scripts = [["See:\n```python\nif 1 < 2:\n    pass\n```\n"]]
    say(page, "Code?")
    done(page)
    page.locator(".copy-code").click()
    expect(page.locator("#said")).to_have_text("Copied.")
    assert page.evaluate("navigator.clipboard.readText()") == "if 1 < 2:\n    pass"
    page.locator(".assistant").get_by_label("Copy").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).startsWith('See:')")


def test_by_keyboard_alone(page: Page, desk: Desk) -> None:
    desk.scripts = [["first answer"], ["second answer"]]
    expect(page.locator("#prompt")).to_be_focused()
    keys = page.keyboard
    keys.type("two")
    keys.press("Shift+Enter")
    keys.type("lines")
    page.evaluate(  # the Enter that takes a word from an input method
        "document.activeElement.dispatchEvent("
        "new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true }))"
    )
    assert not desk.asked
    keys.press("Enter")
    done(page)
    assert told(page) == ["two\nlines", "first answer"]
    expect(page.locator("#prompt")).to_be_focused()
    expect(page.locator("#said")).to_have_text("The model has answered: first answer")
    names = []
    for _ in range(12):  # backwards from the message: the answer's tools, then the turn's
        keys.press("Shift+Tab")
        names.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
        if names[-1] == "Regenerate":
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
    assert names[-1] == "Regenerate" and float(outline.removesuffix("px")) >= 1, (names, outline)
    keys.press("Enter")
    expect(page.locator(".assistant .body")).to_have_text("second answer")
    expect(page.locator("#prompt")).to_be_focused()


def test_the_model_picker_and_the_first_line(page: Page, desk: Desk) -> None:
    desk.scripts = [["verse"]]
    expect(page.locator("#intro")).to_contain_text(f"{BUNDLED} is the small model that comes with Gemwright")
    expect(page.locator("#intro")).to_contain_text("gemwright serve google/gemma-2-2b-it")
    page.select_option("#model", "poet")
    page.reload()
    expect(page.locator("#model")).to_have_value("poet")
    say(page, "Sing")
    done(page)
    assert desk.asked[0]["model"] == "poet"
    expect(page.locator("#room")).to_have_text("8 of 100 tokens")


def test_the_key_is_asked_for_and_stays_in_the_tab(context: BrowserContext, desk: Desk, desk_url: str) -> None:
    desk.key = "secret-key"
    page = context.new_page()
    page.goto(desk_url)
    page.get_by_text("Enter the key").click()
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "secret-key")
    page.press("#key", "Escape")
    expect(page.locator("#model option")).to_have_count(2)
    expect(page.locator("#notice")).to_be_hidden()
    assert "secret-key" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    expect(page.locator("#model option")).to_have_count(2)
    other = context.new_page()
    other.goto(desk_url)
    expect(other.get_by_text("Enter the key")).to_be_visible()


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (500, {"message": "the log tells why under its id, abc"}, ["The server failed", "abc", "Try again"]),
        (503, {"message": "the server is draining", "code": "draining"}, ["takes no requests", "Try again"]),
        (400, {"message": "seed: got <b>", "param": "seed"}, ["refuses this request", "Seed: got <b>"]),
    ],
)
def test_what_the_server_refuses_is_shown_and_can_be_tried_again(
    page: Page, desk: Desk, status: int, error: dict[str, Any], words: list[str]
) -> None:
    desk.scripts = [(status, error), ["fine"]]
    say(page, "Hello")
    for text in words:
        expect(page.locator("#trouble")).to_contain_text(text)
    page.get_by_text("Try again").click()
    expect(page.locator(".assistant .body")).to_have_text("fine")
    done(page)
    expect(page.locator("#trouble")).to_be_empty()
    assert told(page) == ["Hello", "fine"]


def test_full_storage_is_told_and_the_answer_stays_on_the_page(page: Page, desk: Desk) -> None:
    desk.scripts = [["still here"]]
    page.evaluate(
        "for (let n = 2 ** 20; n; n >>= 1) try { for (let i = 0;; i++)"
        " localStorage.setItem(`fill.${n}.${i}`, 'x'.repeat(n)); } catch {}"
    )
    say(page, "Hello")
    expect(page.locator(".assistant .body")).to_have_text("still here")
    expect(page.locator("#notice")).to_contain_text("does not keep the conversation (QuotaExceededError)")


def test_a_phone(context: BrowserContext, desk: Desk, desk_url: str) -> None:
    wide = "w" * 300 + "\n```\n" + "x = 1; " * 60 + "\n```\n|" + "a column|" * 20 + "\n|" + "-|" * 20
    desk.scripts = [[wide]]
    page = context.new_page()
    page.set_viewport_size({"width": 340, "height": 640})
    page.goto(desk_url)
    expect(page.locator("#sidebar")).to_be_hidden()
    say(page, "y" * 300)
    done(page)
    for part in ("document.documentElement", "document.querySelector('#scroll')"):
        assert page.evaluate(f"{part}.scrollWidth <= {part}.clientWidth"), part
    box = page.locator("#send").bounding_box()
    assert box is not None and box["x"] + box["width"] <= 340 and box["y"] + box["height"] <= 640
    page.click("#menu")
    expect(page.locator("#chats .open")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()


CONTRAST = """(selector) => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    const light = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
        const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
        return a < 255 ? null : 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    };
    const node = document.querySelector(selector);
    let under = node;
    while (light(getComputedStyle(under).backgroundColor) === null) under = under.parentElement;
    const pair = [light(getComputedStyle(node).color), light(getComputedStyle(under).backgroundColor)];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_in_light_and_dark(page: Page, desk: Desk, scheme: Any) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5 at least."""
    page.emulate_media(color_scheme=scheme)
    desk.scripts = [["text `code` [link](https://x.org)\n> quote\n```\nblock\n```"], (500, {"message": "no"})]
    say(page, "Hello")
    done(page)
    say(page, "Again")
    expect(page.locator("#trouble .box")).to_be_visible()
    parts = ".assistant p|.assistant p code|.assistant a|blockquote p|pre code|.code-head span|.copy-code|.facts|"
    parts += ".user .body|.tool|#intro p|#chats .open|#trouble p|#keys|#model|#send|#new|#sidebar p"
    contrasts = {part: page.evaluate(CONTRAST, part) for part in parts.split("|")}
    assert min(contrasts.values()) >= 4.5, contrasts
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground
