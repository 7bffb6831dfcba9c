"""Figures of the experiments: the result file, and docs/reliability.md's table made from it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
RESULTS = PAGE.with_suffix(".json")
BEGIN, END = "<!-- results: written by make reliability -->", "<!-- end of results -->"


def write(path: Path, experiments: list[dict]) -> None:
    """The figures as JSON, one row for all parameters of a test; those of the page's own file as its table, too."""
    rows: dict[str, dict] = {}
    for one in sorted(experiments, key=lambda e: (e["goal"], e["test"])):
        row = rows.setdefault(one["what"], {**one, "count": 0, "passed": True, "seconds": 0.0})
        if one["test"] != row["test"]:
            row["test"] = one["file"]  # -k takes the name of a file, too
        row["count"] += one["count"]
        row["passed"] &= one["passed"]
        row["seconds"] = round(row["seconds"] + one["seconds"], 1)
    content = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "commit": _commit(),
        "rows": list(rows.values()),
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if path.resolve() != RESULTS:
        return
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(content)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _commit() -> str | None:
    """The commit that is measured; None outside a repository."""
    command = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(command, cwd=PAGE.parent, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def table(content: dict) -> str:
    """The table in Markdown."""
    where = f"Python {content['python']}, torch {content['torch']}, {content['cores']} cores, {content['date'][:10]}"
    where += f", commit {(content['commit'] or 'unknown')[:10]}"
    lines = [f"{where}. One row: `pytest -m experiment --reliability=FILE -k NAME`, the name of the last column.", ""]
    lines += ["| Goal | What is done and must hold | Times | Held | Seconds | Name |", "|---|---|---:|---|---:|---|"]
    for row in content["rows"]:
        held = "yes" if row["passed"] else "**no**"
        what = row["what"].rstrip(".")
        lines.append(f"| {row['goal']} | {what} | {row['count']:,} | {held} | {row['seconds']:.0f} | `{row['test']}` |")
    return "\n".join(lines)
