"""Answers of a given form, answers that call tools, and adapters as model names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serve_fixtures import application, client, tiny
from torch import nn

from gemwright import prompt
from gemwright.engine.engine import Engine
from gemwright.lm import LM
from gemwright.loader import load_model
from gemwright.lora import LoraConfig, add_lora, save_adapter
from gemwright.serve.chat import Chat
from gemwright.serve.schema import ChatBody
from gemwright.tools import render_tools

ASK: Any = [{"role": "user", "content": "The capital of France"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "old": {"type": "boolean"}},
    "required": ["city", "old"],
    "additionalProperties": False,
}
CONTEXT = 2048
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def answer(http: TestClient, **body: Any) -> str:
    found = http.post(CHAT, json={"messages": ASK, "max_tokens": 400, "seed": 1, "temperature": 1.0} | body)
    assert found.status_code == 200, found.text
    choice = found.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    text: str = choice["message"]["content"]
    return text


def test_a_schema_is_kept_to_by_a_model_of_random_weights(http: TestClient, lm: LM) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    blank = {str(i): -100 for i in range(lm.tokenizer.vocab_size) if lm.tokenizer.decode([i]).isspace()}
    value = json.loads(answer(http, response_format=form, logit_bias=blank))
    assert set(value) == {"city", "old"} and value["city"] in ("Paris", "Rome") and isinstance(value["old"], bool)
    assert answer(http, guided_json={"enum": ["left", "right"]}) in ('"left"', '"right"')


def test_regex_choice_and_grammar_are_kept_to(http: TestClient) -> None:
    assert re.fullmatch("[a-c]{3,9}!", answer(http, guided_regex="[a-c]{3,9}!"))
    assert answer(http, guided_choice=["yes", "no"]) in ("yes", "no")
    assert re.fullmatch("x+y", answer(http, guided_grammar='start: "x"+ "y"'))


def test_a_completion_can_have_a_form_too(http: TestClient) -> None:
    body = {"prompt": "Pick:", "guided_choice": ["left", "right"], "temperature": 0, "max_tokens": 20}
    assert http.post(TEXT, json=body).json()["choices"][0]["text"] in ("left", "right")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"guided_regex": "["}, "guided_regex"),
        ({"guided_grammar": "start: nothing"}, "guided_grammar"),
        ({"guided_json": {"type": "colour"}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}},
            "response_format.json_schema.schema",
        ),
    ],
)
def test_a_form_that_cannot_be_is_refused_by_name(http: TestClient, body: dict[str, Any], param: str) -> None:
    found = http.post(CHAT, json={"messages": ASK} | body)
    assert found.status_code == 400 and found.json()["error"]["param"] == param, found.text


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, {"prompt": "a", "guided_choice": ["\ud800"]}, "guided_choice"),
        (TEXT, {"prompt": "a", "guided_json": {"enum": ["\ud800"]}}, "guided_json"),
        (TEXT, {"prompt": "\ud800"}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ("/v1/responses", {"input": "a", "metadata": {"\ud800": "b"}}, "metadata"),
        ("/generate", {"inputs": "a", "parameters": {"grammar": {"type": "regex", "value": "\ud800"}}}, None),
    ],
)
def test_half_a_character_is_refused_by_name(http: TestClient, path: str, body: Any, param: str | None) -> None:
    """JSON can spell a lone surrogate, which no UTF-8 has. In a key of metadata it came back as a status 500."""
    found = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert found.status_code == 400, found.text
    assert (found.json()["error"]["param"] or "").startswith(param or "parameters.grammar.value")


def test_an_adapter_is_a_model_of_its_own(tmp_path: Path) -> None:
    lm, other = tiny(tmp_path / "model"), tiny(tmp_path / "other")
    other.model = load_model(other.folder, device=other.device, pack=False)
    for name in add_lora(other.model, LoraConfig(rank=2)):
        nn.init.normal_(other.model.get_submodule(name).lora_B, std=0.3)  # type: ignore[arg-type]
    folder = save_adapter(other.model, tmp_path / "poet")
    expected = [
        lm.generate(ASK, temperature=0, max_new_tokens=8).text,
        other.generate(ASK, temperature=0, max_new_tokens=8).text,
    ]

    def make() -> Engine:
        engine = Engine(lm, rows=4, budget=64, cache_tokens=1024)
        engine.load_adapter("poet", folder)
        return engine

    with client(application(lm, engine=make)) as http:
        cards = http.get("/v1/models").json()["data"]
        assert [(card["id"], card.get("parent")) for card in cards] == [("tiny", None), ("poet", "tiny")]
        body = {"messages": ASK, "temperature": 0, "max_tokens": 8}
        texts = [http.post(CHAT, json=body | {"model": name}).json() for name in ("tiny", "poet")]
        assert [one["choices"][0]["message"]["content"] for one in texts] == expected
        assert expected[0] != expected[1] and texts[1]["model"] == "poet"


NO_MORE = {"additionalProperties": False}
CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]} | NO_MORE
NOTHING = {"type": "object", "properties": {}} | NO_MORE
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock", "parameters": NOTHING}},
]
CALL: Any = {"messages": ASK, "tools": TOOLS, "max_tokens": 200, "temperature": 0, "parallel_tool_calls": False}


def test_a_named_function_is_called(http: TestClient) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    found = http.post(CHAT, json=CALL | {"tool_choice": choice}).json()["choices"][0]
    (call,) = found["message"]["tool_calls"]
    assert found["finish_reason"] == "tool_calls" and found["message"]["content"] is None
    assert call["type"] == "function" and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")


def test_streamed_calls_are_the_whole_ones(http: TestClient) -> None:
    body = CALL | {"tool_choice": "required"}
    whole = http.post(CHAT, json=body).json()["choices"][0]
    events = http.post(CHAT, json=body | {"stream": True}).text.split("\n\n")[:-2]
    choices = [json.loads(event[6:])["choices"][0] for event in events]
    assert whole["finish_reason"] == choices[-1]["finish_reason"] == "tool_calls"
    (call,) = choices[-1]["delta"]["tool_calls"]
    assert call["index"] == 0 and call["function"] == whole["message"]["tool_calls"][0]["function"]
    assert not any(choice["delta"].get("content") for choice in choices)


def test_a_call_that_is_cut_off_is_words(http: TestClient) -> None:
    body = CALL | {"tool_choice": "required", "max_tokens": 8}
    whole = http.post(CHAT, json=body).json()["choices"][0]
    assert whole["finish_reason"] == "length" and whole["message"]["content"].startswith("<tool_ca")
    events = http.post(CHAT, json=body | {"stream": True}).text.split("\n\n")[:-2]
    deltas = [json.loads(event[6:])["choices"][0]["delta"] for event in events]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["message"]["content"]


def test_without_a_call_tools_leave_words_alone(http: TestClient, lm: LM) -> None:
    own = lm.generate(ASK, temperature=0, max_new_tokens=8).text
    found = http.post(CHAT, json=CALL | {"tool_choice": "none", "max_tokens": 8}).json()["choices"][0]
    assert found["message"]["content"] == own and "tool_calls" not in found["message"]


def test_words_before_a_call_are_sent_as_they_come() -> None:
    """The marker, its beginnings and the space in front of it are held back; nothing else is."""
    body = ChatBody.model_validate(CALL)
    chat = Chat.__new__(Chat)
    chat.body = body
    text, sent, out = "It rains <tool_calls> here. \n<tool_call>\n{", 0, ""
    for end in range(1, len(text) + 1):
        stop = chat._certain(text[:end], sent)
        out, sent = out + text[sent:stop], stop
        assert end < 5 or end > 27 or sent >= end - len("<tool_call>") - 1
    assert out == "It rains <tool_calls> here."


def test_results_go_back_to_the_model(http: TestClient, lm: LM) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    past = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    ids = http.post("/tokenize", json={"messages": past}).json()["tokens"]
    own = prompt.render(render_tools(past[1:], []), lm.tokenizer, system="Be brief.")
    assert ids == own and '"content": "noon"' in lm.tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type"),
        ({"tools": TOOLS, "guided_regex": "a"}, "guided_regex"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"messages": [{"role": "system", "content": "a"}, *ASK, *ASK]}, "messages[2]"),
        ({"messages": [*ASK, {"role": "tool", "tool_call_id": "x", "content": "1"}]}, "messages[1]"),
    ],
)
def test_wrong_tools_are_refused_by_name(http: TestClient, body: dict[str, Any], param: str) -> None:
    found = http.post(CHAT, json={"messages": ASK} | body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["param"] == param or param in error["message"], error
