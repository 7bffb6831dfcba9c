"""Forward and forward+backward of one adapted linear layer in train mode: bare nn.Linear, PEFT, by hand, this package.

    python benchmarks/bench_linear.py

The base is frozen, x needs a gradient, all providers share weights and x and take turns in one run. Outputs and
gradients are checked against float64 first, every provider with the same dropout mask (RMS error at most 1.1 times
PEFT's plus an ulp); a wrong one gets no time. The floor is the bare layer: its forward, and the backward that gives dx.
`saved` counts what autograd keeps for the backward, each storage once, parameters excepted.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from layers import ADAPTER, SCALING, Point, Weights, no_worse, plausible
from report import Candidate, Clock, Report, Table, interleaved, parser, run_points, settings, spread, summary
from torch import nn

import fused_lora
from fused_lora.ops.lora_linear import draw_seeds
from fused_lora.reference import keep_scale

SHAPES = [(576, 1536), (2048, 2048), (4096, 4096), (1000, 777)]
LLAMA_3_8B = [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)]
LORAFUSION = [(4096, 4096), (5120, 5120), (8192, 8192)]  # K = N at 8192 rows, arXiv:2510.00206
COLUMNS = [("layer", 44), ("provider", 11), ("forward ms", 22), ("xbare", 6), ("fwd+bwd ms", 22), ("xbare", 6)]
COLUMNS += [("speed/PEFT fwd", 15), ("fwd+bwd", 8), ("saved MiB", 10), ("x MiB", 7)]
_SEED = 1


@dataclass
class Provider:
    name: str
    call: Callable[[torch.Tensor], torch.Tensor]
    trained: list[nn.Parameter]
    parameters: list[nn.Parameter]


class _ByHand(nn.Module):
    """y = x W^T + b, then addmm of the adapter's term into it: torch operators only, autograd does the rest."""

    def __init__(self, base: nn.Linear, weights: Weights, dropout: float):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = (nn.Parameter(t.clone()) for t in (weights.lora_A, weights.lora_B))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        S = self.dropout(x.to(self.lora_A.dtype)) @ self.lora_A.t()
        return torch.addmm(y.to(S.dtype), S, self.lora_B.t(), alpha=SCALING).to(y.dtype)


class _FixedMask(nn.Module):
    """Dropout with a given mask, already scaled by 1 / (1 - p)."""

    def __init__(self, scaled_mask: torch.Tensor):
        super().__init__()
        self.scaled_mask = scaled_mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scaled_mask.to(x.dtype)


def providers(weights: Weights, dropout: float, mask: torch.Tensor | None = None) -> dict[str, Provider]:
    """bare, PEFT, addmm, fused_lora over one weight; ``mask`` takes the place of PEFT's and addmm's own dropout."""
    base = weights.base_layer(copy=False)
    peft, by_hand = weights.peft(weights.base_layer(copy=False), dropout), _ByHand(base, weights, dropout)
    ours = weights.ours(weights.base_layer(copy=False), dropout)
    if mask is not None:
        peft.lora_dropout[ADAPTER] = by_hand.dropout = _FixedMask(mask)
    found = [Provider("bare", base, [], list(base.parameters()))]
    for name, layer, parts in (
        ("PEFT", peft, (peft.lora_A, peft.lora_B)),
        ("addmm", by_hand, (by_hand.lora_A, by_hand.lora_B)),
        ("fused_lora", ours, (ours.lora_A, ours.lora_B)),
    ):
        trained = [part[ADAPTER].weight if isinstance(part, nn.ModuleDict) else part for part in parts]
        found.append(Provider(name, layer, trained, list(layer.parameters())))
    return {provider.name: provider for provider in found}


def results(provider: Provider, x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    """y, dx and, where there is an adapter, dA and dB."""
    x = x.detach().requires_grad_()
    y = provider.call(x)
    found = torch.autograd.grad(y, [x, *provider.trained], g)
    return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *found), strict=False))


