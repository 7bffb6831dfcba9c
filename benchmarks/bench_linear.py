"""Forward and forward+backward of one adapted linear layer in train mode: bare nn.Linear, PEFT, by hand, this package.

    python benchmarks/bench_linear.py [--base nf4]

bare          the frozen nn.Linear: its forward, and the backward that gives dx; the floor
              (with --base nf4: bitsandbytes' Linear4bit, and all others over it; the results are those of "quantised")
dense         with --base: nn.Linear over the dequantised weight
PEFT          lora.Linear with adapters of the point's dtype
PEFT default  over a 16-bit base: fp32 adapters under torch.autocast, as trainers run PEFT's default
PEFT compiled PEFT through torch.compile (--compile)
addmm         library GEMMs in Unsloth's order; with dropout, which Unsloth refuses, in axolotl's
fused_lora    LoraLinear
fused default LoraLinear with fp32 adapters under torch.autocast, beside PEFT default

The base is frozen, x needs a gradient, all providers share weights and x and take turns in one run. Outputs and
gradients are checked against float64 first, every provider with the same dropout mask (RMS error at most 1.1 times
PEFT's plus an ulp); a wrong one gets no time.
`host us` is the time in which the host issues forward and backward on a GPU; `graph ms` a replay of both as one CUDA
graph, up to 2,048 rows. `saved` counts what autograd keeps for the backward, each storage once, parameters excepted.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace

import torch
from layers import ADAPTER, QUANTISED, SCALING, Point, Weights, kept_by, no_worse, plausible
from report import Candidate, Clock, Report, Table, interleaved, parser, run, spread, summary, times_of
from torch import nn

import fused_lora
from fused_lora.ops.linear.op import draw_seeds
from fused_lora.reference import keep_scale
from fused_lora.testing.graphs import capture

SHAPES = [(576, 1536), (2048, 2048), (4096, 4096), (1000, 777)]
LLAMA_3_8B = [(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)]
LLAMA_3_70B = [(8192, 8192), (8192, 28672), (28672, 8192), (8192, 1024)]
QWEN_2_5_32B = [(5120, 5120), (5120, 27648), (27648, 5120), (5120, 1024)]
LORAFUSION = [(4096, 4096), (5120, 5120), (8192, 8192)]
# the 75 single-adapter points of LoRAFusion's kernel benchmark (arXiv:2510.00206): r=16, p=0.1, bf16
LORAFUSION_POINTS = [
    Point(*shape, r=16, dtype="bfloat16", adapter_dtype="bfloat16", dropout=0.1, M=M, relative=0.5)
    for M in range(8192, 2047, -256)
    for shape in LORAFUSION
]
POINTS = ("first", "lorafusion", "models", "all")
COLUMNS = [("layer", 44), ("provider", 13), ("forward ms", 22), ("xbare", 6), ("fwd+bwd ms", 22), ("xbare", 6)]
COLUMNS += [("speed/PEFT fwd", 15), ("fwd+bwd", 8), ("host us", 8), ("graph ms", 9), ("saved MiB", 10), ("x MiB", 7)]
_GRAPH_ROWS = 2048  # up to here launches outweigh the work
_SEED = 1


@dataclass
class Provider:
    name: str
    call: Callable[[torch.Tensor], torch.Tensor]
    trained: list[nn.Parameter]
    parameters: list[nn.Parameter]


class _Addmm(torch.autograd.Function):
    """y = x W^T + b + s d A^T B^T by library GEMMs, each adapter term added in place by addmm_; d is x or drop(x)."""

    @staticmethod
    def forward(ctx, x, dropped, W, bias, A, B):
        d = x if dropped is None else dropped
        y = nn.functional.linear(x, W, bias)
        y.addmm_(d @ A.t().to(x.dtype), B.t().to(x.dtype), alpha=SCALING)
        ctx.save_for_backward(d, W, A, B)
        ctx.masked = dropped is not None
        return y

    @staticmethod
    def backward(ctx, g):
        d, W, A, B = ctx.saved_tensors
        a, b = A.to(g.dtype), B.to(g.dtype)
        dS = g @ b
        dA = (dS.t() @ d).mul_(SCALING)
        dB = (g.t() @ (d @ a.t())).mul_(SCALING)
        dx = g @ W
        if ctx.masked:
            masked = (dS @ a).mul_(SCALING)
        else:
            dx.addmm_(dS, a, alpha=SCALING)
            masked = None
        return dx, masked, None, None, dA.to(A.dtype), dB.to(B.dtype)


class _ByHand(nn.Module):
    def __init__(self, base: nn.Linear, weights: Weights, dropout: float):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = (nn.Parameter(t.clone()) for t in (weights.lora_A, weights.lora_B))
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dropped = None if self.dropout is None else self.dropout(x)
        return _Addmm.apply(x, dropped, self.base.weight, self.base.bias, self.lora_A, self.lora_B)


class _FixedMask(nn.Module):
    """Dropout with a given mask, already scaled by 1 / (1 - p)."""

    def __init__(self, scaled_mask: torch.Tensor):
        super().__init__()
        self.scaled_mask = scaled_mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scaled_mask.to(x.dtype)


def providers(
    weights: Weights, dropout: float, mask: torch.Tensor | None = None, compiled: bool = False
) -> dict[str, Provider]:
    """All providers over one weight; ``mask`` takes the place of the dropout of all but our layer."""

    def peft(weights: Weights) -> nn.Module:
        layer = weights.peft(weights.base_layer(copy=False), dropout)
        if mask is not None:
            layer.lora_dropout[ADAPTER] = _FixedMask(mask)
        return layer

    base, dtype = weights.base_layer(copy=False), weights.weight.dtype
    layers = {"PEFT": peft(weights)}
    calls: dict[str, Callable] = {}
    if dtype.itemsize == 2:
        wide = replace(weights, lora_A=weights.lora_A.float(), lora_B=weights.lora_B.float())
        layers["PEFT default"] = default = peft(wide)
        autocast = torch.autocast(base.weight.device.type, dtype)
        calls["PEFT default"] = autocast(default)
    if compiled:
        layers["PEFT compiled"] = peft(weights)
        calls["PEFT compiled"] = torch.compile(layers["PEFT compiled"], dynamic=False)
    if weights.quantised is None:
        layers["addmm"] = by_hand = _ByHand(base, weights, dropout)
        if mask is not None:
            by_hand.dropout = _FixedMask(mask)
    layers["fused_lora"] = weights.ours(weights.base_layer(copy=False), dropout)
    if dtype.itemsize == 2:
        layers["fused default"] = ours = wide.ours(weights.base_layer(copy=False), dropout)
        calls["fused default"] = autocast(ours)
    found = {"bare": Provider("bare", base, [], list(base.parameters()))}
    if weights.quantised is not None:
        dense = weights.dense()
        found["dense"] = Provider("dense", dense, [], list(dense.parameters()))
    for name, layer in layers.items():
        parts = (layer.lora_A, layer.lora_B)
        trained = [part[ADAPTER].weight if isinstance(part, nn.ModuleDict) else part for part in parts]
        found[name] = Provider(name, calls.get(name, layer), trained, list(layer.parameters()))
    return found


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
    device = weights.weight.device
    generator = torch.Generator(device).manual_seed(2)
    shapes = ((point.M, point.inputs), (point.M, point.outputs))
    return tuple(torch.randn(s, generator=generator, device=device).to(weights.weight.dtype) for s in shapes)


def check(
    point: Point, weights: Weights, x: torch.Tensor, g: torch.Tensor, compiled: bool = False
) -> dict[str, str | None]:
    """{provider: None or what is wrong}: y, dx, dA, dB against float64, all with the mask that our layer draws."""
    mask = None
    if point.dropout:
        torch.manual_seed(_SEED)
        seed = int(draw_seeds(1, x.device))
        mask = fused_lora.dropout_mask(seed, x.shape, point.dropout, x.device) * keep_scale(point.dropout)
    exact = exact_results(weights, x, g, mask, bare=False)
    exact_bare = exact_results(weights, x, g, mask, bare=True)
    terms = dict(y=point.inputs, dx=point.outputs, dA=point.M, dB=point.M)
    found, yardsticks = {}, {}
    for name, provider in providers(weights, point.dropout, mask, compiled).items():
        torch.manual_seed(_SEED)
        got = results(provider, x, g)
        if name in ("bare", "dense", "PEFT", "PEFT default"):
            yardsticks[name] = got
            expected = exact_bare if name in ("bare", "dense") else exact
            # under autocast gradients of fp32 adapters are 16-bit products
            found[name] = _first(
                plausible(got[k].to(x.dtype) if name == "PEFT default" else got[k], expected[k], terms[k], k)
                for k in expected
            )
            continue
        # addmm rounds fp32 adapters to x's dtype, as autocast does
        rounds = name == "fused default" or name == "addmm" and point.adapter_dtype != point.dtype
        peft = yardsticks["PEFT default" if rounds else "PEFT"]
        found[name] = _first(no_worse(got[k], peft[k], exact[k], k) for k in exact)
    return found


def _first(found: Iterable[str | None]) -> str | None:
    return next((text for text in found if text is not None), None)


def saved_bytes(provider: Provider, x: torch.Tensor) -> tuple[int, int]:
    """(all bytes kept for the backward, those that are not x): unique storages, parameters excepted."""
    kept = kept_by(lambda: provider.call(x), provider.parameters)
    total = sum(kept.values())
    return total, total - kept.get(x.untyped_storage()._cdata, 0)


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


def graph_times(
    layers: dict[str, Provider], x: torch.Tensor, g: torch.Tensor, clock: Clock, arguments
) -> tuple[dict[str, dict], dict[str, str]]:
    """Forward and backward as one CUDA graph: ({provider: summary of ms}, {provider: why it was not captured})."""
    graphs, failed = {}, {}
    for name, provider in layers.items():

        def both(provider: Provider = provider) -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(provider.call(x), [x, *provider.trained], g)

        try:
            graphs[name] = capture(both)[0].replay
        except RuntimeError as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return times_of(graphs, clock, arguments), failed


def measure(point: Point, report: Report, table: Table, arguments) -> None:
    """Check, time and add the rows of one layer."""
    device, compiled = arguments.device, getattr(arguments, "compile", False)
    if compiled:
        torch.compiler.reset()  # or the points share one limit of recompilations
    weights = Weights.draw(point, device)
    x, g = draw_inputs(point, weights)
    x.requires_grad_()
    wrong = check(point, weights, x, g, compiled)
    found = providers(weights, point.dropout, compiled=compiled)
    layers = {name: provider for name, provider in found.items() if wrong[name] is None}
    more = {}
    for name, provider in layers.items():
        total, other = saved_bytes(provider, x)
        more[name] = dict(saved_bytes=total, saved_beyond_x=other, x_bytes=x.nbytes)
    candidates = [_candidate(provider, x, g) for provider in layers.values()]
    clock = Clock(device)
    times = interleaved(candidates, clock, arguments.seconds, arguments.rounds, arguments.deadline)
    for candidate in candidates:
        candidate.before()
        host = dict(forward_host_us=clock.host_us(candidate.steps[:1]), host_us=clock.host_us(candidate.steps))
        more[candidate.name] |= host | dict(graph_ms=None)
    if device.type == "cuda" and point.M <= _GRAPH_ROWS:
        replays, failed = graph_times(layers, x, g, clock, arguments)
        for name in layers:
            more[name] |= {"graph_error": failed[name]} if name in failed else {}
            more[name]["graph_ms"] = replays.get(name)
    _add_rows(point, report, table, wrong, times, more)


def _add_rows(point, report, table, wrong, times, more) -> None:
    label = point.label
    found = {name: (summary([t[0] for t in ts]), summary([sum(t) for t in ts])) for name, ts in times.items()}

    def over(name: str, other: str) -> list[float | None]:
        """How many times the other's time: forward, forward+backward."""
        if other not in found:
            return [None, None]
        return [round(a["median"] / b["median"], 4) for a, b in zip(found[name], found[other], strict=True)]

    def step_ms(name: str) -> float:
        """The time that a training loop waits: the device's or the host's, whichever is longer."""
        return max(found[name][1]["median"], (more[name]["host_us"] or 0) / 1e3)

    for name, message in wrong.items():
        row = vars(point) | dict(benchmark="linear", provider=name, correct=True)
        if message is not None:
            report.add_wrong(table, row, message, label, name)
            continue
        forward, both = found[name]
        to_bare, to_peft = over(name, "bare"), over(name, "PEFT")
        speedup = [value and round(1 / value, 4) for value in to_peft]
        row |= dict(forward_ms=forward, both_ms=both, forward_to_bare=to_bare[0], both_to_bare=to_bare[1])
        row |= dict(forward_speedup=speedup[0], both_speedup=speedup[1]) | more[name]
        default = found.get("PEFT default")
        row["both_speedup_default"] = default and round(default[1]["median"] / both["median"], 4)
        row["step_speedup"] = round(step_ms("PEFT") / step_ms(name), 4) if "PEFT" in found else None
        report.rows.append(row)
        number = [None if value is None else f"{value:.2f}" for value in (*to_bare, *speedup)]
        host, graph = row["host_us"], row["graph_ms"]
        table.row(
            label, name, spread(forward), number[0], spread(both), number[1], number[2], number[3],
            host and f"{host:.0f}", graph and f"{graph['median']:.4g}",
            f"{row['saved_bytes'] / 2**20:.2f}", f"{row['x_bytes'] / 2**20:.2f}",
        )  # fmt: skip
        if "graph_error" in row:
            print(f"  {name}, no graph: {row['graph_error']}")


