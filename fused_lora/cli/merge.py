"""``fused-lora merge`` and ``fused-lora unmerge``: adapters into a model's files and back, without a model."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from fused_lora.diagnostics.tables import table

DTYPES = ("float32", "bfloat16", "float16")
_OPTIONS = {"adapters": "adapter", "lora_alpha": "alpha"}  # parameters whose option has another name


def merge(arguments: Sequence[str] | None = None) -> int:
    """Merge adapters into a checkpoint; returns the exit status."""
    found = argparse.ArgumentParser("fused-lora merge", description="merge adapters into a checkpoint, file by file")
    found.add_argument("--base", required=True, metavar="DIR_OR_FILE", help="the model's folder or .safetensors file")
    found.add_argument(
        "--adapter",
        required=True,
        action="append",
        type=weighted,
        metavar="DIR[:WEIGHT]",
        help="a PEFT adapter; WEIGHT multiplies its scaling. May be repeated",
    )
    place = found.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", metavar="DIR", help="the new folder")
    place.add_argument("--in-place", action="store_true", help="instead of --out: replace the base when all is written")
    found.add_argument("--dtype", choices=DTYPES, help="of all floating tensors (default: as in the base)")
    found.add_argument("--device", default="cpu", help="where sums are computed (default: cpu)")
    found.add_argument("--record", metavar="DIR", help="a new folder for what `fused-lora unmerge` needs")
    renaming(found)
    found.add_argument("--dry-run", action="store_true", help="check and tell what changes; write nothing")
    found.add_argument("--verify", action="store_true", help="read the result again and compare it with sums in fp64")
    found.add_argument("--stochastic", type=int, metavar="SEED", help="round sums to 16 bits at random, unbiased")
    options = common(found).parse_args(arguments)
    from fused_lora.checkpoints import merge_checkpoint

    return run(
        "merge",
        options,
        lambda progress: merge_checkpoint(
            options.base,
            options.adapter,
            options.out,
            dtype=torch_dtype(options.dtype),
            device=options.device,
            record=options.record,
            rename=options.rename,
            in_place=options.in_place,
            dry_run=options.dry_run,
            verify=options.verify,
            stochastic=options.stochastic,
            progress=progress,
        ),
        lambda report: _tell(report, options.dry_run),
    )


def unmerge(arguments: Sequence[str] | None = None) -> int:
    """Write the checkpoint from before a merge; returns the exit status."""
    found = argparse.ArgumentParser("fused-lora unmerge", description="the files from before a merge, byte for byte")
    found.add_argument("--merged", required=True, metavar="DIR_OR_FILE", help="what `fused-lora merge` wrote")
    found.add_argument("--record", required=True, metavar="DIR", help="what `fused-lora merge --record` wrote")
    found.add_argument("--out", required=True, metavar="DIR", help="the new folder")
    options = common(found).parse_args(arguments)

    from fused_lora.checkpoints import unmerge_checkpoint

    return run(
        "unmerge",
        options,
        lambda progress: unmerge_checkpoint(options.merged, options.record, options.out, progress=progress),
        lambda report: print(_written(report)),
    )


def run(
    command: str,
    options: argparse.Namespace,
    work: Callable[[Any], Any],
    tell: Callable[[Any], Any],
    status: int = 1,
    judge: Callable[[Any], int] = lambda report: 0,
) -> int:
    """Run ``work`` with a progress bar and print its report; ``judge`` makes the exit status of it. Errors become one
    line and the exit ``status``."""
    bar = _Bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = work(bar)
        bar.end()
    except KeyboardInterrupt:
        bar.end()
        goes_on = "; the same command goes on where it ended" if command in ("merge", "unmerge") else ""
        print(f"fused-lora {command}: stopped{goes_on}", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        bar.end()
        print(f"fused-lora {command}: error: {_in_words_of(options, error)}", file=sys.stderr)
        return status
    for warning in caught:
        print(f"fused-lora {command}: warning: {_in_words_of(options, warning.message)}", file=sys.stderr)
    try:
        if options.json:
            print(json.dumps(report.to_dict(), indent=1))
        else:
            tell(report)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; Python must not flush again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return judge(report)


def _in_words_of(options: argparse.Namespace, message: Exception | str) -> str:
    """The message without an error's number, its first word as the option where it is a parameter's name."""
    text = str(message)
    if isinstance(message, OSError) and message.strerror:
        text = message.strerror + (f": {os.fspath(message.filename)!r}" if message.filename is not None else "")
    name, colon, rest = text.partition(":")
    name = _OPTIONS.get(name, name)
    return f"--{name.replace('_', '-')}:{rest}" if colon and name in vars(options) else text


def weighted(text: str) -> tuple[str, float]:
    """DIR or DIR:WEIGHT. A folder of the whole name comes first."""
    folder, colon, number = text.rpartition(":")
    if not colon or os.path.isdir(text):
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"expected a finite weight behind the last colon, got {text!r}")
    return folder, weight


def _rename(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected OLD=NEW, got {text!r}")
    return old, new


class _Renames(argparse.Action):
    """OLD=NEW of each option in a dict; an OLD once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        (old, new), known = values, getattr(namespace, self.dest)
        if known.get(old, new) != new:
            parser.error(f"--rename: expected one name for {old!r}, got {known[old]!r} and {new!r}")
        setattr(namespace, self.dest, {**known, old: new})