def exact_results(weights: Weights, x, g, mask, bare: bool) -> dict[str, torch.Tensor]:
    """The same in float64, by autograd over the formula."""
    x, A, B = (t.detach().double().requires_grad_() for t in (x, weights.lora_A, weights.lora_B))
    y = nn.functional.linear(x, weights.weight.double(), weights.bias.double())
    inputs = [x] if bare else [x, A, B]
    if not bare:
        y = y + SCALING * ((x if mask is None else x * mask) @ A.t()) @ B.t()
    found = torch.autograd.grad(y, inputs, g.double())
    return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *found), strict=False))


def draw_inputs(point: Point, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] and g = dL/dy [M, N]."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(point.M, point.inputs, generator=generator)
    g = torch.randn(point.M, point.outputs, generator=generator)
    return tuple(t.to(weights.weight.device, weights.weight.dtype) for t in (x, g))


def check(point: Point, weights: Weights, x: torch.Tensor, g: torch.Tensor) -> dict[str, str | None]:
    """{provider: None or what is wrong}: y, dx, dA, dB against float64, all with the mask that our layer draws."""
    mask = None
    if point.dropout:
        torch.manual_seed(_SEED)
        seed = int(draw_seeds(1, x.device))
        mask = fused_lora.dropout_mask(seed, x.shape, point.dropout, x.device) * keep_scale(point.dropout)
    exact = exact_results(weights, x, g, mask, bare=False)
    terms = dict(y=point.inputs, dx=point.outputs, dA=point.M, dB=point.M)
    layers = providers(weights, point.dropout, mask)
    bare, peft = results(layers.pop("bare"), x, g), results(layers.pop("PEFT"), x, g)
    exact_bare = exact_results(weights, x, g, mask, bare=True)
    found = {
        "bare": _first(plausible(bare[k], exact_bare[k], terms[k], k) for k in exact_bare),
        "PEFT": _first(plausible(peft[k], exact[k], terms[k], k) for k in exact),
    }
    for name, provider in layers.items():
        torch.manual_seed(_SEED)
        ours = results(provider, x, g)
        found[name] = _first(no_worse(ours[k], peft[k], exact[k], k) for k in exact)
    return found


def _first(found: Iterable[str | None]) -> str | None:
    return next((text for text in found if text is not None), None)


def saved_bytes(provider: Provider, x: torch.Tensor) -> tuple[int, int]:
    """(all bytes kept for the backward, those that are not x): unique storages, parameters excepted."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = provider.call(x)
    for parameter in provider.parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    sizes = {pointer: storage.nbytes() for pointer, storage in kept.items()}
    del y
    total = sum(sizes.values())
    return total, total - sizes.get(x.untyped_storage().data_ptr(), 0)


def _candidate(provider: Provider, x: torch.Tensor, g: torch.Tensor) -> Candidate:
    state = {}

    def clear() -> None:
        state.clear()
        for tensor in (x, *provider.trained):
            tensor.grad = None

    def forward() -> None:
        state["y"] = provider.call(x)

    def backward() -> None:
        state.pop("y").backward(g)

    return Candidate(provider.name, [forward, backward], clear)


def measure(point: Point, report: Report, table: Table, arguments) -> None:
    """Check, time and add the rows of one layer."""
    device = arguments.device
    weights = Weights.draw(point, device)
    x, g = draw_inputs(point, weights)
    x.requires_grad_()
    wrong = check(point, weights, x, g)
    layers = {k: p for k, p in providers(weights, point.dropout).items() if wrong[k] is None}
    saved = {name: saved_bytes(provider, x) for name, provider in layers.items()}
    candidates = [_candidate(provider, x, g) for provider in layers.values()]
    times = interleaved(candidates, Clock(device), arguments.seconds, arguments.rounds, arguments.deadline)
    _add_rows(point, report, table, wrong, times, saved, x.nbytes)


def _add_rows(point, report, table, wrong, times, saved, x_bytes) -> None:
    label = point.label
    found = {name: (summary([t[0] for t in ts]), summary([sum(t) for t in ts])) for name, ts in times.items()}

    def over(name: str, other: str) -> list[float | None]:
        """How many times the other's time: forward, forward+backward."""
        if other not in found:
            return [None, None]
        return [round(a["median"] / b["median"], 4) for a, b in zip(found[name], found[other], strict=True)]

    for name, message in wrong.items():
        row = vars(point) | dict(benchmark="linear", provider=name, correct=message is None)
        if message is not None:
            report.rows.append(row | dict(wrong=message))
            table.row(label, name, "WRONG", *[None] * 7)
            print(f"  {message}")
            continue
        forward, both = found[name]
        to_bare, to_peft = over(name, "bare"), over(name, "PEFT")
        speedup = [value and round(1 / value, 4) for value in to_peft]
        total, other = saved[name]
        row |= dict(forward_ms=forward, both_ms=both, forward_to_bare=to_bare[0], both_to_bare=to_bare[1])
        row |= dict(forward_speedup=speedup[0], both_speedup=speedup[1])
        report.rows.append(row | dict(saved_bytes=total, saved_beyond_x=other, x_bytes=x_bytes))
        number = [None if value is None else f"{value:.2f}" for value in (*to_bare, *speedup)]
        table.row(
            label, name, spread(forward), number[0], spread(both), number[1], number[2], number[3],
            f"{total / 2**20:.2f}", f"{x_bytes / 2**20:.2f}",
        )  # fmt: skip


