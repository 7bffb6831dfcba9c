"""The figure of bench_merge.py: time of a merge over the size of the weight, one panel a dtype."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLOURS = {"fused_lora": "#1f6fb4", "PEFT": "#d1603d", "addmm": "#7a9a3a", "no record": "#7b5aa6"}


def draw(rows: Sequence[dict], path: Path) -> Path | None:
    """Write the figure; None where there is no layer to draw."""
    layers = [row for row in rows if row["benchmark"] == "merge" and row["correct"]]
    dtypes = list(dict.fromkeys(row["dtype"] for row in layers))
    if not dtypes:
        return None
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(4.2 * len(dtypes), 3.8), sharey=True, squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        _panel(axis, sorted((r for r in layers if r["dtype"] == dtype), key=_numbers))
        axis.set_title(dtype)
    axes[0][0].set_ylabel("ms")
    axes[0][-1].legend(fontsize=7)
    figure.suptitle("merge (solid) and unmerge (dotted) of one layer at rank 16, median", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _numbers(row: dict) -> int:
    return row["inputs"] * row["outputs"]


def _panel(axis, rows: Sequence[dict]) -> None:
    for provider, colour in COLOURS.items():
        own = [row for row in rows if row["provider"] == provider]
        for call, line in (("merge_ms", "-"), ("unmerge_ms", ":")):
            label = provider if call == "merge_ms" else None
            times = [row[call]["median"] for row in own]
            axis.plot([_numbers(r) for r in own], times, line, color=colour, marker="o", markersize=3, label=label)
    floor = [(_numbers(row), row["floor_ms"]) for row in rows if row["provider"] == "copy"]
    axis.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1, label="floor (bytes, as a copy)")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("numbers in the weight")
    axis.grid(alpha=0.3, which="both")
