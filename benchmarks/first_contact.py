"""For the first minutes on a GPU machine: checks, tests and benchmarks in order of importance, then one page.

    python benchmarks/first_contact.py --budget 9 --out DIR [--cache FILE] [--commit TEXT] [--dry]

Stages run in order of importance, each in a process of its own under a limit of its own, so a crash, a hang or a CUDA
error costs one stage. DIR holds a log and a JSON result of every stage, the results files of the benchmarks and the
page, first_contact.txt, written again after each stage. --cache: compiled kernels from ``tools/precompile.py pack``.
--dry runs every stage in a small form on a CPU. Exit code: 1 when a stage failed or timed out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
LEAST = 5.0  # seconds left in which a stage still starts
BENCH = "python benchmarks/bench_{}.py --out {{out}} --budget {{minutes}} --commit {{commit}}"
TINY = " --device cpu --shapes 48x40 --seconds 0 --rounds 1"
PYTEST = "python -m pytest -v -o faulthandler_timeout=60 -m {} -n {} --maxschedchunk 1 "
COLLECT = "python -m pytest -q --collect-only -m {} "
GPU_TESTS = " ".join(f"tests/gpu/test_{name}.py" for name in ("layers", "models", "runtime", "quantised", "tune"))
KERNEL_TESTS = "tests/kernels"
REST = "tests " + " ".join(f"--ignore={path}" for path in f"{GPU_TESTS} {KERNEL_TESTS}".split())
TUNE = "python -m fused_lora.cli tune --seconds 0.1"
SMOKE = "python -m fused_lora.testing.smoke"
OF_TESTS = r"^kernels run|^FAILED |^ERROR\b|^=+ .* in [\d.]+s"
OF_BENCH = r"^PASS |^FAIL |WRONG|warning:|^not run| results, |^(layer|decode) "
OURS = r"|^\d+x\d+ .* fused_lora "


@dataclass(frozen=True)
class Stage:
    """share: of the budget, at most. show: the log's lines for the page. beside: runs at the time of the one before."""

    name: str
    share: float
    command: str
    dry: str
    show: str
    beside: bool = False
    env: dict[str, str] = field(default_factory=dict)
    needs: str | None = None


def _bench(name: str, share: float, own: str, dry: str = "", show: str = "") -> Stage:
    command = BENCH.format(name)
    return Stage(f"bench_{name}", share, f"{command} --device cuda {own}", command + TINY + dry, OF_BENCH + show)


