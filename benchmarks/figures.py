"""The figures beside results of bench_merge.py and bench_serving.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLOURS = {"fused_lora": "#1f6fb4", "PEFT": "#d1603d", "loop": "#7a9a3a", "merged": "#888888"}
COLOURS |= {"addmm": "#7a9a3a", "no record": "#7b5aa6"}


def merge(rows: Sequence[dict], path: Path) -> Path | None:
    """Time of a merge over the size of the weight, one panel a dtype; None where there is no layer to draw."""
    layers = [row for row in rows if row["benchmark"] == "merge" and row["correct"]]
    panels = {dtype: [r for r in layers if r["dtype"] == dtype] for dtype in dict.fromkeys(r["dtype"] for r in layers)}
    title = "merge (solid) and unmerge (dotted) of one layer at rank 16, median"
    return _figure(panels, _merge_panel, 10, ("numbers in the weight", "ms", title), path)


def serving(rows: Sequence[dict], model: str | None, path: Path) -> Path | None:
    """Share of the base by distinct adapters, one panel a rank; None where there is no step to draw."""
    found = [r for r in rows if r["benchmark"] == "step" and r["correct"] and r["provider"] in COLOURS]
    panels = {f"rank {rank}": [r for r in found if r["r"] == rank] for rank in sorted({r["r"] for r in found})}
    titles = "distinct adapters D", "time of a step / the base's", f"{model or ''}: every point is one (T, D)"
    return _figure(panels, _serving_panel, 2, titles, path)


def _figure(panels: Mapping[str, list], draw: Callable, base: int, titles: Sequence[str], path: Path) -> Path | None:
    """titles: of x, of y and of all."""
    if not panels:
        return None
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.8), sharey=True, squeeze=False)
    for axis, (name, rows) in zip(axes[0], panels.items(), strict=True):
        draw(axis, rows)
        axis.set_xscale("log", base=base)
        axis.set_yscale("log")
        axis.set_xlabel(titles[0])
        axis.grid(alpha=0.3, which="both")
        axis.set_title(name)
    axes[0][0].set_ylabel(titles[1])
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(titles[2], fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _merge_panel(axis, rows: list[dict]) -> None:
    rows.sort(key=_numbers)
    for provider in ("fused_lora", "PEFT", "addmm", "no record"):
        own = [row for row in rows if row["provider"] == provider]
        if not own:
            continue  # only a device that runs the kernels has one without a record
        for call, line in (("merge_ms", "-"), ("unmerge_ms", ":")):
            style = dict(color=COLOURS[provider], marker="o", markersize=3)
            label = provider if call == "merge_ms" else None
            axis.plot([_numbers(r) for r in own], [r[call]["median"] for r in own], line, label=label, **style)
    floor = [(_numbers(row), row["floor_ms"]) for row in rows if row["provider"] == "copy"]
    axis.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1, label="floor (bytes, as a copy)")


def _numbers(row: dict) -> int:
    return row["inputs"] * row["outputs"]


def _serving_panel(axis, rows: list[dict]) -> None:
    for provider in ("fused_lora", "PEFT", "loop", "merged"):
        own = [r for r in rows if r["provider"] == provider]
        at = [r["D"] for r in own], [r["share"] for r in own]
        axis.scatter(*at, s=14, color=COLOURS[provider], label=provider)
    floor = sorted({(r["D"], r["floor_share"]) for r in rows})
    axis.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1, label="floor (bytes)")
