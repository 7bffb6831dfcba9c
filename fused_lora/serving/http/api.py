"""Requests, answers and errors of the HTTP server, in OpenAI's shapes.

What the engine cannot do is refused with a 400 that names the parameter. Only parameters without effect on the answer
(``user`` and the like) are ignored.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from annotated_types import MaxLen
from pydantic import BaseModel, ConfigDict, FailFast, Field

from fused_lora.serving.http.logprobs import MOST_OF_CHATS, MOST_OF_COMPLETIONS, Scored, Speller
from fused_lora.serving.http.record import request_id

# parameter -> the values with which it asks for nothing, beside null
_NEUTRAL: dict[str, tuple] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none", "auto"),  # what "auto" may choose from is in functions, and in tools
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1, 1.0),
    "logit_bias": ({},),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
_WITHOUT_EFFECT = frozenset(
    "metadata parallel_tool_calls prediction prompt_cache_key prompt_cache_retention safety_identifier service_tier "
    "store user".split()
)
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
# what the fields that may be of several types take, and how pydantic calls those types in the place of an error
_EXPECTED = {
    "prompt": "a string, a list of strings, a list of token ids or a list of such lists",
    "stop": "a string or a list of strings",
    "content": "a string or a list of parts of type text",
}
_CHOICE = re.compile(r"str|list\[.*\]")
_IN_MESSAGES = frozenset(("name", "refusal"))  # templates have no use for them


_STOP_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
_STOPS_SCHEMA: dict[str, Any] = {
    "anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS}, {"type": "null"}]
}


def _describe_others(schema: dict[str, Any]) -> None:
    """Put into a request's JSON schema what ``GenerateRequest.check`` accepts beside the fields."""
    others: dict[str, Any] = {name: {"enum": [None, *values]} for name, values in _NEUTRAL.items()}
    others |= {name: {"description": "ignored"} for name in sorted(_WITHOUT_EFFECT)}
    schema["properties"] = {**others, **schema["properties"]}
    schema["additionalProperties"] = {"type": "null"}


def _describe_message(schema: dict[str, Any]) -> None:
    """The same for a message."""
    others = {name: {"description": "ignored"} for name in sorted(_IN_MESSAGES)}
    schema["properties"] = {**others, **schema["properties"]}
    schema["additionalProperties"] = {"enum": [None, []]}


MAX_PROMPTS = 128  # in one request, whatever the server's own limit


class _First(FailFast):
    """The first wrong element ends a list: an error for each of a million would hold up every other client."""

    def __hash__(self) -> int:  # Annotated wants one; there is one instance
        return id(self)


_T = TypeVar("_T")
_FIRST = _First()
Many = Annotated[list[_T], _FIRST]
Few = Annotated[list[_T], _FIRST, MaxLen(MAX_PROMPTS)]


class ApiError(Exception):
    """An answer other than 200, in OpenAI's error shape."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, kind: str | None = None
    ):
        message = message.encode("utf-8", "backslashreplace").decode()  # halves of surrogate pairs cannot be sent
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    @property
    def name(self) -> str:
        """Its code, or its type if it has none."""
        return self.code or self.kind

    def body(self) -> dict[str, Any]:
        """The JSON of the answer, with the id of the request that runs."""
        what = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": {**what, "request_id": request_id.get()}}


def unknown_model(name: str) -> ApiError:
    """404: neither the base model nor an adapter has this name."""
    return ApiError(404, f"The model {name[:100]!r} does not exist", "model", "model_not_found")


def queue_full() -> ApiError:
    """429: as many requests run, wait or are read as the server takes."""
    return ApiError(429, "too many requests are waiting", code="queue_full", kind="rate_limit_error")


def too_slow(seconds: float) -> ApiError:
    """504: the request has had its time, from its first byte on."""
    return ApiError(504, f"the request took longer than {seconds:g} s", code="timeout")


def too_long(context: int, has: str, param: str) -> ApiError:
    """400: the prompt and what it asks for do not fit into the context. Clients know this error by its code, or by one
    of the message's two phrases (LiteLLM, LangChain)."""
    message = f"This model's maximum context length is {context} tokens, and the prompt is too long: {param} has {has}."
    return ApiError(400, message, param, "context_length_exceeded")


def unexpected(error: Exception) -> ApiError:
    """500: an unexpected error."""
    return ApiError(500, f"{type(error).__name__} in the server; its log says more")


def malformed(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """400 for what pydantic found: which field, and what it should have been."""
    # a field of several types has an error for each; that a list is too long is the one to tell
    first = next((error for error in errors if error["type"] == "too_long"), errors[0])
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"body: no JSON: {first['ctx']['error']} at character {place[-1]}")
    choice = next((i for i, part in enumerate(place) if i and _CHOICE.fullmatch(part)), None)  # behind the field's name
    where = ".".join(place[:choice])[:200]
    if first["type"] == "too_long":
        return ApiError(400, f"{where}: expected at most {first['ctx']['max_length']} items", where)
    if choice:
        return ApiError(400, f"{where}: expected {_EXPECTED[place[choice - 1]]}", where)
    if not where:
        return ApiError(400, "body: expected a JSON object, sent with Content-Type: application/json")
    return ApiError(400, f"{where}: {first['msg']}", where)


