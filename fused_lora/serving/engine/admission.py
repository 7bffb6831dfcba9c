"""Which requests may start: those whose adapter the store can hold beside the adapters in use."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from fused_lora.serving.residency.residency import StoreFull
from fused_lora.serving.store import AdapterStore, Lease

_log = logging.getLogger("fused_lora.serving")

# keys in a request's logit_processor_kwargs
ADAPTER, VERSION = "adapter", "adapter_version"
SCHEDULER = "fused_lora"
PATIENCE_SECONDS = 2.0


def adapter_of(state: RequestState) -> str | None:
    """The adapter a request names; None is the base model."""
    return state.logit_processor_kwargs.get(ADAPTER)


def version_of(state: RequestState) -> str:
    """The version a request started with, as the store spells it; empty for the base model and before the start."""
    return state.logit_processor_kwargs.get(VERSION, "")


@dataclass
class EngineCounters:
    """What the engine has done since it was made; written by its thread only."""

    steps: int = 0
    generated_tokens: int = 0
    adapter_rows: int = 0
    base_rows: int = 0
    requests_in_steps: int = 0
    adapters_in_steps: int = 0
    waits_for_adapters: int = 0
    failed_steps: int = 0
    failed_requests: int = 0
    non_finite_requests: int = 0


class Admission:
    """Leases the adapters of started requests from the store, and lets waiting requests in while theirs fit.

    A request keeps the version it started with to its end. Requests are let in by age. One whose adapter does not fit
    keeps younger ones from bringing in further adapters; after ``PATIENCE_SECONDS`` it also keeps out those whose
    adapter is there, so that room is made in the end.
    """

    def __init__(self, store: AdapterStore, fail: Callable[[RequestState, Exception], None], counters: EngineCounters):
        self.store, self.fail, self.counters = store, fail, counters
        self.leases: dict[str, Lease] = {}
        self.admitted: set[str] = set()

    def lease_of(self, state: RequestState) -> Lease | None:
        """What a started request holds; None for the base model."""
        return None if adapter_of(state) is None else self.leases[version_of(state)]

    def update(self, active: Iterable[RequestState], waiting: Iterable[RequestState]) -> None:
        """Before a step: give back the leases that no request needs, and choose who may start."""
        waiting = list(waiting)
        # a request that lost its cache waits again, and goes on with the version it started with
        self.release(keep={version_of(state) for state in (*active, *waiting)})
        self.admitted = set()
        blocked_since = None
        for state in waiting:
            if adapter_of(state) is None or version_of(state):
                self.admitted.add(state.request_id)
                continue
            try:
                started = self._start(state, blocked_since)
            except Exception as error:  # a name that is gone, a file that is damaged: the request fails, not the engine
                _log.warning("adapter %r: %s: %s", adapter_of(state), type(error).__name__, error)
                self.fail(state, error)
                continue
            if started:
                self.admitted.add(state.request_id)
            elif blocked_since is None:
                blocked_since = state.created_time
                self.counters.waits_for_adapters += 1

    def _start(self, state: RequestState, blocked_since: float | None) -> bool:
        """Give the request the present version of its adapter, unless it has to wait for room."""
        name, now = adapter_of(state), time.perf_counter()
        version = self.store.identity(name)
        refused = self.store.refusal(name)
        if refused is not None:
            raise refused
        if version not in self.leases:
            if blocked_since is not None:
                return False
            try:
                lease = self.store.lease(name)
            except StoreFull:
                if self.leases or now - state.created_time < PATIENCE_SECONDS:
                    return False
                raise
            version = lease.identity
            self.leases[version] = lease
        elif blocked_since is not None and now - blocked_since > PATIENCE_SECONDS:
            return False
        state.logit_processor_kwargs[VERSION] = version
        return True

    def release(self, keep: Iterable[str] = ()) -> None:
        """Give back all leases but those of the versions ``keep``."""
        for version in self.leases.keys() - set(keep):
            self.leases.pop(version).release()


class AdapterScheduler(FIFOScheduler):
    """transformers' first-in-first-out scheduler, with an :class:`Admission` before each batch."""

    admission: Admission | None = None

    def schedule_batch(self, token_budget: int, cache_budget: int) -> tuple:
        self.admission.update(self.active_requests.values(), super()._get_waiting_candidates())
        return super().schedule_batch(token_budget, cache_budget)

    def _get_waiting_candidates(self) -> list[RequestState]:
        return [s for s in super()._get_waiting_candidates() if s.request_id in self.admission.admitted]


SCHEDULER_MAPPING[SCHEDULER] = AdapterScheduler
