"""gemwright generate: one completion, streamed as text or printed as one JSON object."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes

from gemwright.cli.options import Count, File, Flag, Loading, Model, Sampling, Text

if TYPE_CHECKING:
    from gemwright.generate import TokenLogprob
    from gemwright.lm import LM, Completion


@dataclass(frozen=True)
class Options:
    """Continue a text, or answer a conversation, once.

    The text comes from --prompt, else from stdin; a conversation from --messages. Text is streamed to stdout; notes go
    to stderr.

    For example:

      gemwright generate --prompt "Once upon a time" --max-new-tokens 64

      gemwright generate google/gemma-2-2b-it --messages chat.json --temperature 0 --json

      echo "The capital of France is" | gemwright generate FOLDER --logprobs 5 --json
    """

    model: Model = None
    """Folder or hub name."""
    prompt: Text = None
    """Text to continue, as it is: no chat turns are put around it."""
    messages: File = None
    """JSON file with a list of {"role", "content"}, or an object that has it under "messages"; - reads stdin."""
    system: Text = None
    """With --messages: text put in front of the first user turn."""
    json: Flag = False
    """Print one JSON object: text, tokens, finish_reason, counts, seconds, log-probabilities."""
    logprobs: Count = None
    """With --json: log-probability of each new token and of the N likeliest."""
    prompt_logprobs: Count = None
    """With --json: the same for the prompt's tokens."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    loading: OmitArgPrefixes[Loading] = field(default_factory=Loading)


def run(options: Options) -> int:
    """Generate; 0, or an error of the input."""
    prompt = _prompt(options)
    if not options.json and (options.logprobs is not None or options.prompt_logprobs is not None):
        raise ValueError("--logprobs and --prompt-logprobs: allowed with --json")
    lm = options.loading.load(options.model)
    wanted = {"logprobs": options.logprobs, "prompt_logprobs": options.prompt_logprobs}
    sampling = options.sampling.given() | {name: n for name, n in wanted.items() if n is not None}
    start = time.perf_counter()
    if options.json:
        completion = lm.generate(prompt, system=options.system, **sampling)
        print(json.dumps(report(lm, completion, time.perf_counter() - start), ensure_ascii=False))
        return 0
    stream = lm.stream(prompt, system=options.system, **sampling)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    if stream.completion.finish_reason == "length":
        print(f"(ended after {len(stream.completion.tokens)} tokens: --max-new-tokens or the context)", file=sys.stderr)
    return 0


def _prompt(options: Options) -> str | list[dict[str, str]]:
    """The text, or the messages, that the options name."""
    if options.prompt is not None and options.messages is not None:
        raise ValueError("--prompt and --messages: got both, allowed is one")
    if options.system is not None and options.messages is None:
        raise ValueError("--system: allowed with --messages")
    if options.messages is not None:
        return read_messages(options.messages)
    if options.prompt is not None:
        return options.prompt
    if sys.stdin.isatty():
        raise ValueError("no prompt: give --prompt TEXT or --messages FILE, or pipe the text in")
    return sys.stdin.read().removesuffix("\n")


def read_messages(file: str) -> list[dict[str, str]]:
    """Messages from a JSON file (- for stdin): a list, or an object that has it under "messages"."""
    text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f'{file}: allowed is a list of {{"role", "content"}}, or an object with "messages"')
    return messages


def report(lm: LM, completion: Completion, seconds: float) -> dict[str, Any]:
    """A completion as JSON data."""

    def entries(logprobs: list[TokenLogprob] | None) -> list[dict[str, Any]] | None:
        if logprobs is None:
            return None
        return [
            {**dataclasses.asdict(entry), "token": lm.tokenizer.decode([entry.id], skip_special=False)}
            for entry in logprobs
        ]

    return {
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "new_tokens": len(completion.tokens),
        "seconds": round(seconds, 3),
        "logprobs": entries(completion.logprobs),
        "prompt_logprobs": entries(completion.prompt_logprobs),
    }
