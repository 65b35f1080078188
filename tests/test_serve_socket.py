"""Over real sockets: readers that leave or sleep, bodies that never come, and signals."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folder_fixtures
import httpx2
import pytest
from fastapi import FastAPI
from serve_fixtures import application, launch, listening

from gemwright.engine.engine import Engine
from gemwright.lm import LM

CONTEXT = 8192
ENDLESS = 4000
"""Tokens that take seconds longer than a reader is waited for."""
LONG = {"prompt": "The capital", "min_tokens": ENDLESS, "max_tokens": ENDLESS, "temperature": 0, "stream": True}
SHORT = {"prompt": "The capital", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def app(lm: LM) -> FastAPI:
    limits: dict[str, Any] = {"max_requests": 8, "body_seconds": 0.3, "stall_seconds": 1.0}
    return application(lm, engine=lambda: Engine(lm, rows=4, budget=64), **limits)


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    with listening(app) as address:
        yield address


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def idle(app: FastAPI) -> bool:
    worker = app.state.worker
    return worker._samples == worker._waiting_tokens == 0 and not worker._routes and not worker.loaded[1].busy


def connect(url: str, *, buffer: int | None = None) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    link = socket.socket()
    link.settimeout(10)
    if buffer is not None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    link.connect((host, int(port)))
    return link


def post(body: dict[str, object]) -> bytes:
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n"
    return head.encode() + b"Content-Type: application/json\r\n\r\n" + raw


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(app: FastAPI, url: str, stream: bool) -> None:
    with connect(url) as link:
        link.sendall(post(LONG | {"stream": stream}))
        if stream:
            assert b"200 OK" in link.recv(1000)
        until(lambda: app.state.worker.stats.running == 1)
    until(lambda: idle(app))
    stats = app.state.worker.stats
    assert stats.cancelled == 1 and stats.generated_tokens < ENDLESS


def test_a_client_that_goes_away_while_it_waits_frees_its_place(app: FastAPI, url: str) -> None:
    """Before its first token a stream sends nothing, so only listening tells that nobody is there."""
    links = [connect(url) for _ in range(6)]  # four rows are served, two wait
    for link in links:
        link.sendall(post(LONG))
    until(lambda: app.state.worker._samples == 6)
    for link in links:
        link.close()
    until(lambda: idle(app))


def test_a_reader_that_sleeps_holds_nobody_up(app: FastAPI, url: str) -> None:
    with connect(url, buffer=1024) as sleeper:
        sleeper.sendall(post(LONG | {"logprobs": 100}))  # enough text to fill the buffers between here and there
        until(lambda: app.state.worker.stats.running == 1)
        for _ in range(3):
            assert httpx2.post(f"{url}/v1/completions", json=SHORT).status_code == 200
        until(lambda: idle(app))  # given up after stall_seconds
        assert app.state.worker.stats.generated_tokens < ENDLESS


def test_a_body_that_does_not_come_is_given_up(url: str) -> None:
    with connect(url) as link:
        link.sendall(post(SHORT)[:-5])
        begun = time.monotonic()
        assert b" 408 " in link.recv(2000)
        assert time.monotonic() - begun < 5


def test_a_body_that_says_it_is_too_large_is_not_read(url: str) -> None:
    with connect(url) as link:
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n")
        assert b" 413 " in link.recv(2000)


def test_every_stream_is_whole_under_load(url: str, lm: LM) -> None:
    """More clients than rows, each with its own text, whose joints fall inside characters."""
    texts = [f"{i} Zwölf Boxkämpfer 中文 🙂" for i in range(7)]
    own = [one.text for one in lm.generate(texts, temperature=0, max_new_tokens=20)]
    found: dict[int, str] = {}

    def ask(i: int) -> None:
        body = {"prompt": texts[i], "temperature": 0, "max_tokens": 20, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            events = [line[6:] for line in answer.iter_lines() if line.startswith("data: {")]
        found[i] = "".join(json.loads(event)["choices"][0]["text"] for event in events)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(7)] == own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny"
    folder_fixtures.gemma2(path, max_position_embeddings=CONTEXT)
    return path


def start(folder: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
    """The command in a process of its own, once it is ready; and its URL."""
    process, url, told = launch((), folder, *options)
    assert "no API keys" in told and "model 'tiny'" in told
    return process, url


def test_the_first_sigterm_drains(folder: Path) -> None:
    process, url = start(folder, "--drain-seconds", "60")
    body = LONG | {"min_tokens": 1500, "max_tokens": 1500}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        while (ready := httpx2.get(f"{url}/ready")).status_code == 200:
            pass
        assert ready.json() == {"status": "draining"}
        refused = httpx2.post(f"{url}/v1/completions", json=SHORT)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        rest = list(lines)
    assert rest[-2] == "data: [DONE]" and '"finish_reason":"length"' in rest[-4]
    assert process.wait(20) == 0


@pytest.mark.slow
def test_a_second_sigterm_stops(folder: Path) -> None:
    process, url = start(folder, "--drain-seconds", "60", "--json-logs")
    with httpx2.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
        lines = answer.iter_lines()  # kept: a response whose lines nobody holds is closed
        next(lines)
        process.send_signal(signal.SIGTERM)
        while httpx2.get(f"{url}/ready").status_code == 200:
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1
