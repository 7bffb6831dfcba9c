"""The manager behind ``continuous.py``; it imports transformers, so only that module's functions import it.

Where it reaches into transformers' engine, and why:

* the adapter of a request and its version travel in ``RequestState.logit_processor_kwargs``: that is what the engine
  copies when it drops a request's cache and starts it again;
* its own scheduler decides before every step which versions are leased and which requests may start;
* ``_generation_step`` runs inside ``store.batch_rows`` and attends request by request (attention.py). Requests with
  rows that are not finite (finite.py) leave the step before the processor sees its result;
* log probabilities of each request (logprobs.py) are taken from the logits of a step and kept in ``RequestState``;
* ``_generation_loop_body`` ends the requests of a step that raised, where transformers' own would end the engine;
* the block hashes of the prefix cache are keyed by the adapter's version.
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.model_runner import infer_max_single_request_tokens
from transformers.generation.continuous_batching.requests import RequestState, RequestStatus
from transformers.generation.continuous_batching.utils import stream_context

from fused_lora.modules.arguments import check_int
from fused_lora.serving.engine import request, sampling
from fused_lora.serving.engine.admission import ADAPTER, SCHEDULER, START, VERSION, Admission, EngineCounters, start_of
from fused_lora.serving.engine.attention import by_request, is_by_request, spans_of
from fused_lora.serving.engine.failures import MAX_FAILED_STEPS, StepFailed
from fused_lora.serving.engine.finite import StepCheck
from fused_lora.serving.engine.logprobs import LOGPROBS, PROMPT_LOGPROBS, need_all_rows, record
from fused_lora.serving.engine.prefix import PrefixNamespaces
from fused_lora.serving.residency.lease import Lease
from fused_lora.serving.residency.refusal import NonFiniteOutput
from fused_lora.serving.store import AdapterStore

_log = logging.getLogger("fused_lora.serving")


def default_config(device: torch.device) -> ContinuousBatchingConfig:
    """The engine's sizes if the caller gives no config."""
    if device.type == "cuda":
        return ContinuousBatchingConfig()
    # transformers' own are for a GPU that the engine has to itself
    return ContinuousBatchingConfig(
        page_size=32, num_blocks=512, max_batch_tokens=256, max_requests_per_batch=64, auto_switch_to_flash=False
    )


def _checked(config: ContinuousBatchingConfig) -> ContinuousBatchingConfig:
    for name in ("use_cuda_graph", "use_async_batching", "varlen_compile_config", "decode_compile_config"):
        value = getattr(config, name)
        if any(value) if isinstance(value, tuple) else value:
            raise ValueError(f"config.{name}: not supported with adapters, got {value!r}")
    if config.default_compile_level or config.return_logprobs:
        raise ValueError(
            "config: default_compile_level and return_logprobs are not supported with adapters; "
            "add_request takes logprobs"
        )
    if config.scheduler_type != "fifo":
        raise ValueError(f"config.scheduler_type: expected 'fifo', got {config.scheduler_type!r}")
    return replace(config, use_cuda_graph=False, use_async_batching=False, scheduler_type=SCHEDULER)


def _check_parts(model: Any, store: Any, config: Any) -> None:
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise TypeError(f"model: expected a transformers model that generates, got {type(model).__name__}")
    if not isinstance(store, AdapterStore):
        raise TypeError(f"store: expected an AdapterStore, got {type(store).__name__}")
    if store.model is not model:
        raise ValueError("store: it was made for another model")
    if not isinstance(config, ContinuousBatchingConfig | None):
        raise TypeError(f"config: expected a ContinuousBatchingConfig, got {type(config).__name__}")


def _rows_of(futures: list) -> list[int] | np.ndarray:
    """The rows of each request, or the request of each row, where those before an aLoRA's start are -1."""
    counts, starts = [f.query_length for f in futures], [start_of(f.state) for f in futures]
    if not any(starts):
        return counts
    ends = [f.state.position_offset for f in futures]
    positions = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
    owners = np.repeat(np.arange(len(futures)), counts)
    return np.where(positions < np.array(starts)[owners], -1, owners)


