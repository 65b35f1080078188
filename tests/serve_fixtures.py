"""What the server's tests share: a tiny model behind an application, clients, and an engine that fails on demand."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import folder_fixtures
import httpx2
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient

from gemwright.engine.engine import Engine
from gemwright.engine.request import Finish, Request, Stats, TokenEvent
from gemwright.lm import LM
from gemwright.serve.app import create_app
from gemwright.serve.settings import Settings

CONTEXT = 128


def tiny(folder: Path, **changes: Any) -> LM:
    """A tiny chat model of random weights; greedy answers are the same at every call."""
    folder_fixtures.gemma2(folder, **({"max_position_embeddings": CONTEXT} | changes))
    return LM(folder, device="cpu", dtype="auto")


def application(lm: LM, *, engine: Callable[[], Engine] | None = None, **settings: Any) -> FastAPI:
    """The server over a model; `engine` makes another engine than the plain one."""

    def load() -> tuple[LM, Engine]:
        return lm, engine() if engine is not None else Engine(lm, rows=4, budget=64, cache_tokens=1024)

    return create_app(load, Settings(**({"name": "tiny"} | settings)))


@contextmanager
def client(app: FastAPI, *, wait: bool = True) -> Iterator[TestClient]:
    """A client inside this process, once the model is loaded."""
    with TestClient(app, raise_server_exceptions=False) as made:
        while wait and made.get("/ready").status_code != 200:
            pass
        yield made


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The application on a real socket, in a thread; its URL. The kernel holds little for a reader that sleeps."""
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    link.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run, args=([link],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        url = f"http://127.0.0.1:{link.getsockname()[1]}"
        while httpx2.get(f"{url}/ready").status_code != 200:
            pass
        yield url
    finally:
        server.should_exit = True
        thread.join()


class FakeEngine:
    """Counts upwards: token i of a sample is i. Steps wait for `go` where it is given, and fail while `broken`."""

    def __init__(self, *, go: threading.Semaphore | None = None) -> None:
        self.go, self.broken = go, False
        self.stats = Stats()
        self.running: dict[str, list[Any]] = {}
        self.cancelled: list[str] = []
        self.outbox: list[TokenEvent] = []
        self._numbers = itertools.count()

    @property
    def busy(self) -> bool:
        return bool(self.running or self.outbox)

    def submit(self, request: Request) -> str:
        if not request.tokens:
            raise ValueError("prompt: got no tokens, allowed is at least one")
        ident = f"fake-{next(self._numbers)}"
        self.running[ident] = [request, 0]
        return ident

    def cancel(self, ident: str, index: int | None = None) -> None:
        assert index is None, "one sample of several is for the real engine"
        if self.running.pop(ident, None) is not None:
            self.cancelled.append(ident)
            self.outbox.append(TokenEvent(id=ident, finish="cancelled"))

    def step(self) -> list[TokenEvent]:
        if not self.running:
            events, self.outbox = self.outbox, []
            return events
        if self.go is not None:
            self.go.acquire(timeout=1)
        if self.broken:
            raise RuntimeError("secret detail of the device")
        events, self.outbox = self.outbox, []
        for ident, state in list(self.running.items()):
            request, count = state
            state[1] = count + 1
            last = count + 1 == request.params.max_new_tokens
            finish: Finish | None = "length" if last else None
            events += [TokenEvent(id=ident, index=i, token=count, finish=finish) for i in range(request.params.n)]
            if last:
                del self.running[ident]
        return events


def launch(launcher: Sequence[str], folder: Path, *options: str) -> tuple[subprocess.Popen[str], str, str]:
    """`gemwright serve` behind a launcher, in processes of its own, once it is ready; its URL, and what it said."""
    command = [sys.executable, *launcher, "-m", "gemwright", "serve", str(folder), "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    told = ""
    for line in process.stderr:
        told += line
        if line.startswith("Ready"):
            break
    found = re.search(r"API: http://localhost:(\d+)/v1", told)
    assert found, told
    return process, f"http://127.0.0.1:{found[1]}", told
