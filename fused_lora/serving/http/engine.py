"""The engine for asyncio: limits, time-outs, cancellation, and loading adapters while requests run."""

from __future__ import annotations

import asyncio
import functools
import math
import queue
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fused_lora.adapters.errors import AdapterError
from fused_lora.modules.inject import AdapterNotFound
from fused_lora.serving.engine.admission import version_of
from fused_lora.serving.engine.failures import StepFailed, failure_of
from fused_lora.serving.engine.logprobs import TokenLogprob
from fused_lora.serving.http.api import MAX_PROMPTS, ApiError, queue_full, too_slow, unexpected, unknown_model
from fused_lora.serving.http.logprobs import Scored
from fused_lora.serving.http.metrics import Counts, Metrics
from fused_lora.serving.http.record import request_id
from fused_lora.serving.http.text import TextStream
from fused_lora.serving.residency.refusal import NonFiniteOutput
from fused_lora.serving.residency.residency import StoreFull

if TYPE_CHECKING:  # it imports transformers' engine, which differs by release
    from fused_lora.serving.engine.manager import AdapterManager

_POLL_SECONDS = 0.02
_FOLDERS = re.compile(r"""(?<![\w.])/(?:[^/\s"']+/)+""")


@dataclass
class Limits:
    """Of one server."""

    max_queue: int = 256
    max_tokens: int = 4096
    request_seconds: float = 600.0
    drain_seconds: float = 30.0
    body_bytes: int = 1 << 20
    body_seconds: float = 30.0

    @property
    def max_choices(self) -> int:
        """Sequences of one request."""
        return min(MAX_PROMPTS, self.max_queue)


@dataclass
class Job:
    """One sequence to generate.

    Attributes:
        max_tokens: 0 is for a job with ``echo`` that wants nothing more.
        source: the request's parameter that the prompt came from.
        logprobs: so many of the likeliest tokens come with each token; None: no log probabilities.
        echo: the prompt's text and where its tokens begin in it, which come before the new text.
        ignore_eos: generate ``max_tokens`` tokens, whatever they are.
        since: when its request began (``time.monotonic``).
        deadline: when it ends (``time.monotonic``); the server's time for a request, once it has begun, may be earlier.
    """

    prompt: Sequence[int]
    adapter: str | None
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stops: Sequence[str]
    source: str = "prompt"
    logprobs: int | None = None
    echo: tuple[str, list[int]] | None = None
    ignore_eos: bool = False
    since: float = field(default_factory=time.monotonic)
    deadline: float = math.inf


@dataclass
class Piece:
    """New text of a job, how many tokens were generated for it, and those that begin in it; the last one has a
    reason."""

    text: str
    tokens: int
    reason: str | None = None
    scored: list[Scored] = field(default_factory=list)


@dataclass(eq=False)
class _Running:
    """A job in the engine: its output, and whether the engine or the client has finished with it."""

    request_id: str
    adapter: str | None
    outputs: asyncio.Queue = field(default_factory=asyncio.Queue)
    finished: bool = False
    ended: bool = False


