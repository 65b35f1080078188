"""Tools for a model that was trained on none: OpenAI's `tools` as text in Gemma 2's turns, and its calls read back.

Gemma 2 has two roles and no tool training, so everything is text in them, in a form that many open models know:

    user    the functions, one JSON object a line, how to call them, and the first question
    model   <tool_call>\\n{"name": "weather", "arguments": {"city": "Rome"}}\\n</tool_call>
    user    <tool_response>\\n{"name": "weather", "content": {"celsius": 21}}\\n</tool_response>
    model   In Rome it is 21 degrees.

`render_tools` writes the turns, `constraint` gives the grammar of what the model may answer, `parse` reads the answer.
Under the grammar `required` and a named function are calls from the first token; `auto` is free text without the marker
`<tool_call>`, or text up to the first marker and calls from there on. A model may be bad at choosing, but it cannot
write a call that does not parse. `tool_choice` none leaves the functions out of the prompt.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal, TypedDict

from gemwright.engine.structured import COMMAND, JSON, Constraint, StructuredMissing

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
CHECKS: Final = 20_000
"""Keywords looked at when arguments are validated: references can multiply, and a schema comes from outside."""
UNCHECKED: Final = ("pattern", "patternProperties")
"""Left to the grammar: Python's regexes may run for ever on a pattern from outside."""

Tool = Mapping[str, Any]
"""{"type": "function", "function": {"name": ..., "description": ..., "parameters": a JSON schema of an object}}"""
ToolChoice = Literal["auto", "none", "required"] | Mapping[str, Any]
"""The mapping names a function: {"type": "function", "function": {"name": ...}}"""


class CalledFunction(TypedDict):
    name: str
    arguments: str
    """JSON."""


class Call(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


def render_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], tool_choice: ToolChoice = "auto"
) -> list[dict[str, str]]:
    """The conversation in turns of `user` and `assistant` alone, for `prompt.render`; other roles are left as they are.

    The functions stand in front of the first user turn. An assistant's `tool_calls` become text, and the results that
    follow become one user turn, with the user's own words after them if there are any. Raises ValueError, naming the
    message or the tool, for what has not OpenAI's shape, for a result without a call and a call without a result.
    """
    functions = _functions(tools)
    choice = _choice(tool_choice, functions)
    turns: list[dict[str, str]] = []
    open_calls: dict[str, str] = {}
    after_result = False
    for index, message in enumerate(messages):
        where, role = f"messages[{index}]", str(message.get("role"))
        content = message.get("content") or ""
        if not isinstance(content, str):
            raise ValueError(f"{where}: content is a {type(content).__name__}; allowed: a string")
        if role != "tool" and open_calls:
            raise ValueError(f"{where}: the call {next(iter(open_calls))!r} before it has no result of role 'tool'")
        if role == "tool":
            name = open_calls.pop(str(message.get("tool_call_id")), None)
            if name is None:
                raise ValueError(f"{where}: tool_call_id {message.get('tool_call_id')!r} is no call that waits for one")
            content = _block("tool_response", {"name": name, "content": _value(content)})
        elif calls := message.get("tool_calls"):
            open_calls = dict(_calls(calls, where))
            content = "\n".join([*filter(None, [content.strip()]), *(_written(call) for call in calls)])
        if after_result and role in ("tool", "user"):
            turns[-1]["content"] += ("\n" if role == "tool" else "\n\n") + content
        else:
            turns.append({"role": "user" if role == "tool" else role, "content": content})
        after_result = role == "tool"
    if functions and choice != "none":
        first = next((turn for turn in turns if turn["role"] == "user"), None)
        if first is None:
            raise ValueError("tools: there is no user turn to put them in front of")
        first["content"] = f"{_manual(functions.values(), choice)}\n\n{first['content'].lstrip()}"
    return turns


