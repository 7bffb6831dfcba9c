"""``fused-lora serve``: an OpenAI-compatible HTTP server for one model and a folder of adapters.

    /v1/completions  /v1/chat/completions                  ``model`` names the adapter, or the base model
    /v1/models  /v1/models/{id}                            what there is
    /v1/load_lora_adapter  /v1/unload_lora_adapter         as vLLM has them, with --allow-load, from --adapters
    /health  /metrics                                      without the API key
    /openapi.json                                          the description of all of these

It serves plain HTTP. Encryption and rates per client are the job of a proxy in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from fused_lora.modules.inject import AdapterNotFound
from fused_lora.serving.http.api import (
    Answer,
    ApiError,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    LoadRequest,
    StreamOptions,
    UnloadRequest,
    Usage,
    malformed,
    queue_full,
    too_long,
    unexpected,
    unknown_model,
)
from fused_lora.serving.http.engine import AsyncEngine, Job, Piece, as_api_error
from fused_lora.serving.http.guard import OPEN_PATHS, Guard, allowed_adapter
from fused_lora.serving.http.logprobs import Scored, Speller
from fused_lora.serving.http.metrics import MEDIA_TYPE
from fused_lora.serving.http.openapi import (
    CHANGES_ADAPTERS,
    GENERATES,
    ChatCompletion,
    Completion,
    Health,
    ModelCard,
    ModelList,
    answers,
    describe,
)
from fused_lora.serving.http.prompts import PromptReader
from fused_lora.serving.http.record import RECORD, Record
from fused_lora.serving.http.streams import begun, merged, unless_gone
from fused_lora.serving.residency.naming import check_served_name

# str.splitlines, and so httpx's iter_lines, ends a line at these, too; json.dumps has escaped the other ones
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
# nginx would keep events back until its buffer is full
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass
class Settings:
    """Settings of one server: the name of its model, where adapters may come from, the key, whether adapters are loaded
    without the tensors that do not fit the model, where the model is from, and from where web pages may ask."""

    base_name: str
    adapters: Path | None = None
    allow_load: bool = False
    api_key: str | None = None
    allow_partial: bool = False
    base_path: str | None = None
    origins: Sequence[str] = ()


class Service:
    """The routes' work: from a request's JSON to jobs, and from pieces of text to an answer."""

    def __init__(self, engine: AsyncEngine, settings: Settings):
        self.engine, self.settings, self.started = engine, settings, int(time.time())
        manager = engine.manager
        longest = getattr(manager.model.config.get_text_config(), "max_position_embeddings", None)
        self.context = min(longest or manager.max_request_tokens, manager.max_request_tokens)
        self._prompts = PromptReader(engine.tokenizer, self.context)
        self._speller = Speller(engine.tokenizer)
        self._reading = 0  # requests whose prompts are being tokenised: they wait as much as those in the engine

    def adapter(self, model: str) -> str | None:
        """The adapter that a request's ``model`` names; None is the base. Raises ApiError."""
        if model == self.settings.base_name:
            return None
        try:
            refused = self.engine.store.refusal(model)
        except AdapterNotFound:
            raise unknown_model(model) from None
        if refused is not None:
            raise as_api_error(refused, model)
        return model

    async def jobs(self, request: GenerateRequest) -> list[Job]:
        """The sequences that a request asks for, accepted by the engine's limits. Raises ApiError."""
        request.check()
        adapter, limits, name = self.adapter(request.model), self.engine.limits, request.input_name
        if isinstance(request, ChatRequest):
            prompts, limit = [[m.plain() for m in request.messages]], "max_completion_tokens"
            limit = "max_tokens" if request.max_completion_tokens is None else limit
            echo, logprobs = False, (request.top_logprobs or 0) if request.logprobs else None
            template = request.chat_template_kwargs or {}
        else:
            template = {}
            prompts, limit = request.prompts(), "max_tokens"
            echo, logprobs = request.echo, request.logprobs
        wanted, n = getattr(request, limit), request.n or 1
        if not 0 < len(prompts) * n <= limits.max_choices:
            message = f"prompts x n: expected 1 to {limits.max_choices}, got {len(prompts)} x {n}"
            raise ApiError(400, message, "n" if n > 1 else name)
        if wanted is not None and wanted > limits.max_tokens:
            raise ApiError(400, f"{limit}: at most {limits.max_tokens} on this server, got {str(wanted)[:40]}", limit)
        temperature = 1.0 if request.temperature is None else request.temperature
        top_p = 1.0 if request.top_p is None else request.top_p
        jobs = []
        for prompt in prompts:
            ids = await self._prompts.encode(prompt, name, template)
            budget = self._budget(len(ids), wanted, name)
            echoed = await self._prompts.echo(prompt, ids) if echo else None
            for choice in range(n):
                seed = None if request.seed is None else request.seed + choice * 0x9E3779B9
                drawn = temperature, top_p, seed
                told = name, logprobs, echoed, bool(request.ignore_eos)
                jobs.append(Job(ids, adapter, budget, *drawn, request.stops(), *told))
        self.engine.check(jobs)
        return jobs

    def _budget(self, prompt: int, wanted: int | None, name: str) -> int:
        context = self.context
        if prompt + (wanted or 1) > context:
            raise too_long(context, f"{prompt} tokens, and {wanted or 1} are to be generated", name)
        return wanted if wanted is not None else min(context - prompt, self.engine.limits.max_tokens)

    async def answer(self, http: Request, request: GenerateRequest) -> Response:
        """The whole answer, or the stream of its chunks."""
        record: Record = http.scope[RECORD]
        since, seconds = record.started, self.engine.limits.request_seconds
        if request.model == self.settings.base_name or request.model in self.engine.store:
            record.model = request.model
        if self.engine.in_flight + self._reading >= self.engine.limits.max_queue:
            raise queue_full()
        self._reading += 1
        try:
            jobs = await unless_gone(http, self.jobs(request), since, seconds)
        finally:
            self._reading -= 1
        for job in jobs:
            job.since, job.deadline = since, since + seconds
        speller = self._speller if any(job.logprobs is not None for job in jobs) else None
        answer = Answer(request.model, isinstance(request, ChatRequest), speller)
        usage = Usage(prompt_tokens=sum(len(job.prompt) for job in jobs[:: request.n or 1]))
        record.prompt_tokens, record.completion_tokens = usage.prompt_tokens, 0
        if request.stream:
            # what fails before the first token has a status, and no client takes a chat's first chunk for a token
            pieces = await begun(http, self._pieces(jobs, usage, record))
            opening, options = answer.opening(len(jobs)), request.stream_options or StreamOptions()
            chunks = self._chunks(answer, opening, pieces, usage, options, record)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=_STREAM_HEADERS)
        return JSONResponse(await unless_gone(http, self._whole(answer, jobs, usage, record)))

    async def _pieces(self, jobs: list[Job], usage: Usage, record: Record) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of all jobs, their tokens counted."""
        async with contextlib.aclosing(merged(self.engine, jobs)) as pieces:
            async for index, piece in pieces:
                usage.completion_tokens += piece.tokens
                record.completion_tokens = usage.completion_tokens
                if piece.tokens:
                    record.note_token()
                yield index, piece

    async def _whole(self, answer: Answer, jobs: list[Job], usage: Usage, record: Record) -> dict[str, Any]:
        texts, reasons = [""] * len(jobs), ["length"] * len(jobs)
        scored: list[list[Scored]] = [[] for _ in jobs]
        async with contextlib.aclosing(self._pieces(jobs, usage, record)) as pieces:
            async for index, piece in pieces:
                texts[index] += piece.text
                reasons[index] = piece.reason or reasons[index]
                scored[index] += piece.scored
        return answer.whole(texts, reasons, scored, usage)

    async def _chunks(
        self,
        answer: Answer,
        opening: list[dict[str, Any]],
        pieces: AsyncGenerator[tuple[int, Piece], None],
        usage: Usage,
        options: StreamOptions,
        record: Record,
    ) -> AsyncGenerator[str, None]:
        def event(chunk: dict[str, Any]) -> str:
            return _event({**chunk, "usage": usage.json()} if options.continuous_usage_stats else chunk)

        try:
            async with contextlib.aclosing(pieces):
                for chunk in opening:
                    yield event(chunk)
                async for index, piece in pieces:
                    if piece.text or piece.reason or piece.scored:
                        yield event(answer.piece(index, piece.text, piece.reason, piece.scored))
        except ApiError as error:  # the status has been sent; clients look for this object in the stream
            record.error = error.name
            yield _event(error.body())
            return
        if options.include_usage:
            yield _event(answer.usage(usage))
        yield "data: [DONE]\n\n"

    def models(self) -> dict[str, Any]:
        """What /v1/models answers: the base model, and the adapters that are not refused at present."""
        store = self.engine.store
        refused, cards = store.refusals(), [self.model(self.settings.base_name)]
        for name in store.names():
            if name not in refused:
                with contextlib.suppress(ApiError):  # unloaded or refused meanwhile
                    cards.append(self.model(name))
        return {"object": "list", "data": cards}

    def model(self, name: str) -> dict[str, Any]:
        """What /v1/models/{id} answers. Raises ApiError for a name that cannot be served."""
        adapter, base = self.adapter(name), self.settings.base_name
        root = self.settings.base_path if adapter is None else self.engine.store.folder(adapter)
        card = {"id": name, "object": "model", "created": self.started, "owned_by": "fused_lora"}
        return card | {"root": root or name, "parent": None if adapter is None else base}

    def check_may_load(self, name: str) -> Path:
        """The folder of the adapters. Raises ApiError unless adapters may be changed and ``name`` is one for them."""
        if not self.settings.allow_load or self.settings.adapters is None:
            raise ApiError(403, "This server does not load adapters on request; start it with --allow-load.")
        try:
            check_served_name(name)
        except ValueError as error:
            raise ApiError(400, str(error).replace("adapter_name", "lora_name", 1), "lora_name") from None
        if name == self.settings.base_name:
            raise ApiError(400, f"lora_name: {name!r} is the base model's name", "lora_name")
        return self.settings.adapters


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':')).translate(_LINE_ENDS)}\n\n"


def create_app(engine: AsyncEngine, settings: Settings, lifespan: Any = None) -> Any:
    """The ASGI application; ``lifespan`` is FastAPI's."""
    app = FastAPI(title="fused_lora", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    service = Service(engine, settings)

    @app.post("/v1/completions", **answers(Completion, *GENERATES, kind="text/event-stream"))
    async def completions(http: Request, request: CompletionRequest) -> Response:
        return await service.answer(http, request)

    @app.post("/v1/chat/completions", **answers(ChatCompletion, *GENERATES, kind="text/event-stream"))
    async def chat_completions(http: Request, request: ChatRequest) -> Response:
        return await service.answer(http, request)

    @app.get("/v1/models", **answers(ModelList, 401))
    async def models() -> Response:
        return JSONResponse(await asyncio.to_thread(service.models))

    @app.get("/v1/models/{name:path}", **answers(ModelCard, 401, 404, 422))
    async def model(name: str) -> Response:
        return JSONResponse(service.model(name))

    @app.post("/v1/load_lora_adapter", **answers(None, *CHANGES_ADAPTERS, kind="text/plain"))
    async def load_lora_adapter(request: LoadRequest) -> Response:
        root = service.check_may_load(request.lora_name)
        path = await asyncio.to_thread(allowed_adapter, root, request.lora_path)
        options = dict(inside=settings.adapters, allow_partial=settings.allow_partial)
        await engine.load(request.lora_name, path, request.load_inplace, **options)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", **answers(None, *CHANGES_ADAPTERS, kind="text/plain"))
    async def unload_lora_adapter(request: UnloadRequest) -> Response:
        service.check_may_load(request.lora_name)
        await engine.unload(request.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{request.lora_name}' removed successfully.")

    @app.get("/health", **answers(Health, 503))
    async def health() -> Response:
        if not engine.healthy():
            raise engine.stopped()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", **answers(None, kind="text/plain"))
    async def metrics() -> Response:
        text = engine.metrics.text(engine, engine.store)
        return Response(text, media_type=MEDIA_TYPE)

    _answer_errors(app)
    describe(app, settings.api_key is not None, OPEN_PATHS)
    guarded = Guard(app, engine.limits, settings.api_key, engine.metrics)
    if not settings.origins:
        return guarded
    # outside of the guard: a browser asks first whether it may send the key, and does so without it
    return CORSMiddleware(
        guarded,
        allow_origins=settings.origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after"],
    )


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    def answer(http: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
        http.scope[RECORD].error = error.name
        again = {"Retry-After": "1"} if error.status in (429, 503) else {}
        return JSONResponse(error.body(), error.status, {**again, **(headers or {})})

    @app.exception_handler(ApiError)
    async def api_error(http: Request, error: ApiError) -> Response:
        return answer(http, error)

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # the only one of FastAPI's own: bytes that are no text, or nested too deeply
            return answer(http, ApiError(400, "body: no JSON that can be read"))
        asked = f"{http.method} {http.url.path[:200]}"
        if error.status_code == 404:
            return answer(http, ApiError(404, f"Invalid URL ({asked})", code="unknown_url"))
        headers = error.headers or {}  # a 405 says what is allowed
        message = f"{error.detail} ({asked}), allowed: {headers.get('Allow')}"
        return answer(http, ApiError(error.status_code, message), headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Response:
        return answer(http, malformed(error.errors()))

    @app.exception_handler(Exception)
    async def failed(http: Request, error: Exception) -> Response:
        return answer(http, unexpected(error))
