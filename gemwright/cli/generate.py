"""gemwright generate: one completion, streamed as text or printed as one JSON object, or a file of them."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from gemwright.cli.options import Count, File, Flag, Loading, Model, Sampling, Text

if TYPE_CHECKING:
    from gemwright.engine.engine import Engine
    from gemwright.engine.structured import Constraint
    from gemwright.generate import TokenLogprob
    from gemwright.lm import LM, Completion


@dataclass(frozen=True)
class Options:
    """Continue a text, or answer a conversation, once; or a whole file of them.

    The text comes from --prompt, else from stdin; a conversation from --messages. Text is streamed to stdout; notes go
    to stderr. With --input and --output, a file of prompts is answered many at a time; a run that was ended goes on
    where it was when it is started again.

    For example:

      gemwright generate --prompt "Once upon a time" --max-new-tokens 64

      gemwright generate google/gemma-2-2b-it --messages chat.json --temperature 0 --json

      echo "The capital of France is" | gemwright generate FOLDER --logprobs 5 --json

      gemwright generate FOLDER --input prompts.jsonl --output answers.jsonl --rows 16
    """

    model: Model = None
    """Folder or hub name."""
    prompt: Text = None
    """Text to continue, as it is: no chat turns are put around it."""
    messages: File = None
    """JSON file with a list of {"role", "content"}, or an object that has it under "messages"; - reads stdin."""
    system: Text = None
    """With --messages: text put in front of the first user turn."""
    input: File = None
    """JSON lines, each with "prompt" or "messages" (and "sampling", controls of its own); other keys are kept."""
    output: File = None
    """Where the lines of --input go, in their order, with "answer", "finish_reason" and counts, or "error"."""
    json_schema: File = None
    """File with a JSON schema that the answer must satisfy."""
    regex: Text = None
    """Regular expression that the whole answer must match."""
    choice: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT", help_behavior_hint="")] = ()
    """The answer is one of these; given once for each."""
    grammar: File = None
    """File with a Lark grammar of the answer."""
    adapter: File = None
    """PEFT folder of a LoRA adapter to apply."""
    lookup: Flag = False
    """Guess tokens that repeat the prompt (editing, quoting): the same answer, sooner where the guesses hold."""
    rows: int = 32
    """With --input: most prompts that run at once."""
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
    if (options.input is None) != (options.output is None):
        raise ValueError("--input and --output: got one, allowed is both or neither")
    prompt = _prompt(options) if options.input is None else None
    if not options.json and (options.logprobs is not None or options.prompt_logprobs is not None):
        raise ValueError("--logprobs and --prompt-logprobs: allowed with --json")
    limits = _constraint(options)
    with options.loading.ranks() as parallel:
        if parallel is not None and options.input is not None:
            raise ValueError("--input: not under torchrun; a model that one machine holds answers files in one process")
        lm = options.loading.load(options.model, parallel)
        engine = _engine(options, lm)
        wanted = {"logprobs": options.logprobs, "prompt_logprobs": options.prompt_logprobs}
        sampling = options.sampling.given() | {name: n for name, n in wanted.items() if n is not None}
        common: dict[str, Any] = {"constraint": limits, "adapter": options.adapter, "engine": engine}
        if prompt is None:
            return _bulk(options, lm, sampling, common)
        return _one(options, lm, prompt, sampling | common)


def _one(options: Options, lm: LM, prompt: str | list[dict[str, str]], how: dict[str, Any]) -> int:
    """Answer one prompt."""
    start = time.perf_counter()
    if options.json:
        completion = lm.generate(prompt, system=options.system, **how)
        print(json.dumps(report(lm, completion, time.perf_counter() - start), ensure_ascii=False))
        return 0
    stream = lm.stream(prompt, system=options.system, **how)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    if stream.completion.finish_reason == "length":
        print(f"(ended after {len(stream.completion.tokens)} tokens: --max-new-tokens or the context)", file=sys.stderr)
    return 0


def _constraint(options: Options) -> Constraint | None:
    """What the options say an answer must look like."""
    from gemwright.engine.structured import Constraint, Kind

    given: dict[Kind, Any] = {"regex": options.regex, "choice": options.choice or None}
    if options.json_schema is not None:
        given["json_schema"] = Path(options.json_schema).read_text(encoding="utf-8")
    if options.grammar is not None:
        given["grammar"] = Path(options.grammar).read_text(encoding="utf-8")
    found = {kind: value for kind, value in given.items() if value is not None}
    if len(found) > 1:
        raise ValueError(f"{', '.join('--' + kind.replace('_', '-') for kind in found)}: allowed is one of them")
    return next((Constraint.of(kind, value) for kind, value in found.items()), None)


def _engine(options: Options, lm: LM) -> Engine:
    """An engine of the size and with the adapter that the options name."""
    from gemwright.engine.engine import Engine
    from gemwright.engine.speculative import PromptLookup

    rows = options.rows if options.input is not None else 1
    proposer = PromptLookup() if options.lookup else None
    engine = Engine(lm, rows=rows, budget=max(512, 2 * rows), proposer=proposer, parallel=lm.parallel)
    if options.adapter is not None:
        engine.load_adapter(options.adapter, options.adapter)
    return engine


def _bulk(options: Options, lm: LM, sampling: dict[str, Any], common: dict[str, Any]) -> int:
    """Answer the lines of a file; 1 where some could not be answered."""
    from gemwright.bulk import bulk

    assert options.input is not None and options.output is not None
    source, target = Path(options.input), Path(options.output)
    done = bulk(lm, source, target, sampling=sampling, system=options.system, **common)
    if options.json:
        print(json.dumps(dataclasses.asdict(done)))
    else:
        found = f", {done.found} found from an earlier run" if done.found else ""
        print(f"{target}: {done.answered} answered, {done.failed} failed{found}; {done.new_tokens} new tokens")
    return 1 if done.failed else 0


def _prompt(options: Options) -> str | list[dict[str, str]]:
    """The text, or the messages, that the options name."""
    if options.prompt is not None and options.messages is not None:
        raise ValueError("--prompt and --messages: got both, allowed is one")
    if options.system is not None and options.messages is None and options.input is None:
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
