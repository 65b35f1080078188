"""LM: text in, text out. Prompts, stop strings and incremental text over a model, a tokenizer and the engine.

    lm = gemwright.load("folder-or-hub-name")
    lm.generate([{"role": "user", "content": "Hi"}], temperature=0).text

`pipeline` gives the same with transformers' call and answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, overload

import torch
from torch import Tensor

from gemwright import bundled, hub, prompt
from gemwright.checkpoint import Checkpoint
from gemwright.engine.engine import Engine
from gemwright.engine.request import Finish, Pooling, Request, TokenEvent
from gemwright.engine.structured import Constraint, Grammars
from gemwright.generate import TokenLogprob
from gemwright.loader import choose_device, load_model
from gemwright.parallel import TensorParallel
from gemwright.sampling import SamplingParams, defaults
from gemwright.tokenizer import TextStream, Tokenizer

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt."""

    text: str
    tokens: list[int]
    """Without the stop id that ended it."""
    finish_reason: Finish
    prompt_tokens: int
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    """From the prompt's second token on."""
    cached_tokens: int = 0
    """Prompt tokens whose keys an earlier request had left."""


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt (a text, or the messages of a conversation) and not a list of them."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))


class Answer:
    """The text of one sample while it grows."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_tokens: int) -> None:
        self._text = TextStream(tokenizer, stop=params.stop)
        self._vocab = tokenizer.vocab_size
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.finish: Finish = "cancelled"

    @property
    def stopped(self) -> bool:
        """Whether a stop string came: the request can be cancelled."""
        return self._text.stopped

    def push(self, event: TokenEvent) -> str:
        """Take an event in; the text that is now certain, all of it with the last event. RuntimeError for a failure."""
        if event.finish == "error":
            raise RuntimeError(f"generation failed: {event.error}")
        if event.prompt_logprobs is not None:
            self.prompt_logprobs = event.prompt_logprobs
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        if self.stopped:
            return ""
        if event.finish is not None:
            self.finish = event.finish
        piece = ""
        if event.token is not None and event.finish != "stop":
            self.tokens.append(event.token)
            if self.logprobs is not None and event.logprob is not None:
                self.logprobs.append(event.logprob)
            # a table padded past the tokenizer's vocabulary can yield an id that has no text
            piece = self._text.push([event.token] if event.token < self._vocab else [])
        if self.stopped:
            self.finish = "stop"
        return piece + self._text.finish() if event.finish is not None else piece

    def completion(self) -> Completion:
        """What there is so far."""
        self._text.finish()
        return Completion(
            self._text.text, self.tokens, self.finish, self.prompt_tokens, self.logprobs, self.prompt_logprobs,
            self.cached_tokens,
        )  # fmt: skip


class Stream:
    """Iterate for pieces of text as they become certain; `completion` is what there is so far, all of it at the end."""

    def __init__(self, engine: Engine, request: Request, answer: Answer) -> None:
        self._answer = answer
        self._pieces = self._run(engine, request)

    def _run(self, engine: Engine, request: Request) -> Iterator[str]:
        events = engine.stream([request])
        try:
            for event in events:
                if piece := self._answer.push(event):
                    yield piece
                if self._answer.stopped:
                    return
        finally:
            events.close()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def completion(self) -> Completion:
        return self._answer.completion()


class LM:
    """A language model with its tokenizer. Made by `load`."""

    def __init__(
        self,
        folder: Path,
        *,
        device: str | int | torch.device,
        dtype: str | torch.dtype,
        attention: str = "auto",
        parallel: TensorParallel | None = None,
    ) -> None:
        self.folder, self.parallel = folder, parallel
        self.device = choose_device(device) if parallel is None else parallel.device
        self.model = load_model(folder, device=self.device, dtype=dtype, attention=attention, parallel=parallel)
        self.config = self.model.config
        self.dtype = self.model.model.embed_tokens.weight.dtype
        self.tokenizer = Tokenizer.load(folder)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"{folder}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model {self.config.vocab_size}"
            )
        self.generation_config = Checkpoint(folder).generation_config
        self.stop_ids = prompt.stop_ids(self.config, self.generation_config, self.tokenizer)

    def encode(self, prompt_: Prompt, *, system: str | None = None) -> list[int]:
        """Token ids of a text (BOS once, as the tokenizer's configuration says) or of a conversation's turns."""
        if isinstance(prompt_, str):
            if system is not None:
                raise ValueError("system: allowed with messages, got a text prompt")
            return self.tokenizer.encode(prompt_)
        return prompt.render(prompt_, self.tokenizer, system=system)

    def params(self, **sampling: Any) -> SamplingParams:
        """Sampling controls: what is given, else the folder's generation_config, else the defaults."""
        fields = [field.name for field in dataclasses.fields(SamplingParams)]
        if unknown := sorted(set(sampling) - set(fields)):
            raise ValueError(f"{unknown[0]}: no such sampling control; allowed are {', '.join(fields)}")
        return SamplingParams(**(defaults(self.generation_config) | sampling))

    @cached_property
    def grammars(self) -> Grammars:
        """Compiles constraints for this tokenizer."""
        return Grammars(self.tokenizer, self.config.vocab_size, self.stop_ids)

    @cached_property
    def engine(self) -> Engine:
        """The engine that this model's own calls run on, made by the first of them."""
        return Engine(self, parallel=self.parallel)

    @overload
    def generate(self, prompts: str | Messages, *, system: str | None = None, **sampling: Any) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, system: str | None = None, **sampling: Any
    ) -> list[Completion]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        system: str | None = None,
        constraint: Constraint | None = None,
        adapter: str | None = None,
        engine: Engine | None = None,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """Generate for one prompt (a text, or messages), or for a list of prompts at once.

        `sampling` takes the fields of SamplingParams; those not given come from the folder's generation_config. With
        n > 1 the answer is a list, n to a prompt. `constraint` (engine.structured.Constraint) says what an answer must
        look like, `adapter` names one that the engine has loaded; `engine` is used instead of this model's own.
        Raises ValueError for a control or a message that is not allowed, ContextError where a prompt does not fit.
        """
        single = _is_one(prompts)
        batch: Sequence[Any] = [prompts] if single else prompts
        params = self.params(**sampling)
        ids = [self.encode(one, system=system) for one in batch]
        requests = [
            Request(id=f"{id(ids)}-{i}", tokens=one, params=params, constraint=constraint, adapter=adapter)
            for i, one in enumerate(ids)
        ]
        answers = {(r.id, n): Answer(self.tokenizer, params, len(r.tokens)) for r in requests for n in range(params.n)}
        runner = engine or self.engine
        for event in runner.stream(requests):
            answer = answers[event.id, event.index]
            answer.push(event)
            if answer.stopped and event.finish is None:
                runner.cancel(event.id, event.index)
        done = [answer.completion() for answer in answers.values()]
        return done[0] if single and params.n == 1 else done

    def stream(
        self,
        prompt_: Prompt,
        *,
        system: str | None = None,
        constraint: Constraint | None = None,
        adapter: str | None = None,
        engine: Engine | None = None,
        **sampling: Any,
    ) -> Stream:
        """The pieces of text for one prompt as they come; arguments as for `generate`, with n = 1."""
        params = self.params(**sampling)
        if params.n > 1:
            raise ValueError(f"n: got {params.n}, allowed is 1 for a stream")
        ids = self.encode(prompt_, system=system)
        # refused here, and not when the first piece is asked for
        runner = engine or self.engine
        runner.check(request := Request(tokens=ids, params=params, constraint=constraint, adapter=adapter))
        return Stream(runner, request, Answer(self.tokenizer, params, len(ids)))

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's summed log-probability in nats; is it the greedy one.

        The two are encoded together and split at the context's length; spaces at the context's end belong to the
        continuation (as lm-evaluation-harness does). An empty context is the BOS.
        """
        return self.engine.score([self._split(*pair) for pair in pairs])

    def embed(self, texts: Sequence[str], *, pooling: Pooling = "mean", normalize: bool = True) -> Tensor:
        """Embeddings [texts, D] in fp32: the final hidden states, their mean or the last token's, of length 1."""
        return self.engine.embed([self.encode(text) for text in texts], pooling=pooling, normalize=normalize)

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        stripped = context.rstrip()
        whole = self.tokenizer.encode(context + continuation)
        first = len(self.tokenizer.encode(stripped)) if stripped else int(self.tokenizer.add_bos)
        if first == 0 and self.tokenizer.bos_id is not None:
            whole, first = [self.tokenizer.bos_id, *whole], 1
        if len(whole) <= first:
            raise ValueError(f"continuation: {continuation!r} adds no token of its own after {context[-20:]!r}")
        return whole[:first], whole[first:]