def add_bars(report: Report) -> None:
    """The package's goals for training a layer, compared with the measured rows."""
    rows = [r for r in report.rows if r["benchmark"] == "linear" and r["provider"] == "fused_lora" and r["correct"]]
    if rows:
        beyond = max(row["saved_beyond_x"] / row["x_bytes"] for row in rows)
        report.bar("linear: bytes saved beyond x / bytes of x, most over the layers", beyond, 0.25, False)
    timed = [row for row in rows if row["both_speedup"] is not None]
    if report.device.type == "cuda":
        _add_gpu_bars(report, timed)
    elif timed := [row for row in timed if row["dropout"] > 0]:
        speedups = [row["both_speedup"] for row in timed]
        name = "linear fwd+bwd with dropout: times PEFT's speed"
        report.bar(f"{name}, least over the layers", min(speedups), 1.0, True)
        report.bar(f"{name}, geometric mean", statistics.geometric_mean(speedups), 1.15, True)


def _add_gpu_bars(report: Report, rows: list[dict]) -> None:
    if any(row["base"] for row in rows):
        return  # the goals are those of dense layers
    names = [field.name for field in fields(Point)]
    by_point = {Point(*(row[name] for name in names)): row for row in rows}
    large = LORAFUSION_POINTS[0]
    name = f"linear fwd+bwd {large}"
    if row := by_point.get(large):
        if row["both_to_bare"] is not None:
            report.bar(f"{name}: times the bare layer's time", row["both_to_bare"], 1.15, False)
        report.bar(f"{name}: times PEFT's speed", row["both_speedup"], 1.25, True)
    for row in report.rows:
        at_large = all(row.get(key) == value for key, value in vars(large).items())
        if at_large and row["provider"] == "fused default" and row.get("both_speedup_default"):
            title = f"{name}, fp32 adapters under autocast: times PEFT default's speed"
            report.bar(title, row["both_speedup_default"], 1.6, True)
    if speedups := [by_point[point]["both_speedup"] for point in LORAFUSION_POINTS if point in by_point]:
        title = f"linear fwd+bwd, LoRAFusion's points ({len(speedups)} of {len(LORAFUSION_POINTS)})"
        report.bar(f"{title}: times PEFT's speed, geometric mean", statistics.geometric_mean(speedups), 1.3, True)
    if rows:
        least = min(rows, key=lambda row: row["step_speedup"])
        where = Point(*(least[name] for name in names)).label
        title = "linear fwd+bwd, the longer of device and host: times PEFT's speed, least over the layers"
        report.bar(f"{title} ({where})", least["step_speedup"], 1.0, True)


