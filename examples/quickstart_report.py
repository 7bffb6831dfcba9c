"""What the quickstart measures and checks: times and peak memory side by side, and a list of checks that must hold."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

SIDES = ("ours", "PEFT")


class Memory:
    """Peak memory of a stretch of code, above what was held before it; None where the system does not tell.

    On CUDA the allocator's own count. On Linux the kernel's high-water mark of resident memory, which a process may
    reset for itself; freed heap is handed back first, so that one side does not profit from what the other left.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._highest = 0
        self._linux = sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)
        self._libc = ctypes.CDLL(None) if self._linux else None

    def start(self) -> None:
        gc.collect()
        if self._cuda:
            self._highest = max(self._highest, torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif self._linux:
            if hasattr(self._libc, "malloc_trim"):
                self._libc.malloc_trim(0)
            self._highest = max(self._highest, self._status("VmHWM"))
            Path("/proc/self/clear_refs").write_text("5")
            self._before = self._status("VmRSS")

    def stop(self) -> int | None:
        if self._cuda:
            return torch.cuda.max_memory_allocated() - self._before
        return self._status("VmHWM") - self._before if self._linux else None

    def highest(self) -> int:
        """Peak of the whole run in bytes."""
        if self._cuda:
            return max(self._highest, torch.cuda.max_memory_allocated())
        unit = 1 if sys.platform == "darwin" else 1024
        return max(self._highest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)

    def _status(self, key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {key}")


class Report:
    """Measurements by step and side, checks, and the figures worth keeping; ends as a table and as JSON."""

    def __init__(self, device: torch.device):
        self.device, self.memory = device, Memory(device)
        self.seconds: dict[str, dict[str, list[float]]] = {}
        self.peaks: dict[str, dict[str, int | None]] = {}
        self.checks: list[dict] = []
        self.facts: dict = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, step: str, side: str) -> Iterator[None]:
        """Time the body. Where a step is repeated, its second time gives the memory and later ones the time."""
        samples = self.seconds.setdefault(step, {s: [] for s in SIDES})[side]
        tracked = len(samples) < 2
        if tracked:
            self.memory.start()
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        samples.append(time.perf_counter() - begin)
        if tracked:
            self.peaks.setdefault(step, {})[side] = self.memory.stop()

    def check(self, what: str, holds: bool, detail: str) -> None:
        """Print and keep the outcome; one that does not hold makes the run fail."""
        print(f"  [{'ok' if holds else 'FAILED'}] {what}: {detail}", flush=True)
        self.checks.append({"check": what, "holds": bool(holds), "detail": detail})

    @property
    def failed(self) -> list[str]:
        return [check["check"] for check in self.checks if not check["holds"]]

    def rows(self) -> list[dict]:
        rows = []
        for step, sides in self.seconds.items():
            ours, peft = (statistics.median(sides[s][2:] or sides[s][-1:]) for s in SIDES)
            peaks = {s: self.peaks[step][s] for s in SIDES}
            rows.append({"step": step, "seconds": {"ours": ours, "PEFT": peft}, "ratio": peft / ours, "peak": peaks})
        return rows

    def print_table(self) -> None:
        section("Each step, side by side in this run")
        head = f"  {'step':<30}{'ours':>10}{'PEFT':>10}{'ratio':>8}{'ours peak':>12}{'PEFT peak':>12}"
        print(head, "  " + "-" * (len(head) - 2), sep="\n")
        for row in self.rows():
            times = "".join(f"{_seconds(row['seconds'][s]):>10}" for s in SIDES)
            peaks = "".join(f"{_size(row['peak'][s]):>12}" for s in SIDES)
            print(f"  {row['step']:<30}{times}{row['ratio']:>7.2f}x{peaks}")
        kind = "GPU memory" if self.device.type == "cuda" else "resident memory"
        print(f"  ratio: PEFT's time / ours. peak: {kind} above what was held before the step.")
        print(f"  whole run: {self.elapsed():.0f} s, peak {_size(self.memory.highest())}")

    def write(self, path: Path) -> None:
        import peft
        import transformers

        machine = {"system": platform.platform(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
        machine["device"] = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine()
        versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
        run = {"seconds": self.elapsed(), "peak_bytes": self.memory.highest()}
        record = {"machine": machine, "versions": versions, "run": run, "rows": self.rows(), "samples": self.seconds}
        path.parent.mkdir(parents=True, exist_ok=True)
        record |= {"checks": self.checks, "facts": self.facts}
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def elapsed(self) -> float:
        return time.perf_counter() - self._started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def section(title: str) -> None:
    print(f"\n{title}\n{'=' * len(title)}", flush=True)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _size(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f} MiB"