def add_bars(report: Report) -> None:
    """What this package promises of training a layer, over the rows that were measured."""
    rows = [r for r in report.rows if r["benchmark"] == "linear" and r["provider"] == "fused_lora" and r["correct"]]
    if rows:
        beyond = max(row["saved_beyond_x"] / row["x_bytes"] for row in rows)
        report.bar("linear: bytes saved beyond x / bytes of x, most over the layers", beyond, 0.25, False)
    timed = [row for row in rows if row["both_speedup"] is not None and row["dropout"] > 0]
    if timed:
        speedups = [row["both_speedup"] for row in timed]
        mean = math.exp(sum(map(math.log, speedups)) / len(speedups))
        name = "linear fwd+bwd with dropout: times PEFT's speed"
        report.bar(f"{name}, least over the layers", min(speedups), 1.0, True)
        report.bar(f"{name}, geometric mean", mean, 1.15, True)
    large = [row["both_to_bare"] for row in rows if row["M"] >= 4096 and row["r"] <= 64 and row["both_to_bare"]]
    if large and report.device.type == "cuda":
        report.bar("linear fwd+bwd, M >= 4096, r <= 64: times the bare layer's time, most", max(large), 1.08, False)


def points(arguments) -> list[Point]:
    """On a CPU: dropout before none, shapes in the order given. On a GPU: what papers report first, in bf16."""
    rows = getattr(arguments, "rows", None)
    if arguments.shapes or arguments.device.type == "cpu":
        dtype = "float32" if arguments.device.type == "cpu" else "bfloat16"
        common = dict(dtype=dtype, adapter_dtype=dtype, M=rows or 512)
        shapes = arguments.shapes or SHAPES
        return [Point(*shape, dropout=p, relative=0.5, **common) for p in (0.1, 0.0) for shape in shapes]
    found = []
    for p, adapter_dtype, M, r in (
        (0.1, "bfloat16", 8192, 16),
        (0.0, "bfloat16", 8192, 16),
        (0.1, "float32", 8192, 16),  # PEFT's default adapters over a 16-bit base
        (0.1, "bfloat16", 2048, 16),
        (0.1, "bfloat16", 512, 16),
        (0.1, "bfloat16", 8192, 64),
    ):
        common = dict(r=r, dtype="bfloat16", adapter_dtype=adapter_dtype, dropout=p, M=rows or M, relative=0.5)
        found += [Point(*shape, **common) for shape in dict.fromkeys(LLAMA_3_8B + LORAFUSION)]
    return list(dict.fromkeys(found))


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="rows of x (M)")
    arguments = options.parse_args(argv)
    recorded = settings(arguments)
    report = Report("linear", arguments.device, arguments.out, recorded, arguments.commit)
    report.heading()
    table = Table(COLUMNS)
    run_points(points(arguments), report, arguments.deadline, lambda point: measure(point, report, table, arguments))
    add_bars(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
