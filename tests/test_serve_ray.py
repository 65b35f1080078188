"""gemwright serve --ray: options that do not fit, and, where Ray is installed, two replicas of a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import folder_fixtures
import httpx2
import pytest

from gemwright.cli.serve import Options, run
from gemwright.lm import LM
from gemwright.serve.replicas import Replicas

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'gemwright[ray]'")
LONG = {"prompt": "The capital", "min_tokens": 300, "max_tokens": 300, "temperature": 0, "stream": True}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(replicas=2), "--replicas and --replica-cpus: allowed with --ray"),
        (Options(ray=True, replicas=0, port=8000), "count: got 0, allowed is >= 1"),
        (Options(ray=True, replica_cpus=0, port=8000), "cpus: got 0, allowed is >= 1"),
        (Options(ray=True, port=0), "--port: got 0"),
        (Options(ray=True, certificate="c.pem"), "--certificate and --private-key: both or neither"),
    ],
)
def test_what_does_not_fit_is_refused_before_ray_starts(options: Options, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(options)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_the_extra_is_named() -> None:
    with pytest.raises(ValueError, match=r"--ray: ray is missing; pip install 'gemwright\[ray\]'"):
        run(Options(ray=True))


def test_a_replica_takes_a_whole_share() -> None:
    assert Replicas(count=2, cpus=4, gpus=1) == Replicas(gpus=1, cpus=4, count=2)


@needs_ray
@pytest.mark.slow
def test_two_replicas_answer_and_drain(tmp_path: Path) -> None:
    folder_fixtures.gemma2(tmp_path / "tiny", max_position_embeddings=512)
    own = LM(tmp_path / "tiny", device="cpu", dtype="auto").generate("The sky is", temperature=0, max_new_tokens=8)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gemwright", "serve", "tiny", "--ray", "--replicas", "2", "--port", str(port)]
    # on a busy machine Ray's proxy needs longer than the five seconds that it has by default
    environment = os.environ | {
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    assert process.stderr is not None
    try:
        told = ""
        while "API: " not in told:
            line = process.stderr.readline()
            assert line, told
            told += line
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            assert http.get("/ready").json() == {"status": "ready"}
            body = {"prompt": "The sky is", "temperature": 0, "max_tokens": 8}
            answers = [http.post("/v1/completions", json=body).json() for _ in range(12)]
            assert {answer["choices"][0]["text"] for answer in answers} == {own.text}
            wrong = http.post("/v1/completions", json=body | {"colour": 1})
            assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "colour"
            lines = http.get("/metrics").text.splitlines()
        (count,) = [
            float(line.split()[1]) for line in lines if line.startswith("gemwright_time_to_first_token_seconds_count ")
        ]
        assert 0 < count < 12, "one replica had all"
        _drain(process, f"http://127.0.0.1:{port}")
    finally:
        process.kill()


def _drain(process: subprocess.Popen[str], url: str) -> None:
    """SIGTERM while streams run: they end whole."""
    found: list[list[str]] = []
    begun = threading.Barrier(4)

    def ask() -> None:
        with httpx2.stream("POST", f"{url}/v1/completions", json=LONG, timeout=120) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            begun.wait(60)
            found.append([line for line in (first, *lines) if line])

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    begun.wait(60)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert process.wait(60) == 0
    for lines in found:
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert len(found) == 3
