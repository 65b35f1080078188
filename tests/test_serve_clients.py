"""lm-evaluation-harness's own API models against the server, over a real socket; skipped where it is not installed.

Its default sends no BOS, without which Gemma 2 is lost: `add_bos_token=True` belongs to every run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from serve_fixtures import application, listening

from gemwright.lm import LM

WHY = "lm-eval is not installed: pip install 'lm-eval[api]'"
pytest.importorskip("tenacity", reason=WHY)
models: Any = pytest.importorskip("lm_eval.models.openai_completions", reason=WHY)
instance: Any = pytest.importorskip("lm_eval.api.instance", reason=WHY)

CONTEXT = 256
PAIRS = [
    ("Zwölf Boxkämpfer", " zwölf"),
    ("Tell me a joke.", "\nParis"),
    ("", "Hello there"),  # the harness puts the BOS in front of nothing
]
TEXTS = ["Tell me a joke.", "Two and three\n", "Zwölf 中文 🙂"]


@pytest.fixture(scope="module")
def url(lm: LM) -> Iterator[str]:
    with listening(application(lm)) as address:
        yield address


def completions(url: str, lm: LM, **options: Any) -> Any:
    given = {"model": "tiny", "tokenizer": str(lm.folder), "add_bos_token": True, "max_length": CONTEXT}
    return models.LocalCompletionsAPI(base_url=f"{url}/v1/completions", **given, **options)


def asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [
        instance.Instance(request_type=kind, doc={}, arguments=one, idx=number) for number, one in enumerate(arguments)
    ]


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"num_concurrent": 4}], ids=["single", "batch", "parallel"])
def test_its_scores_are_the_librarys(url: str, lm: LM, options: dict[str, int]) -> None:
    greedy = lm.generate(PAIRS[0][0], temperature=0, max_new_tokens=5).text
    pairs = [*PAIRS, (PAIRS[0][0], greedy)]
    for context, continuation in pairs:  # a token across the joint would be two tokens to the harness
        alone = lm.encode(context)
        assert lm.encode(context + continuation)[: len(alone)] == alone
    found = completions(url, lm, **options).loglikelihood(asked("loglikelihood", pairs))
    truth = lm.loglikelihood(pairs)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in truth]
    assert found[-1][1] and not all(is_greedy for _, is_greedy in found)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in truth], abs=1e-3)


def test_its_texts_are_the_librarys(url: str, lm: LM) -> None:
    stop = lm.generate(TEXTS[0], temperature=0, max_new_tokens=12).text[5:7]
    wanted = {"until": [stop], "max_gen_toks": 12, "do_sample": False}
    own = [lm.generate(text, temperature=0, max_new_tokens=12, stop=(stop,)).text for text in TEXTS]
    found = completions(url, lm).generate_until(asked("generate_until", [(text, dict(wanted)) for text in TEXTS]))
    assert stop and found == own
    chat = models.LocalChatCompletion(base_url=f"{url}/v1/chat/completions", model="tiny")
    turns = [{"role": "user", "content": TEXTS[0]}]
    request = asked("generate_until", [(chat.apply_chat_template(turns), {"until": ["\0"], "max_gen_toks": 12})])
    assert chat.generate_until(request) == [lm.generate(turns, temperature=0, max_new_tokens=12).text]


def test_a_task_comes_to_the_same_accuracy(url: str, lm: LM, tmp_path: Path) -> None:
    """The whole way of its evaluator."""
    evaluate: Any = pytest.importorskip("lm_eval", reason=WHY).simple_evaluate
    rows = [{"text": text, "choices": [" Paris", " Rome", " zwölf"], "label": n % 3} for n, text in enumerate(TEXTS)]
    data = tmp_path / "rows.json"
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "three_questions", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "train",
        "dataset_kwargs": {"data_files": str(data), "cache_dir": str(tmp_path)},
        "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}", "target_delimiter": "",
    }  # fmt: skip
    known = pytest.importorskip("lm_eval.tasks", reason=WHY).TaskManager(include_defaults=False)  # scans no task files
    made = evaluate(model=completions(url, lm, batch_size=4), tasks=[task], task_manager=known, bootstrap_iters=0)
    own = []
    for row in rows:
        scores = lm.loglikelihood([(str(row["text"]), choice) for choice in row["choices"]])  # type: ignore[attr-defined]
        own.append(max(range(3), key=lambda n, scores=scores: scores[n][0]) == row["label"])  # type: ignore[misc]
    assert made["results"]["three_questions"]["acc,none"] == pytest.approx(sum(own) / len(own))