def renaming(parser: argparse.ArgumentParser) -> None:
    """Add --rename."""
    parser.add_argument(
        "--rename", action=_Renames, default={}, type=_rename, metavar="OLD=NEW", help="beginnings of module names"
    )


def common(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what all commands on files have."""
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def torch_dtype(name: str | None) -> Any:
    """One of DTYPES as torch's; None stays None."""
    import torch

    return None if name is None else getattr(torch, name)


def _tell(report: Any, dry: bool) -> None:
    if dry:
        rows = [("tensor", "change", "shape", "dtype", "rank", "adapters")]
        for c in report.changes:
            shape = "x".join(map(str, c["shape"]))
            rows.append((c["tensor"], c["kind"], shape, c["dtype"], str(c["rank"] or ""), str(len(c["adapters"]))))
        print("\n".join(table(rows)))
    kinds = Counter(change["kind"] for change in report.changes)
    print(", ".join(f"{count} tensors: {kind}" for kind, count in kinds.items()))
    for adapter in report.provenance["adapters"]:
        made_for = adapter["base_model_name_or_path"] or "a base that its config does not name"
        print(f"adapter {adapter['path']}, weight {adapter['weight']:g}, made for {made_for}")
    if report.left_out:
        print(f"not carried along: {', '.join(report.left_out)}")
    if report.checked is not None:
        checked = report.checked
        print(f"verified {checked['rows']} rows of merged weights, {gigabytes(checked['same_bytes'])} unchanged")
        print(
            f"largest error {checked['worst_ulps']:.2f} ulp; rounding took {checked['lost_share']:.1%} of the adapters"
        )
    print(f"would write {gigabytes(report.nbytes)} to {report.out}" if dry else _written(report))


def _written(report: Any) -> str:
    before = f", {len(report.kept)} were there already" if report.kept else ""
    speed = f"{report.nbytes / max(report.seconds, 1e-9) / 1e6:,.0f} MB/s"
    text = f"{gigabytes(report.nbytes)} in {report.seconds:.1f} s" + (f" ({speed})" if not report.kept else "")
    return f"wrote {report.out}: {len(report.written)} shards{before}, {text}"


def gigabytes(nbytes: float) -> str:
    """Bytes with a unit that keeps three digits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} bytes"


class _Bar:
    """A line on a terminal's stderr with share, bytes and speed."""

    def __init__(self) -> None:
        self._start, self._last, self._first = time.monotonic(), 0.0, None
        self._shown = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._start, self._first = now, done
        if self._shown and (now - self._last > 0.2 or done == total):
            self._last = now
            speed = (done - self._first) / max(now - self._start, 1e-9) / 1e6
            filled = 30 * done // max(total, 1)
            line = f"[{'#' * filled}{'.' * (30 - filled)}] {done / max(total, 1):4.0%}"
            print(f"\r{line} {gigabytes(done)} of {gigabytes(total)} {speed:,.0f} MB/s  ", end="", file=sys.stderr)

    def end(self) -> None:
        """Leave the line."""
        if self._shown and self._first is not None:
            print(file=sys.stderr)
            self._first = None
