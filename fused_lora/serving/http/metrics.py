"""Counters and histograms of the server; prometheus-client writes the page."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "fused_lora_"
MEDIA_TYPE = CONTENT_TYPE_LATEST
MOST_ADAPTERS = 1000  # with a label of their own
OTHERS = "*"  # the label of the rest: no adapter has this name
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_WINDOW = 10.0


class Rate:
    """Growth per second of a counter over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, value: int) -> float:
        now = time.monotonic()
        self._seen.append((now, value))
        while len(self._seen) > 2 and now - self._seen[1][0] > _WINDOW:
            self._seen.popleft()
        start, first = self._seen[0]
        return (value - first) / (now - start) if now > start else 0.0


@dataclass
class Counts:
    """Of one adapter."""

    sequences: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


class Metrics:
    """Counters of the server. The engine's and the store's numbers are read for each page."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.started, self.ended = 0, Counter(finished=0, failed=0, cancelled=0)
        self.prompt_tokens = 0
        about = "Seconds from a request's first byte to a sequence's first token."
        self.first_token = _histogram("time_to_first_token_seconds", about)
        about = "Seconds from a token of a sequence to the next."
        self.next_token = _histogram("inter_token_seconds", about, _TOKEN_SECONDS)
        self.request_seconds = _histogram("request_seconds", "Seconds from a request's first byte to a sequence's end.")
        self._of = {"": Counts()}  # of the base model, which is never one of the others
        self._rate = Rate()

    def of(self, adapter: str | None) -> Counts:
        """The counts of an adapter, or of the base model; those of adapters beyond the first 1,000 are counted as one.

        They stay its own until ``forget``: what a request counts after that is lost, not a label for ever.
        """
        name = adapter or ""
        if name not in self._of and len(self._of) > MOST_ADAPTERS:
            name = OTHERS
        return self._of.setdefault(name, Counts())

    def forget(self, adapter: str) -> None:
        """The adapter was unloaded: its label goes."""
        self._of.pop(adapter, None)

    def text(self, engine: Any, store: Any) -> bytes:
        """The whole page."""
        return generate_latest(_Page(self, engine, store))


class _Page(Collector):
    """What prometheus-client collects for a page."""

    def __init__(self, metrics: Metrics, engine: Any, store: Any):
        self.metrics, self.engine, self.store = metrics, engine, store

    def collect(self) -> Iterator[Metric]:
        own, counters, stats = self.metrics, self.engine.counters, self.store.stats()
        running, waiting = self.engine.queue_lengths()
        requests = {(route, str(status)): count for (route, status), count in sorted(own.requests.items())}
        yield _counter("requests", "Answers by route and status.", requests, "route", "status")
        yield _gauge("requests_running", "Requests with a place in the batch.", running)
        yield _gauge("requests_waiting", "Requests waiting for a place or for their adapter.", waiting)
        yield _counter("sequences_started", "Sequences given to the engine.", own.started)
        ended = {(outcome,): count for outcome, count in own.ended.items()}
        yield _counter("sequences_ended", "Sequences by how they ended.", ended, "outcome")
        yield _counter("prompt_tokens", "Tokens of accepted prompts.", own.prompt_tokens)
        yield _counter("prompt_tokens_cached", "Prompt tokens that the prefix cache had.", counters.cached_tokens)
        yield _counter("generation_tokens", "Tokens generated.", counters.generated_tokens)
        rate = own._rate(counters.generated_tokens)
        yield _gauge("generation_tokens_per_second", "Tokens per second over the last ten seconds of scrapes.", rate)
        yield _counter("steps", "Forward passes.", counters.steps)
        yield _counter("failed_steps", "Forward passes that raised an error.", counters.failed_steps)
        yield _counter("failed_requests", "Requests that the engine failed.", counters.failed_requests)
        bad = counters.non_finite_requests
        yield _counter("non_finite_requests", "Requests whose rows were not finite.", bad)
        yield _counter("step_requests", "Requests summed over forward passes.", counters.requests_in_steps)
        yield _counter("step_adapters", "Distinct adapters summed over passes.", counters.adapters_in_steps)
        rows = {("adapter",): counters.adapter_rows, ("base",): counters.base_rows}
        yield _counter("step_rows", "Token rows summed over forward passes.", rows, "kind")
        used = self.engine.cache_used()
        yield _gauge("cache_used_ratio", "Share of the cache with keys and values, kept prefixes among them.", used)
        for what, help_text in (
            ("sequences", "Sequences given to the engine"),
            ("prompt_tokens", "Prompt tokens"),
            ("generation_tokens", "Tokens generated"),
        ):
            by_name = {(name,): getattr(counts, what) for name, counts in own._of.items()}
            text = f"{help_text}, by adapter; the base model's is empty, '{OTHERS}' are those beyond {MOST_ADAPTERS}."
            yield _counter(f"adapter_{what}", text, by_name, "adapter")
        waits = counters.waits_for_adapters
        yield _counter("adapter_waits", "Times a request had to wait for room for its adapter.", waits)
        for key in ("hits", "loads", "evictions"):
            yield _counter(f"adapter_{key}", f"Adapter {key} of the store.", stats[key])
        yield _gauge("adapter_bytes_used", "Bytes of adapters on the device.", stats["bytes_used"])
        yield _gauge("adapter_bytes_capacity", "Byte budget of adapters on the device.", stats["capacity"] or 0)
        yield _gauge("adapters_in_use", "Adapters that running requests hold on the device.", stats["in_use"])
        yield _gauge("adapters_refused", "Adapters that are not served at present.", len(self.store.refusals()))
        yield _gauge("adapters_known", "Adapters that requests can name.", stats["adapters"])
        for histogram in (own.first_token, own.next_token, own.request_seconds):
            yield from histogram.collect()


def _histogram(name: str, help_text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
    return Histogram(PREFIX + name, help_text, buckets=buckets, registry=None)


def _counter(name: str, help_text: str, value: float | Mapping[Any, float], *labels: str) -> Metric:
    """With labels ``value`` has a number for each tuple of theirs."""
    found = CounterMetricFamily(PREFIX + name, help_text, labels=labels)
    for at, count in value.items() if isinstance(value, Mapping) else [((), value)]:
        found.add_metric(list(at), count)
    return found


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, help_text, value=value)