def constraint(tools: Sequence[Tool], tool_choice: ToolChoice = "auto", *, parallel: bool = True) -> Constraint | None:
    """What the answer must look like; None where no tool may be called. Without `parallel` it has one call at most.

    A named function is called once. Raises ValueError for tools or a choice of another shape.
    """
    functions = _functions(tools)
    choice = _choice(tool_choice, functions)
    if choice == "none":
        return None
    named = choice in functions
    rules = [
        f"{_rule(function, number)}"
        for number, function in enumerate(functions.values())
        if not named or function["name"] == choice
    ]
    more = "" if named or not parallel else f' ("\\n{OPEN}" call)*'
    if choice == "auto":
        # the first marker ends the text: the rule that has it at its end is lazy, what matches it goes no further
        start = f"start: TEXT | opening call{more}\nopening[lazy]: /(.|\\n)*{OPEN}/\nTEXT: /(.|\\n)*/"
    else:
        start = f'start: "{OPEN}" call{more}'
    return Constraint("grammar", "\n".join([start, "call: " + " | ".join(rules)]), field="tools")


def parse(text: str, tools: Sequence[Tool]) -> tuple[str, list[Call]]:
    """The words and the calls of an answer.

    Raises ValueError, naming the call, for one that is cut off or malformed, that names no function, or whose arguments
    do not satisfy the function's schema.
    """
    functions = _functions(tools)
    content, marker, rest = text.partition(OPEN)
    calls: list[Call] = []
    while marker:
        where = f"tool_calls[{len(calls)}]"
        try:
            value, end = json.JSONDecoder().raw_decode(rest := rest.lstrip())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON after {OPEN}: {error}") from error
        tail = rest[end:].lstrip()
        if not tail.startswith(CLOSE):
            raise ValueError(f"{where}: {tail[:20]!r} after the call; allowed: {CLOSE}")
        calls.append(_call(value, functions, where))
        _, marker, rest = tail.removeprefix(CLOSE).partition(OPEN)
    return content.strip() if calls else text, calls


def _functions(tools: Sequence[Tool]) -> dict[str, dict[str, Any]]:
    """Name, description and parameters of each function, by name. ValueError names the tool."""
    functions: dict[str, dict[str, Any]] = {}
    for index, tool in enumerate(tools):
        where = f"tools[{index}]"
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise ValueError(f'{where}: {tool!r:.80}; allowed: {{"type": "function", "function": {{...}}}}')
        name, parameters = function.get("name"), function.get("parameters") or {}
        if not isinstance(name, str) or not re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", name) or name in functions:
            raise ValueError(f"{where}: name is {name!r:.80}; allowed: 1 to 64 of a-z A-Z 0-9 _ . - and no name twice")
        if not isinstance(parameters, Mapping) or parameters.get("type", "object") != "object":
            raise ValueError(f"{where}: parameters are {parameters!r:.80}; allowed: a JSON schema of type object")
        described = {"description": function["description"]} if function.get("description") else {}
        functions[name] = {"name": name, **described, "parameters": {"type": "object", **parameters}}
    return functions


def _choice(choice: ToolChoice, functions: Mapping[str, Any]) -> str:
    """auto, none, required, or the name of a function."""
    if choice in ("auto", "none"):
        return str(choice) if functions else "none"
    if choice == "required" and functions:
        return "required"
    named = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    if isinstance(named, Mapping) and named.get("name") in functions:
        return str(named["name"])
    raise ValueError(
        f"tool_choice: got {choice!r:.120}; allowed: auto, none, required, or one of {[*functions]} as "
        '{"type": "function", "function": {"name": ...}}'
    )


def _manual(functions: Iterable[Mapping[str, Any]], choice: str) -> str:
    ask = {
        "auto": "Call functions only where they help; otherwise answer in words.",
        "required": "Answer with one or more calls now.",
    }
    lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    example = _block("tool_call", {"name": "function name", "arguments": {"parameter": "value"}})
    return (
        f"You can call these functions; their parameters are described by JSON schemas:\n{lines}\n\n"
        f"To call one, write a block like this, and nothing after the last block:\n{example}\n"
        f"The results come in the next turn. {ask.get(choice) or f'Answer with a call of {choice} now.'}"
    )


