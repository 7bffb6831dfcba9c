"""Write the results table of README.md from benchmarks/results/*.json, between its two markers.

    python benchmarks/readme_table.py            # rewrites README.md
    python benchmarks/readme_table.py --check    # exit code 1 when README.md does not show these results
    python benchmarks/readme_table.py --print    # the table alone

For each machine and benchmark the newest file counts. Losses stay in the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent
README = BENCHMARKS.parent / "README.md"
BEGIN = "<!-- results: written by benchmarks/readme_table.py -->"
END = "<!-- end of results -->"
_SHORT = dict(float32="fp32", bfloat16="bf16", float16="fp16")
_LINEAR = ("linear", "quantised", "lorafusion")  # kinds of files whose rows are those of bench_linear.py
_KINDS = dict.fromkeys(_LINEAR, ("linear",)) | dict(train=("train",), merge=("merge",))
_KINDS |= dict(serving=("step", "generate", "server"))
_LLAMA = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))
_STEPS = ((1, 1, 16), (8, 8, 16))  # T, D, r of the decode steps shown; the others are in the file
_MERGERS = ("PEFT", "addmm", "fused_lora")
_MERGE_NOTE = (
    "Not back: weights whose bits differ after merge and unmerge, PEFT / fused_lora. "
    "Memory: peak of a merge beyond what was held before, of the weight's size, PEFT / fused_lora."
)


def load(folder: Path) -> dict[str, dict]:
    """{machine name: {"linear": file, "merge": file, "serving": file}}: the newest file that has rows of each kind.

    ValueError: a file has none.
    """
    found: dict[str, dict] = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "rows" not in content or "machine" not in content:
            continue  # another kind of result
        if not content["rows"]:
            raise ValueError(f"{path}: expected rows of a benchmark, found none")
        entry = found.setdefault(content["machine"]["name"], {})
        for kind, benchmarks in _KINDS.items():
            if kind in _LINEAR and kind != _linear_kind(content.get("settings", {})):
                continue
            has_rows = any(row.get("benchmark") in benchmarks for row in content["rows"])
            if has_rows and (kind not in entry or entry[kind]["date"] < content["date"]):
                entry[kind] = content
    return {name: entry for name, entry in sorted(found.items()) if entry}


def _linear_kind(settings: dict) -> str:
    if settings.get("base") or settings.get("bases"):
        return "quantised"
    return "lorafusion" if settings.get("points") == "lorafusion" else "linear"


def render(results: dict[str, dict]) -> str:
    """One block of Markdown per machine."""
    return "\n\n".join(_machine_block(entry) for entry in results.values())


def _machine_block(entry: dict) -> str:
    newest = max((entry[kind] for kind in entry), key=lambda content: content["date"])
    machine, versions = newest["machine"], newest["versions"]
    threads = " or ".join(sorted({str(content["machine"]["threads"]) for content in entry.values()}))
    where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {threads} threads"
    commits: dict[str, list[str]] = {}
    for kind, content in entry.items():
        commits.setdefault((content["commit"] or "unknown")[:10], []).append(kind)
    made = ", ".join(f"{commit} ({', '.join(kinds)})" for commit, kinds in commits.items())
    head = f"{where}; torch {versions['torch']}, PEFT {versions['peft']}; {newest['date'][:10]}, commit {made}."
    lines = [head + " Median ms, all providers in turns in one run."]
    if "linear" in entry:
        lines += ["", *_linear_table(entry["linear"]["rows"])]
        if "lorafusion" in entry:
            lines[-1] += " " + _lorafusion(entry["lorafusion"]["rows"])
    if "quantised" in entry:
        rows = [row for row in entry["quantised"]["rows"] if row.get("base") == "nf4"]  # the file has the others
        lines += ["", *_linear_table(rows)]
        lines += [] if machine["gpu"] else ["", f"Threads: {entry['quantised']['machine']['threads']}."]
        lines[-1] += " The base layer is bitsandbytes' Linear4bit, NF4 with double quantisation."
    if "train" in entry:
        lines += ["", *_train_table(entry["train"]["rows"])]
    if "merge" in entry:
        lines += ["", *_merge_table(entry["merge"]["rows"])]
    if "serving" in entry:
        lines += ["", *_serving_table(entry["serving"])]
    return "\n".join(lines)


def _linear_table(rows: Sequence[dict]) -> list[str]:
    layers = _layers(rows, "linear")
    if any("PEFT default" in layer for layer in layers):
        return _gpu_linear_table(layers)
    lines = _head("forward+backward, in x out", "bare layer", "PEFT", "addmm", "fused_lora", "over PEFT", "saved, MiB")
    for layer in layers:
        own = layer["fused_lora"]
        times = [_time(layer.get(name), "both_ms") for name in ("bare", "PEFT", "addmm", "fused_lora")]
        saved = [_mebibytes(layer.get(name), "saved_bytes") for name in ("PEFT", "fused_lora")]
        adapters = "" if own["adapter_dtype"] == own["dtype"] else f"+{_SHORT[own['adapter_dtype']]}"
        label = f"{own['inputs']}x{own['outputs']}, {own['M']} rows, r={own['r']}, p={own['dropout']:g}, "
        label += _SHORT[own["dtype"]] + adapters
        lines.append(_line(label, *times, _factor(own.get("both_speedup")), " -> ".join(saved)))
    return lines


def _gpu_linear_table(layers: Sequence[dict]) -> list[str]:
    """The layers of Llama-3-8B with dropout, and all of LoRAFusion's points in one line; the file has every other."""
    lines = _head(
        "forward+backward, in x out", "bare layer", "PEFT", "PEFT default", "addmm", "fused_lora", "times bare",
        "over PEFT", "default over default", "saved, MiB",
    )  # fmt: skip
    for layer in layers:
        own, default = layer["fused_lora"], layer.get("fused default", {})
        if (own["inputs"], own["outputs"]) not in _LLAMA or (own["r"], own["dropout"]) != (16, 0.1):
            continue
        if own["adapter_dtype"] != own["dtype"]:
            continue
        names = ("bare", "PEFT", "PEFT default", "addmm", "fused_lora")
        times = [_time(layer.get(name), "both_ms") for name in names]
        saved = [_mebibytes(layer.get(name), "saved_bytes") for name in ("PEFT", "fused_lora")]
        factors = own.get("both_to_bare"), own.get("both_speedup"), default.get("both_speedup_default")
        label = f"{own['inputs']}x{own['outputs']}, {own['M']} rows"
        lines.append(_line(label, *times, *map(_factor, factors), " -> ".join(saved)))
    note = "bf16, r=16, p=0.1. PEFT: bf16 adapters; default: fp32 adapters under autocast, as trainers run them."
    return [*lines, "", note]


