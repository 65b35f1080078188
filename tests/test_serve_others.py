"""Routes beside OpenAI's older ones: Text Generation Inference's, Vertex AI's, and the Responses API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serve_fixtures import CONTEXT, application, client

from gemwright.cli.serve import Options, address, configure
from gemwright.lm import LM
from gemwright.serve.settings import Keys

TEXT = "The capital of France"
ASK: Any = [{"role": "user", "content": TEXT}]
PREDICT, HEALTH = "/v1/endpoints/7/deployedModels/8:predict", "/v1/endpoints/7/deployedModels/8"


@pytest.fixture(scope="module")
def http(lm: LM) -> Iterator[TestClient]:
    with client(application(lm, predict_route=PREDICT, health_route=HEALTH)) as made:
        yield made


def post(http: TestClient, url: str, **body: Any) -> Any:
    answer = http.post(url, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# --- Text Generation Inference ---------------------------------------------------------------------------------------


def test_generate_is_greedy_unless_told(http: TestClient, lm: LM) -> None:
    """The model's generation_config asks for sampling; TGI does not consult it."""
    lm.generation_config["temperature"] = 1.0
    own = lm.generate(TEXT, temperature=0, max_new_tokens=9)
    assert post(http, "/generate", inputs=TEXT, parameters={"max_new_tokens": 9}) == {"generated_text": own.text}
    sampled = lm.generate(TEXT, temperature=0.8, top_k=0, top_p=1.0, seed=3, max_new_tokens=9)
    told = {"temperature": 0.8, "seed": 3, "max_new_tokens": 9}
    assert sampled.text != own.text
    assert post(http, "/generate", inputs=TEXT, parameters=told)["generated_text"] == sampled.text
    full = post(http, "/generate", inputs=TEXT, parameters={"max_new_tokens": 9, "return_full_text": True})
    assert full["generated_text"] == TEXT + own.text


def test_details_tell_every_token(http: TestClient, lm: LM) -> None:
    own = lm.generate(TEXT, temperature=0, max_new_tokens=6, logprobs=2, prompt_logprobs=0)
    wanted = {"max_new_tokens": 6, "details": True, "decoder_input_details": True, "top_n_tokens": 2}
    details = post(http, "/generate", inputs=TEXT, parameters=wanted)["details"]
    assert (details["finish_reason"], details["generated_tokens"]) == ("length", 6)
    assert [token["id"] for token in details["tokens"]] == own.tokens
    assert own.logprobs is not None and own.prompt_logprobs is not None
    assert [token["logprob"] for token in details["tokens"]] == pytest.approx(
        [s.logprob for s in own.logprobs], abs=1e-4
    )
    assert [[top["id"] for top in tops] for tops in details["top_tokens"]] == [
        [i for i, _ in s.top] for s in own.logprobs
    ]
    assert [token["id"] for token in details["prefill"]] == lm.encode(TEXT) and details["prefill"][0]["logprob"] is None
    values = [token["logprob"] for token in details["prefill"][1:]]
    assert values == pytest.approx([s.logprob for s in own.prompt_logprobs], abs=1e-4)


