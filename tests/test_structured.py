"""Structured output: every text that random logits make under a grammar satisfies it, by judges of another make.

Judges: jsonschema, Python's re, a list, a bracket counter. What may come next is compared with every continuation of a
finite language, byte by byte.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizer_fixtures
import torch
from test_bundled import needs_base

from gemwright import bundled
from gemwright.engine.structured import (
    Constraint,
    Grammar,
    GrammarError,
    Grammars,
    Matcher,
    StructuredMissing,
)
from gemwright.ops.draw import unpack
from gemwright.sampling import Sampler, SamplingParams
from gemwright.tokenizer import Tokenizer

FIXTURES: dict[str, Callable[[Path], Path]] = {
    "gemma": tokenizer_fixtures.gemma,
    "llama": lambda folder: tokenizer_fixtures.gemma(folder, leading_space=True),
    "byte_level": tokenizer_fixtures.byte_level,
    "sentencepiece": tokenizer_fixtures.sentence_piece,
    "sentencepiece_space": lambda folder: tokenizer_fixtures.sentence_piece(folder, leading_space=True),
}
PADDED = 5
"""Rows of the table past the tokenizer's vocabulary."""

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mail": {"type": "string", "pattern": "^[a-z]{1,5}@[a-z]{2,4}\\.org$"},
        "kind": {"enum": ["été", 'a "b"', None, 3.5]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 3},
        "boss": {"anyOf": [{"$ref": "#/$defs/boss"}, {"type": "null"}]},
    },
    "required": ["name", "age", "mail", "kind", "tags", "boss"],
    "additionalProperties": False,
    "$defs": {"boss": {"type": "object", "properties": {"id": {"type": "boolean"}}, "required": ["id"],
                       "additionalProperties": False}},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: Tokenizer.load(make(folder / name)) for name, make in FIXTURES.items()}


@pytest.fixture(scope="module")
def compilers(tokenizers: dict[str, Tokenizer]) -> dict[str, Grammars]:
    return {name: Grammars(t, t.vocab_size + PADDED, frozenset({t.eos_id})) for name, t in tokenizers.items()}