class AdapterManager(ContinuousBatchingManager):
    """transformers' ContinuousBatchingManager with ``adapter=`` on every request; see ``continuous_batching``."""

    def __init__(self, model: Any, store: AdapterStore, config: ContinuousBatchingConfig | None = None):
        _check_parts(model, store, config)
        source = model.generation_config
        eos = -1 if source.eos_token_id is None else source.eos_token_id
        greedy = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=source.pad_token_id)
        self.store, self.counters = store, EngineCounters()
        self.admission = Admission(store, self._fail_waiting, lambda: self._wake_up_loop.set(), self.counters)
        self._in_step: list[RequestState] | None = None
        self._failures_in_a_row = 0
        super().__init__(model, greedy, _checked(config or default_config(model.device)))
        sampling.install(
            self.logit_processor, {ADAPTER: str, VERSION: str, START: int, LOGPROBS: int, PROMPT_LOGPROBS: bool}
        )
        self.batch_processor = self._create_batch_processor()
        self.max_request_tokens = infer_max_single_request_tokens(self.batch_processor.cache)
        self._head, self._check = model.get_output_embeddings(), StepCheck(model)
        slices = self.batch_processor.model_runner.supports_logits_to_keep(model)
        self._slices_logits = slices and self._check.sees_all_rows

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Choose an implementation as transformers does. Then replace sdpa and eager by those of attention.py."""
        own = model.config._attn_implementation
        if is_by_request(own):
            return
        super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)
        chosen = by_request(model.config._attn_implementation)
        if chosen != model.config._attn_implementation:
            model.set_attn_implementation(chosen)
            self._original_attn_impl = own

    def start(self) -> None:
        """Start the engine's thread, and set the model's attention again after a stop."""
        self.switch_to_cb_friendly_attn(self.model, self.continuous_batching_config.auto_switch_to_flash)
        super().start()

    def __enter__(self) -> AdapterManager:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop(hard_stop=exc_info[0] is not None)

    def check(
        self,
        input_ids: Any,
        adapter: str | None = None,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | list[int] | None = None,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
    ) -> tuple[list[int], int, int | list[int] | None, dict[str, float | int], dict[str, Any]]:
        """Raise what ``add_request`` would for these arguments: TypeError, ValueError or AdapterNotFound.

        Returns:
            Token ids, number of new ones, where to end, the arguments of the draw, and of log probabilities.
        """
        if adapter is not None and not isinstance(adapter, str):
            raise TypeError(f"adapter: expected a name or None, got {adapter!r:.100}")
        if adapter is not None:
            self.store.identity(adapter)  # raises AdapterNotFound
        ids = request.token_ids(input_ids, self.model.config.get_text_config().vocab_size)
        count = check_int("max_new_tokens", max_new_tokens, 1)
        if len(ids) + count > self.max_request_tokens:
            raise ValueError(
                f"input_ids: {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the cache's "
                f"{self.max_request_tokens} tokens"
            )
        drawn = request.sampling(temperature, top_p, seed)
        told = request.logprobs(logprobs, prompt_logprobs)
        return ids, count, request.ends(eos_token_id), drawn, told

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int = 20,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        adapter: str | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: bool = False,
    ) -> str:
        """Queue a request under ``adapter`` (None is the base model); returns its id.

        Greedy by default; with ``temperature`` > 0 tokens are drawn, reproducibly for a given ``seed``.

        Args:
            input_ids: a list of token ids, or a one-dimensional tensor or array.
            request_id: by default the engine makes one.
            logprobs: the output's ``logprobs`` are the ``TokenLogprob`` of the generated tokens, each with so many of
                the likeliest tokens (0 to 20). None: there are none.
            prompt_logprobs: those of the prompt's tokens, from the second on, come before them. The prompt is then
                computed in full, with nothing of the prefix cache.

        Raises:
            TypeError, ValueError: an argument does not fit, or another request has this id. The message names it.
            AdapterNotFound: unknown adapter. RuntimeError: the engine does not run.
        """
        ids, count, ends, drawn, own = self.check(
            input_ids, adapter, max_new_tokens, temperature, top_p, seed, eos_token_id, logprobs, prompt_logprobs
        )
        self._check_id(request_id)
        own |= {} if adapter is None else {ADAPTER: adapter}
        if drawn:
            own |= {"seed": secrets.randbits(63), **drawn}
        queued = super().add_request(ids, request_id, count, streaming, record_timestamps, ends, **own)
        if queued is None:
            raise RuntimeError(f"no new requests: {self.background_thread_status.can_accept_new_requests()}")
        return queued

    def _check_id(self, request_id: str | None) -> None:
        if request_id is None:
            return
        if not isinstance(request_id, str):
            raise TypeError(f"request_id: expected a str or None, got {request_id!r:.100}")
        with self.input_queue.mutex:
            known = {state.request_id for state in self.input_queue.queue}
        if self.batch_processor is not None:  # it is None once the engine has stopped
            scheduler = self.batch_processor.scheduler
            known |= scheduler.waiting_requests.keys() | scheduler.active_requests.keys()
        if request_id in known:
            raise ValueError(f"request_id: {request_id[:100]!r} is the id of a request that has not ended")

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        known = self.batch_processor
        processor = super()._create_batch_processor()
        if processor is not known:
            processor.scheduler.admission = self.admission
            PrefixNamespaces(processor, self.counters)
        return processor

    def _run_generation_loop(self, **options: bool) -> None:
        try:
            super()._run_generation_loop(**options)  # from transformers 5.24 on with use_inference_mode
        finally:
            self.admission.release_all()

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        """One step, or a wait for requests. Returns whether to go on."""
        self._in_step = None
        try:
            going_on = super()._generation_loop_body(batch_processor, bootstrapping)
        except Exception as error:
            self._fail_step(batch_processor, error)
            going_on = True
        else:
            self._failures_in_a_row = self._failures_in_a_row if self._in_step is None else 0
        if not batch_processor.has_pending_requests():
            self.admission.release_all()  # an engine that has nothing to do keeps no adapter in its place
        return going_on

    def _fail_step(self, processor: ContinuousBatchProcessor, error: Exception) -> None:
        """End the requests of the step that raised ``error``. Raises if the engine must stop too."""
        scheduler = processor.scheduler
        # before the forward nobody knows whose fault it was; what the scheduler has begun for active ones is lost
        states = list(scheduler.active_requests.values()) if self._in_step is None else self._in_step
        names = ", ".join(state.request_id for state in states)
        _log.error("a step of the engine failed with the requests %s", names, exc_info=error)
        waiting = scheduler.waiting_requests
        scheduler.waiting_requests_order = deque(i for i in scheduler.waiting_requests_order if i in waiting)
        for state in states:
            scheduler.finish_request(state.request_id)
            self._fail(state, StepFailed(error))
        scheduler.block_new_requests = False
        self.counters.failed_steps += 1
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= MAX_FAILED_STEPS:
            raise error
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)  # raises if the device is lost; then nothing here can run again

    def _generation_step(self) -> None:
        """One forward of the engine. Each row uses the adapter of its request."""
        inputs = self.batch_processor.inputs_and_outputs
        futures = inputs.requests_in_batch
        self._in_step = [future.state for future in futures]
        leases = [self.admission.lease_of(future.state) for future in futures]
        # where the output layer has an adapter it must see all rows, not those alone that a token is taken from
        runner = self.batch_processor.model_runner
        on_head = any(lease.adapts(self._head) for lease in set(leases) - {None})
        runner._model_supports_logits_to_keep = self._slices_logits and not on_head and not need_all_rows(futures)
        self._check.keep_logits = any(LOGPROBS in future.state.logit_processor_kwargs for future in futures)
        rows = _rows_of(futures)
        # on a GPU the engine computes on a stream of its own, and what the store notes is noted on the current one
        with stream_context(inputs.compute_stream), self.store.batch_rows(leases, rows) as batch:
            batch.check_outputs = False  # one request's rows are to end that request alone
            with self._check, spans_of(futures, self.batch_processor.cache):
                super()._generation_step()
            of_terms = batch.bad_rows()
        with stream_context(inputs.compute_stream):
            if self._check.logits is not None:
                every_row = not runner._model_supports_logits_to_keep
                record(futures, self._check.logits, every_row, inputs.output_ids[0])
            ended = self._without_non_finite(inputs, leases, of_terms)
        self._count(futures, leases, rows)
        for state, error in ended:
            self.counters.non_finite_requests += 1
            _log.error("request %s: %s", state.request_id, error)
            self._fail(state, error)

    def _without_non_finite(
        self, inputs: Any, leases: list[Lease | None], of_terms: list[int]
    ) -> list[tuple[RequestState, NonFiniteOutput]]:
        """Take requests with rows that are not finite out of the step and return them with the reason.

        ``of_terms``: rows of which that is known. The processor sees the other requests only.
        """
        futures = inputs.requests_in_batch
        ends = np.cumsum([future.query_length for future in futures])
        of_logits = [end - 1 for end, future in zip(ends, futures, strict=True) if future.has_new_token]
        sliced = self.batch_processor.model_runner._model_supports_logits_to_keep
        bad_rows = self._check.bad_rows(int(ends[-1]), of_logits if sliced else None).union(of_terms)
        if not bad_rows:
            return []
        bad = sorted({int(np.searchsorted(ends, row, "right")) for row in bad_rows})
        kept = [i for i in range(len(futures)) if i not in bad]
        token_of = np.cumsum([future.has_new_token for future in futures]) - 1
        places = [int(token_of[i]) for i in kept if futures[i].has_new_token]
        tokens = torch.tensor(places, dtype=torch.int64, device=inputs.output_ids.device)
        inputs.output_ids[:, : len(tokens)] = inputs.output_ids[:, tokens]
        inputs.requests_in_batch = [futures[i] for i in kept]
        self._in_step = [futures[i].state for i in kept]
        scheduler = self.batch_processor.scheduler
        for i in bad:
            scheduler.finish_request(futures[i].state.request_id)
        scheduler.block_new_requests = False
        return [(futures[i].state, self._blame(futures[i].state, leases[i])) for i in bad]

    def _blame(self, state: RequestState, lease: Lease | None) -> NonFiniteOutput:
        """The error for a request with rows that are not finite.

        The adapter is quarantined if the base alone is finite on the same tokens. Otherwise a prompt that the base
        fails on could cost others their adapter.
        """
        if lease is None:
            return NonFiniteOutput("the base model's output for this request has values that are not finite")
        what = f"the output under adapter {lease.identity!r} has values that are not finite"
        if not self._base_is_finite((state.initial_tokens + state.generated_tokens)[: state.position_offset]):
            return NonFiniteOutput(f"{what}, and maybe the base's has", [lease.identity])
        error = NonFiniteOutput(f"{what}; it is refused until it is loaded anew", [lease.identity])
        self.store.quarantine(lease, error)
        return error

    def _base_is_finite(self, tokens: list[int]) -> bool:
        """Whether the model without adapters is finite on these tokens. False if they are too many for one step."""
        if len(tokens) > self.batch_processor.max_batch_tokens:
            return False
        last = {"logits_to_keep": 1} if self._slices_logits else {}
        try:
            with torch.no_grad(), self._check:
                self.model(input_ids=torch.tensor([tokens], device=self.model.device), use_cache=False, **last)
        except Exception:
            _log.exception("the base model could not be tried on the tokens of a request that was not finite")
            return False
        return not self._check.bad_rows(len(tokens), [len(tokens) - 1] if last else None)

    def _count(self, futures: list, leases: list[Lease | None], rows: list[int] | np.ndarray) -> None:
        counters = self.counters
        counters.steps += 1
        counters.requests_in_steps += len(futures)
        counters.adapters_in_steps += len(set(leases) - {None})
        kept = self.batch_processor.inputs_and_outputs.requests_in_batch
        counters.generated_tokens += sum(future.has_new_token for future in kept)
        base = sum(f.query_length for f, lease in zip(futures, leases, strict=True) if lease is None)
        base += int((rows == -1).sum()) if isinstance(rows, np.ndarray) else 0
        counters.base_rows += base
        counters.adapter_rows += sum(f.query_length for f in futures) - base

    def _fail_waiting(self, state: RequestState, error: Exception) -> None:
        """End a waiting request with ``error``."""
        scheduler = self.batch_processor.scheduler
        del scheduler.waiting_requests[state.request_id]
        scheduler.waiting_requests_order.remove(state.request_id)
        self._fail(state, error)

    def _fail(self, state: RequestState, error: Exception) -> None:
        """Deliver ``error`` as the end of a request."""
        self.counters.failed_requests += 1
        state.status, state.error = RequestStatus.FAILED, str(error)
        output = state.to_generation_output()
        output.exception = error.with_traceback(None)  # its frames would keep the engine's cache alive
        self.output_router.deliver(output)
