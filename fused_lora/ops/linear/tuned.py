"""Plans that were measured on one GPU by ``fused-lora tune``: which variant is fastest, where the rules only estimate.

A file of them is read once in a process for each device: the one that ``FUSED_LORA_TUNED`` names ("off" for none), else
the user's own of this GPU, ``$XDG_CACHE_HOME/fused_lora/tuned/<GPU>.json``, else one that came with the package. It
holds for the GPU, driver, torch, Triton and version of this package that it was measured under; the package's own for
the GPU alone. Any other is not applied: one warning says so, and the rules choose.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import secrets
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_lora._version import __version__

SWITCH = "FUSED_LORA_TUNED"
FORMAT = 1
OPS = {"linear": ("recompute", "split", "library", "eager"), "backward": ("passes", "library", "eager")}
ADAPTERS = ("same", "wider", "rounded")
FARTHEST = 4  # times more or less rows than were measured, up to which a measurement decides


class Shape(NamedTuple):
    """What is measured at some numbers of rows: ``op`` with one adapter, N results a row and a contraction of K.

    r: 16, or the power of 2 that a higher rank is rounded up to. adapters: of x's dtype ("same"), "wider", or fp32 ones
    that are "rounded".
    """

    op: str
    N: int
    K: int
    r: int
    dtype: str
    dropout: bool
    adapters: str


class Measured(NamedTuple):
    """The variant to run, the one that the rules choose, and microseconds of all that ran and were right."""

    variant: str
    rule: str
    us: dict[str, float]

    @property
    def changes(self) -> bool:
        """Whether the rules choose another."""
        return self.variant != self.rule


def shape(
    op: str, N: int, K: int, r: int, dtype: torch.dtype, dropout: bool, upcast: bool, rounds: bool
) -> Shape:  # fmt: skip
    """The :class:`Shape` of these arguments of :func:`fused_lora.ops.linear.plan.plan`."""
    adapters = "rounded" if rounds else "wider" if upcast else "same"
    return Shape(op, N, K, max(16, 1 << (r - 1).bit_length()), str(dtype).removeprefix("torch."), dropout, adapters)


@dataclass
class Table:
    """The measurements of one file. key: what they hold for, as :func:`key_of` gives it."""

    path: Path
    key: dict[str, str]
    found: dict[Shape, dict[int, Measured]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    @property
    def changes(self) -> int:
        """How many measurements change what the rules choose."""
        return sum(measured.changes for by_rows in self.found.values() for measured in by_rows.values())

    def variant(self, rows: int, shape: Shape) -> str | None:
        """That of the nearest number of rows that was measured, by their ratio; None where none is near enough."""
        measured = self.found.get(shape, {})
        far, nearest = min(((max(rows / M, M / rows), M) for M in measured), default=(float("inf"), 0))
        return measured[nearest].variant if far <= FARTHEST else None

    def write(self) -> None:
        """Replace the file, in one step. OSError from the file system; the file is then as before."""
        entries = [
            {**shape._asdict(), "M": M, **measured._asdict()}
            for shape, by_rows in sorted(self.found.items())
            for M, measured in sorted(by_rows.items())
        ]
        lines = ",\n".join(json.dumps(entry) for entry in entries)
        text = f'{{"format": {FORMAT}, "key": {json.dumps(self.key)}, "entries": [\n{lines}\n]}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stage = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        try:
            with open(stage, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(stage, self.path)
        except BaseException:
            stage.unlink(missing_ok=True)
            raise


def read(path: Path) -> Table:
    """The table of a file. ValueError: it is none, and why; OSError from the file system."""
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        table = Table(path, {str(name): str(value) for name, value in content["key"].items()})
        for entry in content["entries"]:
            _add(table, dict(entry))
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        text = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no file of tuned plans: {text}") from None
    return table


def _add(table: Table, entry: dict[str, Any]) -> None:
    kinds = dict(op=str, N=int, K=int, r=int, dtype=str, dropout=bool, adapters=str, M=int, variant=str, rule=str)
    for name, kind in kinds.items():
        if type(entry[name]) is not kind or kind is int and not 0 < entry[name] < 1 << 63:
            raise ValueError(f"{name} is {entry[name]!r}")
    known = OPS.get(entry["op"], ())
    if not {entry["variant"], entry["rule"], *entry["us"]} <= {*known} or entry["adapters"] not in ADAPTERS:
        raise ValueError(f"unknown names in {entry}")
    us = {name: float(value) for name, value in entry["us"].items()}
    by_rows = table.found.setdefault(Shape(*(entry[name] for name in Shape._fields)), {})
    by_rows[entry["M"]] = Measured(entry["variant"], entry["rule"], us)


def key_of(device: torch.device) -> dict[str, str]:
    """What measurements on this device hold for."""
    import triton

    cuda = device.type == "cuda"
    return {
        "gpu": _name(device),
        "driver": f"CUDA {driver_version()}" if cuda and torch.version.cuda else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fused_lora": __version__,
    }


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def driver_version() -> str:
    """The newest CUDA that the driver runs, "13.0". OSError where there is no driver for NVIDIA's GPUs."""
    number = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def own_path(device: torch.device) -> Path:
    """The user's file for this device, which may not be there: the one that is named, else one for each kind of GPU."""
    named = os.environ.get(SWITCH, "off")
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # to be ignored, as its standard says: it would be another in every folder
        cache = os.path.expanduser("~/.cache")
    return Path(cache, "fused_lora", "tuned", _file(device)) if named in ("", "off") else Path(named)


def _file(device: torch.device) -> str:
    return re.sub(r"[^a-z0-9]+", "-", _name(device).lower()).strip("-") + ".json"


def shipped_path(device: torch.device) -> Path:
    """Where the package's own measurements of this GPU are, if it has any."""
    from fused_lora.kernels import config

    return Path(config.__file__).with_name("tuned") / _file(device)


def differences(table: Table, here: Mapping[str, str]) -> str:
    """In what the machine of a table's measurements differs from this one, in words; "" for nothing."""
    there = {name: table.key.get(name) for name in here}
    return "; ".join(f"{name} {there[name]}, here {value}" for name, value in here.items() if there[name] != value)


def find(device: torch.device) -> Table | None:
    """The measurements that hold for this device; None where there are none.

    Raises:
        ValueError, OSError: there is a file that cannot be used, and why.
    """
    if os.environ.get(SWITCH) == "off":
        return None
    path = own_path(device)
    shipped = not os.environ.get(SWITCH) and not os.path.isfile(path)  # where it may not be looked for, it is not
    if shipped and not (path := shipped_path(device)).is_file():
        return None
    table = read(path)
    if other := differences(table, {"gpu": _name(device)} if shipped else key_of(device)):
        raise ValueError(f"{path} was measured under {other}: run fused-lora tune again")
    return table


@functools.cache
def table(device: torch.device) -> Table | None:
    """:func:`find`, once; a file that cannot be used is a warning. ``plan.forget()`` has it read anew."""
    try:
        return find(device)
    except (OSError, ValueError) as error:
        warnings.warn(f"fused_lora: the tuned plans are not used, the rules choose: {error}", stacklevel=2)
        return None


def describe(device: torch.device) -> str:
    """Which plans run, in words: the file and how many measurements it has, or "rules" and why."""
    try:
        found = find(device)
    except (OSError, ValueError) as error:
        return f"rules: {error}"
    if found is None:
        return f"rules: {SWITCH}=off" if os.environ.get(SWITCH) == "off" else "rules"
    return f"{found.path}, {len(found)} measurements, {found.changes} of them change the rules' choice"
