"""Tools: turns by hand, calls that random logits make under the grammar, and what is refused, by name."""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema
import pytest
import tokenizer_fixtures
from test_structured import babble

from gemwright.engine.structured import Grammar, Grammars
from gemwright.prompt import render_text
from gemwright.tokenizer import Tokenizer
from gemwright.tools import constraint, parse, render_tools

WEATHER: dict[str, Any] = {
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"$ref": "#/$defs/unit"},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["celsius", "kelvin"]}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "It's weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock.now"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "unit": "kelvin"}}\n</tool_call>'


def asked(**function: str) -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": function}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tokenizer_fixtures.gemma(tmp_path_factory.mktemp("tools") / "gemma"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, frozenset({1, 107}))


def test_a_conversation_with_tools_is_gemmas_turns(tokenizer: Tokenizer) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "  Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [
            asked(name="weather", arguments='{"city":"Rome","unit":"kelvin"}'),
            {**asked(name="clock.now", arguments="{}"), "id": "c2"}]},
        {"role": "tool", "tool_call_id": "c2", "content": "noon\n"},
        {"role": "tool", "tool_call_id": "c1", "content": '{"t": 294.5}'},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    turns = render_tools(messages, TOOLS)
    shown = (
        "You can call these functions; their parameters are described by JSON schemas:\n"
        + '{"name": "weather", "description": "It\'s weather", "parameters": '
        + json.dumps({"type": "object", **WEATHER})
        + '}\n{"name": "clock.now", "parameters": {"type": "object"}}\n\n'
        + "To call one, write a block like this, and nothing after the last block:\n"
        + '<tool_call>\n{"name": "function name", "arguments": {"parameter": "value"}}\n</tool_call>\n'
        + "The results come in the next turn. Call functions only where they help; otherwise answer in words.\n\nRome?"
    )
    called = CALL + '\n<tool_call>\n{"name": "clock.now", "arguments": {}}\n</tool_call>'
    results = (
        '<tool_response>\n{"name": "clock.now", "content": "noon\\n"}\n</tool_response>\n'
        '<tool_response>\n{"name": "weather", "content": {"t": 294.5}}\n</tool_response>\n\nAnd?'
    )
    assert turns == [
        {"role": "user", "content": shown},
        {"role": "assistant", "content": called},
        {"role": "user", "content": results},
    ]
    text = render_text(turns, tokenizer)  # the turns alternate, or this raises
    assert text.count("<start_of_turn>user") == 2 and text.endswith("And?<end_of_turn>\n<start_of_turn>model\n")
    assert [call["function"] for call in parse(called, TOOLS)[1]] == [
        {"name": "weather", "arguments": '{"city": "Rome", "unit": "kelvin"}'},
        {"name": "clock.now", "arguments": "{}"},
    ], "what is written as history is what would be read as an answer"


def test_the_choice_is_said_in_the_prompt_and_none_says_nothing() -> None:
    messages = [{"role": "user", "content": "Rome?"}]
    assert render_tools(messages, TOOLS, "none") == render_tools(messages, []) == messages
    assert "Answer with one or more calls now." in render_tools(messages, TOOLS, "required")[0]["content"]
    assert "Answer with a call of weather now." in render_tools(messages, TOOLS, NAMED)[0]["content"]
    assert messages == [{"role": "user", "content": "Rome?"}], "the caller's messages are not changed"