class _Nowhere(queue.Queue):
    """Discards the outputs of a cancelled request."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        pass


class AsyncEngine:
    """Runs jobs on an :class:`AdapterManager`; all methods belong to one event loop.

    An answer uses one version of its adapter. ``load`` and ``unload`` take effect for new jobs at once. They return
    when no job uses the old version any more. After ``limits.drain_seconds`` they end the jobs that still do.
    """

    def __init__(self, manager: AdapterManager, tokenizer: Any, limits: Limits, metrics: Metrics):
        self.manager, self.tokenizer, self.limits, self.metrics = manager, tokenizer, limits, metrics
        self.store, self.counters = manager.store, manager.counters
        self.in_flight = 0
        self._jobs: dict[str, _Running] = {}
        self._next_id = 0
        self._loading: list[str] = []
        manager.output_router.output_queue = _Nowhere()

    def queue_lengths(self) -> tuple[int, int]:
        """(requests in the batch, requests waiting)."""
        processor = self.manager.batch_processor
        running = min(len(processor.scheduler.active_requests), self.in_flight) if processor else 0
        return running, self.in_flight - running

    def cache_used(self) -> float:
        """Share of the cache that has keys and values, of requests or kept for equal prefixes."""
        processor = self.manager.batch_processor
        return 1.0 - processor.cache.compute_free_capacity() if processor else 0.0

    def healthy(self) -> bool:
        """Whether the engine runs and takes requests."""
        return self.manager.is_running() and self.manager.background_thread_status.can_accept_new_requests() is None

    def stopped(self) -> ApiError:
        """The error for clients when the engine does not run."""
        fatal = self.manager.background_thread_status.fatal_error
        why = "" if fatal is None else f" after {type(fatal).__name__}; the server's log says more"
        return ApiError(503, f"the engine has stopped{why}", code="engine_stopped")

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise ApiError where the jobs cannot be accepted."""
        if not self.healthy():
            raise self.stopped()
        if self.in_flight + len(jobs) > self.limits.max_queue:
            raise queue_full()
        for job in jobs:
            try:
                self.manager.check(job.prompt, job.adapter, max(job.max_tokens, 1), job.temperature, job.top_p)
            except AdapterNotFound:
                raise unknown_model(str(job.adapter)) from None
            except (TypeError, ValueError) as error:
                message = str(error)
                param = job.source if message.startswith("input_ids") else None
                raise ApiError(400, message.replace("input_ids", job.source, 1), param) from None

    async def generate(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The pieces of a job as they come. Closing it early cancels the job. Raises ApiError."""
        start = time.monotonic()
        self._next_id += 1
        engine_id = f"{request_id.get()}#{self._next_id}"  # a client may send one id twice
        self.in_flight += 1
        running = self._jobs[engine_id] = _Running(engine_id, job.adapter)
        self.metrics.started += 1
        counts = self.metrics.of(job.adapter) if job.adapter is None or job.adapter in self.store else Counts()
        counts.sequences += 1
        outcome = "cancelled"  # unless something else ends it, its client has gone
        try:
            self._submit(engine_id, job, running.outputs)
            self.metrics.prompt_tokens += len(job.prompt)
            counts.prompt_tokens += len(job.prompt)
            async for piece in self._pieces(job, running, start):
                counts.generation_tokens += piece.tokens
                yield piece
            outcome = "finished"
        except ApiError:
            outcome = "failed"
            raise
        finally:
            self.metrics.ended[outcome] += 1
            running.ended = True
            if not running.finished:
                self.manager.cancel_request(engine_id)
            router = self.manager.output_router
            with router._lock:
                router.result_handlers.pop(engine_id, None)
            del self._jobs[engine_id]
            self.in_flight -= 1
            self.metrics.request_seconds.observe(time.monotonic() - job.since)

    async def _pieces(self, job: Job, running: _Running, start: float) -> AsyncGenerator[Piece, None]:
        text, seen = TextStream(self.tokenizer, job.stops), 0
        echo = len(job.echo[0]) if job.echo else 0
        behind = len(job.prompt) - 1 if job.echo and job.logprobs is not None else 0  # of the prompt, in logprobs
        scored: list[Scored] = []
        last = 0.0  # when the last token came
        deadline = min(job.deadline, start + self.limits.request_seconds)
        while not running.finished:
            output = await self._next(running.outputs, deadline)
            running.finished = output.is_finished()
            if failure := failure_of(output):
                raise as_api_error(failure, job.adapter) if self.healthy() else self.stopped()
            new = output.generated_tokens[seen:]
            if new:
                now = time.monotonic()
                since, seconds = (last, self.metrics.next_token) if seen else (job.since, self.metrics.first_token)
                seconds.observe(now - since)
                last = now
            if new and not seen:
                if job.echo:
                    yield _echoed(job, output.logprobs[:behind])
                    if not job.max_tokens:
                        return
            certain = text.add(new)
            if running.finished and not text.stopped:
                certain += text.flush()
            told = zip(output.logprobs[behind + seen :], text.offsets[seen:], strict=False)
            scored += [Scored(entry, echo + offset) for entry, offset in told]
            seen += len(new)
            reason = "stop" if text.stopped else None
            if running.finished and not text.stopped:
                ended = not job.ignore_eos and output.generated_tokens[-1] in self._ends()
                reason = "stop" if ended else "length"
            # a token comes with its text; what begins behind a stop string does not come
            end = math.inf if reason and not text.stopped else echo + text.released
            ready = [entry for entry in scored if entry.offset < end]
            scored = scored[len(ready) :]
            if new or reason:
                yield Piece(certain, len(new), reason, ready)
            if text.stopped:
                return

    def _submit(self, engine_id: str, job: Job, outputs: asyncio.Queue) -> None:
        self.manager.register_result_handler(engine_id, outputs.put_nowait)
        try:
            self.manager.add_request(
                list(job.prompt),
                engine_id,
                max(job.max_tokens, 1),
                streaming=True,
                eos_token_id=-1 if job.ignore_eos else None,
                adapter=job.adapter,
                temperature=job.temperature,
                top_p=job.top_p,
                seed=job.seed,
                logprobs=job.logprobs,
                prompt_logprobs=job.logprobs is not None and job.echo is not None,
            )
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        except Exception as error:
            raise (as_api_error(error, job.adapter) if self.healthy() else self.stopped()) from error

    async def _next(self, outputs: asyncio.Queue, deadline: float) -> Any:
        try:
            output = await asyncio.wait_for(outputs.get(), max(deadline - time.monotonic(), 0))
        except asyncio.TimeoutError:
            raise too_slow(self.limits.request_seconds) from None
        if isinstance(output, ApiError):
            raise output
        return output

    def _ends(self) -> set[int]:
        eos = self.manager.generation_config.eos_token_id
        return set(eos) if isinstance(eos, list) else {eos}

    async def load(self, name: str, path: Path, replace: bool, **options: Any) -> None:
        """``store.load`` with these options in a thread; with ``replace`` also of a name that is there. If all room is
        in use, its first request brings it to the device. Raises ApiError."""
        if name in self.store and not replace:
            raise ApiError(400, f"The lora adapter {name!r} has already been loaded.", "lora_name")
        if name in self._loading and not replace:
            raise ApiError(409, f"The lora adapter {name!r} is being loaded.", "lora_name", "adapter_loading")
        self._loading.append(name)
        try:
            await self._change(functools.partial(self._load, **options), name, str(path))
        finally:
            self._loading.remove(name)

    def _load(self, name: str, path: str, **options: Any) -> None:
        try:
            self.store.load(name, path, **options)
        except StoreFull as error:  # its files have been checked in full by then
            if not error.in_use:
                raise
            self.store.register(name, path, **options)

    async def unload(self, name: str) -> None:
        """Unload an adapter. Raises ApiError."""
        if name not in self.store:
            raise ApiError(404, f"The lora adapter {name!r} does not exist.", "lora_name", "adapter_not_found")
        await self._change(self.store.unload, name)
        if name not in self.store:  # not loaded anew meanwhile
            self.metrics.forget(name)

    async def _change(self, work: Callable[..., Any], name: str, *more: str) -> None:
        if not self.healthy():
            raise self.stopped()
        try:
            await asyncio.to_thread(work, name, *more)
        except Exception as error:
            raise (_load_error(error, name) if self.healthy() else self.stopped()) from error
        now = self.store.identity(name) if name in self.store else None
        older = [running for running in self._jobs.values() if running.adapter == name]
        deadline = time.monotonic() + self.limits.drain_seconds
        while older := [running for running in older if not running.ended and self._version(running) != now]:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_POLL_SECONDS)
        # one that has not started yet will start with what the name means then
        for running in filter(self._version, older):
            message = f"adapter {name!r} was changed while the request ran"
            running.outputs.put_nowait(ApiError(409, message, "model", "adapter_changed"))
            while not running.ended:
                await asyncio.sleep(_POLL_SECONDS)

    def _version(self, running: _Running) -> str:
        """The version a job started with, or an empty string."""
        processor = self.manager.batch_processor
        if processor is None:  # the engine has stopped, and its jobs end with an error
            return ""
        known = processor.scheduler.active_requests, processor.scheduler.waiting_requests
        state = next((found for requests in known if (found := requests.get(running.request_id))), None)
        return version_of(state) if state is not None else ""


def _echoed(job: Job, told: list[TokenLogprob]) -> Piece:
    """The prompt as a first piece; the first token has nothing before it that would make it likely."""
    text, starts = job.echo or ("", [])
    known = [] if job.logprobs is None else [TokenLogprob(job.prompt[0], None), *told]
    scored = [Scored(*pair) for pair in zip(known, starts, strict=False)]
    return Piece(text, 0, None if job.max_tokens else "length", scored)


def as_api_error(error: Exception, adapter: str | None) -> ApiError:
    """The error for the client of a generation under ``adapter``. A server error does not show paths or other
    internals."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AdapterNotFound):
        return unknown_model(str(adapter))
    if isinstance(error, ValueError):  # of the store: the client named an adapter whose files do not fit
        return ApiError(422, f"the adapter cannot be served: {_of_files(error)}", "model", "invalid_adapter")
    if isinstance(error, NonFiniteOutput):
        return ApiError(422 if error.identities else 500, str(error), "model", "not_finite")
    if isinstance(error, StoreFull):
        return ApiError(422, str(error), "model", "store_full")
    if isinstance(error, StepFailed):
        message = f"the model failed in a step with this request ({error.kind}); the server's log says more"
        return ApiError(500, message, code="step_failed")
    return unexpected(error)


def _load_error(error: Exception, name: str) -> ApiError:
    """The error for the client that asked for a load. Most are about its files."""
    if isinstance(error, ValueError):
        return ApiError(400, f"lora_path: {_of_files(error)}", "lora_path", "invalid_adapter")
    if isinstance(error, StoreFull):
        return ApiError(400, f"lora_path: {error}", "lora_path", "store_full")
    return as_api_error(error, name)


def _of_files(error: ValueError) -> str:
    """What is wrong with an adapter, without paths of this machine."""
    message = str(error)
    if isinstance(error, AdapterError):
        what = f"{error.key}: " if error.key else ""
        message = f"{what}expected {error.expected}, found {error.found}"
    return _FOLDERS.sub("", message)
