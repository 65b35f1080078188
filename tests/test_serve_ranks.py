"""One model over two ranks behind one server, started by torchrun; and engines with guesses, as the options ask."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import folder_fixtures
import httpx2
import pytest
from serve_fixtures import launch

from gemwright.cli.serve import Options, loader, run
from gemwright.engine.request import Request
from gemwright.engine.speculative import DraftModel, PromptLookup
from gemwright.engine.structured import Constraint
from gemwright.lm import LM
from gemwright.sampling import SamplingParams
from gemwright.serve.ranks import received, sent

CONTEXT = 512
SHORTER = {"min_tokens": 100, "max_tokens": 100}
ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "request_",
    [
        Request(tokens=(2, 5, 7)),
        Request(tokens=[2, 5], score_from=1, id="a", after="b", adapter="poet"),
        Request(tokens=[2], embed="last"),
        Request(
            tokens=[2, 5],
            params=SamplingParams(
                max_new_tokens=3, temperature=0.7, logit_bias={7: -1.5, 3: 2.0}, stop=("é", "x"),
                stop_ids=frozenset((9, 4)), seed=2**62, logprobs=2, n=2,
            ),
            constraint=Constraint.of("choice", ["yes", "no"]),
        ),
    ],
    ids=["plain", "score", "embed", "all"],
)  # fmt: skip
def test_a_request_comes_through_json_as_it_was(request_: Request) -> None:
    found = received(json.loads(json.dumps(sent(request_), allow_nan=False)))
    assert sent(found) == sent(request_)
    assert (found.params, found.constraint) == (request_.params, request_.constraint)
    assert list(found.tokens) == list(request_.tokens)


def start(folder: Path) -> tuple[subprocess.Popen[str], str]:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--shutdown-timeout", "90")
    return launch(torchrun, folder, "--device", "cpu", "--drain-seconds", "80")[:2]


def test_two_ranks_answer_as_one(tmp_path: Path) -> None:
    """Greedy, sampled without a seed, constrained, scored, left by its client; then SIGTERM while a stream runs."""
    folder_fixtures.gemma2(tmp_path / "tiny", max_position_embeddings=CONTEXT)
    lm = LM(tmp_path / "tiny", device="cpu", dtype="auto")
    own = lm.generate("The sky is", temperature=0, max_new_tokens=12)
    process, url = start(tmp_path / "tiny")
    rest: list[str] = []
    try:
        with httpx2.Client(base_url=url, timeout=60) as http:

            def post(path: str = "/v1/completions", **body: Any) -> Any:
                answer = http.post(path, json=body)
                assert answer.status_code == 200, answer.text
                return answer.json()

            assert post(prompt="The sky is", temperature=0, max_tokens=12)["choices"][0]["text"] == own.text
            long = {"prompt": "The sky", "min_tokens": 300, "max_tokens": 300, "stream": True}
            with http.stream("POST", "/v1/completions", json=long) as answer:
                next(answer.iter_lines())  # and it leaves
            assert post(prompt="a", n=2, temperature=1.0, min_tokens=4, max_tokens=4)["usage"]["completion_tokens"] == 8
            assert post(prompt="a", guided_choice=["red", "green"])["choices"][0]["text"] in ("red", "green")
            (vector,) = post("/v1/embeddings", input="The sky")["data"]
            assert vector["embedding"] == pytest.approx(lm.embed(["The sky"])[0].tolist(), abs=1e-4)
            scored = post(prompt="The sky is", max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
            ids = lm.encode("The sky is")
            ((truth, _),) = lm.engine.score([(ids[:1], ids[1:])])
            assert sum(scored["token_logprobs"][1:]) == pytest.approx(truth, abs=1e-3)

            def follow() -> None:
                with httpx2.stream("POST", f"{url}/v1/completions", json=long | SHORTER, timeout=90) as answer:
                    rest.extend(line for line in answer.iter_lines() if line)

            thread = threading.Thread(target=follow)
            thread.start()
            while "gemwright_running 1.0" not in http.get("/metrics").text:
                assert thread.is_alive()
            process.send_signal(signal.SIGTERM)
            thread.join()
        process.wait(90)
    finally:
        process.kill()
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]


def test_engines_guess_as_they_are_told(lm: LM, tmp_path: Path) -> None:
    plain, lookup = loader(Options(model=str(lm.folder))), loader(Options(model=str(lm.folder), lookup=True))
    assert plain()[1].proposer is None and isinstance(lookup()[1].proposer, PromptLookup)
    made, engine = loader(Options(model=str(lm.folder), draft=str(lm.folder)))()
    assert isinstance(engine.proposer, DraftModel)
    answer = made.generate("The sky is", temperature=0, max_new_tokens=20, engine=engine)
    assert answer.text == lm.generate("The sky is", temperature=0, max_new_tokens=20).text
    assert engine.stats.accepted_tokens > 0
    with pytest.raises(ValueError, match="--lookup and --draft: got both"):
        run(Options(model=str(lm.folder), lookup=True, draft=str(lm.folder)))
    with pytest.raises(ValueError, match=r"--draft: .* has another vocabulary"):
        loader(Options(model=str(lm.folder), draft=str(_other(tmp_path))))()


def _other(tmp_path: Path) -> Path:
    """A model of the same width whose tokenizer reads another way."""
    folder = tmp_path / "other"
    folder_fixtures.gemma2(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    return folder
