"""Who is let in and how much of what: keys, hosts, origins, sizes, the queue; and what a failure tells to whom."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serve_fixtures import application, client

from gemwright.engine.engine import Engine
from gemwright.engine.request import TokenEvent
from gemwright.lm import LM
from gemwright.serve import logs, tracing
from gemwright.serve.app import create_app
from gemwright.serve.settings import Keys, Settings, read_keys

KEY = "first-key-of-two"
BODY = {"prompt": "The capital", "max_tokens": 3, "temperature": 0}
URL = "/v1/completions"


@pytest.fixture(scope="module")
def guarded(lm: LM) -> Iterator[TestClient]:
    app = application(
        lm, keys=Keys([KEY, "second-key-of-two"]), metrics_key=True, origins=("https://page.example",), max_body=2000
    )
    with client(app) as made:
        yield made


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_without_a_key_nothing_answers_but_health_and_page(guarded: TestClient) -> None:
    paths = {*cast(FastAPI, guarded.app).openapi()["paths"], "/openapi.json", "/nothing"}
    assert {URL, "/metrics", "/tokenize"} <= paths
    for path in sorted(paths - {"/health", "/ready"}):
        for answer in (guarded.get(path), guarded.post(path, json=BODY)):
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/health").status_code == guarded.get("/ready").status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Bearer {KEY}", 200),
        (f"bearer  {KEY} ", 200),
        ("Bearer second-key-of-two", 200),
        (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401),
        (f"Basic {KEY}", 401),
        ("Bearer ", 401),
        (KEY, 401),
    ],
)
def test_a_key_must_be_exact(guarded: TestClient, header: str, status: int) -> None:
    answer = guarded.post(URL, json=BODY, headers={b"Authorization": header.encode("latin-1")})
    assert answer.status_code == status, answer.text
    if status == 401:
        assert KEY not in answer.text


def test_keys_come_from_file_and_variable(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nalpha-alpha\n\n beta-beta-beta \n")
    keys = read_keys(file, "gamma-gamma, delta-delta")
    assert len(keys) == 4
    assert all(keys.admit(key) for key in (b"alpha-alpha", b"beta-beta-beta", b"gamma-gamma", b"delta-delta"))
    assert not keys.admit(b"# ours") and not keys.admit(b"") and not Keys().admit(b"")
    assert len(read_keys(None, None)) == 0
    for wrong in ("short", "with\x07bell-in-it", "umlaut-ümlaut"):
        with pytest.raises(ValueError, match="key 1"):
            read_keys(None, wrong)
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no key in it"):  # a file that was meant to protect and does not
        read_keys(file, "gamma-gamma")


def test_large_bodies_are_refused_by_their_length_and_as_they_come(guarded: TestClient) -> None:
    def pieces() -> Iterator[bytes]:
        yield from [b"x" * 500] * 5

    for content in (b"x" * 2001, pieces()):
        answer = guarded.post(URL, content=content, headers=bearer(KEY))
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    assert (
        guarded.post(URL, content=b" " * 1900 + json.dumps(BODY).encode(), headers=bearer(KEY) | JSON).status_code
        == 200
    )


JSON = {"Content-Type": "application/json"}


def test_foreign_pages_are_told_apart(guarded: TestClient) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    ours = guarded.options(URL, headers=ask | {"Origin": "https://page.example"})
    assert ours.status_code == 200 and ours.headers["access-control-allow-origin"] == "https://page.example"
    assert (
        "access-control-allow-origin"
        not in guarded.options(URL, headers=ask | {"Origin": "https://evil.example"}).headers
    )
    error = guarded.post(URL, json=BODY, headers={"Origin": "https://page.example"})
    assert error.status_code == 401 and "access-control-allow-origin" in error.headers  # the page may read why


def test_hosts_keep_foreign_names_out(lm: LM) -> None:
    with client(application(lm, hosts=("testserver", "[::1]"))) as http:
        for host, status in (
            ("testserver", 200),
            ("TestServer:8000", 200),
            ("[::1]:80", 200),
            ("evil.example", 400),
            ("", 400),
        ):
            assert http.get("/v1/models", headers={"Host": host}).status_code == status, host


def test_a_full_queue_says_when_to_come_back(lm: LM) -> None:
    hold = threading.Event()

    class Waiting(Engine):
        def step(self) -> list[TokenEvent]:
            hold.wait(10)
            return super().step()

    app = application(lm, engine=lambda: Waiting(lm, rows=4, budget=64, cache_tokens=1024), max_requests=2)
    with client(app) as http:
        first: list[Any] = []
        threads = [threading.Thread(target=lambda: first.append(http.post(URL, json=BODY))) for _ in range(2)]
        for thread in threads:
            thread.start()
        while app.state.worker._samples < 2:
            pass
        refused = http.post(URL, json=BODY)
        hold.set()
        for thread in threads:
            thread.join()
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        own = lm.generate("The capital", max_new_tokens=3, temperature=0).text
        assert [answer.json()["choices"][0]["text"] for answer in first] == [own, own]
        assert http.post(URL, json=BODY).status_code == 200


def test_loading_and_draining_are_told(lm: LM) -> None:
    loaded = threading.Event()

    def load() -> tuple[LM, Engine]:
        loaded.wait(10)
        return lm, Engine(lm, rows=4, budget=64, cache_tokens=1024)

    app = create_app(load, Settings(name="tiny"))
    with client(app, wait=False) as http:
        for path, status in (("/health", 200), ("/ready", 503), ("/v1/models", 503), ("/metrics", 200)):
            assert http.get(path).status_code == status, path
        early = http.post(URL, json=BODY)
        assert early.status_code == 503 and early.json()["error"]["code"] == "loading" and early.headers["retry-after"]
        loaded.set()
        while http.get("/ready").status_code != 200:
            pass
        assert http.post(URL, json=BODY).status_code == 200
        app.state.worker.state = "draining"
        assert http.post(URL, json=BODY).json()["error"]["code"] == "draining"
        assert http.get("/ready").json() == {"status": "draining"} and http.get("/health").status_code == 200


def test_a_failure_tells_the_client_an_id_and_the_log_the_trace(lm: LM, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Engine):
        fail = True

        def step(self) -> list[TokenEvent]:
            if self.fail and self._tracks:
                raise RuntimeError("secret path /home/x")
            return super().step()

    engines: list[Broken] = []

    def make() -> Engine:
        engines.append(Broken(lm, rows=4, budget=64, cache_tokens=1024))
        return engines[0]

    with caplog.at_level(logging.INFO), client(application(lm, engine=make)) as http:
        failed = http.post(URL, json=BODY, headers={"X-Request-Id": "my-id.7"})
        assert failed.status_code == 500 and failed.headers["x-request-id"] == "my-id.7"
        assert "my-id.7" in failed.text and "secret" not in failed.text and "Traceback" not in failed.text
        assert "secret path" in caplog.text
        stream = http.post(URL, json=BODY | {"stream": True})
        assert stream.status_code == 200 and '"type":"server_error"' in stream.text and "secret" not in stream.text
        assert not stream.text.endswith("[DONE]\n\n")
        engines[0].fail = False
        own = lm.generate("The capital", max_new_tokens=3, temperature=0).text
        assert http.post(URL, json=BODY).json()["choices"][0]["text"] == own
        numbers = http.get("/metrics").text
        assert 'gemwright_requests_total{route="/v1/completions",status="500"} 1.0' in numbers
    ends = [record.fields for record in caplog.records if getattr(record, "fields", {}).get("status") == 500]  # type: ignore[attr-defined]
    assert ends and ends[0]["path"] == URL


def test_an_id_that_could_break_a_log_is_replaced(guarded: TestClient) -> None:
    for bad in ("a b", "x" * 129, 'a"b', ""):
        given = guarded.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert given != bad and len(given) == 32


def test_unknown_paths_and_methods_answer_in_openais_shape(lm: LM) -> None:
    with client(application(lm)) as http:
        assert (http.get("/v1/nothing").status_code, http.get(URL).status_code) == (404, 405)
        for answer in (http.get("/v1/nothing"), http.get(URL)):
            assert answer.json()["error"]["type"] == "invalid_request_error"
        page = http.get("/%2e%2e/settings.py")
        assert page.status_code == 404


def test_meters_count_what_happened(lm: LM) -> None:
    with client(application(lm)) as http:
        for _ in range(2):
            assert http.post(URL, json=BODY | {"prompt": "x" * 90}).status_code == 200
        lines = dict(line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(lines["gemwright_time_to_first_token_seconds_count"]) == 2
    assert float(lines["gemwright_inter_token_seconds_count"]) == 4
    assert float(lines["gemwright_generated_tokens_total"]) == 6
    assert float(lines["gemwright_cached_tokens_total"]) >= 64  # the second prompt is the first one's
    assert float(lines["gemwright_pages_total"]) > 0 and float(lines["gemwright_running"]) == 0
    assert float(lines['gemwright_requests_total{route="/v1/completions",status="200"}']) == 2


def test_a_trace_has_the_callers_parent_and_the_tokens(lm: LM) -> None:
    kept = InMemorySpanExporter()
    tracer, shutdown = tracing.tracer(kept)
    app = create_app(lambda: (lm, Engine(lm, rows=4, budget=64, cache_tokens=1024)), Settings(), tracer=tracer)
    with client(app) as http:
        parent = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
        assert http.post(URL, json=BODY, headers=parent).status_code == 200
        assert http.post(URL, json=BODY | {"stream": True}, headers=parent).status_code == 200
    shutdown()
    spans = [span for span in kept.get_finished_spans() if span.name == f"POST {URL}"]
    for span in spans:
        assert span.parent is not None and f"{span.parent.trace_id:032x}" == "a" * 32
        told = dict(span.attributes or {})
        assert told["gen_ai.usage.output_tokens"] == 3 and told["http.response.status_code"] == 200
    assert len(spans) == 2


def test_json_logs_are_one_object_a_line_with_the_requests_id(caplog: pytest.LogCaptureFixture) -> None:
    record = logging.LogRecord("x", logging.ERROR, "file", 1, "two\nlines %s", ("é",), None)
    record.fields = {"status": 500}
    token = logs.request_id.set("id-1")
    try:
        line = logs.JsonLines().format(record)
    finally:
        logs.request_id.reset(token)
    told = json.loads(line)
    assert "\n" not in line
    assert (told["message"], told["request_id"], told["status"], told["level"]) == (
        "two\nlines é",
        "id-1",
        500,
        "error",
    )
