"""The command line: `gemwright VERB ...`, one file per verb.

A verb's file has `Options`, a documented dataclass in which every option is declared once, and `run(options) -> int`.
It is imported only when its verb is called, and imports torch only when it runs, so that help comes at once.

Exit codes: 0 done; 1 the work or a check failed; 2 wrong usage or input; 130 interrupted. Errors go to stderr.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

from gemwright import __version__

VERBS: Final[dict[str, str]] = {
    "chat": "talk with a model in the terminal",
    "generate": "continue a text, or answer a conversation, once, or a file of them",
    "serve": "an OpenAI-compatible server with a chat page",
    "sft": "fine-tune on conversations, completions or text",
    "pretrain": "train from fresh weights",
    "distill": "teach a student a teacher's whole distribution",
    "cache-teacher": "store what a teacher says of a data set",
    "synthesize": "let a teacher answer prompts, as data to train on",
    "fuse": "fold an adapter into its base model",
    "bench": "measure the engine, or a server",
    "info": "shapes, parameters, bytes, and what fits this machine",
    "doctor": "check a checkpoint and this machine's arithmetic, trait by trait",
    "download": "fetch a model from the Hugging Face hub",
    "adopt": "put a Llama-style model into the Gemma 2 architecture",
}
"""Verb -> what it does; the module is `gemwright.cli.VERB`, with `_` for `-`."""


def usage() -> str:
    """What `gemwright --help` prints."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
    return (
        f"usage: gemwright VERB [OPTIONS]\n\nGemma 2, exactly and fast.\n\n{verbs}\n\n"
        "`gemwright VERB --help` explains a verb; `gemwright --version` prints the version.\n"
        "`gemwright chat` alone talks with a small bundled model."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb == "--version":
        print(f"gemwright {__version__}")
        return 0
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"gemwright: no verb {verb!r}{hint} The verbs are {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    return _run(verb, rest)


def _run(verb: str, arguments: list[str]) -> int:
    import tyro

    module = importlib.import_module(f"gemwright.cli.{verb.replace('-', '_')}")
    try:
        if hasattr(module, "parse"):  # a verb whose options may also come from a file
            options = module.parse(arguments)
        else:
            options = tyro.cli(
                module.Options, prog=f"gemwright {verb}", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
            )
        return int(module.run(options))
    except SystemExit as end:  # help was printed (0), or the usage was wrong (2)
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"gemwright {verb}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # torch: out of memory and the like; the bundled model's missing base
        print(f"gemwright {verb}: {error}", file=sys.stderr)
        return 1
