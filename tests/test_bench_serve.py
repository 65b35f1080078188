"""gemwright bench serve: what it sends and counts, against the tiny server on a socket and numbers made by hand."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_fixtures import application, listening, tiny

from gemwright.cli import bench_serve
from gemwright.cli.bench_serve import Options, Record, arrivals, bodies, run, summary


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    lm = tiny(tmp_path_factory.mktemp("serve") / "model", max_position_embeddings=512)
    with listening(application(lm)) as address:
        yield f"{address}/v1"


def measured(capsys: pytest.CaptureFixture[str], **options: Any) -> tuple[int, dict[str, Any]]:
    code = run(Options(json=True, **options))
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("load", [{"concurrency": 3}, {"rate": 200.0}, {"whole": True}, {"chat": True}])
def test_every_request_is_answered_and_counted(
    url: str, load: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """min_tokens makes every answer as long as asked, so the counts are known."""
    out = str(tmp_path / "out.json")
    extra = '{"min_tokens": 7, "temperature": 0}'
    code, result = measured(capsys, url=url, requests=7, new=7, words=(5, 9), extra=extra, out=out, **load)
    assert code == 0 and result["failed"] == 0 and result["errors"] == {}
    records = json.loads(Path(out).read_text())["records"]
    assert [record["new_tokens"] for record in records] == [7] * 7
    assert len({record["prompt_tokens"] for record in records[::2]} & {r["prompt_tokens"] for r in records[1::2]}) == 0
    assert result["new_tokens_per_s"] == pytest.approx(49 / result["seconds"], rel=1e-2)
    assert (result["first_token_ms"] is None) == bool(load.get("whole"))
    for record in records:
        times = [record["due"], *record["times"], record["end"]]
        assert times == sorted(times) and len(record["times"]) <= 7


def test_failures_are_told_by_kind(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:  # bound, and nobody listens
        nobody.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
        code, result = measured(capsys, url=closed, model="x", requests=2)
        assert code == 1 and result["errors"] == {"ConnectError": 2} and result["request_ms"] is None
        with pytest.raises(ValueError, match="give --model"):
            run(Options(url=closed))
    assert measured(capsys, url=url, model="nobody", requests=2)[1]["errors"] == {"HTTP 404": 2}
    assert measured(capsys, url=url, requests=1, extra='{"colour": 1}')[1]["errors"] == {"HTTP 400": 1}


def test_prompts_are_read_in_the_formats_of_the_field(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    cases: list[tuple[str, list[dict[str, Any]]]] = [
        ("one\n\ntwo\n", [{"prompt": "one"}, {"prompt": "two"}]),
        ('{"prompt": "p", "max_tokens": 3}\n{"text": "t"}', [{"prompt": "p", "max_tokens": 3}, {"prompt": "t"}]),
        (json.dumps({"messages": turns}), [{"messages": turns[:1]}]),
        (
            json.dumps([{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}]}]),
            [{"prompt": "h"}],
        ),
    ]
    for text, expected in cases:
        file.write_text(text)
        assert bodies(Options(prompts=str(file))) == expected
    assert bodies(Options(prompts=str(file), chat=True)) == [{"messages": [{"role": "user", "content": "h"}]}]
    for text, said in (("", "no prompt in it"), ('{"a": 1}', "record 1"), ('{"a"', "not JSON")):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            bodies(Options(prompts=str(file)))


def test_made_up_prompts_have_the_lengths_and_are_all_different() -> None:
    made = [one["prompt"] for one in bodies(Options(words=(3, 50), requests=9))]
    assert [len(text.split()) for text in made] == [3, 50] * 4 + [3] and len(set(made)) == 9
    assert made == [one["prompt"] for one in bodies(Options(words=(3, 50), requests=9))]


def test_arrivals_are_a_poisson_process() -> None:
    """Gaps of mean 1 / rate, and of deviation as large: neither a clock nor a burst."""
    dues = list(itertools.islice(arrivals(50.0, 1), 4000))
    gaps = [b - a for a, b in itertools.pairwise(dues)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.02, rel=0.05) and deviation == pytest.approx(0.02, rel=0.1)


def test_the_summary_of_known_times() -> None:
    records = [
        Record(0.0, 1.0, [0.1, 0.3, 1.0], prompt_tokens=10, new_tokens=4),
        Record(0.5, 2.0, [1.0, 1.5], prompt_tokens=20, new_tokens=2),
        Record(1.0, 1.5, [1.2], error="stream cut off"),
    ]
    found = summary(records)
    assert (found["failed"], found["errors"], found["seconds"]) == (1, {"stream cut off": 1}, 2.0)
    assert (found["requests_per_s"], found["prompt_tokens_per_s"], found["new_tokens_per_s"]) == (1.0, 15.0, 3.0)
    assert found["first_token_ms"]["mean"] == pytest.approx(300) and found["first_token_ms"]["max"] == 500
    assert found["between_tokens_ms"]["p50"] == pytest.approx(500)  # of 200, 500, 700
    assert found["request_ms"]["p50"] == pytest.approx(1250) and found["request_ms"]["p90"] == pytest.approx(1450)


def test_a_picture_is_drawn_with_and_without_failures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "latency.png"
    bench_serve.plot([Record(0.0, 1.0, [0.1]), Record(0.5, 0.6, error="timeout")], str(path))
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 5000
    bench_serve.plot([Record(0.0, 1.0, error="timeout")], str(path))


@pytest.mark.parametrize("wrong", [{"requests": 0}, {"words": (0,)}, {"rate": 0.0}, {"extra": "[1]"}, {"extra": "{"}])
def test_wrong_options_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"--{name}"):
        Options(**wrong).fields()