def points(arguments) -> list[Point]:
    """On a CPU: dropout before none, shapes in the order given. On a GPU: what papers report first, in bf16."""
    base = getattr(arguments, "base", "")
    return [replace(point, base=base) for point in _points(arguments)]


def _points(arguments) -> list[Point]:
    rows, chosen = getattr(arguments, "rows", None), getattr(arguments, "points", None)
    if chosen is None and (arguments.shapes or arguments.device.type == "cpu"):
        dtype = "float32" if arguments.device.type == "cpu" else "bfloat16"
        common = dict(dtype=dtype, adapter_dtype=dtype, M=rows or 512)
        shapes = arguments.shapes or SHAPES
        return [Point(*shape, dropout=p, relative=0.5, **common) for p in (0.1, 0.0) for shape in shapes]

    def cross(shapes, p=0.1, adapter_dtype="bfloat16", M=8192, r=16) -> list[Point]:
        common = dict(r=r, dtype="bfloat16", adapter_dtype=adapter_dtype, dropout=p, M=M, relative=0.5)
        return [Point(*shape, **common) for shape in dict.fromkeys(shapes)]

    first, models = LLAMA_3_8B + LORAFUSION, LLAMA_3_8B + LLAMA_3_70B + QWEN_2_5_32B
    groups = {
        "first": [
            *cross(first),
            *cross(first, p=0.0),
            *cross(first, adapter_dtype="float32"),  # PEFT's default adapters over a 16-bit base
            *cross(first, M=2048),
            *cross(first, M=512),
            *cross(first, r=64),
        ],
        "models": [*cross(models), *cross(models, M=2048)],
        "lorafusion": LORAFUSION_POINTS,
    }
    found = sum(groups.values(), []) if chosen == "all" else groups[chosen or "first"]
    if arguments.shapes:
        found = [replace(point, inputs=K, outputs=N) for point in found for K, N in arguments.shapes]
    return list(dict.fromkeys(replace(point, M=rows or point.M) for point in found))


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="rows of x (M)")
    options.add_argument("--points", choices=POINTS, help="which layers (default on a GPU: first; bf16)")
    options.add_argument("--base", choices=("", *QUANTISED), default="", help="nf4: over 4-bit weights of bitsandbytes")
    options.add_argument("--compile", action="store_true", help="PEFT through torch.compile, too; compiling takes long")
    arguments = options.parse_args(argv)
    return run("quantised" if arguments.base else "linear", arguments, COLUMNS, points, measure, add_bars)


if __name__ == "__main__":
    sys.exit(main())
