"""What every benchmark shares: interleaved timing, the machine, a table on the screen, results as JSON.

A results file has: benchmark, machine, versions, commit, date, settings, rows (one per point and provider), bars,
skipped and warnings. It is written again after every point, so a run that is cut off keeps what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

import fused_lora
from fused_lora.ops import guard
from fused_lora.ops.linear import tuned
from fused_lora.testing.clock import Candidate, Clock, interleaved, summary
from fused_lora.testing.graphs import capture

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def summaries(candidates: Sequence[Candidate], clock: Clock, arguments: argparse.Namespace) -> dict[str, list[dict]]:
    """:func:`interleaved`, as many rounds as the command line says: {name: [summary of each step's ms]}."""
    times = interleaved(candidates, clock, arguments.seconds, arguments.rounds, arguments.deadline)
    return {name: [summary(step) for step in zip(*turns, strict=True)] for name, turns in times.items()}


def times_of(calls: Mapping, clock: Clock, arguments: argparse.Namespace) -> dict:
    """The same of candidates of one step each: {name: summary}."""
    candidates = [Candidate(name, [call]) for name, call in calls.items()]
    return {name: found for name, [found] in summaries(candidates, clock, arguments).items()}


def replayed(call: Callable[[], object], stack: contextlib.ExitStack) -> Callable[[], object]:
    """``call`` as the replay of a CUDA graph until ``stack`` ends; RuntimeError where it cannot be one."""
    graph, result = capture(call)
    stack.callback(graph.reset)

    def replay() -> object:
        graph.replay()
        return result

    return replay


def machine(device: torch.device) -> dict:
    """CPU model, cores, threads, load and GPU: what a reader needs to place the numbers, and nothing private."""
    found = dict(
        name=machine_name(device),
        cpu=_cpu_model(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        load_before=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        system=platform.system(),
        gpu=None,
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        table = tuned.table(device) if guard.usable(device) else None
        found["gpu"] = dict(
            name=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            memory_gib=round(properties.total_memory / 2**30, 1),
            cuda=torch.version.cuda or torch.version.hip,
            tuned_plans=0 if table is None else len(table),  # of `fused-lora tune`, before the rules
        )
    return found


def machine_name(device: torch.device) -> str:
    """File-name form of the GPU's model, or of the CPU's model and core count: ``nvidia-h200``, ``amd-epyc-2c``."""
    if device.type == "cuda":
        return _sanitised(torch.cuda.get_device_name(device))
    return f"{_sanitised(_cpu_model())}-{_cores()}c"


def _sanitised(model: str) -> str:
    model = re.sub(r"\((?:r|tm|c)\)|@.*|\b\d+-core\b|\b(?:processor|cpu)\b", " ", model.lower())
    return re.sub(r"[^a-z0-9]+", "-", model).strip("-") or "unknown"


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str | None]:
    """python, torch, triton, peft and fused_lora; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "fused_lora": fused_lora.__version__}
    found["torch"] = torch.__version__  # with the build, which the metadata of PyPI's wheels leave out
    for name in ("triton", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checkout's commit, with ``+changes`` where tracked files outside the results differ; None without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass
class Report:
    """Collects rows and bars and writes the results file."""

    benchmark: str
    device: torch.device
    out: Path
    settings: dict
    commit: str | None = None
    rows: list[dict] = field(default_factory=list)
    bars: list[dict] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self):
        self._machine, self._versions = machine(self.device), versions()
        self._date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.commit = self.commit or commit()

    @property
    def path(self) -> Path:
        return self.out / f"{self._machine['name']}-{self.benchmark}.json"

    @property
    def wrong(self) -> int:
        return sum(not row.get("correct", True) for row in self.rows)

    def add_wrong(self, table: Table, row: dict, message: str, *cells: object) -> None:
        """A result that gets no time, and what is wrong with it."""
        self.rows.append(row | dict(correct=False, wrong=message))
        table.row(*cells, "WRONG")
        print(f"  {message}")

    def heading(self) -> None:
        m, gpu = self._machine, self._machine["gpu"]
        where = gpu["name"] if gpu else f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads"
        print(f"{self.benchmark} on {where}; load {m['load_before']}; commit {(self.commit or 'unknown')[:20]}")
        print("  ".join(f"{name} {version}" for name, version in self._versions.items()), flush=True)

    @contextlib.contextmanager
    def noting_warnings(self) -> Iterator[None]:
        """Keep this package's warnings with the results. A dropped kernel explains a slow row."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for text in dict.fromkeys(str(warning.message) for warning in caught):
            if text.startswith("fused_lora") and text not in self.warnings:
                self.warnings.append(text)
                print(f"  warning: {text}")

    def bar(self, name: str, value: float, limit: float, at_least: bool) -> None:
        passed = value >= limit if at_least else value <= limit
        self.bars.append(dict(name=name, value=round(value, 4), limit=limit, at_least=at_least, passed=passed))

    def write(self) -> None:
        names = ("benchmark", "settings", "commit", "rows", "bars", "skipped", "warnings")
        content = dict(machine=self._machine, versions=self._versions, date=self._date)
        content.update({name: getattr(self, name) for name in names})
        self.out.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        # messages of compilers and drivers name folders of this machine
        text = re.sub(r"(?<![\w.])/(?:[^/\s\"']+/)+", "", json.dumps(content, indent=1))
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, self.path)

    def figure(self, kind: str, *arguments: object) -> None:
        """The figure beside the results, by ``kind(rows, *arguments, path)`` of figures.py, if matplotlib is there."""
        try:
            draw = getattr(importlib.import_module("figures"), kind)
        except ImportError as error:
            print(f"no figure: {error}")
            return
        path = draw(self.rows, *arguments, self.path.with_suffix(".png"))
        if path is not None:
            print(f"figure: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name}")

    def finish(self) -> int:
        """Write, print bars and what was left out; the exit code: 1 when a result was wrong."""
        self.write()
        for bar in self.bars:
            verdict, sign = "PASS" if bar["passed"] else "FAIL", ">=" if bar["at_least"] else "<="
            print(f"{verdict}  {bar['name']}: {bar['value']:.3g} (bar {sign} {bar['limit']:g})")
        for text in self.skipped:
            print(f"not run: {text}")
        shown = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path.name
        print(f"{len(self.rows)} results, {self.wrong} wrong: {shown}", flush=True)
        return 1 if self.wrong else 0


class Table:
    """Rows of fixed-width columns, printed as they come: [(title, width), ...]; the first column is left-aligned."""

    def __init__(self, columns: Sequence[tuple[str, int]]):
        self._columns = columns
        self._print([title for title, _ in columns])

    def row(self, *cells: object) -> None:
        cells += (None,) * (len(self._columns) - len(cells))
        self._print(["-" if cell is None else str(cell) for cell in cells])

    def _print(self, cells: Sequence[str]) -> None:
        widths = [width for _, width in self._columns]
        first, *rest = zip(cells, widths, strict=True)
        print(" ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]), flush=True)


def spread(found: dict[str, float] | None) -> str | None:
    """``12.3 [11.9 13.0]``: median and the 20th and 80th percentile."""
    return found and f"{found['median']:.4g} [{found['p20']:.4g} {found['p80']:.4g}]"


def parser(description: str, seconds: float = 4.0) -> argparse.ArgumentParser:
    """The options that every benchmark takes; ``seconds``: of a point on a CPU, as for :func:`begin`."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    found.add_argument("--budget", type=float, metavar="MINUTES", help="start no point after this (CPU default: 2)")
    found.add_argument("--seconds", type=float, help=f"timing per point (default: {seconds:g} on a CPU, 0.3 on a GPU)")
    found.add_argument("--rounds", type=int, default=7, help="rounds per point at least (default: %(default)s)")
    found.add_argument("--shapes", type=_shapes, help="in x out of the layers, e.g. 4096x4096,1000x777")
    found.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    found.add_argument("--commit", help="recorded where git is not at hand")
    return found


def begin(benchmark: str, arguments: argparse.Namespace, seconds: float = 4.0) -> Report:
    """The report of a run, its heading printed; fills in the defaults of ``arguments`` and their ``deadline``."""
    on_cpu = arguments.device.type == "cpu"
    if arguments.seconds is None:
        arguments.seconds = seconds if on_cpu else 0.3
    if arguments.budget is None and on_cpu:
        arguments.budget = 2.0
    arguments.deadline = time.monotonic() + (arguments.budget * 60 if arguments.budget is not None else 1e9)
    private = ("out", "commit", "deadline", "device")
    settings = {"device": arguments.device.type} | {k: v for k, v in vars(arguments).items() if k not in private}
    report = Report(benchmark, arguments.device, arguments.out, settings, arguments.commit)
    report.heading()
    return report


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise argparse.ArgumentTypeError(f"expected INxOUT[,INxOUT...], got {text!r}")
    return shapes


def run(name: str, arguments, columns, points: Callable, measure: Callable, add_bars: Callable | None = None) -> int:
    """A benchmark of one table: ``measure(point, report, table, arguments)`` of each of ``points(arguments)``."""
    report, table = begin(name, arguments), Table(columns)
    run_points(points(arguments), report, arguments.deadline, lambda point: measure(point, report, table, arguments))
    if add_bars is not None:
        add_bars(report)
    return report.finish()


def run_points(points: Sequence, report: Report, deadline: float, measure: Callable[[object], None]) -> None:
    """``measure`` each point until the deadline, writing the results after each.

    A point that fails is recorded as a wrong result and the others still run.
    """
    for point in points:
        if time.monotonic() >= deadline:
            report.skipped.append(f"{point}: out of time")
            continue
        try:
            with report.noting_warnings():
                measure(point)
        except torch.OutOfMemoryError:
            report.skipped.append(f"{point}: out of memory")
        except Exception as error:
            traceback.print_exc()
            failed = dict(benchmark="failed", provider="all", correct=False, wrong=f"{type(error).__name__}: {error}")
            report.rows.append(vars(point) | failed)
        report.write()
