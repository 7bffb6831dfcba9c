"""Decide which requests may start: those whose adapter fits into the store beside the adapters in use."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from fused_lora.modules.activated import starts_of
from fused_lora.modules.inject import AdapterNotFound
from fused_lora.serving.residency.lease import Lease
from fused_lora.serving.residency.residency import StoreFull
from fused_lora.serving.store import AdapterStore

_log = logging.getLogger("fused_lora.serving")

# keys in a request's logit_processor_kwargs
ADAPTER, VERSION, START = "adapter", "adapter_version", "adapter_start"
SCHEDULER = "fused_lora"
_NEVER = 1 << 62
PATIENCE_SECONDS = 2.0


def adapter_of(state: RequestState) -> str | None:
    """The adapter a request names; None is the base model."""
    return state.logit_processor_kwargs.get(ADAPTER)


def version_of(state: RequestState) -> str:
    """The identity of the version a request started with. Empty for the base model and before the start."""
    return state.logit_processor_kwargs.get(VERSION, "")


def start_of(state: RequestState) -> int:
    """The position where an aLoRA of a started request begins to act; 0 for other adapters."""
    return state.logit_processor_kwargs.get(START, 0)


@dataclass
class EngineCounters:
    """What the engine has done since it was made. Only its thread writes them."""

    steps: int = 0
    generated_tokens: int = 0
    adapter_rows: int = 0
    base_rows: int = 0
    requests_in_steps: int = 0
    adapters_in_steps: int = 0
    waits_for_adapters: int = 0
    failed_steps: int = 0
    failed_requests: int = 0
    cached_tokens: int = 0
    non_finite_requests: int = 0


class Admission:
    """Leases the adapters of started requests, and starts waiting requests while their adapters fit.

    A request keeps the version it started with. Requests start by age. If an adapter does not fit, younger requests
    may not load further adapters. After ``PATIENCE_SECONDS`` they may not start at all, so that room is made. A request
    fails with StoreFull if its adapter can never fit, or if others hold the room for ``PATIENCE_SECONDS`` while the
    engine holds none. Files are read in the store's threads while steps go on.

    Args:
        fail: ends a waiting request with an error. wake: called from another thread when a load has ended.
    """

    def __init__(
        self,
        store: AdapterStore,
        fail: Callable[[RequestState, Exception], None],
        wake: Callable[[], None],
        counters: EngineCounters,
    ):
        self.store, self.fail, self.wake, self.counters = store, fail, wake, counters
        self.leases: dict[str, Lease] = {}
        self.admitted: set[str] = set()
        self.loading: dict[str, Future[Lease]] = {}
        self._full: set[str] = set()  # versions that found no room the last time
        self._held_at = 0.0  # when the engine last held room; what failed before that says nothing of the room now

    def lease_of(self, state: RequestState) -> Lease | None:
        """The lease of a started request. None for the base model."""
        return None if adapter_of(state) is None else self.leases[version_of(state)]

    def update(self, active: Iterable[RequestState], waiting: Iterable[RequestState]) -> None:
        """Before a step: release the leases that no request needs, and choose the requests that may start."""
        waiting = list(waiting)
        if self.leases or len(self.loading) > 1:
            self._held_at = time.perf_counter()
        # a request that lost its cache waits again, and goes on with the version it started with
        self.release(keep={version_of(state) for state in (*active, *waiting)})
        self._abandon(keep={name for state in waiting if (name := adapter_of(state)) is not None})
        self.admitted = set()
        blocked_since = None
        for state in waiting:
            name = adapter_of(state)
            if name is None or version_of(state):
                self.admitted.add(state.request_id)
                continue
            try:
                started = self._start(state, name, blocked_since)
            except Exception as error:  # a name that is gone, a file that is damaged: the request fails, not the engine
                what = f"adapter {name!r}: {type(error).__name__}: {error}"
                _log.warning("request %s: %s", state.request_id, what)
                self.fail(state, error)
                continue
            if started:
                self.admitted.add(state.request_id)
            elif blocked_since is None and started is False:
                blocked_since = state.created_time
                self.counters.waits_for_adapters += 1

    def _start(self, state: RequestState, name: str, blocked_since: float | None) -> bool | None:
        """Lease the current version of its adapter ``name``. False if the request waits for room, None if for files."""
        version = self.store.identity(name)
        refused = self.store.refusal(name)
        if refused is not None:
            raise refused
        if version not in self.leases:
            if blocked_since is not None:
                # what has come meanwhile holds room: it is used, or given back to the older request
                if version not in self.loading or not self.loading[version].done():
                    return False
                if time.perf_counter() - blocked_since > PATIENCE_SECONDS:
                    _give_up(self.loading.pop(version))
                    return False
            try:
                lease = self._fetch(name, version)
            except StoreFull as error:
                self._full.add(version)
                alone = time.perf_counter() - max(state.created_time, self._held_at)
                if error.in_use and (self.leases or self.loading or alone < PATIENCE_SECONDS):
                    return False
                raise
            if lease is None:
                return False if version in self._full else None
            self._full.discard(version)
            version = lease.identity
            if version in self.leases:
                lease.release()
            else:
                self.leases[version] = lease
        elif blocked_since is not None and time.perf_counter() - blocked_since > PATIENCE_SECONDS:
            return False
        state.logit_processor_kwargs[VERSION] = version
        invocation = self.leases[version].invocation
        if invocation:  # looked for in the prompt alone, also after the request has lost its cache
            [start] = starts_of(torch.tensor([state.initial_tokens], device="cpu"), invocation)
            state.logit_processor_kwargs[START] = _NEVER if start is None else start
        return True

    def _fetch(self, name: str, version: str) -> Lease | None:
        """A lease, or None while another thread loads the adapter. Raises what the load raised."""
        future = self.loading.get(version)
        if future is None:
            lease = self.store.lease_if_ready(name)
            if lease is None:
                future = self.loading[version] = self.store.lease_async(name)
                future.add_done_callback(self._came)
            return lease
        if not future.done():
            return None
        del self.loading[version]
        return future.result()

    def _came(self, future: Future[Lease]) -> None:
        # a load that found no room is tried again with the next step; waking for it would be a busy loop
        if not future.cancelled() and not isinstance(future.exception(), StoreFull):
            self.wake()

    def _abandon(self, keep: Iterable[str] = ()) -> None:
        """Cancel loads of versions that no request will start with, or release their leases when they come.

        keep: the adapters that requests wait for. They start with the current versions, whatever was asked for before.
        """
        current = set()
        for name in keep:
            with contextlib.suppress(AdapterNotFound):  # unloaded meanwhile
                current.add(self.store.identity(name))
        for version in self.loading.keys() - current:
            _give_up(self.loading.pop(version))
        self._full &= current

    def release(self, keep: Iterable[str] = ()) -> None:
        """Release all leases except those of the versions ``keep``."""
        for version in self.leases.keys() - set(keep):
            self.leases.pop(version).release()

    def release_all(self) -> None:
        """Release everything. No request is left."""
        self.release()
        self._abandon()


def _give_up(future: Future[Lease]) -> None:
    """Cancel a load, or release its lease as soon as it is there."""
    if not future.cancel():
        future.add_done_callback(lambda done: done.result().release() if done.exception() is None else None)


class AdapterScheduler(FIFOScheduler):
    """transformers' first-in-first-out scheduler, with an :class:`Admission` before each batch."""

    admission: Admission | None = None

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple:
        self.admission.update(self.active_requests.values(), super()._get_waiting_candidates())
        return super().schedule_batch(token_budget, cache_budget)

    def _get_waiting_candidates(self) -> list[RequestState]:
        return [s for s in super()._get_waiting_candidates() if s.request_id in self.admission.admitted]


SCHEDULER_MAPPING[SCHEDULER] = AdapterScheduler