class Checked(BaseModel):
    """Strict JSON types: a string or true is not a number."""

    model_config = ConfigDict(strict=True)


class StreamOptions(Checked):
    """``continuous_usage_stats`` is vLLM's: each chunk has the usage up to it."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # there is none in any case


class GenerateRequest(Checked):
    """What completions and chat completions have in common."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_describe_others)
    input_name: ClassVar[str]

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: str | Few[str] | None = Field(default=None, json_schema_extra=_STOPS_SCHEMA)
    ignore_eos: bool | None = None  # vLLM's; load generators want answers of one length
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def check(self) -> None:
        """Raise ApiError for a parameter that the engine does not support or that is no parameter."""
        for name, value in (self.model_extra or {}).items():
            if value is None or name in _WITHOUT_EFFECT:
                continue
            if name not in _NEUTRAL:
                raise ApiError(400, f"Unrecognized request argument: {name[:100]}", name[:100])
            # by type too: JSON's true is not 1, nor false 0
            if not any(value == neutral and type(value) is type(neutral) for neutral in _NEUTRAL[name]):
                raise ApiError(400, f"{name} is not supported by this server", name, "unsupported_parameter")
        if len(self.stops()) > MAX_STOPS or any(not 0 < len(s) <= MAX_STOP_LENGTH for s in self.stops()):
            message = f"stop: expected at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters"
            raise ApiError(400, message, "stop")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only with stream=true", "stream_options")

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class CompletionRequest(GenerateRequest):
    input_name = "prompt"
    prompt: str | Many[int] | Few[str] | Few[Many[int]]
    max_tokens: int | None = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=MOST_OF_COMPLETIONS)
    echo: bool | None = None

    def check(self) -> None:
        """As for all requests."""
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: expected at least 1, or 0 with echo=true", "max_tokens")

    def prompts(self) -> list[str | list[int]]:
        """Every prompt of the request, as text or token ids."""
        prompt: Any = self.prompt
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        return prompt if several else [prompt]


class TextPart(Checked):
    type: Literal["text"]
    text: str


class Message(Checked):
    """A message. Content that is not text (pictures, tool calls) is refused."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_describe_message)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Many[TextPart]
    type: Literal["text"] = "text"  # says nothing; lm-eval up to 0.4.9 sends it

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatRequest(GenerateRequest):
    input_name = "messages"
    messages: Many[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MOST_OF_CHATS)
    # vLLM's: what the model's chat template reads beside the messages, as enable_thinking
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None

    def check(self) -> None:
        """As for all requests. A message may hold nothing that would be left out of the prompt."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs=true", "top_logprobs")
        for i, message in enumerate(self.messages):
            for name, value in (message.model_extra or {}).items():
                if name not in _IN_MESSAGES and value not in (None, []):
                    where = f"messages.{i}.{name}"[:200]
                    raise ApiError(400, f"{where} is not supported by this server", where, "unsupported_parameter")


class LoadRequest(Checked):
    """vLLM's request to /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(Checked):
    """vLLM's request to /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_int_id: int | None = None


@dataclass
class Usage:
    """Token counts of an answer."""

    prompt_tokens: int = 0
    completion_tokens: int = 0

    def json(self) -> dict[str, int]:
        """With the total."""
        total = self.prompt_tokens + self.completion_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total}


class Answer:
    """Builds the JSON of one answer, whole or in chunks, with log probabilities if there is a ``speller``."""

    def __init__(self, model: str, chat: bool, speller: Speller | None = None):
        self.chat, self.speller = chat, speller
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: list[str], reasons: list[str], scored: list[list[Scored]], usage: Usage) -> dict[str, Any]:
        """The answer to a request without streaming."""
        choices = []
        for index, (text, reason, tokens) in enumerate(zip(texts, reasons, scored, strict=True)):
            body = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **body, "logprobs": self._logprobs(tokens), "finish_reason": reason})
        return {**self.head, "choices": choices, "usage": usage.json()}

    def opening(self, count: int) -> list[dict[str, Any]]:
        """The chunks before the first token: a chat names the role of each choice."""
        return [self._chunk(i, {"role": "assistant", "content": ""}, None) for i in range(count)] if self.chat else []

    def piece(self, index: int, text: str, reason: str | None, scored: list[Scored]) -> dict[str, Any]:
        """A chunk with further text and tokens of choice ``index``, its last one with a reason."""
        return self._chunk(index, {"content": text} if self.chat else text, reason, self._logprobs(scored))

    def usage(self, usage: Usage) -> dict[str, Any]:
        """The chunk that ``stream_options.include_usage`` asks for."""
        return {**self._stream_head(), "choices": [], "usage": usage.json()}

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any] | None:
        if self.speller is None:
            return None
        return self.speller.of_chat(scored) if self.chat else self.speller.of_completion(scored)

    def _stream_head(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk"} if self.chat else self.head

    def _chunk(self, index: int, body: Any, reason: str | None, logprobs: Any = None) -> dict[str, Any]:
        key = "delta" if self.chat else "text"
        choice = {"index": index, key: body, "logprobs": logprobs, "finish_reason": reason}
        return {**self._stream_head(), "choices": [choice]}
