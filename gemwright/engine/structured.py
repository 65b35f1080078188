"""Structured output: which tokens may come next, so that an answer satisfies a JSON schema, a regex, a list, a grammar.

    grammars = Grammars(tokenizer, vocab_size, stop_ids)       # once for a model
    grammar = grammars.compile(Constraint("regex", "[0-9]+"))  # once for a constraint; refuses what cannot be met
    matcher = grammar.start()                                  # once for a sequence
    matcher.mask(row_W); matcher.accept(token)                 # for each token

The library is llguidance (extra "structured"): an Earley parser over a lexer of regex derivatives, which needs no
tables made beforehand. It refuses the parts of JSON Schema that it does not do instead of passing over them. What a
schema leaves open is decided here: whitespace between tokens is one space, or a line break with an indent, or nothing,
so that no answer is lost in blanks; properties come in the schema's order.

A grammar comes from outside, so it is tried in a process of its own first (`grammar_trial`; some 0.1 s, saved where a
schema is small and simple), and each step has limits. `compile` may be called from any thread: a server compiles in one
of its own, so that the engine finds the grammar in the cache.

Legend: V vocabulary, W = ceil(V / 32) words of 32 bits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import unquote

import numpy as np
import torch
from torch import Tensor

from gemwright.engine import grammar_trial
from gemwright.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

COMMAND: Final = "pip install 'gemwright[structured]'"
LONGEST: Final = 128 * 1024
"""Most characters of a constraint's source."""
SMALL: Final = 8 * 1024
"""Characters of a JSON schema that needs no trial if its keywords are simple."""
CACHED: Final = 64
"""Compiled grammars kept, the least recently used dropped first."""
TRIAL_WALL_SECONDS: Final = 30.0
JSON: Final[Any] = {"whitespace_pattern": r"[ ]|\n[ ]{0,32}", "lenient": False, "coerce_one_of": False}
"""The library's options for JSON, which a schema may not override: bounded whitespace, and nothing passed over."""

Kind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]
KINDS: Final[tuple[Kind, ...]] = ("json_schema", "json_object", "regex", "choice", "grammar")


class StructuredMissing(ValueError):
    """The library for constraints is not installed; the message has the command."""


class GrammarError(RuntimeError):
    """A sequence under a grammar cannot go on: a limit of the library, or a token that the grammar does not allow."""


@dataclass(frozen=True)
class Constraint:
    """What an answer must look like."""

    kind: Kind
    source: str = ""
    """json_schema: the schema as JSON. regex: Rust's syntax, for the whole answer. choice: a JSON list of strings.
    grammar: Lark, in llguidance's dialect, or GBNF. json_object: nothing."""
    field: str = "constraint"
    """The request's field that it came from: errors name it."""

    @classmethod
    def of(cls, kind: Kind, value: Any, *, field: str = "constraint") -> Constraint:
        """A constraint from JSON data: a schema as a mapping, choices as a list; text is taken as it is."""
        try:
            return cls(kind, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), field)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{field}: {kind} is no JSON data: {error}") from error


class Grammars:
    """Compiles constraints for one vocabulary. The library's view of it is built by the first constraint."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        """Width of a row of logits; ids past the tokenizer's are never allowed."""
        self.stop_ids = stop_ids
        self._cached = lru_cache(maxsize=CACHED)(self._compile)

    def compile(self, constraint: Constraint) -> Grammar:
        """The grammar of a constraint, from the cache where it was compiled before.

        Raises ValueError, naming the field and the reason, for a source that is malformed, asks for something that is
        not supported, cannot be met, or is too large; StructuredMissing without the library.
        """
        return self._cached(constraint)

    def _compile(self, constraint: Constraint) -> Grammar:
        source = _source(constraint)
        from llguidance import LLMatcher, LLParserLimits

        if not _harmless(constraint.kind, source):
            _try(source, constraint.field)
        if constraint.kind == "json_schema" and _endless(json.loads(constraint.source)):
            raise ValueError(f"{constraint.field}: every value that satisfies the schema is endless")
        limits = LLParserLimits(**grammar_trial.LIMITS)
        matcher = LLMatcher(self._library, source, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(f"{constraint.field}: {_reason(matcher.get_error())}")
        return Grammar(matcher, self, constraint.field)

    @cached_property
    def _library(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        stops = sorted(self.stop_ids) or [self._tokenizer.eos_id]
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._tokenizer, self.vocab_size)), eos_token=stops)


