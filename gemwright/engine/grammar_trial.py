"""A foreign grammar tried where it can do no harm: in a process of its own, with little stack, time and memory.

The library compiles most schemas in a millisecond. But a kilobyte of intersected patterns keeps it busy for minutes,
and a long chain of rules overflows its stack, which ends the whole process. So `python grammar_trial.py` reads a
grammar in the library's own form from standard input, compiles it for a vocabulary of bytes, takes the first mask, and
writes the library's complaint, if it has one. Exit code 0 says that the same can be done in an engine.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, Final

SECONDS: Final = 2
"""Processor time of a trial."""
MEMORY: Final = 2 * 2**30
STACK: Final = 4 * 2**20
"""Half of what a thread has by default, so that what passes here passes there."""
LIMITS: Final[dict[str, Any]] = {"verbose_errors": False, "max_lexer_states": 30_000}
"""Arguments of LLParserLimits: the library's defaults, but a lexer of some 50 MB at most."""


class Bytes:
    """A vocabulary of the 256 bytes and an end."""

    eos_token_id = 256
    bos_token_id = None
    tokens: Final = [*(bytes([b]) for b in range(256)), b"<end>"]
    special_token_ids: Final = [256]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def complaint(grammar: str) -> str:
    """What the library says against a grammar; empty if nothing."""
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    limits = LLParserLimits(**LIMITS)
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error()


def main() -> None:
    grammar = sys.stdin.buffer.read().decode()
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    trial = threading.Thread(target=lambda: sys.stdout.buffer.write(complaint(grammar).encode()))
    trial.start()
    trial.join()


if __name__ == "__main__":
    main()
