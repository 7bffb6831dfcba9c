"""Compile every configuration for every chip, without a GPU, and check the binaries.

    python tools/compile_report             compile what has changed, print the table, write the JSON and the page
    python tools/compile_report --check     write nothing; exit status 1 if a case breaks a rule or has become worse
    python tools/compile_report --all       compile everything again

Rules: no spills; shared memory within the chip's limit; HGMMA on sm_90 and tcgen05 on sm_100 in the 16-bit GEMMs whose
tile has the 64 rows of such an instruction, HMMA in the others; 16-byte copies; TMA loads where a configuration asks
for them; no wgmma in flight that reads registers; with the recorded compiler not more than 10 % more registers than
recorded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from compile_report.compiling import CHIPS, collect, fingerprint, labelled, toolchain
from fused_lora.diagnostics.explain import explain

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "compile_report.json"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- compile-report: begin -->", "<!-- compile-report: end -->"
_REGISTER_SLACK = 1.10
_SIZES = {"bfloat16": "16-bit", "float16": "16-bit", "float32": "32-bit"}


def problems(results: dict[str, dict[str, dict]], recorded: dict[str, dict[str, dict]]) -> list[str]:
    """One line for each rule that a case breaks; see the module's docstring."""
    return [
        f"{chip} {label}: {line}"
        for chip, records in results.items()
        for label, r in records.items()
        for line in _broken_rules(r, CHIPS[chip].shared_per_block, recorded.get(chip, {}).get(label, {}))
    ]


