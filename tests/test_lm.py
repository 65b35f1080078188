"""LM and the plain loop against transformers on the same folder: greedy text, log-probs, batches, stops, streams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folder_fixtures import gemma2

import gemwright
from gemwright.engine.engine import Engine
from gemwright.engine.request import Request
from gemwright.engine.structured import Constraint
from gemwright.generate import ContextError, Generation
from gemwright.lm import LM, Answer
from gemwright.loader import load_model
from gemwright.lora import LoraConfig, add_lora, save_adapter
from gemwright.sampling import SamplingParams

CHAT = [{"role": "user", "content": "Hello there, how are you?"}]
PROMPTS = ["The capital of France", "Hello", "user\nTell me of the end of a turn, the start of a turn and the end of"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    folder = tmp_path_factory.mktemp("lm") / "model"
    gemma2(folder)
    return gemwright.load(folder, device="cpu")


@pytest.fixture(scope="module")
def oracle(lm: LM) -> Any:
    model = transformers.Gemma2ForCausalLM.from_pretrained(lm.folder, attn_implementation="eager")
    return model.eval()


def greedy(oracle: Any, ids: list[int], steps: int, stop: frozenset[int]) -> list[int]:
    """Greedy continuation by whole forward passes, without any cache."""
    out: list[int] = []
    for _ in range(steps):
        with torch.no_grad():
            token = int(oracle(torch.tensor([ids + out]), use_cache=False).logits[0, -1].argmax())
        if token in stop:
            break
        out.append(token)
    return out


def test_greedy_equals_transformers_past_the_window(lm: LM, oracle: Any) -> None:
    """Prompts of 6 to 40 tokens and 24 more, window 8, alone and as a ragged batch."""
    wanted = [greedy(oracle, lm.encode(p), 24, lm.stop_ids) for p in PROMPTS]
    together = lm.generate(PROMPTS, max_new_tokens=24, temperature=0)
    for prompt, want, answer in zip(PROMPTS, wanted, together, strict=True):
        assert answer.tokens == want
        assert answer.text == lm.tokenizer.decode(want)
        assert lm.generate(prompt, max_new_tokens=24, temperature=0) == answer


def test_small_chunks_change_nothing(lm: LM) -> None:
    """Prefill in chunks of 3 (ring wraps, rows end in different chunks) equals prefill at once."""
    ids = [lm.encode(p) for p in PROMPTS]
    params = [SamplingParams(max_new_tokens=12, temperature=0, logprobs=2, prompt_logprobs=1)] * 3

    def run(chunk: int) -> tuple[list[Any], Any]:
        generation = Generation(lm.model, ids, params, stop_ids=lm.stop_ids, chunk=chunk)
        return [t for step in generation for t in step], generation.prompt_logprobs

    (a, pa), (b, pb) = run(3), run(512)
    assert [(t.row, t.id, t.finish) for t in a] == [(t.row, t.id, t.finish) for t in b]
    for x, y in zip(a, b, strict=True):
        assert x.logprob.logprob == pytest.approx(y.logprob.logprob, rel=1e-4, abs=1e-4)
    for row_a, row_b in zip(pa, pb, strict=True):
        assert [t.id for t in row_a] == [t.id for t in row_b]
        assert [t.logprob for t in row_a] == pytest.approx([t.logprob for t in row_b], rel=1e-4, abs=1e-4)


def test_log_probs_equal_transformers(lm: LM, oracle: Any) -> None:
    answer = lm.generate(PROMPTS[2], max_new_tokens=8, temperature=0, logprobs=3, prompt_logprobs=2)
    ids = lm.encode(PROMPTS[2])
    with torch.no_grad():
        log_p = oracle(torch.tensor([ids + answer.tokens]), use_cache=False).logits[0].log_softmax(-1)
    assert answer.prompt_logprobs is not None
    assert answer.logprobs is not None
    assert len(answer.prompt_logprobs) == len(ids) - 1
    for at, token in enumerate([*answer.prompt_logprobs, *answer.logprobs]):
        assert token.logprob == pytest.approx(float(log_p[at, token.id]), rel=1e-4, abs=1e-3)
        best = log_p[at].topk(len(token.top))
        assert [i for i, _ in token.top] == best.indices.tolist()
        assert [p for _, p in token.top] == pytest.approx(best.values.tolist(), rel=1e-4, abs=1e-3)


def test_loglikelihood_equals_transformers(lm: LM, oracle: Any) -> None:
    pairs = [
        ("The capital of France is", " Paris."),
        ("", "Hello there"),
        ("Thank  ", "qwx"),
        (PROMPTS[2], "\nThe capital"),
    ]
    for (context, continuation), (total, is_greedy) in zip(pairs, lm.loglikelihood(pairs), strict=True):
        ids = lm.tokenizer.encode(context + continuation)
        first = len(lm.tokenizer.encode(context.rstrip())) if context else 1
        with torch.no_grad():
            log_p = oracle(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        want = sum(float(log_p[at - 1, ids[at]]) for at in range(first, len(ids)))
        assert total == pytest.approx(want, rel=1e-4)
        assert is_greedy == all(int(log_p[at - 1].argmax()) == ids[at] for at in range(first, len(ids)))


def test_a_greedy_continuation_is_recognised(lm: LM) -> None:
    """is_greedy must be able to be true, by the tokens that the model itself would have taken."""
    from gemwright.generate import loglikelihood

    ids = lm.encode("Hello")
    out = lm.generate("Hello", max_new_tokens=5, temperature=0).tokens
    assert out
    assert loglikelihood(lm.model, [(ids, out)])[0][1] is True
    assert loglikelihood(lm.model, [(ids, [(out[0] + 1) % 100, *out[1:]])])[0][1] is False


def test_a_stream_joins_to_the_completion(lm: LM) -> None:
    stream = lm.stream(CHAT, max_new_tokens=20, seed=7)
    pieces = list(stream)
    assert "".join(pieces) == stream.completion.text
    assert stream.completion == lm.generate(CHAT, max_new_tokens=20, seed=7)
    assert len(pieces) > 1


def test_seeds_repeat_in_company_and_differ_from_each_other(lm: LM) -> None:
    alone = lm.generate(PROMPTS[0], max_new_tokens=16, seed=5).tokens
    assert lm.generate(PROMPTS, max_new_tokens=16, seed=5)[0].tokens == alone
    assert lm.generate(PROMPTS[0], max_new_tokens=16, seed=6).tokens != alone
    unseeded = {tuple(lm.generate(PROMPTS[0], max_new_tokens=16).tokens) for _ in range(3)}
    assert len(unseeded) > 1


def test_stop_ids_and_min_new_tokens(lm: LM) -> None:
    free = lm.generate("Hello", max_new_tokens=16, temperature=0)
    stop = free.tokens[3]
    cut = lm.generate("Hello", max_new_tokens=16, temperature=0, stop_ids=frozenset({stop}))
    assert cut.tokens == free.tokens[: free.tokens.index(stop)]
    assert cut.finish_reason == "stop"
    longer = lm.generate("Hello", max_new_tokens=16, temperature=0, stop_ids=frozenset({stop}), min_new_tokens=6)
    assert len(longer.tokens) >= 6
    assert stop not in longer.tokens[:6]


def test_stop_strings_across_tokens_are_not_printed(lm: LM) -> None:
    free = lm.generate("Hello", max_new_tokens=24, temperature=0).text
    stop = free[4:7]
    for answer in (
        lm.generate("Hello", max_new_tokens=24, temperature=0, stop=(stop,)),
        lm.generate(["Hello"], max_new_tokens=24, temperature=0, stop=(stop,))[0],
    ):
        assert answer.text == free[: free.index(stop)]
        assert answer.finish_reason == "stop"
    stream = lm.stream("Hello", max_new_tokens=24, temperature=0, stop=(stop,))
    assert "".join(stream) == free[: free.index(stop)]


def test_past_the_context_is_an_error_with_the_counts(lm: LM) -> None:
    context = lm.config.max_position_embeddings
    text = "Hello " * context
    count = len(lm.encode(text))
    with pytest.raises(ContextError, match=rf"{count} tokens.*{context}"):
        lm.generate(text)
    ids = len(lm.encode("Hello"))
    with pytest.raises(
        ContextError, match=rf"prompt of {ids} tokens and max_new_tokens {context}: the context holds {context}"
    ):
        lm.generate("Hello", max_new_tokens=context)
    with pytest.raises(ContextError):
        lm.loglikelihood([("Hello", text)])


def test_the_context_can_be_filled_to_the_last_position(lm: LM) -> None:
    context = lm.config.max_position_embeddings
    ids = lm.encode("Hello")
    left = context - len(ids)
    answer = lm.generate("Hello", max_new_tokens=left, temperature=0, stop_ids=frozenset())
    assert (len(answer.tokens), answer.finish_reason) == (left, "length")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(prompts="Hi", heat=1), "heat: no such sampling control"),
        (dict(prompts="Hi", temperature=-1), "temperature: got -1"),
        (dict(prompts="Hi", system="Be brief"), "system: allowed with messages"),
        (dict(prompts=[{"role": "assistant", "content": "x"}]), "assistant"),
    ],
)
def test_bad_calls_are_named(lm: LM, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm.generate(call.pop("prompts"), **call)


def test_pipeline_answers_like_transformers(lm: LM, oracle: Any) -> None:
    pipe = gemwright.pipeline(
        "text-generation", model=lm.folder, model_kwargs={"torch_dtype": torch.float32}, device="cpu"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm.folder)
    theirs = transformers.pipeline("text-generation", model=oracle, tokenizer=tokenizer)
    text = "The capital of France"
    assert pipe(text, max_new_tokens=8, do_sample=False) == theirs(text, max_new_tokens=8, do_sample=False)
    short = pipe(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    assert short == theirs(text, max_new_tokens=8, do_sample=False, return_full_text=False)
    answer = pipe(CHAT, max_new_tokens=8)[0]["generated_text"]
    assert answer[:-1] == CHAT
    assert answer[-1] == {"role": "assistant", "content": lm.generate(CHAT, max_new_tokens=8, temperature=0).text}
    assert [len(x) for x in pipe([text, "Hello"], max_new_tokens=2)] == [1, 1]


@pytest.mark.parametrize("where", ["model_kwargs", "options"])
def test_pipeline_refuses_what_it_does_not_do(lm: LM, where: str) -> None:
    extra = {"quantization_config": {"load_in_4bit": True}}
    kwargs = {"model_kwargs": extra} if where == "model_kwargs" else extra
    with pytest.raises(ValueError, match="quantization_config: not supported"):
        gemwright.pipeline("text-generation", model=lm.folder, **kwargs)
    with pytest.raises(ValueError, match="task: got 'summarization'"):
        gemwright.pipeline("summarization", model=lm.folder)
    with pytest.raises(ValueError, match="num_beams: not supported"):
        gemwright.pipeline(model=lm.folder)("Hello", num_beams=4)


def test_folder_defaults_are_used_and_can_be_overruled(tmp_path: Path) -> None:
    gemma2(tmp_path / "model", generation={"eos_token_id": [1, 107], "do_sample": False})
    lm = gemwright.load(str(tmp_path / "model"), device="cpu")
    assert lm.params().temperature == 0
    assert lm.params(temperature=1.5).temperature == 1.5
    assert lm.stop_ids == {1, 107}


def test_an_id_past_the_tokenizer_has_no_text(tmp_path: Path) -> None:
    """A table of more rows than the tokenizer has tokens; sampling such a row once raised amid an answer."""
    gemma2(tmp_path / "model", vocab_size=5000)
    lm = gemwright.load(tmp_path / "model", device="cpu")
    answer = lm.generate("Hello", max_new_tokens=40, seed=1, stop_ids=frozenset())
    assert max(answer.tokens) >= lm.tokenizer.vocab_size
    assert answer.text == lm.tokenizer.decode([i for i in answer.tokens if i < lm.tokenizer.vocab_size])


def test_constraints_hold_in_company(lm: LM) -> None:
    """A choice, a schema and free text side by side; the free one is what it is alone; all end by themselves."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    limits = [Constraint.of("choice", ["red", "green"]), Constraint.of("json_schema", schema), None]
    params = lm.params(max_new_tokens=40, temperature=1.0, seed=2)
    requests = [
        Request(id=str(i), tokens=lm.encode(PROMPTS[i]), params=params, constraint=limit)
        for i, limit in enumerate(limits)
    ]
    answers = [Answer(lm.tokenizer, params, len(request.tokens)) for request in requests]
    for event in lm.engine.stream(requests):
        answers[int(event.id)].push(event)
    choice, data, free = (answer.completion() for answer in answers)
    assert choice.text in ("red", "green")
    assert json.loads(data.text)["a"] in (1, 2)
    assert choice.finish_reason == data.finish_reason == "stop"
    assert free.tokens == lm.generate(PROMPTS[2], max_new_tokens=40, temperature=1.0, seed=2).tokens
    with pytest.raises(ValueError, match="constraint: Invalid type: nonsense"):
        lm.generate(PROMPTS[0], constraint=Constraint.of("json_schema", {"type": "nonsense"}))


