"""gemwright synthesize: a teacher answers prompts in bulk, as rows that sft reads."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import OmitArgPrefixes

from gemwright.cli.options import File, Flag, Loading, Model, Sampling, Text

if TYPE_CHECKING:
    from gemwright.synthesize import Server


@dataclass(frozen=True)
class Options:
    """Let a teacher answer a file of prompts: rows of messages with their provenance, which sft and distill read.

    Prompts and answers that say the same are kept once. A run that was ended, or whose server failed, goes on with the
    same command. For example:

      gemwright synthesize google/gemma-2-9b-it --prompts prompts.jsonl --output chats.jsonl --max-new-tokens 512

      gemwright synthesize --server http://127.0.0.1:8000/v1 --server-model NAME --prompts p.jsonl --output chats.jsonl
    """

    model: Model = None
    """Folder or hub name of the teacher; default: the bundled model."""
    prompts: File = None
    """JSON lines, each with "prompt" (a text, asked as a user's turn) or "messages" (their last answer is left out)."""
    output: File = None
    """Where the rows go; prompts without an answer go to OUTPUT.failed.jsonl."""
    system: Text = None
    """Text put in front of the first user turn, in what is asked and in the rows."""
    keep_cut: Flag = False
    """Keep answers that the limit of tokens ended."""
    server: Text = None
    """Base URL of an OpenAI-compatible server that answers instead of a model here; its key is read from
    OPENAI_API_KEY."""
    server_model: Text = None
    """The server's name for the model."""
    concurrency: int = 8
    """With --server: requests in flight at once."""
    retries: int = 5
    """With --server: further tries after a fault, with growing pauses."""
    rows: int = 32
    """Without --server: most answers that grow at once."""
    json: Flag = False
    """Print what was done as one JSON object."""
    sampling: OmitArgPrefixes[Sampling] = field(default_factory=Sampling)
    loading: OmitArgPrefixes[Loading] = field(default_factory=Loading)


def run(options: Options) -> int:
    """Synthesize; 0, or 1 where some prompts could not be answered."""
    from gemwright.synthesize import synthesize

    if options.prompts is None or options.output is None:
        raise ValueError("--prompts and --output: both are needed")
    target = Path(options.output).expanduser()
    if target.exists():  # before a model is loaded
        raise ValueError(f"output: {target} exists; remove it, or choose another name")
    common: dict[str, Any] = {
        "sampling": options.sampling.given(), "system": options.system, "keep_cut": options.keep_cut,
    }  # fmt: skip
    source, start = Path(options.prompts).expanduser(), time.perf_counter()
    if options.server is not None:
        server = _server(options)
        done = synthesize(server, source, target, name=server.model, **common)
    else:
        from gemwright.engine.engine import Engine

        lm = options.loading.load(options.model)
        engine = Engine(lm, rows=options.rows, budget=max(512, 2 * options.rows))
        done = synthesize(lm, source, target, name=options.model or lm.folder.name, engine=engine, **common)
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps(dataclasses.asdict(done) | {"seconds": round(seconds, 2)}))
    else:
        print(
            f"{done.rows} rows from {done.prompts} prompts; left out: {done.same_prompts} prompts and "
            f"{done.same_answers} answers that say the same, {done.empty} empty, {done.cut} cut, {done.failed} failed"
        )
    if done.failed:
        print(f"{done.failed} prompts have no answer, the first: {done.first_error}", file=sys.stderr)
    return 1 if done.failed else 0


def _server(options: Options) -> Server:
    from gemwright.synthesize import Server

    if options.server is None or options.server_model is None:
        raise ValueError("--server-model: not given; allowed is the server's name for the model")
    return Server(
        url=options.server, model=options.server_model, key=os.environ.get("OPENAI_API_KEY"),
        concurrency=options.concurrency, retries=options.retries,
    )  # fmt: skip