def _broken_rules(r: dict, shared_limit: int, before: dict) -> Iterator[str]:
    if "error" in r:
        yield f"does not compile: {r['error']}"
        return
    if r["spills"]:
        yield f"{r['spills']} bytes of spills"
    if r["shared"] > shared_limit:
        yield f"{r['shared']} bytes of shared memory, the chip has {shared_limit}"
    if r.get("loose"):
        yield f"{r['loose']} wgmmas in flight read their left operand from registers"
    yield from (f"no {name}" for name in r["needs"] if not r.get(name))
    if r["registers"] > before.get("registers", math.inf) * _REGISTER_SLACK:
        yield f"{r['registers']} registers, recorded were {before['registers']}"


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown: one line for each chip, operation, variant and size of x's type, with the range over its cases."""
    lines = [
        "| chip | kernel | x | compilations | registers | spills | shared memory, KiB of the limit "
        "| blocks per SM | tensor cores | 16-byte copies | TMA |",
        "|---|---|---|---:|---:|---:|---:|---:|---|---:|---:|",
    ]
    for chip, records in results.items():
        groups: dict[tuple, list[dict]] = {}
        for r in records.values():
            name = r["op"] if r["variant"] == r["op"] else f"{r['op']}, {r['variant']}"
            groups.setdefault((name, _SIZES.get(r["dtype"], r["dtype"])), []).append(r)
        for (name, dtype), group in groups.items():
            sound = [r for r in group if "error" not in r]
            if not sound:
                lines.append(f"| {chip} | {name} | {dtype} | 0 of {len(group)} compile |" + " |" * 7)
                continue
            count = str(len(group)) if len(sound) == len(group) else f"{len(sound)} of {len(group)} compile"
            units = [u for u in ("HGMMA", "tcgen05", "HMMA", "MFMA") if any(r.get(u) for r in sound)]
            cells = [chip, name, dtype, count, _span(r["registers"] for r in sound)]
            cells += [str(max(r["spills"] for r in sound))]
            cells += [f"{_span(r['shared'] >> 10 for r in sound)} of {CHIPS[chip].shared_per_block >> 10}"]
            cells += [_span(r["blocks"] for r in sound), ", ".join(units) or "-"]
            cells += [_span(r.get(name, 0) for r in sound) for name in ("copy16", "TMA")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _span(values: Iterable[int]) -> str:
    values = list(values)
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def cost_table(N: int = 4096, K: int = 4096) -> str:
    """Markdown: what ``explain`` says of a bf16 layer on sm_90, against the floor, which moves every operand once.

    A merge's floor is one read and one write of W; the corrections of its record are a few per cent of W
    (kernels/merge.py).
    """
    lines = [
        "| operation | rows | rank | dropout | variant | launches | MB | of the floor | GFLOP | of the floor |",
        "|---|---:|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for M, r in ((1, 16), (64, 16), (8192, 16), (8192, 64), (8192, 128)):
        for p in (0.0, 0.1):
            found = explain(M=M, K=K, N=N, r=r, dropout=p, device="sm_90")
            for cost in (found.forward, found.backward):
                lines.append(
                    f"| {cost.name} | {M} | {r} | {'yes' if p else 'no'} | {cost.variant} | {cost.launches} "
                    f"| {cost.bytes / 1e6:.1f} | {cost.bytes / cost.floor_bytes:.3f} "
                    f"| {cost.flops / 1e9:.2f} | {cost.flops / cost.floor_flops:.3f} |"
                )
    W = 2 * N * K
    lines.append(f"| merge | - | 16 | - | - | 1 | {2 * W / 1e6:.1f} | 1.000 | {2 * N * K * 16 / 1e9:.2f} | 1.000 |")
    return "\n".join(lines)


def read_results(path: Path) -> dict[str, dict[str, dict]]:
    """{chip: {label: record}}. Empty if there is no file yet, or one of another compiler."""
    if not path.exists():
        return {}
    whole = json.loads(path.read_text(encoding="utf-8"))
    return whole["chips"] if whole["toolchain"] == toolchain() else {}


def write_results(path: Path, results: dict[str, dict[str, dict]]) -> None:
    """One record a line, so that a diff shows the cases that have changed; replaced in one step."""
    chips = []
    for chip, records in results.items():
        rows = [f"   {json.dumps(label)}: {json.dumps(r, separators=(',', ':'))}" for label, r in records.items()]
        chips.append(f"  {json.dumps(chip)}: {{\n" + ",\n".join(rows) + "\n  }")
    text = f'{{\n "toolchain": {json.dumps(toolchain())},\n "chips": {{\n' + ",\n".join(chips) + "\n }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_page(path: Path, results: dict[str, dict[str, dict]]) -> None:
    """Put the table between the page's markers, or at its end if it has none."""
    listed = {chip: len(labelled(CHIPS[chip].capability, True)) for chip in results}
    numbers = ", ".join(f"{len(records)} of {listed[chip]} on {chip}" for chip, records in results.items())
    block = (
        f"{BEGIN}\nConfigurations compiled with {toolchain()}: {numbers}.\n\n{table(results)}\n\n"
        f"One bf16 layer, K = N = 4096, as sm_90 would run it:\n\n{cost_table()}\n{END}"
    )
    text = path.read_text(encoding="utf-8") if path.exists() else "# Performance\n\n## Compiled configurations\n"
    if BEGIN in text:
        before, rest = text.split(BEGIN, 1)
        text = before + block + rest.split(END, 1)[1]
    else:
        text = text.rstrip("\n") + "\n\n" + block + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="tools/compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 on a broken rule or a regression")
    parser.add_argument("--all", action="store_true", help="compile cases whose recorded result still stands, too")
    parser.add_argument("--every-dtype", action="store_true", help="fp16 of training and merge on every chip, not one")
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=list(CHIPS))
    parser.add_argument("--only", default="", help="only cases whose label contains this")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    recorded = read_results(options.results)
    results: dict[str, dict[str, dict]] = {}
    written = 0
    for done, todo, results in collect(
        recorded, options.chips, options.only, options.all, options.processes, options.every_dtype
    ):
        print(f"\rcompiled {done} of {todo}", end="", file=sys.stderr, flush=True)
        if not options.check and done >= written + 40:
            write_results(options.results, _over(read_results(options.results), results))
            written = done
    print(file=sys.stderr)
    print(table(results))
    found = problems(results, recorded)
    for line in found:
        print(line)
    print(f"{sum(map(len, results.values()))} configurations, {len(found)} problems")
    if not options.check:
        kept = _over(read_results(options.results), results)  # another run may have written, too
        write_results(options.results, kept)
        write_page(options.page, kept)
    return 1 if found and options.check else 0


def _over(recorded, results):
    """The results so far on top of the recorded ones, so that an interrupted run keeps what it has.

    Only existing cases are kept. A recorded result is kept only if it is of today's code.
    """
    kept = {}
    for chip, spec in CHIPS.items():
        known, usual = recorded.get(chip, {}) | results.get(chip, {}), labelled(spec.capability)
        kept[chip] = {
            label: known[label]
            for label, case in labelled(spec.capability, True).items()
            if label in known and (label in usual or known[label]["key"] == fingerprint(case, chip))
        }
    return {chip: records for chip, records in kept.items() if records}
