"""The server's OpenAPI description: what each route answers, with which status, and what the key opens."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict

from fused_lora._version import __version__

_STATUS = {
    400: "The request is malformed, or asks for what the engine cannot do; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The server does not load adapters on request.",
    404: "There is no such model or adapter.",
    408: "The body did not come in time.",
    409: "The adapter was changed while the request ran, or is being loaded.",
    413: "The body is too large.",
    422: "The adapter cannot be served, or can never fit into the store, or its answer is not finite.",
    429: "As many requests run and wait as the server takes.",
    500: "The model failed in a step with this request, or the server has an error; its log says more.",
    503: "The engine has stopped, or the server is shutting down.",
    504: "The request took too long.",
}
_READING = (400, 401, 408, 413)  # of every route with a body
GENERATES = (*_READING, 404, 409, 422, 429, 500, 503, 504)
CHANGES_ADAPTERS = (*_READING, 403, 404, 409, 500, 503)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorEntry(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str


class Error(_Answer):
    """OpenAI's shape of an error."""

    error: ErrorEntry


class TokenCounts(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextLogprobs(_Answer):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TokenLogprobs(_Answer):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprobs(TokenLogprobs):
    top_logprobs: list[TokenLogprobs]


class ChatLogprobs(_Answer):
    content: list[ContentLogprobs]
    refusal: None


class _Choice(_Answer):
    index: int
    finish_reason: Literal["stop", "length"]


class TextChoice(_Choice):
    text: str
    logprobs: TextLogprobs | None


class ChatAnswer(_Answer):
    role: Literal["assistant"]
    content: str


class ChatChoice(_Choice):
    message: ChatAnswer
    logprobs: ChatLogprobs | None


class _Generated(_Answer):
    id: str
    created: int
    model: str
    usage: TokenCounts


class Completion(_Generated):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ChatCompletion(_Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelCard(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None


class ModelList(_Answer):
    object: Literal["list"]
    data: list[ModelCard]


class Health(_Answer):
    status: Literal["ok"]


def answers(model: type[BaseModel] | None, *errors: int, kind: str = "") -> dict[str, Any]:
    """Arguments of a FastAPI route: its answer 200, JSON of ``model`` or text of the media type ``kind``; its errors.

    The routes make their answers themselves, so that FastAPI only describes them.
    """
    responses: dict[int, Any] = {code: {"model": Error, "description": _STATUS[code]} for code in sorted(errors)}
    if kind:
        responses[200] = {"content": {kind: {}}}
    return {"response_model": model, "responses": responses, **({} if model else {"response_class": PlainTextResponse})}


def describe(app: FastAPI, with_key: bool, open_paths: tuple[str, ...]) -> None:
    """Give ``app`` its description, with the key if there is one."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=__version__, routes=app.routes)
            if with_key:
                found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in found["paths"].items():
                for method in methods.values():
                    _correct(method["responses"])
                    if with_key and path not in open_paths:
                        method["security"] = [{"key": []}]
            for unused in ("HTTPValidationError", "ValidationError"):
                found["components"]["schemas"].pop(unused, None)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi


def _correct(responses: dict[str, Any]) -> None:
    """Take out FastAPI's own 422, which is a 400 here. Errors are JSON, also of a route that answers with text."""
    if responses.get("422", {}).get("description") != _STATUS[422]:
        responses.pop("422", None)
    for code, response in responses.items():
        if code != "200":
            (schema,) = response["content"].values()
            response["content"] = {"application/json": schema}
