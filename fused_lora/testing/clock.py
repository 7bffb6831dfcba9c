"""Times of calls that take turns: the device's, by CUDA events after an L2 flush, and the host's beside it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_FLUSH_BYTES = 256 << 20  # several times the L2 of any current GPU
_CALIBRATION_CYCLES = 1 << 22  # about 2 ms
_LONGEST_LEAD = 100.0  # ms


@dataclass
class Candidate:
    """One provider in an interleaved run: ``before`` is not timed, each of ``steps`` is, in this order."""

    name: str
    steps: Sequence[Callable[[], object]]
    before: Callable[[], object] = lambda: None


class _Cuda:
    """The GPU as Clock needs it; ``begin`` and ``end`` are its two events."""

    def __init__(self, device: torch.device):
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_CALIBRATION_CYCLES)  # loads the kernel and wakes the chip
        self.begin.record()
        torch.cuda._sleep(_CALIBRATION_CYCLES)
        self.end.record()
        self.end.synchronize()
        self._cycles_per_ms = _CALIBRATION_CYCLES / self.begin.elapsed_time(self.end)

    def flush(self) -> None:
        self._flush.zero_()

    def sleep(self, ms: float) -> None:
        torch.cuda._sleep(int(ms * self._cycles_per_ms))

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._flush.device)


class Clock:
    """Milliseconds of one call: wall time on a CPU; on a GPU the device's time, by CUDA events after an L2 flush.

    On a GPU the first call of a step finds how long the host takes to issue it; before every later one the device is
    kept busy for twice as long, so the events do not time Python. ``host_us`` is the time to issue steps.
    """

    def __init__(self, device: torch.device):
        self._gpu = _Cuda(device) if device.type == "cuda" else None
        self._lead: dict[Callable, float] = {}
        self._host_us: dict[Callable, list[float]] = {}

    def __call__(self, step: Callable[[], object]) -> float:
        return self.measure(step)[0]

    def measure(self, step: Callable[[], object]) -> tuple[float, float]:
        """(that time, ms in which the host issued this call)."""
        gpu = self._gpu
        if gpu is None:
            start = time.perf_counter()
            step()
            wall = (time.perf_counter() - start) * 1e3
            return wall, wall
        lead = self._lead.get(step)
        gpu.flush()
        if lead is None:
            gpu.synchronize()
        else:
            gpu.sleep(lead)
        gpu.begin.record()
        start = time.perf_counter()
        step()
        host = (time.perf_counter() - start) * 1e3
        gpu.end.record()
        ahead = not gpu.begin.query()
        gpu.end.synchronize()
        if ahead and lead is not None:  # else the step waited for the device: this is not the host's own time
            self._host_us.setdefault(step, []).append(host * 1e3)
        if ahead or lead is None:  # a first call may have compiled: the lead may shrink later, never grow
            self._lead[step] = min(2 * host + 0.05, _LONGEST_LEAD if lead is None else lead)
        return gpu.begin.elapsed_time(gpu.end), host

    def host_us(self, steps: Sequence[Callable]) -> float | None:
        """Median microseconds in which the host issued these steps, summed; None on a CPU and where one waits."""
        if not all(step in self._host_us for step in steps):
            return None
        return round(sum(statistics.median(self._host_us[step]) for step in steps), 2)


def interleaved(
    candidates: Sequence[Candidate],
    clock: Callable[[Callable], float],
    seconds: float,
    rounds: int,
    deadline: float = float("inf"),
) -> dict[str, list[list[float]]]:
    """Rounds A B C A B C ... after one untimed round; {name: [[ms of step 0, ms of step 1, ...] per round]}.

    At least ``rounds`` rounds, then more until ``seconds`` have passed or ``deadline`` (time.monotonic) is reached.
    """
    times: dict[str, list[list[float]]] = {c.name: [] for c in candidates}
    gc.collect()
    gc.disable()
    try:
        for timed in range(-1, 10_000):
            if timed == 0:
                start = time.monotonic()
            if timed >= max(rounds, 1) and (time.monotonic() - start >= seconds or time.monotonic() >= deadline):
                break
            for candidate in candidates:
                candidate.before()
                result = [clock(step) for step in candidate.steps]
                if timed >= 0:
                    times[candidate.name].append(result)
    finally:
        gc.enable()
    return times


def summary(values: Sequence[float]) -> dict[str, float]:
    """median, p20, p80, min and the number of values."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    numbers = dict(median=statistics.median(values), p20=cuts[0], p80=cuts[3], min=min(values))
    return {**{name: round(value, 5) for name, value in numbers.items()}, "rounds": len(values)}
