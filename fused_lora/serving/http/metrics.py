"""Counters and histograms in the Prometheus text format (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

import bisect
import itertools
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

PREFIX = "fused_lora_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_WINDOW = 10.0


class Histogram:
    """Seconds in fixed buckets."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(_SECONDS) + 1), 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect.bisect_left(_SECONDS, seconds)] += 1
        self.total += seconds

    def samples(self) -> dict[str, float]:
        """The value of each line by what comes after the name."""
        bounds, counts = (*map(str, _SECONDS), "+Inf"), list(itertools.accumulate(self.counts))
        found: dict[str, float] = {f'_bucket{{le="{b}"}}': n for b, n in zip(bounds, counts, strict=True)}
        return {**found, "_sum": self.total, "_count": counts[-1]}


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


class Metrics:
    """Counters of the server. The engine's and the store's numbers are read for each page."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.started, self.ended = 0, Counter(finished=0, failed=0, cancelled=0)
        self.prompt_tokens = 0
        self.first_token, self.request_seconds = Histogram(), Histogram()
        self._rate = Rate()

    def text(self, engine: Any, store: Any) -> str:
        """The whole page."""
        lines: list[str] = []

        def put(kind: str, name: str, help_text: str, samples: Mapping[str, float] | float) -> None:
            full = PREFIX + name
            lines.extend((f"# HELP {full} {help_text}", f"# TYPE {full} {kind}"))
            by_label = samples if isinstance(samples, Mapping) else {"": samples}
            lines.extend(f"{full}{label} {value}" for label, value in by_label.items())

        counters, stats = engine.counters, store.stats()
        requests = {f'{{route="{r}",status="{status}"}}': n for (r, status), n in sorted(self.requests.items())}
        put("counter", "requests_total", "Answers by route and status.", requests)
        running, waiting = engine.queue_lengths()
        put("gauge", "requests_running", "Requests with a place in the batch.", running)
        put("gauge", "requests_waiting", "Requests waiting for a place or for their adapter.", waiting)
        put("counter", "sequences_started_total", "Sequences given to the engine.", self.started)
        ended = {f'{{outcome="{outcome}"}}': count for outcome, count in self.ended.items()}
        put("counter", "sequences_ended_total", "Sequences by how they ended.", ended)
        put("counter", "prompt_tokens_total", "Tokens of accepted prompts.", self.prompt_tokens)
        put("counter", "generation_tokens_total", "Tokens generated.", counters.generated_tokens)
        rate = self._rate(counters.generated_tokens)
        put("gauge", "generation_tokens_per_second", "Tokens per second over the last ten seconds of scrapes.", rate)
        put("counter", "steps_total", "Forward passes.", counters.steps)
        put("counter", "failed_steps_total", "Forward passes that raised an error.", counters.failed_steps)
        put("counter", "failed_requests_total", "Requests that the engine failed.", counters.failed_requests)
        bad = counters.non_finite_requests
        put("counter", "non_finite_requests_total", "Requests whose rows were not finite.", bad)
        put("counter", "step_requests_total", "Requests summed over forward passes.", counters.requests_in_steps)
        put("counter", "step_adapters_total", "Distinct adapters summed over passes.", counters.adapters_in_steps)
        rows = {'{kind="adapter"}': counters.adapter_rows, '{kind="base"}': counters.base_rows}
        put("counter", "step_rows_total", "Token rows summed over forward passes.", rows)
        waits = counters.waits_for_adapters
        put("counter", "adapter_waits_total", "Times a request had to wait for room for its adapter.", waits)
        for key in ("hits", "loads", "evictions"):
            put("counter", f"adapter_{key}_total", f"Adapter {key} of the store.", stats[key])
        put("gauge", "adapter_bytes_used", "Bytes of adapters on the device.", stats["bytes_used"])
        put("gauge", "adapter_bytes_capacity", "Byte budget of adapters on the device.", stats["capacity"] or 0)
        put("gauge", "adapters_in_use", "Adapters that running requests hold on the device.", stats["in_use"])
        put("gauge", "adapters_refused", "Adapters that are not served at present.", len(store.refusals()))
        put("gauge", "adapters_known", "Adapters that requests can name.", stats["adapters"])
        first = self.first_token.samples()
        put("histogram", "time_to_first_token_seconds", "Seconds to the first token.", first)
        put("histogram", "request_seconds", "Seconds of a request.", self.request_seconds.samples())
        return "\n".join(lines) + "\n"
