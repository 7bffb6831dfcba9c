"""The figure of bench_serving.py: share of the base by distinct adapters, one panel per rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

COLOURS = {"fused_lora": "#1f6fb4", "PEFT": "#d1603d", "loop": "#7a9a3a", "merged": "#888888"}


def draw(rows: Sequence[dict], model: str | None, path: Path) -> Path | None:
    """Write the figure; None where there is no step to draw."""
    found = [r for r in rows if r["benchmark"] == "step" and r["correct"] and r["provider"] in COLOURS]
    if not found:
        return None
    ranks = sorted({r["r"] for r in found})
    figure, axes = pyplot.subplots(1, len(ranks), figsize=(4.2 * len(ranks), 3.8), sharey=True, squeeze=False)
    for axis, rank in zip(axes[0], ranks, strict=True):
        _panel(axis, [r for r in found if r["r"] == rank])
        axis.set_title(f"rank {rank}")
    axes[0][0].set_ylabel("time of a step / the base's")
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(f"{model or ''}: every point is one (T, D)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return path


def _panel(axis, rows: Sequence[dict]) -> None:
    for provider, colour in COLOURS.items():
        own = sorted((r for r in rows if r["provider"] == provider), key=lambda r: (r["D"], r["T"]))
        axis.scatter([r["D"] for r in own], [r["share"] for r in own], s=14, color=colour, label=provider)
    floor = sorted({(r["D"], r["floor_share"]) for r in rows})
    axis.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1, label="floor (bytes)")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("distinct adapters D")
    axis.grid(alpha=0.3, which="both")