def load(
    name: str | Path | None = None,
    *,
    device: str | int | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attention: str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    offline: bool = False,
    parallel: TensorParallel | None = None,
) -> LM:
    """Load a model: a local folder, a name on the Hugging Face hub, or, without a name, the bundled small model.

    Args:
        name: folder in Hugging Face layout, or `owner/name` on the hub.
        device: auto (CUDA, else CPU), cpu, cuda, cuda:N, mps.
        dtype: auto (as stored), bfloat16, float32 or float16.
        attention: backend for every phase, or auto.
        revision, token, cache_dir, offline: for hub names, as in huggingface_hub.
        parallel: the ranks that hold the model together (`TensorParallel.join`, under torchrun).
    """
    if name is None:
        folder = bundled.folder()
    else:
        folder = hub.resolve(name, revision=revision, token=token, cache_dir=cache_dir, offline=offline)
    return LM(folder, device=device, dtype=dtype, attention=attention, parallel=parallel)


class TextGeneration:
    """What `pipeline` returns: call it as transformers' text-generation pipeline."""

    CONTROLS: Final = (
        "max_new_tokens",
        "min_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
    )

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    def __call__(self, inputs: Any, *, return_full_text: bool = True, **options: Any) -> list[Any]:
        """Continue a text or a conversation, or each of a list of them.

        Options are transformers' generation arguments; one that is not known is refused by name. Without `do_sample`
        the folder's generation_config decides, else greedy, as in transformers. Returns
        [{"generated_text": text or messages with the answer}], or a list of such lists for a list of inputs.
        """
        do_sample = options.pop("do_sample", self.lm.generation_config.get("do_sample", False))
        stop = options.pop("stop_strings", None) or ()
        if unknown := sorted(set(options) - set(self.CONTROLS)):
            allowed = ", ".join(("do_sample", "stop_strings", "return_full_text", *self.CONTROLS))
            raise ValueError(f"{unknown[0]}: not supported by this pipeline; allowed are {allowed}")
        if not do_sample:
            options["temperature"] = 0.0
        single = _is_one(inputs)
        batch = [inputs] if single else list(inputs)
        answers = self.lm.generate(batch, stop=stop, **options)
        results = [
            [{"generated_text": self._join(i, a, return_full_text)}] for i, a in zip(batch, answers, strict=True)
        ]
        return results[0] if single else results

    @staticmethod
    def _join(given: Prompt, answer: Completion, full: bool) -> Any:
        if not full:
            return answer.text
        if isinstance(given, str):
            return given + answer.text
        return [*given, {"role": "assistant", "content": answer.text}]