def _lorafusion(rows: Sequence[dict]) -> str:
    """One sentence for the points of LoRAFusion's benchmark."""
    own = [layer["fused_lora"] for layer in _layers(rows, "linear") if layer["fused_lora"].get("both_speedup")]
    speedups, steps = [row["both_speedup"] for row in own], [row["step_speedup"] for row in own]
    mean = statistics.geometric_mean(speedups)
    sizes = f"{min(row['M'] for row in own):,} to {max(row['M'] for row in own):,} rows"
    text = f"{len(speedups)} layers of LoRAFusion's benchmark (K = N of 4096, 5120 and 8192, {sizes}): "
    text += f"{mean:.2f}x PEFT's speed on average, {min(speedups):.2f}x to {max(speedups):.2f}x. "
    slower = sum(step < 1 for step in steps)
    text += f"Run eagerly on this host, which takes longer than the device, {slower} of them are slower than PEFT's"
    return text + f", {min(steps):.2f}x at worst."


def _train_table(rows: Sequence[dict]) -> list[str]:
    """A line for each model and kind of adapters."""
    lines = _head("training step", "base", "PEFT", "fused_lora", "over PEFT", "tokens/s", "peak, GiB")
    for default in (False, True):
        at = {row["provider"].partition(" ")[0]: row for row in rows if row["default"] is default}
        if "fused_lora" not in at:
            continue
        own, both = at["fused_lora"], [at[name] for name in ("PEFT", "fused_lora") if name in at]
        label = f"Llama {own['model']}, {own['layers']} layers, {own['batch']} x {own['tokens']:,} tokens, "
        label += "fp32 adapters under autocast" if default else f"{_SHORT[own['dtype']]} adapters"
        times = [_time(at.get(name), "ms") for name in ("base", "PEFT", "fused_lora")]
        speeds = " -> ".join(f"{row['tokens_per_second']:,}" for row in both)
        peaks = " -> ".join(f"{row['peak_GiB']:.3g}" for row in both)
        lines.append(_line(label, *times, _over(at, "ms", faster=False), speeds, peaks))
    return [*lines, "", "Rank 16 on all linear layers, p=0.1, forward, backward and AdamW; random weights and tokens."]


def _merge_table(rows: Sequence[dict]) -> list[str]:
    lines = _head("merge / unmerge, in x out", "copy", *_MERGERS, "over PEFT", "not back, %", "memory, %")
    for layer in _layers(rows, "merge"):
        own = layer["fused_lora"]
        if own["dtype"] == "float16":
            continue  # as bf16; the file has them
        times = [" / ".join(_time(layer.get(name), key) for key in ("merge_ms", "unmerge_ms")) for name in _MERGERS]
        speedup = " / ".join(_factor(own.get(key)) for key in ("merge_speedup", "unmerge_speedup"))
        back = " / ".join(_percent(layer.get(name), "changed") for name in ("PEFT", "fused_lora"))
        extra = " / ".join(_percent(layer.get(name), "extra_memory") for name in ("PEFT", "fused_lora"))
        label = f"{own['inputs']}x{own['outputs']}, r={own['r']}, {_SHORT[own['dtype']]}"
        lines.append(_line(label, _time(layer.get("copy"), "merge_ms"), *times, speedup, back, extra))
    return [*lines, "", _MERGE_NOTE]


