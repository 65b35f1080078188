"""/v1/completions, embeddings and the tokenizer's routes, against the library; and what lm-evaluation-harness reads."""

from __future__ import annotations

import base64
import json
from typing import Any, cast

import numpy as np
import openai
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from serve_fixtures import CONTEXT

from gemwright import generate
from gemwright.lm import LM

URL = "/v1/completions"
TEXT = "The capital of Italy is Rome.\nTell me of L'été"


def post(http: TestClient, url: str = URL, **body: Any) -> Any:
    answer = http.post(url, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_texts_and_token_ids_continue_alike(http: TestClient, lm: LM) -> None:
    own = lm.generate(TEXT, temperature=0, max_new_tokens=12)
    for prompt in (TEXT, lm.encode(TEXT), [TEXT], [lm.encode(TEXT)]):
        answer = post(http, model="tiny", prompt=prompt, temperature=0, max_tokens=12)
        assert answer["choices"][0]["text"] == own.text
        assert answer["usage"]["prompt_tokens"] == own.prompt_tokens
    assert len(post(http, prompt=TEXT, temperature=0, min_tokens=16)["choices"][0]["text"]) > 0
    assert post(http, prompt=TEXT, temperature=0, min_tokens=16)["usage"]["completion_tokens"] == 16  # the default


def test_several_prompts_and_samples_are_numbered_prompt_by_prompt(http: TestClient, lm: LM) -> None:
    prompts = [TEXT, "Zwölf Boxkämpfer"]
    own: list[Any] = [lm.generate(one, n=2, seed=4, temperature=1.0, max_new_tokens=8) for one in prompts]
    answer = post(http, prompt=prompts, n=2, seed=4, temperature=1.0, max_tokens=8)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == [one.text for pair in own for one in pair]


def test_lm_evaluation_harness_reads_exact_scores(http: TestClient, lm: LM) -> None:
    """Its sum over token_logprobs[context:-1] and its test for greediness, for a greedy and another continuation."""
    context = lm.encode(TEXT)
    greedy = lm.generate(TEXT, temperature=0, max_new_tokens=4).tokens
    other = lm.tokenizer.encode("Paris.", bos=False)
    pairs = [(context, greedy), (context, other), (context[:1], context[1:])]
    answer = post(http, prompt=[a + b for a, b in pairs], temperature=0, max_tokens=1, logprobs=1, echo=True, seed=1234)
    truth = generate.loglikelihood(lm.model, pairs)
    for choice, (head, tail), (score, is_greedy) in zip(answer["choices"], pairs, truth, strict=True):
        values = choice["logprobs"]["token_logprobs"]
        tops = choice["logprobs"]["top_logprobs"]
        assert values[0] is None and tops[0] is None and len(values) == len(head) + len(tail) + 1
        assert sum(values[len(head) : -1]) == pytest.approx(score, abs=1e-4)
        best = [value == max(top.values()) for value, top in zip(values, tops, strict=True) if top is not None]
        assert all(best[len(head) - 1 : -1]) == is_greedy
    assert [greedy for _, greedy in truth][:2] == [True, False]


def test_an_answer_that_stops_at_once_still_counts_its_token(http: TestClient, lm: LM) -> None:
    """The harness drops the last entry, so a stop token without one would cost a token of the prompt."""
    ids = lm.encode(TEXT)
    bias = {str(i): 100 for i in sorted(lm.stop_ids)}
    answer = post(http, prompt=ids, temperature=0, max_tokens=1, logprobs=0, echo=True, logit_bias=bias)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == TEXT
    assert len(choice["logprobs"]["token_logprobs"]) == len(ids) + 1


def test_echo_alone_scores_without_generating(http: TestClient, lm: LM) -> None:
    whole = post(http, prompt=TEXT, temperature=0, max_tokens=1, logprobs=2, echo=True)["choices"][0]
    alone = post(http, prompt=TEXT, max_tokens=0, logprobs=2, echo=True)["choices"][0]
    assert alone["text"] == TEXT and alone["finish_reason"] == "length"
    assert alone["logprobs"]["token_logprobs"][1:] == pytest.approx(whole["logprobs"]["token_logprobs"][1:-1], abs=1e-4)
    assert alone["logprobs"]["tokens"] == whole["logprobs"]["tokens"][:-1]
    offsets, text = alone["logprobs"]["text_offset"], alone["text"]
    words = [text[a:b] for a, b in zip(offsets, [*offsets[1:], len(text)], strict=True)]
    assert words[1:] == [lm.tokenizer.decode([i]) for i in lm.encode(TEXT)[1:]]


def test_a_streamed_echo_comes_first(http: TestClient, lm: LM) -> None:
    answer = http.post(URL, json={"prompt": TEXT, "echo": True, "stream": True, "temperature": 0, "logprobs": 0})
    parts = [json.loads(event[6:])["choices"][0] for event in answer.text.split("\n\n")[:-2]]
    whole = post(http, prompt=TEXT, echo=True, temperature=0, logprobs=0)["choices"][0]
    assert parts[0]["text"].startswith(TEXT) and "".join(part["text"] for part in parts) == whole["text"]
    for name, values in whole["logprobs"].items():
        joined = [value for part in parts for value in part["logprobs"][name]]
        assert joined == pytest.approx(values, abs=1e-4) if name == "token_logprobs" else joined == values


def test_half_characters_are_told_apart(http: TestClient, lm: LM) -> None:
    """Two byte tokens have the same text, U+FFFD: as keys of top_logprobs they would be one."""
    answer = post(http, prompt=[2, *lm.tokenizer.encode("中", bos=False)], echo=True, max_tokens=0, logprobs=0)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["<bos>", "bytes:\\xe4", "bytes:\\xb8", "bytes:\\xad"]
    assert answer["choices"][0]["logprobs"]["text_offset"] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt[0]"),
        ({"prompt": "a\ud800"}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 1000}, "logprobs"),
        ({"prompt": ["a"] * 300}, "n"),
        ({"prompt": [1] * (CONTEXT + 1)}, "prompt"),
    ],
)
def test_wrong_bodies_are_refused(http: TestClient, body: dict[str, Any], param: str) -> None:
    answer = http.post(URL, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b'"text"', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 10**5, "application/json"),
        (b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", "application/json"),
        (b'{"prompt": "a", "temperature": NaN}', "application/json"),
        (b'{"prompt": "a"}', "text/plain"),  # what a foreign page may send without asking first
        (b"prompt=a", "application/x-www-form-urlencoded"),
    ],
)
def test_bodies_that_are_no_json_object_are_refused(http: TestClient, raw: bytes, kind: str) -> None:
    answer = http.post(URL, content=raw, headers={"Content-Type": kind})
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", answer.text


