"""Bodies of requests. A field that is not declared is refused by name; null is the same as absence.

The types are held strictly here; the ranges are those of `SamplingParams`, which checks them itself. Fields that have
only one meaning here (`store`, `best_of`) accept that value alone. Fields beyond OpenAI's: top_k, min_p,
repetition_penalty, min_tokens, and guided_json, guided_regex, guided_choice, guided_grammar.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ID_MAX: Final = 2**31 - 1
STOPS: Final = 16
STOP_CHARACTERS: Final = 256
BIASES: Final = 1024
MESSAGES: Final = 4096
INPUTS: Final = 2048
TOOLS: Final = 128

TokenId = Annotated[int, Field(ge=0, le=ID_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
StopText = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]


class Body(BaseModel):
    """Strict, closed, and null is absence."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _absent(cls, value: Any) -> Any:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else value


class StreamOptions(Body):
    include_usage: bool = False
    """A last chunk tells the tokens used."""


class JsonSchema(Body):
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = True


class ResponseFormat(Body):
    """What the answer must look like; it is held token by token, so `strict` is always so."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: needed with type json_schema, and allowed with it alone")
        return self


class Controls(Body):
    """What both ways of generating share."""

    model: str | None = None
    """A name of /v1/models, or "tgi"; absent: the model itself."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=BIASES)] | None = None
    """Token id -> what is added to its logit."""
    stop: StopText | Annotated[list[StopText], Field(max_length=STOPS)] | None = None
    min_tokens: int | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    """Who the request is for; it goes into the log."""

    @model_validator(mode="after")
    def _consistent(self) -> Controls:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: allowed with stream")
        if len(forms := self._forms()) > 1:
            raise ValueError(f"{forms[1]}: allowed without {forms[0]}")
        return self

    def _forms(self) -> list[str]:
        plain = self.response_format is None or self.response_format.type == "text"
        guides = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
        return ["response_format"] * (not plain) + [name for name in guides if getattr(self, name) is not None]

    @property
    def form(self) -> str | None:
        """The field that says what the answer must look like, if there is one."""
        return next(iter(self._forms()), None)

    def sampling(self) -> dict[str, Any]:
        """The controls under the names of SamplingParams, as far as they are given."""
        same = "n seed temperature top_p top_k min_p repetition_penalty frequency_penalty presence_penalty".split()
        given = {name: value for name in same if (value := getattr(self, name)) is not None}
        if self.min_tokens is not None:
            given["min_new_tokens"] = self.min_tokens
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.logit_bias is not None:
            wrong = [key for key in self.logit_bias if not (key.isascii() and key.isdigit() and int(key) <= ID_MAX)]
            if wrong:
                raise ValueError(f"logit_bias: got key {wrong[0]!r:.40}, allowed is a token id")
            given["logit_bias"] = {int(key): bias for key, bias in self.logit_bias.items()}
        return given


class Part(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One turn. Assistant's turns come back as this server gave them, with `refusal` and the like absent."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    type: Literal["text", "message"] | None = None
    """What lm-evaluation-harness and the Responses API put into a turn; it says nothing more."""
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content: missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: allowed with role assistant")
        if (self.tool_call_id or self.name) and self.role != "tool":
            raise ValueError("tool_call_id: allowed with role tool, as name is")
        return self

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(Controls):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)]
    max_tokens: int | None = None
    """Most new tokens; absent: what the context has left."""
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: Annotated[list[Tool], Field(max_length=TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _chat(self) -> ChatBody:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens: allowed without max_completion_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: allowed with logprobs")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice: allowed with tools")
        if self.callable and (form := self.form) is not None:
            raise ValueError(f"{form}: allowed without tools that may be called")
        return self

    @property
    def callable(self) -> bool:
        """Whether the answer may call a tool."""
        return bool(self.tools) and self.tool_choice != "none"

    def sampling(self) -> dict[str, Any]:
        limit = self.max_tokens if self.max_tokens is not None else self.max_completion_tokens
        given = super().sampling() | ({} if limit is None else {"max_new_tokens": limit})
        return given | ({"logprobs": self.top_logprobs or 0} if self.logprobs else {})


class CompletionBody(Controls):
    """POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=INPUTS)]
    """A text, its token ids, or a list of either. A text gets the BOS that the model wants; ids are taken as is."""
    max_tokens: int = Field(16, ge=0)
    """Most new tokens; 0 with echo scores the prompt alone."""
    echo: bool = False
    logprobs: int | None = None
    """Log-probabilities of the tokens (with echo: of the prompt's, too) and of the N likeliest."""
    best_of: Literal[1] | None = None

    @model_validator(mode="after")
    def _completion(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: got 0, allowed is >= 1, or 0 with echo")
        return self

    def sampling(self) -> dict[str, Any]:
        wanted = {} if self.logprobs is None else {"logprobs": self.logprobs}
        if self.echo and self.logprobs is not None:
            wanted["prompt_logprobs"] = self.logprobs
        return super().sampling() | wanted | ({"max_new_tokens": self.max_tokens} if self.max_tokens else {})


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    input: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1, max_length=INPUTS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Literal["mean", "last"] = "mean"
    """The mean of the final hidden states, or the last one."""
    user: Annotated[str, Field(max_length=512)] | None = None


class TokenizeBody(Body):
    """POST /tokenize: a text, or the messages of a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MESSAGES)] | None = None
    add_special_tokens: bool = True
    """Put the BOS that the model wants in front of a text."""

    @model_validator(mode="after")
    def _one(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: exactly one of prompt and messages is needed")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