def _block(tag: str, value: Any) -> str:
    return f"<{tag}>\n{json.dumps(value, ensure_ascii=False)}\n</{tag}>"


def _rule(function: Mapping[str, Any], number: int) -> str:
    """A call of one function in Lark, from behind the opening marker."""
    head = json.dumps(f'\n{{"name": "{function["name"]}", "arguments": ')
    schema = json.dumps({**function["parameters"], "x-guidance": JSON}, ensure_ascii=False)
    return f'({head} %json {schema} "}}\\n{CLOSE}")'


def _calls(calls: Any, where: str) -> Iterable[tuple[str, str]]:
    """Id and function of each of a message's calls. ValueError names the call."""
    for number, call in enumerate(calls if isinstance(calls, (list, tuple)) else [calls]):
        function = call.get("function") if isinstance(call, Mapping) else None
        values = (
            [call.get("id"), function.get("name"), function.get("arguments")] if isinstance(function, Mapping) else []
        )
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{where}.tool_calls[{number}]: {call!r:.120}; allowed: id, and function: name, arguments")
        if not isinstance(_value(values[2]), dict):
            raise ValueError(f"{where}.tool_calls[{number}]: arguments are {values[2]!r:.80}; allowed: a JSON object")
        yield values[0], values[1]


def _written(call: Mapping[str, Any]) -> str:
    function = call["function"]
    return _block("tool_call", {"name": function["name"], "arguments": _value(function["arguments"])})


def _value(text: str) -> Any:
    """What a text is as JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _call(value: Any, functions: Mapping[str, Mapping[str, Any]], where: str) -> Call:
    if not isinstance(value, dict) or set(value) != {"name", "arguments"} or not isinstance(value["arguments"], dict):
        raise ValueError(f"{where}: {value!r:.80}; allowed: an object of name and arguments")
    function = functions.get(value["name"]) if isinstance(value["name"], str) else None
    if function is None:
        raise ValueError(f"{where}: no function {value['name']!r:.80}; there are {[*functions]}")
    if wrong := _wrong(value["arguments"], function["parameters"]):
        raise ValueError(f"{where}: {value['name']}: {wrong}")
    try:
        arguments = json.dumps(value["arguments"], ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{where}: {value['name']}: a number that JSON does not have: {error}") from error
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": value["name"], "arguments": arguments},
    }


def _wrong(arguments: dict[str, Any], schema: Mapping[str, Any]) -> str | None:
    """The most telling way in which arguments break a schema. ValueError: it cannot be told within CHECKS."""
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import SchemaError, best_match
        from jsonschema.validators import extend
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError as error:
        raise StructuredMissing(f"tools: calls are validated by jsonschema, which this installs: {COMMAND}") from error
    left = CHECKS

    def bounded(keyword: str, check: Callable[..., Any]) -> Callable[..., Any]:
        def run(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise ValueError(f"the schema takes more than {CHECKS} checks")
            # with patternProperties, which properties are additional is for regexes to say
            skipped = keyword in UNCHECKED or ("patternProperties" in schema and keyword.endswith("nalProperties"))
            return () if skipped else check(validator, value, instance, schema)

        return run

    checks = {keyword: bounded(keyword, check) for keyword, check in Draft202012Validator.VALIDATORS.items()}
    validator = extend(Draft202012Validator, checks)(schema, registry=Registry())
    try:
        Draft202012Validator.check_schema(schema)
        found = best_match(validator.iter_errors(arguments))
    except (SchemaError, Unresolvable, RecursionError) as error:
        raise ValueError(f"parameters are no JSON schema that can be checked: {error}") from error
    return None if found is None else f"{found.json_path.replace('$', 'arguments', 1)}: {found.message[:200]}"