def test_a_generate_stream_joins_to_the_text(http: TestClient, lm: LM) -> None:
    own = lm.generate(TEXT, temperature=0, max_new_tokens=20)
    raw = http.post("/generate_stream", json={"inputs": TEXT, "parameters": {"max_new_tokens": 20}}).text
    events = [json.loads(event.removeprefix("data:")) for event in raw.split("\n\n") if event]
    assert "".join(event["token"]["text"] for event in events if not event["token"]["special"]) == own.text
    assert [event["index"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["generated_text"] == own.text and events[-1]["details"]["generated_tokens"] == len(events)
    assert all(event["generated_text"] is None for event in events[:-1])


def test_stops_have_tgis_names(http: TestClient, lm: LM) -> None:
    own = lm.generate(TEXT, temperature=0, max_new_tokens=20)
    stop = own.text[4:7]
    found = post(http, "/generate", inputs=TEXT, parameters={"max_new_tokens": 20, "stop": [stop], "details": True})
    assert found["generated_text"] == own.text.partition(stop)[0]
    assert found["details"]["finish_reason"] == "stop_sequence"
    grammar = {"type": "regex", "value": "[0-9]{3}"}
    ended = post(http, "/generate", inputs=TEXT, parameters={"grammar": grammar, "details": True})
    assert ended["generated_text"].isdigit() and len(ended["generated_text"]) == 3
    assert ended["details"]["finish_reason"] == "eos_token"


@pytest.mark.parametrize("wrong", [{"truncate": 5}, {"temperature": -1.0}, {"best_of": 2}, {"max_new_tokens": 0}])
def test_generate_refuses_by_name(http: TestClient, wrong: dict[str, Any]) -> None:
    answer = http.post("/generate", json={"inputs": TEXT, "parameters": wrong})
    (name,) = wrong
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"parameters.{name}", answer.text


@pytest.mark.parametrize("value", [{"enum": ["yes", "no"]}, '{"enum": ["yes", "no"]}'])
def test_a_grammar_is_a_schema_or_its_text(http: TestClient, value: Any) -> None:
    wanted = {"grammar": {"type": "json", "value": value}}
    assert post(http, "/generate", inputs=TEXT, parameters=wanted)["generated_text"] in ('"yes"', '"no"')


@pytest.mark.parametrize(("kind", "value"), [("regex", {"enum": ["yes"]}), ("json", "a text"), ("json", "[1]")])
def test_a_grammar_of_the_other_kind_is_refused(http: TestClient, kind: str, value: Any) -> None:
    """It was a status 500: the schema of the other routes, which the body is put into, raised unheard."""
    answer = http.post("/generate", json={"inputs": TEXT, "parameters": {"grammar": {"type": kind, "value": value}}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "parameters.grammar.value", answer.text


def test_info_tells_the_limits(http: TestClient) -> None:
    told = http.get("/info").json()
    assert (told["model_id"], told["max_total_tokens"], told["model_dtype"]) == ("tiny", CONTEXT, "torch.float32")


# --- Vertex AI -------------------------------------------------------------------------------------------------------


def test_predictions_are_the_routes_answers(http: TestClient, lm: LM) -> None:
    instances = [{"prompt": TEXT}, {"messages": ASK, "max_tokens": 5}, {"inputs": TEXT}]
    answer = http.post(PREDICT, json={"instances": instances[:2], "parameters": {"temperature": 0, "max_tokens": 7}})
    first, second = answer.json()["predictions"]
    assert first["choices"][0]["text"] == lm.generate(TEXT, temperature=0, max_new_tokens=7).text
    assert second["choices"][0]["message"]["content"] == lm.generate(ASK, temperature=0, max_new_tokens=5).text
    third = post(http, PREDICT, instances=instances[2:], parameters={"max_new_tokens": 4})["predictions"][0]
    assert third == {"generated_text": lm.generate(TEXT, temperature=0, max_new_tokens=4).text}
    wrong = http.post(PREDICT, json={"instances": [{"prompt": TEXT}, {"prompt": TEXT, "colour": 1}]})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "instances[1].colour"
    long = http.post(PREDICT, json={"instances": [{"prompt": TEXT, "max_tokens": CONTEXT}]})
    assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
    assert http.post(PREDICT, json={"instances": [{"prompt": TEXT, "stream": True}]}).status_code == 400


def test_vertex_names_port_and_routes(lm: LM) -> None:
    environment = {"AIP_HTTP_PORT": "8080", "AIP_PREDICT_ROUTE": PREDICT, "AIP_HEALTH_ROUTE": HEALTH}
    assert address(Options(), environment) == ("0.0.0.0", 8080)
    assert address(Options(host="::1", port=9), environment) == ("::1", 9)
    assert address(Options(), {}) == ("127.0.0.1", 8000)
    settings = configure(Options(), environment)
    assert (settings.predict_route, settings.health_route, settings.hosts) == (PREDICT, HEALTH, ())
    with pytest.raises(ValueError, match="AIP_HTTP_PORT"):
        address(Options(), {"AIP_HTTP_PORT": "http"})
    with pytest.raises(ValueError, match="predict_route"):
        configure(Options(), {"AIP_PREDICT_ROUTE": "predict"})
    with client(application(lm, predict_route="/p", health_route="/h", keys=Keys(["a-key-of-ours"]))) as guarded:
        assert guarded.get("/h").json() == {"status": "ready"}
        assert guarded.post("/p", json={"instances": [{"prompt": TEXT}]}).status_code == 401


# --- Responses -------------------------------------------------------------------------------------------------------


def test_a_response_is_the_chats_answer(api: Any, lm: LM) -> None:
    own = lm.generate(ASK, system="Be brief.", temperature=0, max_new_tokens=8)
    made = api.responses.create(
        model="tiny", input=TEXT, instructions="Be brief.", temperature=0, max_output_tokens=8, store=False
    )  # fmt: skip
    assert made.output_text == own.text and made.id.startswith("resp_")
    assert (made.usage.input_tokens, made.usage.output_tokens) == (own.prompt_tokens, len(own.tokens))
    assert made.status == ("incomplete" if own.finish_reason == "length" else "completed")
    turns: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": TEXT}]},
        *(item.model_dump(exclude_none=True) for item in made.output),
        {"role": "user", "content": "And then?"},
    ]
    second = api.responses.create(model="tiny", input=turns, temperature=0, max_output_tokens=8)
    told = [*ASK, {"role": "assistant", "content": own.text}, {"role": "user", "content": "And then?"}]
    assert second.output_text == lm.generate(told, temperature=0, max_new_tokens=8).text


def test_a_streamed_response_is_read_by_openais_client(api: Any, lm: LM) -> None:
    own = lm.generate(ASK, temperature=0, max_new_tokens=16)
    with api.responses.stream(model="tiny", input=TEXT, temperature=0, max_output_tokens=16) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == own.text
    last = "response.incomplete" if own.finish_reason == "length" else "response.completed"
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", last,
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].response.output_text == own.text and events[-1].response.usage.input_tokens == own.prompt_tokens


def test_a_response_can_have_a_form(api: Any) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["yes", "no"]}}}
    made = api.responses.create(model="tiny", input=TEXT, text=text, max_output_tokens=60)
    assert made.output_text in ('"yes"', '"no"') and made.status == "completed"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": []}, "tools"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": [{"role": "assistant", "content": "x"}]}, "input"),
    ],
)
def test_what_a_response_cannot_do_is_refused_by_name(http: TestClient, change: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/responses", json={"input": TEXT} | change)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