def accepts(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the text can be a whole answer."""
    ids, matcher = tokenizer.encode(text, bos=False), grammar.start()
    if matcher.accepts(ids) < len(ids):
        return False
    for i in ids:
        matcher.accept(i)
    return matcher._matcher.is_accepting()


BOTH = CALL + '\n<tool_call>\n{"name": "clock.now", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("choice", "parallel", "good", "bad"),
    [
        ("auto", True, ["", "No <tool_cal", "Let's see.\n" + CALL, BOTH], ["a <tool_call>b", CALL + "x", CALL[:-1]]),
        ("auto", False, ["Yes.", CALL], [BOTH]),
        ("required", True, [CALL, BOTH], ["", "Yes.", "Yes. " + CALL]),
        ("required", False, [CALL], [BOTH]),
        (NAMED, True, [CALL], [BOTH, BOTH[len(CALL) + 1 :], CALL.replace("kelvin", "x"), ""]),
    ],
)
def test_the_grammar_of_an_answer(
    grammars: Grammars, tokenizer: Tokenizer, choice: Any, parallel: bool, good: list[str], bad: list[str]
) -> None:
    wanted = constraint(TOOLS, choice, parallel=parallel)
    assert wanted is not None
    grammar = grammars.compile(wanted)
    assert [text for text in good if not accepts(grammar, tokenizer, text)] == []
    assert [text for text in bad if accepts(grammar, tokenizer, text)] == []


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_whatever_is_drawn_parses_into_calls_that_satisfy_their_schemas(
    grammars: Grammars, tokenizer: Tokenizer, choice: Any
) -> None:
    wanted = constraint(TOOLS, choice)
    assert wanted is not None
    names = set()
    for seed in range(6):
        content, calls = parse(babble(grammars.compile(wanted), grammars, tokenizer, seed), TOOLS)
        assert content == "" and calls
        names |= {call["function"]["name"] for call in calls}
        for call in calls:
            if call["function"]["name"] == "weather":
                jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER)
    assert names == {"weather"} if choice is NAMED else names == {"weather", "clock.now"}


def test_answers_are_read() -> None:
    assert parse("Just <words>.", TOOLS) == ("Just <words>.", [])
    tricky = (
        ' Sure: <tool_call> {"arguments": {"city": "</tool_call>", "unit": "kelvin"}, "name": "weather"} </tool_call> '
    )
    content, (first, second) = parse(tricky + CALL, TOOLS)
    assert content == "Sure:"
    assert json.loads(first["function"]["arguments"]) == {"city": "</tool_call>", "unit": "kelvin"}
    assert first["type"] == "function" and first["id"].startswith("call_") and first["id"] != second["id"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CALL[:-20], r"tool_calls\[0\]: not JSON after <tool_call>"),
        (CALL[:-1], r"tool_calls\[0\]: '</tool_call' after the call; allowed: </tool_call>"),
        (
            CALL + CALL.replace("weather", "x"),
            r"tool_calls\[1\]: no function 'x'; there are \['weather', 'clock.now'\]",
        ),
        (CALL.replace("arguments", "args"), r"tool_calls\[0\]: .*allowed: an object of name and arguments"),
        (CALL.replace("kelvin", "miles"), r"tool_calls\[0\]: weather: arguments.unit: 'miles' is not one of"),
        (CALL.replace('"city": "Rome", ', ""), r"weather: arguments: 'city' is a required property"),
        (CALL.replace('"Rome"', '"Rome", "days": 10'), r"weather: arguments.days: 10 is greater than the maximum"),
        ('<tool_call>{"name": "clock.now", "arguments": {"x": 1e999}}</tool_call>', "a number that JSON does not have"),
        ("<tool_call>" + "[" * 100_000, r"tool_calls\[0\]: not JSON"),
    ],
)
def test_broken_calls_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, TOOLS)


def call_of(schema: dict[str, Any], arguments: str) -> list[Any]:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    return parse(f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>', [tool])[1]


def test_validation_ends_whatever_the_schema() -> None:
    """References that double, a regex that backtracks for ever, a reference elsewhere: schemas come from outside."""
    links = {f"n{i}": {"allOf": [{"$ref": f"#/$defs/n{i + 1}"}] * 2} for i in range(40)}
    with pytest.raises(ValueError, match="the schema takes more than 20000 checks"):
        call_of(
            {"$defs": {**links, "n40": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n0"}}}, '{"a": 1}'
        )
    endless = {"type": "string", "pattern": "^(a+)+$"}
    for schema in (
        {"properties": {"a": endless}},
        {"patternProperties": {"^(a+)+$": {}}, "additionalProperties": False},
    ):
        assert call_of(schema, json.dumps({"a": "a" * 60 + "!", "a" * 60 + "!": 1}))
    with pytest.raises(ValueError, match="no JSON schema that can be checked"):
        call_of({"properties": {"a": {"$ref": "http://127.0.0.1:1/x"}}}, '{"a": 1}')
    with pytest.raises(ValueError, match="no JSON schema that can be checked"):
        call_of({"properties": {"a": {"type": "strin"}}}, '{"a": 1}')


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "retrieval"}], r"tools\[0\]: .*allowed: .*function"),
        ([{"type": "function", "function": {"name": "a b"}}], r"tools\[0\]: name is 'a b'"),
        ([*TOOLS, TOOLS[0]], r"tools\[2\]: name is 'weather'.*no name twice"),
        ([{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}], "of type object"),
        ([{"type": "function", "function": {"name": "a", "parameters": [1]}}], "a JSON schema of type object"),
    ],
)
def test_tools_of_another_shape_are_refused(tools: Any, message: str) -> None:
    for use in (lambda: constraint(tools), lambda: render_tools([], tools), lambda: parse("", tools)):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize("choice", ["any", {"type": "function", "function": {"name": "x"}}, {"name": "weather"}, None])
def test_choices_of_another_shape_are_refused(choice: Any) -> None:
    with pytest.raises(ValueError, match=r"tool_choice: got .*allowed: auto, none, required, or one of \['weather'"):
        constraint(TOOLS, choice)


def test_without_tools_nothing_can_be_asked_for() -> None:
    assert constraint([]) is None and constraint([], "none") is None
    with pytest.raises(ValueError, match="tool_choice: got 'required'"):
        constraint([], "required")


USER, ASKED = (
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "tool_calls": [asked(name="w", arguments="{}")]},
)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, {"role": "tool", "tool_call_id": "c9", "content": ""}], r"messages\[1\]: tool_call_id 'c9' is no call"),
        ([USER, ASKED, USER], r"messages\[2\]: the call 'c1' before it has no result"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"id": "x"}]}],
            r"messages\[1\].tool_calls\[0\]: .*allowed: id, and",
        ),
        (
            [USER, {"role": "assistant", "tool_calls": [asked(name="w", arguments="[")]}],
            r"messages\[1\].tool_calls\[0\]: arguments are '\['; allowed: a JSON object",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]: content is a list; allowed: a string"),
        ([{"role": "assistant", "content": "Hi"}], "tools: there is no user turn"),
    ],
)
def test_messages_of_another_shape_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_tools(messages, TOOLS)


def test_other_roles_are_left_to_the_prompts_rules() -> None:
    turns = render_tools([{"role": "system", "content": "Be brief."}, USER, USER], TOOLS, "none")
    assert [turn["role"] for turn in turns] == ["system", "user", "user"]


def test_without_jsonschema_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ValueError, match=r"tools: .*pip install 'gemwright\[structured\]'"):
        parse(CALL, TOOLS)
    assert parse("words", TOOLS) == ("words", [])