def _serving_table(content: dict) -> list[str]:
    rows, (model, _, part) = content["rows"], content["settings"].get("model", "").partition(", ")
    part = f" ({part})" if part else ""  # a CPU times the steps of some layers only
    lines = _head(f"serving, {model}", "base", "PEFT", "fused_lora", "over PEFT")
    for T, D, r in _STEPS:
        steps = [row for row in rows if row["benchmark"] == "step"]
        at = {row["provider"]: row for row in steps if (row["T"], row["D"], row["r"]) == (T, D, r)}
        if "fused_lora" in at:
            times = [_time(at.get(name), "ms") for name in ("base", "PEFT", "fused_lora")]
            label = f"decode step, sequences: {T}, adapters: {D}, r={r}, ms{part}"
            lines.append(_line(label, *times, _over(at, "ms", faster=False)))
    generated = {row["provider"]: row for row in rows if row["benchmark"] == "generate"}
    if "fused_lora" in generated:
        own = generated["fused_lora"]
        speeds = [f"{generated[name]['tokens_per_second']:.3g}" for name in ("PEFT", "fused_lora") if name in generated]
        label = f"generate, sequences: {own['T']}, adapters: {own['D']}, r={own['r']}, tokens/s"
        lines.append(_line(label, "-", *speeds, _over(generated, "tokens_per_second", faster=True)))
    served = {row["provider"].partition(" ")[0]: row for row in rows if row["benchmark"] == "server" and row["correct"]}
    if "Zipf" in served:
        own, base = served["Zipf"], served.get("base")
        speed = "-" if base is None else f"{base['tokens_per_second']:.3g}"
        label = f"server, {own['known']} adapters, room for {own['held']}, r={own['r']}, tokens/s"
        lines.append(_line(label, speed, "-", f"{own['tokens_per_second']:.3g}", "-"))
    return lines


def _over(rows: dict[str, dict], key: str, faster: bool) -> str:
    """How many times PEFT's speed; ``faster``: the number is a speed, not a time."""
    if "PEFT" not in rows or not rows["fused_lora"]["correct"]:
        return "-"
    theirs, ours = (rows[name][key] for name in ("PEFT", "fused_lora"))
    return _factor(ours / theirs if faster else theirs["median"] / ours["median"])


def _layers(rows: Sequence[dict], kind: str) -> list[dict[str, dict]]:
    """Rows of one layer together, {provider: row}, in the order measured."""
    layers: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        if row["benchmark"] == kind:
            names = ("inputs", "outputs", "r", "dtype", "adapter_dtype", "dropout", "M", "relative")
            layers.setdefault(tuple(row[name] for name in names), {})[row["provider"]] = row
    return [layer for layer in layers.values() if "fused_lora" in layer]


def _head(*titles: str) -> list[str]:
    return [_line(*titles), "|---" + "|---:" * (len(titles) - 1) + "|"]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _time(row: dict | None, key: str) -> str:
    if row is None:
        return "-"
    return f"{row[key]['median']:.3g}" if row["correct"] else "wrong"


def _factor(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(row: dict | None, key: str) -> str:
    return "-" if row is None or row.get(key) is None else f"{100 * row[key]:.3g}"


def _mebibytes(row: dict | None, key: str) -> str:
    return "-" if row is None or key not in row else f"{row[key] / 2**20:.3g}"


def insert(text: str, table: str) -> str:
    """``text`` with ``table`` between the markers. ValueError: a marker is missing."""
    begin, end = text.find(BEGIN), text.find(END)
    if begin < 0 or end < begin:
        raise ValueError(f"README.md: expected the lines {BEGIN!r} and {END!r}")
    return f"{text[: begin + len(BEGIN)]}\n{table}\n{text[end:]}"


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true")
    options.add_argument("--print", action="store_true", dest="print_only")
    options.add_argument("--results", type=Path, default=BENCHMARKS / "results")
    options.add_argument("--readme", type=Path, default=README)
    arguments = options.parse_args(argv)
    table = render(load(arguments.results))
    if arguments.print_only:
        print(table)
        return 0
    old = arguments.readme.read_text(encoding="utf-8")
    new = insert(old, table)
    if arguments.check:
        return int(new != old)
    arguments.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
