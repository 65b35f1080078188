"""What the tests of the chat page share: a Chromium, a server that says what it is told, and the page's own state."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from gemwright.cli.serve import served_name
from gemwright.serve.app import page as page_routes

BUNDLED = served_name(None)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")


class Desk:
    """Answers each request with the next of its scripts: pieces of text, or an error's status and body."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.scripts: list[list[str] | tuple[int, dict[str, Any]]] = []
        self.asked: list[dict[str, Any]] = []
        self.go: threading.Semaphore | None = None
        """Where it is given, a piece waits for it."""
        self.cut = 0
        """Bytes in a packet, so that characters are torn; 0: an event a packet."""
        self.key: str | None = None
        self.left = threading.Event()
        """A reader has gone before the end."""

    def app(self) -> FastAPI:
        app = FastAPI()
        app.include_router(page_routes())

        @app.get("/v1/models")
        async def models(http: HttpRequest) -> Response:
            if self.refuses(http):
                return JSONResponse({"error": {"message": "no API key", "code": "invalid_api_key"}}, 401)
            poet = {"id": "poet", "parent": BUNDLED, "max_model_len": 100}
            return JSONResponse({"data": [{"id": BUNDLED, "max_model_len": 8192}, poet]})

        @app.post("/v1/chat/completions")
        async def chat(http: HttpRequest) -> Response:
            self.asked.append(await http.json())
            script = self.scripts.pop(0)
            if isinstance(script, tuple):
                return JSONResponse({"error": script[1]}, script[0])
            return StreamingResponse(self.packets(script), media_type="text/event-stream")

        return app

    def refuses(self, http: HttpRequest) -> bool:
        return self.key is not None and http.headers.get("authorization") != f"Bearer {self.key}"

    async def packets(self, pieces: list[str]) -> AsyncIterator[bytes]:
        try:
            async for event in self.events(pieces):
                for start in range(0, len(event), self.cut or len(event)):
                    yield event[start : start + (self.cut or len(event))]
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def events(self, pieces: list[str]) -> AsyncIterator[bytes]:
        def event(**changes: Any) -> bytes:
            return f"data: {json.dumps({'choices': [], 'usage': None} | changes, ensure_ascii=False)}\n\n".encode()

        yield event(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        yield b": waiting\n\n"
        for piece in pieces:
            while self.go is not None and not self.go.acquire(blocking=False):
                await asyncio.sleep(0.005)
            yield event(choices=[{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
        yield event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
        yield event(usage={"prompt_tokens": 7, "completion_tokens": len(pieces), "total_tokens": 7 + len(pieces)})
        yield b"data: [DONE]\n\n"


@contextmanager
def launched() -> Iterator[Browser]:
    """A Chromium without its sandbox, which root may not use."""
    flags = ["--no-sandbox", "--no-proxy-server", "--disable-gpu"]
    expect.set_options(timeout=20_000)  # what is waited for; a busy machine takes its time
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=CHROMIUM, args=flags) as made:
        yield made


@contextmanager
def served(desk: Desk) -> Iterator[str]:
    """The desk on a real socket, in a thread; its URL."""
    server = uvicorn.Server(uvicorn.Config(desk.app(), port=0, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def profile(browser: Browser) -> Iterator[BrowserContext]:
    """A fresh profile. Its pages may ask one server alone, raise no error, open no dialog and break no policy."""
    made = browser.new_context(viewport={"width": 1100, "height": 700})
    made.set_default_timeout(20_000)
    wrong: list[str] = []
    hosts: set[str] = set()
    made.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    made.on("dialog", lambda dialog: wrong.append(f"dialog {dialog.message}"))
    made.on("weberror", lambda error: wrong.append(f"error {error.error}"))
    made.on("console", lambda line: wrong.append(line.text) if "Content Security Policy" in line.text else None)
    yield made
    made.close()
    assert not wrong, wrong
    assert len(hosts) == 1, hosts


def opened(context: BrowserContext, url: str) -> Page:
    """The page, once it knows the models."""
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#model option")).to_have_count(2)
    return page


def say(page: Page, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def done(page: Page) -> None:
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")


def kept(page: Page) -> list[dict[str, Any]]:
    """The conversations in the browser's storage, the latest first."""
    texts = page.evaluate(
        "Object.keys(localStorage).filter(k => k.startsWith('gemwright.chat.')).map(k => localStorage[k])"
    )
    return sorted((json.loads(text) for text in texts if text != "broken"), key=lambda chat: -chat["changed"])


def told(page: Page) -> list[str]:
    """Contents of the turns, as kept."""
    return [message["content"] for message in kept(page)[0]["messages"]]
