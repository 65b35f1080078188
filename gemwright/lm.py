"""LM: text in, text out. Prompts, stop strings and incremental text over a model, a tokenizer and the plain loop.

    lm = gemwright.load("folder-or-hub-name")
    lm.generate([{"role": "user", "content": "Hi"}], temperature=0).text

`pipeline` gives the same with transformers' call and answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

import torch

from gemwright import bundled, hub, prompt
from gemwright.checkpoint import Checkpoint
from gemwright.generate import Finish, Generation, Token, TokenLogprob, loglikelihood
from gemwright.loader import choose_device, load_model
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


def _is_one(prompts: Any) -> bool:
    """Whether this is one prompt (a text, or the messages of a conversation) and not a list of them."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))


class _Row:
    """The text of one row while it grows."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_tokens: int) -> None:
        self.text = TextStream(tokenizer, stop=params.stop)
        self.vocab = tokenizer.vocab_size
        self.prompt_tokens = prompt_tokens
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.finish: Finish = "length"

    def push(self, token: Token) -> str:
        """Take a token in; the text that is now certain."""
        if token.finish is not None:
            self.finish = token.finish
        if token.finish == "stop":
            return ""
        self.tokens.append(token.id)
        if self.logprobs is not None and token.logprob is not None:
            self.logprobs.append(token.logprob)
        # a table padded past the tokenizer's vocabulary can yield an id that has no text
        piece = self.text.push([token.id] if token.id < self.vocab else [])
        if self.text.stopped:
            self.finish = "stop"
        return piece

    def completion(self, prompt_logprobs: list[TokenLogprob] | None) -> Completion:
        self.text.finish()
        return Completion(self.text.text, self.tokens, self.finish, self.prompt_tokens, self.logprobs, prompt_logprobs)


class Stream:
    """Iterate for pieces of text as they become certain; `completion` is what there is so far, all of it at the end."""

    def __init__(self, generation: Generation, row: _Row) -> None:
        self._generation, self._row = generation, row
        self._pieces = self._run()

    def _run(self) -> Iterator[str]:
        for (token,) in self._generation:
            if piece := self._row.push(token):
                yield piece
            if self._row.text.stopped:
                return
        if tail := self._row.text.finish():
            yield tail

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def completion(self) -> Completion:
        return self._row.completion(self._generation.prompt_logprobs[0])


class LM:
    """A language model with its tokenizer. Made by `load`."""

    def __init__(
        self, folder: Path, *, device: str | int | torch.device, dtype: str | torch.dtype, attention: str = "auto"
    ) -> None:
        self.folder = folder
        self.device = choose_device(device)
        self.model = load_model(folder, device=self.device, dtype=dtype, attention=attention)
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

    @overload
    def generate(self, prompts: str | Messages, *, system: str | None = None, **sampling: Any) -> Completion: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, system: str | None = None, **sampling: Any
    ) -> list[Completion]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, system: str | None = None, **sampling: Any
    ) -> Completion | list[Completion]:
        """Generate for one prompt (a text, or messages), or for a list of prompts as one batch.

        `sampling` takes the fields of SamplingParams; those not given come from the folder's generation_config. Raises
        ValueError for a control or a message that is not allowed, ContextError where a prompt does not fit.
        """
        single = _is_one(prompts)
        batch: Sequence[Any] = [prompts] if single else prompts
        if not batch:
            return []
        params = self.params(**sampling)
        ids = [self.encode(one, system=system) for one in batch]
        generation = Generation(self.model, ids, [params] * len(ids), stop_ids=self.stop_ids)
        rows = [_Row(self.tokenizer, params, len(one)) for one in ids]
        for tokens in generation:
            for token in tokens:
                rows[token.row].push(token)
                if rows[token.row].text.stopped:
                    generation.stop(token.row)
        done = [row.completion(lp) for row, lp in zip(rows, generation.prompt_logprobs, strict=True)]
        return done[0] if single else done

    def stream(self, prompt_: Prompt, *, system: str | None = None, **sampling: Any) -> Stream:
        """The pieces of text for one prompt as they come; arguments as for `generate`."""
        params = self.params(**sampling)
        ids = self.encode(prompt_, system=system)
        generation = Generation(self.model, [ids], [params], stop_ids=self.stop_ids)
        return Stream(generation, _Row(self.tokenizer, params, len(ids)))

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's summed log-probability in nats; is it the greedy one.

        The two are encoded together and split at the context's length; spaces at the context's end belong to the
        continuation (as lm-evaluation-harness does). An empty context is the BOS.
        """
        return loglikelihood(self.model, [self._split(*pair) for pair in pairs])

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
) -> LM:
    """Load a model: a local folder, a name on the Hugging Face hub, or, without a name, the bundled small model.

    Args:
        name: folder in Hugging Face layout, or `owner/name` on the hub.
        device: auto (CUDA, else CPU), cpu, cuda, cuda:N, mps.
        dtype: auto (as stored), bfloat16, float32 or float16.
        attention: backend for every phase, or auto.
        revision, token, cache_dir, offline: for hub names, as in huggingface_hub.
    """
    if name is None:
        folder = bundled.folder()
    else:
        folder = hub.resolve(name, revision=revision, token=token, cache_dir=cache_dir, offline=offline)
    return LM(folder, device=device, dtype=dtype, attention=attention)


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