STAGES = (
    Stage("environment", 0.15, "python benchmarks/environment.py --cache={cache}",
          "python benchmarks/environment.py --cache={cache} --without-gpu", "."),
    Stage("smoke", 0.2, SMOKE, f"{SMOKE} cpu --subset", "Error|Warning"),
    Stage("memcheck", 0.15,
          f"compute-sanitizer --tool memcheck --error-exitcode 99 --target-processes all {SMOKE} --subset",
          f"{SMOKE} --help", "ERROR SUMMARY|Invalid|at .*kernel", env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
          needs="compute-sanitizer"),
    Stage("gpu_tests", 0.4, PYTEST.format("'gpu and not slow'", max(1, CORES // 4)) + GPU_TESTS,
          COLLECT.format("'gpu and not slow'") + GPU_TESTS, OF_TESTS),
    Stage("kernel_tests", 0.4, PYTEST.format("'not slow'", max(1, CORES // 2)) + KERNEL_TESTS,
          COLLECT.format("'not slow'") + "tests/kernels/test_sync.py", OF_TESTS, beside=True),
    _bench("linear", 0.15, "--seconds 0.5", " --rows 8", OURS),
    _bench("merge", 0.08, "--seconds 0.5", "", OURS),
    _bench("decode", 0.12, "--seconds 0.5", " --rows 8", "|^M="),
    _bench("train", 0.12, "", " --model tiny", "|tokens"),
    _bench("kinds", 0.08, "--seconds 0.2", " --help", "|fused_lora"),
    _bench("variants", 0.15, "--seconds 0.3", " --rows 8", r"| \*$"),
    Stage("tune", 0.12, f"{TUNE} --out {{out}}/tuned.json --rows 16,512,8192", f"{TUNE} --help", "rules:"),
    _bench("launches", 0.1, "--seconds 0.1", " --help", r"| \*$"),
    _bench("memory", 0.05, "", " --rows 8"),
    _bench("host", 0.08, "--seconds 0.2", " --help", "|^train"),
    Stage("other_tests", 1.0, PYTEST.format("'not slow and not thorough'", CORES) + REST,
          COLLECT.format("'not slow and not thorough'") + "tests/test_reference.py", OF_TESTS),
)  # fmt: skip


def run_together(stages: Sequence[Stage], end: float, out: Path, values: dict[str, str], dry: bool) -> list[dict]:
    """Run stages at the same time until ``end``; a result for each. values: of the {names} in their commands."""
    begin, running, results = time.monotonic(), [], []
    for stage in stages:
        result = dict(stage=stage.name, status="not reached", why="", seconds=0.0, log=f"{stage.name}.log", lines=[])
        results.append(result)
        if stage.needs and not shutil.which(stage.needs):
            result |= dict(status="skipped", why=f"{stage.needs} is not on PATH")
        elif end - begin >= LEAST:
            limit = min(stage.share * float(values["budget"]) * 60, end - begin)
            # a benchmark starts no point after 70 % of its limit, so that the last one ends in time
            own = values | dict(minutes=f"{limit * 0.7 / 60:.3f}")
            command = [part.format(**own) for part in shlex.split(stage.dry if dry else stage.command)]
            command = [sys.executable if part == "python" else part for part in command]
            # "0": tests of kernels fail where there is no GPU, instead of being interpreted
            env = os.environ | {"PYTHONFAULTHANDLER": "1", "TRITON_INTERPRET": str(int(dry))} | stage.env
            result |= dict(command=shlex.join(command), limit=round(limit, 1))
            with open(out / result["log"], "wb") as log:
                process = subprocess.Popen(
                    command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
            running.append((stage, result, process, begin + limit))
    try:
        while running:
            for entry in [e for e in running if e[2].poll() is not None or time.monotonic() >= e[3]]:
                stage, result, process, _ = entry
                result["status"], result["why"] = _end(process)
                result["seconds"] = round(time.monotonic() - begin, 1)
                result["lines"] = _for_the_page(stage, out / result["log"], result["status"] == "passed")
                running.remove(entry)
            time.sleep(0.05)
    finally:
        for _, _, process, _ in running:
            _kill(process, signal.SIGKILL)
    return results


def _end(process: subprocess.Popen) -> tuple[str, str]:
    """(how it ended, why), once nothing of its process group is left."""
    code = process.poll()
    if code is None:
        _kill(process, signal.SIGABRT)  # faulthandler writes into the log where each process hangs
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
    _kill(process, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver: not even SIGKILL ends it now
        process.wait(10)
    if code is None:
        return "timed out", "the stacks in its log say where"
    if code < 0:
        return "failed", signal.Signals(-code).name
    return ("failed", f"exit code {code}") if code else ("passed", "")


def _kill(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _for_the_page(stage: Stage, log: Path, passed: bool, most: int = 14) -> list[str]:
    """What the stage shows of its log; where it did not pass, the end of the log, too."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    shown = list(dict.fromkeys(line for line in lines if re.search(stage.show, line)))
    if stage.show == OF_TESTS and not passed and not any(line.startswith(("FAILED", "ERROR")) for line in shown):
        # cut off before its summary
        done = [line for line in lines if re.search(r"\b(PASSED|FAILED|ERROR)\b", line)]
        failed = [line for line in done if "PASSED" not in line]
        shown += [f"{len(done)} tests ran, {len(failed)} of them failed", *failed]
    if len(shown) > most:
        shown = [*shown[: most // 2], f"... {len(shown) - most} more", *shown[-(most - most // 2) :]]
    if not passed:
        fatal = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), len(lines))
        shown += ["the log ends:", *(line for line in lines[max(fatal - 10, 0) : fatal + 1] if line not in shown)]
        for i in [i for i, line in enumerate(lines) if i > fatal and line.startswith("Current thread")][:6]:
            shown += ["stack of a process, innermost call first:", *lines[i + 1 : i + 5]]
    return [line[:200] for line in shown]


def page(results: Sequence[dict], heading: str) -> str:
    """The page that sums everything up."""
    counts = Counter(result["status"] for result in results)
    text = [heading, ", ".join(f"{count} {status}" for status, count in counts.items()), ""]
    for r in results:
        r = r | dict(why=r["why"] and f": {r['why']}")
        text.append("{stage:<16}{seconds:>7.1f} s  {status}{why}".format(**r))
    for r in results:
        if r["lines"]:
            text += ["", f"== {r['stage']}: {r['status']} ({r['log']})", *(f"   {line}" for line in r["lines"])]
    return "\n".join(text) + "\n"


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run the stages and print the page."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--budget", type=float, default=9.0, metavar="MINUTES", help="for all (default: 9)")
    options.add_argument("--out", type=Path, default=Path("first_contact"), metavar="DIR")
    options.add_argument("--cache", type=Path, metavar="FILE", help="compiled kernels to unpack")
    options.add_argument("--commit", default="", help="recorded where git is not at hand")
    options.add_argument("--dry", action="store_true", help="every stage in a small form on a CPU")
    arguments = options.parse_args(argv)
    out, begin, results = arguments.out.resolve(), time.monotonic(), []
    out.mkdir(parents=True, exist_ok=True)
    cache = str(arguments.cache.resolve()) if arguments.cache else ""
    values = dict(out=str(out), cache=cache, commit=arguments.commit, budget=str(arguments.budget))
    groups: list[list[Stage]] = []
    for stage in stages:
        # a dry run times nothing: pairs
        if groups and (stage.beside or arguments.dry and len(groups[-1]) == 1):
            groups[-1].append(stage)
        else:
            groups.append([stage])
    for group in groups:
        results += run_together(group, begin + arguments.budget * 60, out, values, arguments.dry)
        for result in results[-len(group) :]:
            write(out / f"{result['stage']}.json", json.dumps(result, indent=1) + "\n")
            print(f"{result['stage']}: {result['status']} {result['why']}", flush=True)
        took = (time.monotonic() - begin) / 60
        heading = f"first contact{' (dry)' if arguments.dry else ''} {arguments.commit}"
        text = page(results, f"{heading.strip()}: {took:.1f} of {arguments.budget:g} minutes")
        write(out / "first_contact.txt", text)
    print("\n" + text)
    return int(any(result["status"] in ("failed", "timed out") for result in results))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is killed, too
    sys.exit(main())
