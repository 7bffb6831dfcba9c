"""`fused-lora tune`: time every way to compute a layer on this GPU, and keep the fastest for the runs to come.

For each layer, number of rows and direction, with and without dropout, all variants that can run there are checked as
before any first use and timed in turns. The eager path is one of them. A time is what a caller waits for: the device's,
after a flush of its L2 cache, or the host's for issuing the call, whichever is longer. The variant of the rules stays
unless another is faster by more than 2 % and by more than the times of either spread, so that noise changes nothing.

The result is added to a file that plans are read from in every later process (FUSED_LORA_TUNED). Exit code: 1 where no
kernel runs; nothing is changed then.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_lora.diagnostics.tables import dtype_name
from fused_lora.ops import guard
from fused_lora.ops.linear import eager, plan, tuned
from fused_lora.testing.clock import Candidate, Clock, interleaved, summary
from fused_lora.testing.layers import LayerCase

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024))  # of Llama-3 8B
ROWS = (1, 16, 64, 512, 2048, 8192)
DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
SECONDS, ROUNDS = 0.3, 15  # of one comparison, at least
NOISE = 0.02

# {variant: call} -> {variant: ms of each of several calls}, taken in turns
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, Sequence[float]]]


def tune(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    out: Path | None = None,
    *,
    rows: Sequence[int] = ROWS,
    r: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype | None = None,
    autocast: bool = False,
    dropout: float = 0.1,
    timer: Timer | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> tuned.Table:
    """Measure linear layers with one adapter on the current GPU; add the results to a file, and return all it has.

    Args:
        shapes: (in_features, out_features) of each layer. rows: numbers of rows of x.
        out: the file; default: the user's own for this GPU, which every later process reads.
        r, dtype, adapter_dtype: rank, dtype of x and W, and of A and B (default: the same).
        dropout: a probability; layers are measured with it and without.
        autocast: fp32 adapters that are rounded to ``dtype``, as under torch.autocast.
        timer: times the calls of one comparison; default: :func:`device_timer`.
        tell: is called with a line for each comparison.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range, or ``out`` is there and no file of tuned
            plans. OSError: of the file.
        RuntimeError: no kernel runs there.
    """
    device = torch.device(guard.DEVICE)
    _check(shapes, rows, r, dtype, adapter_dtype, autocast, dropout)
    if why := why_not(device):
        raise RuntimeError(why)
    path = out or tuned.own_path(device)
    table = _begun(path, device, tell)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):  # a folder that cannot be written to is known before minutes pass
        pass
    timer = timer or device_timer(device)
    rounded, wide = (dtype, torch.float32) if autocast else (None, adapter_dtype or dtype)
    for K, N in shapes:
        try:
            layer = LayerCase.make(max(rows), N, K, [r], [dropout], dtype, wide, bias=False, device=device)
        except torch.OutOfMemoryError:
            tell(f"{K}x{N}: not measured, the memory does not suffice")
            continue
        found = []
        for M, p, op in product(sorted(rows), dict.fromkeys((0.0, dropout)), tuned.OPS):
            case = replace(layer.rows(slice(M)), dropout=[p], seeds=layer.seeds if p else None)
            title = f"{K}x{N} rows={M} dropout={p:g} {op}"
            try:
                shape, measured = _compare(op, case, rounded, timer)
            except torch.OutOfMemoryError:
                tell(f"{title}: not measured, the memory does not suffice")
                continue
            found.append((shape, M, measured))
            times = ", ".join(f"{name} {us:.1f}" for name, us in measured.us.items())
            tell(f"{title}: {measured.variant}" + f" (rules: {measured.rule})" * measured.changes + f"; us: {times}")
        table = _begun(path, device)  # with what another run has added meanwhile
        for shape, M, measured in found:
            table.found.setdefault(shape, {})[M] = measured
        table.write()  # an interrupt loses the rest only
        plan.forget()
    return table


def why_not(device: torch.device) -> str | None:
    """Why there is nothing to choose between on this device; None where there is."""
    if guard.DEVICE == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    if why := guard.why_not(device):
        return f"no kernel runs on {device}: {why}"
    from fused_lora.kernels.config import capability

    return None if capability(device) >= 80 else f"no kernel runs on {device}: they are for NVIDIA's from sm_80 on"


def _check(shapes, rows, r, dtype, adapter_dtype, autocast, dropout) -> None:
    for name, given in {"shapes": shapes, "rows": rows}.items():
        if not isinstance(given, Sequence):
            raise TypeError(f"{name}: expected a sequence, got {given!r}")
    if not isinstance(dropout, int | float):
        raise TypeError(f"dropout: expected a probability below 1, got {dropout!r}")
    for name, values in {"shapes": [size for shape in shapes for size in shape], "rows": rows, "r": [r]}.items():
        if not values or any(type(value) is not int or value < 1 for value in values):
            raise ValueError(f"{name}: expected positive integers, got {values!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout: expected a probability below 1, got {dropout!r}")
    for name, value in {"dtype": dtype, "adapter_dtype": adapter_dtype or dtype}.items():
        if value not in DTYPES.values():
            raise ValueError(f"{name}: expected one of {', '.join(DTYPES)}, got {value}")
    if autocast and adapter_dtype:
        raise ValueError("adapter_dtype: expected none beside autocast, whose adapters are fp32")
    if autocast and dtype == torch.float32:
        raise ValueError("autocast: expected a dtype of 16 bits, got float32")


def _begun(out: Path, device: torch.device, tell: Callable[[str], object] = lambda line: None) -> tuned.Table:
    """What the file has that holds here."""
    key = tuned.key_of(device)
    if out.exists():
        try:
            table = tuned.read(out)
        except ValueError as error:
            raise ValueError(f"out: {error}") from None
        if not (other := tuned.differences(table, key)):
            return table
        tell(f"{out} is begun anew: it was measured under {other}")
    return tuned.Table(out, key)


@torch.no_grad()
def _compare(
    op: str, case: LayerCase, rounded: torch.dtype | None, timer: Timer
) -> tuple[tuned.Shape, tuned.Measured]:  # fmt: skip
    """What is measured of one direction."""
    from fused_lora.kernels.config import capability

    x, (N, K), A, r = case.x, case.weight.shape, case.lora_A, case.ranks[0]
    arguments = x, case.weight, None, *case.adapters
    size, by = (N, K), plan.forward_by
    if op == "backward":
        _, S = plan.on_rounded(eager.lora_linear, rounded)(*arguments)
        size, by, arguments = (K, N), plan.backward_by, case.of_backward(S)
    masked, upcast = any(case.dropout), A[0].dtype != x.dtype and rounded is None
    others = r, x.dtype, masked, upcast, 1, capability(x.device)
    rule = plan.choose(op, len(x), size[1], *others)
    layer = plan.case_of(x, N, K, None, A, case.lora_B, case.dropout, rounded=rounded)
    calls, keys = {}, {}
    for name in plan.candidates(op, len(x), *others):
        keys[name], run = by(plan.planned(op, layer, *size, variant=name), layer)
        calls[name] = partial(run, *arguments)
        calls[name]()  # checked, compiled

    def passed() -> list[str]:
        return [name for name in calls if guard.verdicts().get(keys[name], name == "eager")]

    ms = timer({name: calls[name] for name in passed()})
    ms = {name: ms[name] for name in passed()}  # none that has failed meanwhile
    us = {name: round(summary(times)["median"] * 1e3, 2) for name, times in ms.items()}
    shape = tuned.shape(op, *size, r, x.dtype, masked, upcast, rounded is not None)
    return shape, tuned.Measured(fastest(ms, rule), rule, us)


def fastest(ms: Mapping[str, Sequence[float]], rule: str) -> str:
    """The variant of the least median, or ``rule`` where that is not slower by more than the noise."""
    found = {name: summary(times) for name, times in ms.items()}
    best = min(found, key=lambda name: found[name]["median"])
    if rule not in found:
        return best
    spread = max((found[name]["p80"] - found[name]["p20"]) / 2 for name in (rule, best))
    ahead = found[rule]["median"] - found[best]["median"]
    return best if ahead > max(NOISE * found[rule]["median"], spread) else rule


def device_timer(device: torch.device, seconds: float = SECONDS) -> Timer:
    """Milliseconds that a caller waits: the device's, or the host's to issue the call if that takes longer."""

    def times(calls: Mapping[str, Callable[[], object]]) -> Mapping[str, Sequence[float]]:
        clock = Clock(device)  # a new one: it remembers calls, and so their tensors
        candidates = [Candidate(name, [call]) for name, call in calls.items()]
        turns = interleaved(candidates, lambda call: max(clock.measure(call)), seconds, ROUNDS)
        return {name: [ms for (ms,) in found] for name, found in turns.items()}

    return times


def shapes_of(model: str) -> list[tuple[int, int]]:
    """(in_features, out_features) of the linear layers of a transformers model but its head; no weights are read.

    model: a folder or hub name. OSError, ValueError: there is no such model, or transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    layers = [module for module in built.modules() if module is not built.get_output_embeddings()]
    found = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    found += [(layer.nx, layer.nf) for layer in layers if isinstance(layer, Conv1D)]
    return list(dict.fromkeys(found))