def test_embeddings_are_the_engines(http: TestClient, lm: LM) -> None:
    texts = [TEXT, "Zwölf"]
    own_BD = lm.engine.embed([lm.encode(text) for text in texts])
    found = post(http, "/v1/embeddings", model="tiny", input=texts)
    assert torch.allclose(torch.tensor([one["embedding"] for one in found["data"]]), own_BD, atol=1e-4)
    assert found["usage"]["prompt_tokens"] == sum(len(lm.encode(text)) for text in texts)
    last_BD = lm.engine.embed([lm.encode(TEXT)], pooling="last")
    packed = post(http, "/v1/embeddings", input=lm.encode(TEXT), encoding_format="base64", pooling="last")
    raw = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert np.allclose(raw, last_BD[0].numpy(), atol=1e-4)
    assert not torch.allclose(last_BD[0], own_BD[0], atol=1e-2)


def test_openais_client_reads_embeddings_and_models(http: TestClient, lm: LM) -> None:
    api = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http)
    vector = api.embeddings.create(model="tiny", input=TEXT).data[0].embedding  # asked for as base64
    assert np.allclose(vector, lm.engine.embed([lm.encode(TEXT)])[0].numpy(), atol=1e-4)
    assert [model.id for model in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("huge")


def test_tokens_go_there_and_back(http: TestClient, lm: LM) -> None:
    ids = post(http, "/tokenize", prompt=TEXT)["tokens"]
    assert ids == lm.encode(TEXT)
    assert post(http, "/tokenize", prompt=TEXT, add_special_tokens=False) == {
        "tokens": ids[1:], "count": len(ids) - 1, "max_model_len": CONTEXT,
    }  # fmt: skip
    assert post(http, "/detokenize", tokens=ids)["prompt"] == f"<bos>{TEXT}"
    refused = http.post("/detokenize", json={"tokens": [0, 10**6]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tokens"


def test_a_sample_that_met_its_stop_string_ends_and_the_others_go_on(http: TestClient, lm: LM) -> None:
    sampling: dict[str, Any] = {"n": 2, "seed": 4, "temperature": 1.0}
    plain: Any = lm.generate(TEXT, max_new_tokens=60, min_new_tokens=60, **sampling)
    texts = [one.text for one in plain]
    stop = next(texts[0][i : i + 3] for i in range(5, 60) if texts[0][i : i + 3] not in texts[1])
    worker = cast(FastAPI, http.app).state.worker
    before = worker.stats.cancelled
    found = post(http, prompt=TEXT, max_tokens=60, min_tokens=60, stop=stop, **sampling)
    assert [one["text"] for one in found["choices"]] == [texts[0].partition(stop)[0], texts[1]]
    assert [one["finish_reason"] for one in found["choices"]] == ["stop", "length"]
    assert worker.stats.cancelled == before + 1