def test_an_adapter_is_one_requests_own(lm: LM, tmp_path: Path) -> None:
    """With and without an adapter in one batch: each is what it is alone, and keys are not shared between them."""
    model = load_model(lm.folder, device=torch.device("cpu"), pack=False)
    for name in add_lora(model, LoraConfig(rank=4)):
        torch.nn.init.normal_(model.get_submodule(name).lora_B, std=0.5)  # type: ignore[arg-type]
    save_adapter(model, tmp_path / "adapter")
    engine = Engine(lm, rows=4)
    engine.load_adapter("a", tmp_path / "adapter")
    prompt = " ".join(PROMPTS) * 2
    plain = lm.generate(prompt, max_new_tokens=12, temperature=0)
    first = lm.generate(prompt, max_new_tokens=12, temperature=0, engine=engine)
    adapted = lm.generate(prompt, max_new_tokens=12, temperature=0, engine=engine, adapter="a")
    assert first.tokens == plain.tokens != adapted.tokens
    assert adapted.cached_tokens == 0
    params = SamplingParams(max_new_tokens=12, temperature=0)
    tokens = [token.id for (token,) in Generation(model, [lm.encode(prompt)], [params], stop_ids=lm.stop_ids)]
    assert [i for i in tokens if i not in lm.stop_ids] == adapted.tokens
    with pytest.raises(ValueError, match="adapter: got 'b', loaded are a"):
        lm.generate(prompt, engine=engine, adapter="b")
    engine.unload_adapter("a")
    assert lm.generate(prompt, max_new_tokens=12, temperature=0, engine=engine).tokens == plain.tokens


def test_the_samples_of_a_prompt(lm: LM) -> None:
    """n samples to a prompt, in order; the first is the plain one; a stop string ends one and not its siblings."""
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0, "seed": 3}
    two = lm.generate(PROMPTS[:2], n=3, **options)
    assert [two[0].text, two[3].text] == [lm.generate(prompt, **options).text for prompt in PROMPTS[:2]]
    stop = two[1].text[2:5]
    cut = lm.generate(PROMPTS[:1], n=3, stop=stop, **options)
    assert [one.text for one in cut] == [one.text.partition(stop)[0] for one in two[:3]]
    assert cut[1].finish_reason == "stop"
    with pytest.raises(ValueError, match="n: got 2, allowed is 1 for a stream"):
        lm.stream(PROMPTS[0], n=2, temperature=1.0)