def _groups(text: str, count: int, example: str) -> list[list[int]]:
    found = [part.split("x") for part in text.split(",")]
    if any(len(group) != count or not all(re.fullmatch("[1-9][0-9]*", n) for n in group) for group in found):
        raise argparse.ArgumentTypeError(f"expected positive integers as in {example}, got {text!r}")
    return [[int(n) for n in group] for group in found]


def _shapes(text: str) -> list[tuple[int, int]]:
    return [(K, N) for K, N in _groups(text, 2, "4096x4096,4096x14336")]


def _rows(text: str) -> list[int]:
    return [M for (M,) in _groups(text, 1, "16,512")]


def _options() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser("fused-lora tune", description=__doc__, formatter_class=style)
    layers = options.add_mutually_exclusive_group()
    layers.add_argument("--model", help="folder or hub name of a transformers model: its linear layers")
    layers.add_argument("--shapes", type=_shapes, help="in_features x out_features: 4096x4096,4096x14336")
    options.add_argument("--rows", type=_rows, default=ROWS, help=f"rows of x (default: {','.join(map(str, ROWS))})")
    options.add_argument("--r", type=int, default=16, help="rank (default: 16)")
    options.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of x and the weight (default: bfloat16)")
    options.add_argument("--adapter-dtype", choices=DTYPES, help="of lora_A and lora_B (default: --dtype)")
    options.add_argument("--autocast", action="store_true", help="fp32 adapters under autocast to --dtype")
    options.add_argument("--dropout", type=float, default=0.1, help="measured beside no dropout (default: 0.1)")
    options.add_argument("--seconds", type=float, default=SECONDS, help=f"for each comparison (default: {SECONDS})")
    options.add_argument("--out", type=Path, metavar="FILE", help="default: the user's own for this GPU")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line for each comparison, and write the file."""
    options = _options()
    chosen, device = options.parse_args(arguments), torch.device(guard.DEVICE)
    dtype, wide = DTYPES[chosen.dtype], DTYPES.get(chosen.adapter_dtype)
    if not 0 <= chosen.seconds < float("inf"):
        options.error(f"--seconds: expected a number from 0 on, got {chosen.seconds}")
    if why := why_not(device):
        print(f"fused-lora tune: {why}. Nothing was changed.", file=sys.stderr)
        return 1
    shapes = chosen.shapes or SHAPES
    if chosen.model:
        try:
            shapes = shapes_of(chosen.model)
        except (ImportError, OSError, ValueError) as error:
            options.error(f"--model: {error}")
    settings: dict[str, Any] = dict(rows=chosen.rows, r=chosen.r, dtype=dtype, adapter_dtype=wide)
    settings |= dict(autocast=chosen.autocast, dropout=chosen.dropout, tell=partial(print, flush=True))
    try:
        table = tune(shapes, chosen.out, timer=device_timer(device, chosen.seconds), **settings)
    except ValueError as error:
        name, _, text = str(error).partition(":")
        options.error(f"--{name.replace('_', '-')}:{text}")
    except OSError as error:
        options.error(f"--out: {error}")
    print(f"{table.path}: {len(table)} measurements, {table.changes} of them change the rules' choice")
    if (path := table.path.absolute()) != tuned.own_path(device).absolute():
        print(f"{tuned.SWITCH}={path} makes other processes read it")
    return 0