def pipeline(
    task: str = "text-generation",
    model: str | Path | None = None,
    *,
    model_kwargs: Mapping[str, Any] | None = None,
    device: str | int | torch.device | None = None,
    device_map: str | None = None,
    dtype: str | torch.dtype | None = None,
    torch_dtype: str | torch.dtype | None = None,
    **options: Any,
) -> TextGeneration:
    """transformers' `pipeline("text-generation", ...)` over an exact Gemma 2.

    `model_kwargs` may hold torch_dtype or dtype, revision, token, cache_dir, local_files_only and attn_implementation
    (every value maps to the exact path). What is not supported is refused by name.
    """
    if task != "text-generation":
        raise ValueError(f"task: got {task!r}, allowed is 'text-generation'")
    kwargs = dict(model_kwargs or {}) | options
    kwargs.pop("attn_implementation", None)  # eager, sdpa, flash: here there is one arithmetic, the exact one
    where = "cpu" if device == -1 else device if device is not None else device_map  # -1: transformers' CPU
    chosen = dtype or torch_dtype or kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
    hub_options = {name: kwargs.pop(name) for name in ("revision", "token", "cache_dir") if name in kwargs}
    offline = bool(kwargs.pop("local_files_only", False))
    for name in ("dtype", "torch_dtype"):
        kwargs.pop(name, None)
    if kwargs:
        raise ValueError(f"{sorted(kwargs)[0]}: not supported by this pipeline")
    lm = load(model, device="auto" if where is None else where, dtype=chosen or "auto", offline=offline, **hub_options)
    return TextGeneration(lm)