class Grammar:
    """A compiled constraint."""

    def __init__(self, matcher: LLMatcher, grammars: Grammars, field: str) -> None:
        self._matcher, self._grammars, self._field = matcher, grammars, field

    def start(self, stop_ids: frozenset[int] | None = None) -> Matcher:
        """A matcher before the first token. `stop_ids`: the ids that end this sequence; None: those of the model."""
        own = None if stop_ids in (None, self._grammars.stop_ids) else stop_ids
        return Matcher(self._matcher.deep_copy(), self._grammars, self._field, own)


class Matcher:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: LLMatcher, grammars: Grammars, field: str, own: frozenset[int] | None) -> None:
        self._matcher, self._field = matcher, field
        self._words = -(-grammars.vocab_size // 32)
        self._own: tuple[Tensor, Tensor] | None = None
        if own is not None:
            self._own = _bits(own | grammars.stop_ids, self._words), _bits(own, self._words)

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing but a stop id may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self, row_W: Tensor) -> None:
        """Fill a row of int32 words on the CPU: bit v % 32 of word v // 32 says whether id v may come next.

        Stop ids may come exactly where the text may end. Raises GrammarError.
        """
        assert row_W.shape == (self._words,) and row_W.dtype == torch.int32 and row_W.is_contiguous(), row_W.shape
        self._matcher.unsafe_compute_mask_ptr(row_W.data_ptr(), 4 * self._words)
        self._check()
        if self._own is not None:
            stops_W, own_W = self._own
            row_W &= ~stops_W
            if self._matcher.is_accepting():
                row_W |= own_W

    def accepts(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first, the grammar allows. The state stays."""
        return self._matcher.validate_tokens(list(tokens))

    def accept(self, token: int) -> None:
        """Take the next token of the text (not the stop id that ends it). Raises GrammarError."""
        self._matcher.consume_token(token)
        self._check()

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""
        if count:
            assert self._matcher.rollback(count), (count, self._matcher.get_error())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"{self._field}: {_reason(self._matcher.get_error())}")


class _Vocabulary:
    """A tokenizer as the library wants it: bytes of every id, and text to ids."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(i) for i in range(size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        ordinary = (i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids)
        self._ids = {self.tokens[i]: i for i in ordinary if self.tokens[i]}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that follows other text; the longest match each where the tokenizer would put a space first."""
        ids, data = self._tokenizer.encode(text, bos=False), text.encode()
        if b"".join(self.tokens[i] for i in ids) == data:
            return ids
        ids, start = [], 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[data[start:end]])
            start = end
        return ids


def _bits(ids: Iterable[int], words: int) -> Tensor:
    row = np.zeros(words, np.uint32)
    for i in ids:
        row[i // 32] |= np.uint32(1 << i % 32)
    return torch.from_numpy(row.view(np.int32))


def _source(constraint: Constraint) -> str:
    """The constraint in the library's own form. ValueError, StructuredMissing."""
    kind, source, field = constraint.kind, constraint.source, constraint.field
    if kind not in KINDS:
        raise ValueError(f"{field}: got kind {kind!r}, allowed are {', '.join(KINDS)}")
    if len(source) > LONGEST:
        raise ValueError(f"{field}: {kind} has {len(source)} characters, allowed are {LONGEST}")
    try:
        from llguidance import LLMatcher, grammar_from
    except ImportError as error:
        raise StructuredMissing(f"{field}: constraints need llguidance, which this installs: {COMMAND}") from error
    if kind == "regex":
        return LLMatcher.grammar_from_regex(source)
    if kind == "grammar":
        try:
            return grammar_from("grammar", source)
        except ValueError as error:
            raise ValueError(f"{field}: {_reason(str(error))}") from error
    try:
        data = json.loads(source) if kind != "json_object" else {"type": "object"}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field}: {kind} is not JSON: {error}") from error
    if kind == "choice":
        if not isinstance(data, list) or not data or not all(isinstance(one, str) for one in data):
            raise ValueError(f"{field}: choice is {source:.80}, allowed is a list of strings, at least one")
        # one terminal: as rules, thousands of choices would pass the parser's limits
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, data)))
    if not isinstance(data, dict):
        raise ValueError(f"{field}: json_schema is {source:.80}, allowed is an object")
    return LLMatcher.grammar_from_json_schema(data, overrides=JSON)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _harmless(kind: Kind, source: str) -> bool:
    """Whether compiling takes time and stack in proportion to a small size: nothing refers, intersects or repeats."""
    plain = kind == "json_schema" and len(source) < SMALL and not re.search(r'"(\$\w+|allOf|pattern\w*)"', source)
    return kind in ("choice", "json_object") or plain


