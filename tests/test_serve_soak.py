"""Faults over real sockets: fuzzed bodies, clients that leave, a burst, a drain, slow senders, limits, endurance.

Each test has two doses: a small one in every run, and the full one under `slow`, whose results are in
docs/reliability.md. What must hold afterwards is the same: no status 5xx, nothing lost, nothing kept.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_fixtures
import httpx2
import psutil
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from serve_fixtures import application, listening, tiny
from test_serve_socket import connect, idle, post, start, until

from gemwright.cli import bench_serve
from gemwright.lm import LM

CONTEXT = 512
BODY_SECONDS = 3.0
ALPHABETS = ("aé", "中文字", "🙂👩‍👩‍👧", "\u0301\u200d\ufeff", "עברית", "\x00\x1b\t\n", "<>&\"'\\", "\U0010ffff�")


@dataclass(frozen=True)
class Dose:
    """How much of each."""

    fuzzed: int
    leaving: int
    burst: int
    bound: int
    draining: int
    slow_senders: int
    sequential: int
    texts: int
    grown: int
    """Bytes that the process may have grown by."""


SMALL = Dose(40, 8, 30, 8, 6, 8, 20, 12, 48 * 2**20)
FULL = Dose(10_000, 200, 1000, 64, 48, 100, 1000, 400, 48 * 2**20)
doses = pytest.mark.parametrize("dose", [SMALL, pytest.param(FULL, marks=pytest.mark.slow)], ids=["small", "full"])


@pytest.fixture
def app(lm: LM, dose: Dose) -> FastAPI:
    return application(lm, max_requests=dose.bound)


@pytest.fixture
def url(app: FastAPI) -> Iterator[str]:
    with listening(app) as address:
        yield address


def resident() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def drive(url: str, **options: Any) -> list[bench_serve.Record]:
    return asyncio.run(bench_serve.drive(bench_serve.Options(url=f"{url}/v1", model="tiny", **options)))


@doses
def test_fuzzed_requests_never_meet_a_defect(tmp_path: Path, dose: Dose) -> None:
    """Bodies from the server's own schema, valid and broken; statuses of 500 and more are the server's fault."""
    app = application(tiny(tmp_path / "model", max_position_embeddings=40))  # an answer without a limit ends soon
    with listening(app) as url:
        fuzz(url, dose)
        until(lambda: idle(app))


def fuzz(url: str, dose: Dose) -> None:
    schemathesis: Any = pytest.importorskip("schemathesis")
    operations = [one.ok() for one in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]
    share = -(-dose.fuzzed // (2 * sum(bool(operation.body) for operation in operations)))
    seen: Counter[int] = Counter()
    for operation in operations:
        modes = [mode for mode in schemathesis.GenerationMode if operation.body or mode.name == "POSITIVE"]
        for mode in modes:

            @settings(
                max_examples=share,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                status = case.call(base_url=url, timeout=120).status_code
                seen[status] += 1
                assert status < 500, (status, case.as_curl_command())

            ask()
    print(f"{sum(seen.values())} requests, by status: {dict(seen)}")
    assert seen[200] and seen[400] and sum(seen.values()) >= dose.fuzzed


@doses
def test_clients_that_leave_free_everything(app: FastAPI, url: str, dose: Dose) -> None:
    draw, before = random.Random(1), app.state.worker.stats.cancelled
    body = {"prompt": "The capital", "min_tokens": 400, "max_tokens": 400, "temperature": 0, "stream": True}
    left = 0
    while left < dose.leaving:
        links = [connect(url) for _ in range(min(8, dose.leaving - left))]
        for link in links:
            link.sendall(post(body))
        for link in links:
            link.recv(draw.choice((1, 300, 900)))
            link.close()
        left += len(links)
    until(lambda: idle(app), 60)
    engine = app.state.worker.loaded[1]
    assert engine.stats.cancelled - before >= 0.9 * dose.leaving  # a fast one may have ended by itself
    assert not engine._requests and not engine._tracks and not app.state.worker._jobs


@doses
def test_a_burst_is_answered_or_told_to_come_back(app: FastAPI, url: str, dose: Dose) -> None:
    """Many at once against a bound: each is answered in full or refused with 429, and none is lost."""
    drive(url, requests=4, new=2)
    before = resident()
    extra = '{"min_tokens": 6}'
    records = drive(url, requests=dose.burst, concurrency=dose.burst, new=6, words=(8,), extra=extra, timeout=120.0)
    kinds = Counter(record.error for record in records)
    print(f"{dose.burst} at once against a bound of {dose.bound}: {dict(kinds)}, grown {resident() - before} bytes")
    assert set(kinds) == {None, "HTTP 429"} and kinds[None] >= dose.bound
    assert all(record.new_tokens == 6 for record in records if record.error is None)
    until(lambda: idle(app))
    assert resident() - before < dose.grown


@doses
def test_a_drain_under_load_finishes_what_was_accepted(tmp_path: Path, dose: Dose) -> None:
    folder = tmp_path / "tiny"
    folder_fixtures.gemma2(folder, max_position_embeddings=CONTEXT)
    process, url = start(folder, "--drain-seconds", "120", "--rows", "8")
    found: list[bench_serve.Record] = []
    load = {"requests": dose.draining, "concurrency": dose.draining, "new": 200, "extra": '{"min_tokens": 200}'}
    thread = threading.Thread(target=lambda: found.extend(drive(url, words=(8,), **load)), daemon=True)
    try:
        thread.start()
        while _metric(url, "gemwright_running") < min(8, dose.draining):
            assert process.poll() is None and thread.is_alive()
        process.send_signal(signal.SIGTERM)
        thread.join(180)
        code = process.wait(60)
    finally:
        process.kill()
    kinds = Counter(record.error for record in found)
    print(f"SIGTERM with {dose.draining} in flight: {dict(kinds)}, exit code {code}")
    assert code == 0 and set(kinds) <= {None, "HTTP 503"} and kinds[None] >= min(8, dose.draining)
    assert all(record.new_tokens == 200 for record in found if record.error is None)


def _metric(url: str, name: str) -> float:
    lines = httpx2.get(f"{url}/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


@doses
def test_senders_that_dribble_hold_nobody_up(lm: LM, dose: Dose) -> None:
    """A byte now and then: given up after body_seconds, and closed, so that dribbling on does not hold a connection."""
    app = application(lm, body_seconds=BODY_SECONDS)
    with listening(app) as url:
        dribble(url, dose)
        until(lambda: idle(app))


def dribble(url: str, dose: Dose) -> None:
    raw = post({"prompt": "x" * 500, "max_tokens": 1})
    links = [connect(url) for _ in range(dose.slow_senders)]
    for link in links:
        link.sendall(raw[:150])
    started = time.monotonic()
    for step in range(4):
        if time.monotonic() - started > BODY_SECONDS / 2:  # a busy machine: what is sent after the end breaks the pipe
            break
        for link in links:
            link.sendall(raw[150 + step : 151 + step])
        begun = time.monotonic()
        assert httpx2.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200
        assert time.monotonic() - begun < 5
    for link in links:
        answer = b""
        while piece := link.recv(4000):  # until the server closes
            answer += piece
        assert b" 408 " in answer
        link.close()


@doses
def test_prompts_at_the_limit_and_a_token_past_it(app: FastAPI, url: str, dose: Dose, lm: LM) -> None:
    ids = (lm.encode("The capital of France is a city") * CONTEXT)[: CONTEXT + 1]
    with httpx2.Client(base_url=url, timeout=60) as http:
        for length, new, status in (
            (CONTEXT - 1, 1, 200),
            (CONTEXT - 2, 2, 200),
            (CONTEXT - 1, 2, 400),
            (CONTEXT, 1, 400),
            (CONTEXT + 1, 1, 400),
        ):
            answer = http.post("/v1/completions", json={"prompt": ids[:length], "max_tokens": new, "temperature": 0})
            assert answer.status_code == status, (length, new, answer.text)
            if status == 400:
                assert answer.json()["error"]["code"] == "context_length_exceeded"
                assert f"{length} tokens" in answer.text and str(CONTEXT) in answer.text
    until(lambda: idle(app))


@doses
def test_one_after_another_keeps_memory_flat(app: FastAPI, url: str, dose: Dose) -> None:
    body: dict[str, Any] = {"max_tokens": 4, "logprobs": 5, "temperature": 1.0}
    with httpx2.Client(base_url=url, timeout=60) as http:
        sizes = []
        for number in range(dose.sequential):
            body |= {"prompt": f"{number} texts, none like another", "stream": number % 2 == 0}
            assert http.post("/v1/completions", json=body).status_code == 200
            if number % max(1, dose.sequential // 10) == 0:
                sizes.append(resident())
    print(f"{dose.sequential} requests, resident MB: {[size // 2**20 for size in sizes]}")
    assert sizes[-1] - sizes[len(sizes) // 3] < dose.grown
    worker = app.state.worker
    assert idle(app) and not worker._jobs and not worker.loaded[1]._requests


@doses
def test_text_of_every_kind_survives_the_joints_of_a_stream(app: FastAPI, url: str, dose: Dose, lm: LM) -> None:
    """A regex makes the model write back what was asked, character for character, in pieces cut anywhere."""
    draw = random.Random(2)
    with httpx2.Client(base_url=url, timeout=60) as http:
        for _ in range(dose.texts):
            text = "".join(draw.choice(draw.choice(ALPHABETS)) for _ in range(draw.randint(1, 12)))
            body = {"prompt": text, "guided_choice": [text], "max_tokens": 120, "stream": True, "echo": True}
            joined = ""
            with http.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200, answer.read()
                raw = b"".join(answer.iter_raw())
            for event in raw.decode().split("\n\n"):
                if event.startswith("data: {"):
                    joined += json.loads(event[6:])["choices"][0]["text"]
            assert joined == text + text, repr(text)
    until(lambda: idle(app))