def mask(matcher: Matcher, grammars: Grammars) -> set[int]:
    row = torch.full((-(-grammars.vocab_size // 32),), -1, dtype=torch.int32)
    matcher.mask(row)
    return set(unpack(row[None], 32 * len(row))[0].nonzero()[:, 0].tolist())


@cache
def closers(tokenizer: Tokenizer) -> list[int]:
    return [i for i in range(tokenizer.vocab_size) if set(tokenizer.token_bytes(i)) & set(b'"]}')]


def babble(grammar: Grammar, grammars: Grammars, tokenizer: Tokenizer, seed: int) -> str:
    """What random logits say under a grammar, with a taste for closing what is open; ended by a stop id."""
    V, closing = grammars.vocab_size, closers(tokenizer)
    matcher, tokens = grammar.start(), list[int]()
    sampler = Sampler([SamplingParams(seed=seed, temperature=1.5, top_k=400)])
    row = torch.empty(1, -(-V // 32), dtype=torch.int32)
    for position in range(500):
        matcher.mask(row[0])
        logits = torch.randn(1, V)
        logits[0, closing] += 1.5 * math.log(V / len(closing))  # as likely as all the others together
        (token,) = sampler(logits, torch.tensor([position]), allowed=([0], row)).tolist()
        if token in grammars.stop_ids:
            return tokenizer.decode(tokens)
        matcher.accept(token)
        tokens.append(token)
        if matcher.done:
            assert mask(matcher, grammars) == set(grammars.stop_ids)
    pytest.fail(f"no end: {tokenizer.decode(tokens)!r}")


def brackets(text: str) -> bool:
    while "()" in text:
        text = text.replace("()", "")
    return not text


def is_json(schema: dict[str, Any]) -> Callable[[str], object]:
    return lambda text: jsonschema.validate(json.loads(text), schema) is None


CASES: dict[str, tuple[Constraint, Callable[[str], object]]] = {
    "schema": (Constraint.of("json_schema", PERSON), is_json(PERSON)),
    "object": (Constraint("json_object"), is_json({"type": "object"})),
    "regex": (Constraint("regex", r"(é|[a-c]{2,4}x)*[0-9]{2}"), re.compile(r"(é|[a-c]{2,4}x)*[0-9]{2}").fullmatch),
    "choice": (Constraint.of("choice", ["Paris", "Par", "L'été", "a\nb\t\\ \"q\"", "€ </s>"]),
               ["Paris", "Par", "L'été", "a\nb\t\\ \"q\"", "€ </s>"].__contains__),
    "lark": (Constraint("grammar", 'start: pair+\npair: "(" pair? ")"'), brackets),
    "gbnf": (Constraint("grammar", 'root ::= "(" root? ")"'), brackets),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FIXTURES)
def test_whatever_is_drawn_satisfies_the_constraint(
    tokenizers: dict[str, Tokenizer], compilers: dict[str, Grammars], name: str, case: str
) -> None:
    constraint, judge = CASES[case]
    grammar = compilers[name].compile(constraint)
    texts = [babble(grammar, compilers[name], tokenizers[name], seed) for seed in range(3)]
    assert all(map(judge, texts)), texts


@needs_base
def test_with_the_bundled_models_tokenizer() -> None:
    tokenizer = Tokenizer.load(bundled.folder(progress=False))
    grammars = Grammars(tokenizer, tokenizer.vocab_size, frozenset({tokenizer.eos_id}))
    for constraint, judge in CASES.values():
        text = babble(grammars.compile(constraint), grammars, tokenizer, 0)
        assert judge(text), text


LANGUAGE = ["Paris", "Pa", "Rome", "é1", "é2", "user\n", "users", "  x"]


@pytest.mark.parametrize("name", ["gemma", "byte_level", "sentencepiece"])
def test_what_may_come_next_is_what_some_text_continues_with(
    tokenizers: dict[str, Tokenizer], compilers: dict[str, Grammars], name: str
) -> None:
    """At every prefix of every text: an id is allowed only if a text goes on with its bytes, and all such ids are
    where the texts part; a stop id exactly at the end of a text; never a control token or a row of padding."""
    tokenizer, grammars = tokenizers[name], compilers[name]
    grammar = grammars.compile(Constraint.of("choice", LANGUAGE))
    spelled = [*map(tokenizer.token_bytes, range(tokenizer.vocab_size))]
    texts = [text.encode() for text in LANGUAGE]
    parted = 0
    for text in LANGUAGE:
        ids, matcher = tokenizer.encode(text, bos=False), grammar.start()
        for count in range(len(ids) + 1):
            so_far = b"".join(spelled[i] for i in ids[:count])
            may = mask(matcher, grammars)
            assert (tokenizer.eos_id in may) == (so_far in texts), so_far
            rests = [one[len(so_far) :] for one in texts if one.startswith(so_far) and one != so_far]
            ordinary = set(range(tokenizer.vocab_size)) - tokenizer.special_ids
            viable = {i for i in ordinary if any(rest.startswith(spelled[i]) for rest in rests)}
            assert may - {tokenizer.eos_id} <= viable, so_far
            if so_far in texts or len({rest[:1] for rest in rests}) > 1:  # otherwise bytes are forced: one id does
                parted += 1
                assert may - {tokenizer.eos_id} == viable, so_far
            if count < len(ids):
                matcher.accept(ids[count])
    assert parted > len(LANGUAGE)


@pytest.mark.parametrize("name", FIXTURES)
def test_no_text_has_control_tokens_or_padding(
    tokenizers: dict[str, Tokenizer], compilers: dict[str, Grammars], name: str
) -> None:
    """Not even where the grammar allows their spelling; the stop id may come because any text may end."""
    tokenizer, grammars = tokenizers[name], compilers[name]
    may = mask(grammars.compile(Constraint("regex", r"(.|\n)*")).start(), grammars)
    assert may & tokenizer.special_ids == {tokenizer.eos_id}
    assert max(may) < tokenizer.vocab_size and len(may) > tokenizer.vocab_size // 2


def test_tokens_are_taken_back_and_tried(tokenizers: dict[str, Tokenizer], compilers: dict[str, Grammars]) -> None:
    """As speculation does: masks after a draft and its rollback are those of a matcher that never saw it."""
    tokenizer, grammars = tokenizers["gemma"], compilers["gemma"]
    grammar = grammars.compile(Constraint("regex", r"[a-z]+ [0-9]+\."))
    ids = tokenizer.encode("the 12", bos=False)
    matcher, fresh = grammar.start(), grammar.start()
    matcher.accept(ids[0])
    fresh.accept(ids[0])
    full_stop, capital = tokenizer.encode(".", bos=False), tokenizer.encode("T", bos=False)
    draft = [*ids[1:], *full_stop, *capital]
    assert matcher.accepts(draft) == len(draft) - 1
    for token in draft[:-1]:
        matcher.accept(token)
    assert matcher.done and not fresh.done
    matcher.rollback(len(draft) - 1)
    assert not matcher.done
    assert mask(matcher, grammars) == mask(fresh, grammars) != mask(grammar.start(), grammars)
    matcher.rollback(0)
    with pytest.raises(GrammarError, match=r"^constraint: .*doesn't satisfy the grammar"):
        matcher.accept(capital[0])
    with pytest.raises(GrammarError):
        mask(matcher, grammars)


def test_a_request_may_have_stop_ids_of_its_own(
    tokenizers: dict[str, Tokenizer], compilers: dict[str, Grammars]
) -> None:
    """Even one that the text uses: it may come at the end and nowhere else."""
    tokenizer, grammars = tokenizers["gemma"], compilers["gemma"]
    (a,), (c,) = (tokenizer.encode(letter, bos=False) for letter in "ac")
    matcher = grammars.compile(Constraint("regex", "[ac]{2}")).start(frozenset({a, 7}))
    assert c in mask(matcher, grammars) and not mask(matcher, grammars) & {a, 7, tokenizer.eos_id}
    matcher.accept(c)
    matcher.accept(c)
    assert mask(matcher, grammars) == {a, 7}


def test_compiling_again_costs_nothing_and_matchers_are_apart(compilers: dict[str, Grammars]) -> None:
    grammars = compilers["byte_level"]
    grammar = grammars.compile(Constraint("regex", "[0-9]+"))
    assert grammars.compile(Constraint("regex", "[0-9]+")) is grammar
    one, other = grammar.start(), grammar.start()
    one.accept(min(mask(one, grammars)))
    assert grammars._tokenizer.eos_id in mask(one, grammars)
    assert grammars._tokenizer.eos_id not in mask(other, grammars)


def test_whitespace_in_json_is_bounded(tokenizers: dict[str, Tokenizer], compilers: dict[str, Grammars]) -> None:
    """A weak model that likes blanks once filled its answers with them. One space or an indented line is allowed."""
    tokenizer, grammars = tokenizers["gemma"], compilers["gemma"]
    grammar = grammars.compile(Constraint.of("json_schema", {"type": "array", "items": {"type": "null"}}))

    def accepted(text: str) -> bool:
        ids = tokenizer.encode(text, bos=False)
        return grammar.start().accepts(ids) == len(ids)

    assert accepted("[null, null]") and accepted("[null,null]") and accepted("[\n    null,\n    null\n]")
    assert not accepted("[null,  null]") and not accepted("[null,\n\nnull]") and not accepted("[" + "\n" + " " * 33)


LOOP = {"$defs": {"n": {"type": "object", "properties": {"k": {"$ref": "#/$defs/n"}}, "required": ["k"]}}}


@pytest.mark.parametrize(
    ("kind", "value", "reason"),
    [
        ("json_schema", {"enum": []}, "Unsatisfiable schema"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum"),
        ("json_schema", {"type": "strin"}, "Invalid type: strin"),
        ("json_schema", {"not": {"type": "string"}}, "Unimplemented keys:.*not"),
        ("json_schema", {"oneOf": [{"type": "string"}, {"minLength": 3, "type": "string"}]}, "oneOf is supported only"),
        ("json_schema", {"type": "string", "not": {}, "x-guidance": {"lenient": True}}, "Unimplemented keys:.*not"),
        ("json_schema", {**LOOP, "$ref": "#/$defs/n"}, "every value that satisfies the schema is endless"),
        ("json_schema", {"$ref": "http://localhost/x"}, "http://localhost/x"),
        ("json_schema", "{", "json_schema is not JSON"),
        ("json_schema", "[" * 100_000, "json_schema is not JSON"),
        ("json_schema", [], r"json_schema is \[\], allowed is an object"),
        ("choice", [], r"choice is \[\], allowed is a list of strings"),
        ("choice", ["a", 1], "allowed is a list of strings"),
        ("regex", "(a", "unclosed group"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", r"[^\s\S]", "no text satisfies it"),
        ("regex", "a" * 200_000, "regex has 200000 characters, allowed are 131072"),
        ("grammar", "start: foo", "unknown name"),
        ("grammar", 'start: start "a"', "no text satisfies it"),
        ("grammar", 'root ::= ("a"', "Expected '\\)'"),
        ("xml", "", "got kind 'xml', allowed are json_schema"),
    ],
)
def test_what_cannot_be_met_is_refused_with_field_and_reason(
    compilers: dict[str, Grammars], kind: Any, value: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^response_format: .*{reason}"):
        compilers["gemma"].compile(Constraint.of(kind, value, field="response_format"))


def test_references_that_end_somewhere_are_not_endless(compilers: dict[str, Grammars]) -> None:
    tree = {"$ref": "#/$defs/a~1b"}
    for node in (
        {"type": "object", "properties": {"k": {"type": "array", "items": tree}}, "required": ["k"]},
        {"anyOf": [{"type": "object", "properties": {"k": tree}, "required": ["k"]}, {"type": "null"}]},
        {"type": ["array", "string"], "items": tree, "minItems": 2},
    ):
        compilers["gemma"].compile(Constraint.of("json_schema", {"$defs": {"a/b": node}, **tree}))
    full = {"$defs": {"a/b": {"type": "array", "items": tree, "minItems": 2}}, **tree}
    with pytest.raises(ValueError, match="endless"):
        compilers["gemma"].compile(Constraint.of("json_schema", full))


def chain(length: int) -> dict[str, Any]:
    """Definitions that each need the next."""
    links = {
        f"n{i}": {"type": "object", "properties": {"k": {"$ref": f"#/$defs/n{i + 1}"}}, "required": ["k"]}
        for i in range(length)
    }
    return {"$defs": {**links, f"n{length}": {"type": "null"}}, "$ref": "#/$defs/n0"}


def test_a_chain_of_references_that_overflows_the_librarys_stack_is_refused(compilers: dict[str, Grammars]) -> None:
    """In this process it would end the process."""
    compilers["gemma"].compile(Constraint.of("json_schema", chain(50)))
    with pytest.raises(ValueError, match="constraint: it takes more than 2 s, or too deep a stack, to compile"):
        compilers["gemma"].compile(Constraint.of("json_schema", chain(1000)))


@pytest.mark.slow
def test_intersections_that_would_compile_for_minutes_are_refused(compilers: dict[str, Grammars]) -> None:
    schema = {"type": "string", "allOf": [{"pattern": f"x{i}"} for i in range(60)]}
    with pytest.raises(ValueError, match="it takes more than 2 s"):
        compilers["gemma"].compile(Constraint.of("json_schema", schema))


def test_values_that_are_no_json_are_refused() -> None:
    with pytest.raises(ValueError, match="response_format: json_schema is no JSON data"):
        Constraint.of("json_schema", {"a": {1, 2}}, field="response_format")


def test_without_the_library_the_command_is_named(
    tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    grammars = Grammars(tokenizers["gemma"], 700, frozenset())
    with pytest.raises(StructuredMissing, match=r"regex: .*pip install 'gemwright\[structured\]'"):
        grammars.compile(Constraint("regex", "a", field="regex"))
