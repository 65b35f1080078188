"""Synthetic data: the teacher's own answers, each once; a server that fails in the middle; rows that sft reads."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from serve_fixtures import application, listening, tiny

from gemwright.cli import main
from gemwright.data.rows import Format, detect, encode
from gemwright.data.sources import open_source
from gemwright.lm import LM
from gemwright.synthesize import Server, normalised, synthesize

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "The capital of France"},
    {"messages": [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "an old answer"}]},
    {"prompt": "the capital, of  FRANCE!"},
    {"prompt": "Hello there"},
    {"prompt": "hello there?"},
    {"prompt": "How are you"},
    {"prompt": "Rome"},
]
"""Three of them say what an earlier one says."""
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return tiny(tmp_path_factory.mktemp("synthesize") / "model")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(path: Path) -> list[str]:
    return [row["messages"][0]["content"] for row in lines(path)]


def test_what_says_the_same() -> None:
    assert normalised("  The capital,\n of FRANCE!") == normalised("the capital of france")
    assert normalised("1 + 1") == normalised("1 1") != normalised("1 2")
    assert normalised("?!") != normalised("...")  # nothing but punctuation stays as it is


def test_rows_are_the_teachers_answers_and_sft_reads_them(lm: LM, tmp_path: Path) -> None:
    source, target = write(tmp_path / "prompts.jsonl", PROMPTS), tmp_path / "rows.jsonl"
    done = synthesize(lm, source, target, name="tiny", sampling=GREEDY, keep_cut=True, progress=False)
    asked = ["The capital of France", "Hello there", "How are you", "Rome"]
    said = {q: lm.generate([{"role": "user", "content": q}], **GREEDY).text.strip() for q in asked}
    assert questions(target) == [q for q in asked if said[q]] and any(said.values())
    for row in lines(target):
        (question, answer) = row["messages"]
        assert answer == {"role": "assistant", "content": said[question["content"]]}
        assert row["provenance"]["model"] == "tiny" and row["provenance"]["sampling"] == GREEDY
        assert len(row["provenance"]["date"]) == 10
    assert (done.prompts, done.same_prompts, done.rows + done.empty, done.failed) == (7, 3, 4, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "rows.jsonl"]
    data = open_source(str(target))
    for line in data.rows():
        document = encode(line, detect(data, Format()), lm.tokenizer, Format())
        assert document is not None and sum(document.weights) > 1
    with pytest.raises(ValueError, match=r"rows.jsonl exists"):
        synthesize(lm, source, target, name="tiny", progress=False)


def test_answers_that_are_cut_empty_or_the_same_are_left_out(lm: LM, tmp_path: Path) -> None:
    """Several answers a prompt, drawn with a seed; each prompt has noise of its own."""
    source = write(tmp_path / "p.jsonl", PROMPTS)
    how: dict[str, Any] = {"max_new_tokens": 2, "temperature": 0.7, "top_k": 3, "n": 8, "seed": 5}
    done = synthesize(lm, source, tmp_path / "kept.jsonl", name="t", sampling=how, keep_cut=True, progress=False)
    rows = lines(tmp_path / "kept.jsonl")
    assert done.rows == len(rows) < 4 * 8 and done.same_answers > 0
    assert done.rows + done.same_answers + done.empty >= 4 * 8
    pairs = [(r["messages"][0]["content"], normalised(r["messages"][1]["content"])) for r in rows]
    assert len(set(pairs)) == len(pairs)
    cut = how | {"min_new_tokens": 2}
    with pytest.raises(ValueError, match=r"no answer is left to write: .*'rows': 0, .*'cut': [23]\d"):
        synthesize(lm, source, tmp_path / "cut.jsonl", name="t", sampling=cut, progress=False)


def test_bad_prompts_are_named(lm: LM, tmp_path: Path) -> None:
    for row, message in {
        '{"prompt": 5}': "prompt 1: 5; allowed is a text or a list",
        '{"messages": [{"role": "user"}]}': "prompt 1: .*allowed is a text or a list of messages",
        '{"messages": [{"role": "assistant", "content": "x"}]}': "prompt 1: there is nothing to answer",
        '{"text": "x"}': 'p.jsonl:1: allowed is an object with either "prompt" or "messages"',
    }.items():
        (tmp_path / "p.jsonl").write_text(row)
        with pytest.raises(ValueError, match=message):
            synthesize(lm, tmp_path / "p.jsonl", tmp_path / "out", name="t", progress=False)
    long = [{"prompt": "word " * 500}, {"prompt": "Hello"}]
    done = synthesize(
        lm,
        write(tmp_path / "p.jsonl", long),
        tmp_path / "out",
        name="t",
        sampling=GREEDY,
        keep_cut=True,
        progress=False,
    )
    assert (done.rows, done.failed) == (1, 1) and "the context holds" in (done.first_error or "")
    (failed,) = lines(tmp_path / "out.failed.jsonl")
    assert failed["messages"][0]["content"] == long[0]["prompt"]
    with pytest.raises(ValueError, match="server: got 'localhost', allowed is an http"):
        Server(url="localhost", model="m")


# --- servers ---------------------------------------------------------------------------------------------------------


class Fake:
    """A server that answers N times and then fails, refuses one prompt, and asks for patience once."""

    def __init__(self) -> None:
        self.left, self.impatient, self.seen, self.most = 10**9, 1, list[str](), 0
        self.keys: set[str | None] = set()
        self.bodies: list[dict[str, Any]] = []
        self._now, self._lock = 0, threading.Lock()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and reply."""
        question = body["messages"][-1]["content"]
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
            self.bodies.append(body)
            if self.impatient:
                self.impatient -= 1
                return 429, {"error": {"message": "slow down"}}
            if question == "refused":
                return 400, {"error": {"message": "too long"}}
            if self.left == 0:
                return 503, {"error": {"message": "out of memory"}}
            self.left -= 1
            self.seen.append(question)
        choice = {"index": 0, "message": {"role": "assistant", "content": f"re: {question}"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        head = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
        return 200, {**head, "choices": [choice], "usage": usage}

    def done(self) -> None:
        """A request has been answered."""
        with self._lock:
            self._now -= 1


@contextmanager
def serving(fake: Fake) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            fake.keys.add(self.headers.get("Authorization"))
            time.sleep(0.01)
            status, reply = fake.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Retry-After-Ms", "1")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            time.sleep(0.03)  # so that others come meanwhile
            fake.done()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_that_fails_in_the_middle_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A clear error that says what is kept; the same command asks only for what is missing."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rows: list[dict[str, Any]] = [{"prompt": f"question {i}"} for i in range(20)]
    rows.insert(7, {"prompt": "refused"})
    source, target, fake = write(tmp_path / "p.jsonl", rows), tmp_path / "rows.jsonl", Fake()
    with serving(fake) as url:
        line = f"synthesize --server {url} --server-model m --prompts {source} --output {target}"
        command = [*line.split(), "--concurrency", "3", "--retries", "2", "--temperature", "0.5", "--top-k", "7"]
        fake.left = 9
        assert main(command) == 1
        error = capsys.readouterr().err
        assert "out of memory" in error and f"10 of 21 prompts are answered and kept in {target}.answers.part" in error
        assert not target.exists() and "secret" not in error
        fake.left = 10**9
        assert main([*command, "--json"]) == 1  # one prompt stays refused
    done = json.loads(capsys.readouterr().out)
    assert (done["rows"], done["failed"], done["found"]) == (20, 1, 10)
    assert sorted(fake.seen) == sorted(f"question {i}" for i in range(20))  # each answered once
    assert questions(target) == [f"question {i}" for i in range(20)]
    assert [row["messages"][1]["content"] for row in lines(target)] == [f"re: question {i}" for i in range(20)]
    (failed,) = lines(tmp_path / "rows.jsonl.failed.jsonl")
    assert "too long" in failed["error"]
    assert 1 < fake.most <= 3 and fake.keys == {"Bearer secret"}
    assert fake.bodies[0]["temperature"] == 0.5 and fake.bodies[0]["top_k"] == 7


def test_our_own_server_answers_as_the_model_does(lm: LM, tmp_path: Path) -> None:
    source = write(tmp_path / "p.jsonl", PROMPTS)
    synthesize(lm, source, tmp_path / "here.jsonl", name="t", sampling=GREEDY, keep_cut=True, progress=False)
    with listening(application(lm)) as url:
        server = Server(url=f"{url}/v1", model="tiny", concurrency=2)
        synthesize(server, source, tmp_path / "there.jsonl", name="t", sampling=GREEDY, keep_cut=True, progress=False)
    assert lines(tmp_path / "there.jsonl") == lines(tmp_path / "here.jsonl")
    with pytest.raises(RuntimeError, match=r"failed: Connection error.. 0 of 4 prompts are answered"):
        synthesize(
            Server(url=f"{url}/v1", model="tiny", retries=0), source, tmp_path / "gone.jsonl", name="t", progress=False
        )