def _try(source: str, field: str) -> None:
    """Compile elsewhere first; ValueError for what is refused or does not end."""
    command = [sys.executable, "-P", str(Path(grammar_trial.__file__))]
    try:
        trial = subprocess.run(command, input=source.encode(), capture_output=True, timeout=TRIAL_WALL_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{field}: it takes more than {TRIAL_WALL_SECONDS} s to compile") from None
    if trial.returncode:
        raise ValueError(f"{field}: it takes more than {grammar_trial.SECONDS} s, or too deep a stack, to compile")
    if trial.stdout:
        raise ValueError(f"{field}: {_reason(trial.stdout.decode())}")


def _reason(error: str) -> str:
    """The library's message in one line."""
    if "NoExtension" in error:
        return "no text satisfies it"
    if "coerce_one_of" in error:
        return "oneOf is supported only where its alternatives exclude each other visibly; anyOf does not ask for that"
    if found := re.search(r"^error: (.+)$", error, re.MULTILINE):  # of the regex parser, below a drawing
        return found[1]
    return re.sub(r"\s+", " ", error.replace("<non-verbose/>", "")).strip()[:300]


def _endless(schema: dict[str, Any]) -> bool:
    """Whether references go round without an end, so that no finite value satisfies the schema.

    The set of references with a finite value grows from none until it grows no more.
    """
    references = set(_references(schema))
    finite = {reference for reference in references if not reference.startswith("#")}
    while new := {r for r in references - finite if _finite(_target(schema, r), finite)}:
        finite |= new
    return not _finite(schema, finite)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _references(one)


def _target(schema: Any, reference: str) -> Any:
    """What a JSON pointer points to (RFC 6901)."""
    for part in unquote(reference.removeprefix("#")).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        schema = schema[int(name)] if isinstance(schema, list) else schema.get(name, True)
    return schema


def _finite(schema: Any, known: set[str]) -> bool:
    """Whether a finite value may satisfy a schema, given the references for which one does."""
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return schema is not False
    if "$ref" in schema and schema["$ref"] not in known:
        return False
    if not all(_finite(one, known) for one in schema.get("allOf", ())):
        return False
    for name in ("anyOf", "oneOf"):
        if name in schema and not any(_finite(one, known) for one in schema[name]):
            return False
    kinds = schema.get("type", "null")
    return any(_finite_kind(kind, schema, known) for kind in ([kinds] if isinstance(kinds, str) else kinds))


def _finite_kind(kind: str, schema: dict[str, Any], known: set[str]) -> bool:
    if kind == "object":
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        return all(_finite(properties.get(name, others), known) for name in schema.get("required", ()))
    if kind == "array":
        first, least = schema.get("prefixItems", []), schema.get("minItems", 0)
        needed = [*first[:least], *[schema.get("items", True)] * (least > len(first))]
        return all(_finite(one, known) for one in needed)
    return True
