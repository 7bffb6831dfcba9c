"""The linear layers of a decode step under many adapters, served from an AdapterStore, against the base layers alone.

    python benchmarks/bench_decode.py

M rows under D adapters of rank 16, or of ranks 8, 16, 32 and 64 in turns ("mixed"), through one decoder layer's linears
of Llama-3-8B; row i has adapter i mod D. ``eager`` opens a batch around every step, as a server without graphs does;
``graph`` replays a CUDA graph. The floor is the bytes of base and adapters over those of the base. Each output is
checked against float64 first: no worse than PEFT's formula in the same dtype; a wrong point gets no time.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass

import torch
from layers import SCALING, no_worse
from report import Clock, Report, Table, begin, parser, replayed, run_points, spread, times_of
from torch import nn

import fused_lora

LLAMA_3_8B = [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))]  # K, each N
RANKS = {"16": (16,), "mixed": (8, 16, 32, 64)}
COLUMNS = [("decode", 24), ("mode", 6), ("base ms", 26), ("fused_lora ms", 26), ("share", 7), ("floor", 7)]


@dataclass(frozen=True)
class DecodePoint:
    """M rows under D distinct adapters of these ranks."""

    M: int
    D: int
    ranks: str

    def __str__(self) -> str:
        return f"M={self.M} D={self.D} r={self.ranks}"


class Linears(nn.Module):
    """Linear layers in groups that share an input; called with one x [M, K] per group, gives all outputs."""

    def __init__(self, weights: list[list[nn.Parameter]]):
        super().__init__()
        self.groups = nn.ModuleList()
        for group in weights:
            layers = [nn.Linear(*reversed(weight.shape), bias=False, device="meta") for weight in group]
            for layer, weight in zip(layers, group, strict=True):
                layer.weight = weight
            self.groups.append(nn.ModuleList(layers))

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for x, group in zip(inputs, self.groups, strict=True) for layer in group]


class Decode:
    """The layers over the same weights: plain, and for each of ``RANKS`` with a store that holds the adapters."""

    def __init__(self, shapes: list, device: torch.device, dtype: torch.dtype):
        self.draw, self.like = torch.Generator(device).manual_seed(0), dict(device=device, dtype=dtype)
        weights = [[nn.Parameter(self._normal(N, K, std=K**-0.5), False) for N in each] for K, each in shapes]
        self.base, self.served = Linears(weights).eval(), {ranks: Linears(weights).eval() for ranks in RANKS}
        self.stores = {r: fused_lora.AdapterStore(model, dtype=dtype) for r, model in self.served.items()}
        self.paths = {path: m for path, m in self.base.named_modules() if isinstance(m, nn.Linear)}
        self.adapters: dict[str, dict[str, tuple]] = {}

    def _normal(self, *shape: int, std: float) -> torch.Tensor:
        return torch.empty(shape, **self.like).normal_(0.0, std, generator=self.draw)

    def names(self, point: DecodePoint) -> list[str]:
        """The adapter of each row; loads what is not there."""
        ranks = RANKS[point.ranks]
        for i in range(point.D):
            if (name := f"{point.ranks}-{i}") not in self.adapters:
                r = ranks[i % len(ranks)]
                self.adapters[name] = {
                    path: (self._normal(r, m.in_features, std=m.in_features**-0.5),
                           self._normal(m.out_features, r, std=r**-0.5), SCALING)
                    for path, m in self.paths.items()
                }  # fmt: skip
                self.stores[point.ranks].load(name, self.adapters[name])
        return [f"{point.ranks}-{i % point.D}" for i in range(point.M)]

    def inputs(self, M: int) -> list[torch.Tensor]:
        """x [M, K] of each group."""
        return [self._normal(M, group[0].in_features, std=1.0) for group in self.base.groups]

    def floor(self, names: list[str]) -> float:
        """Bytes of base and the adapters in use over those of the base."""
        of_adapters = sum(t.nbytes for n in set(names) for A, B, _ in self.adapters[n].values() for t in (A, B))
        return 1 + of_adapters / sum(m.weight.nbytes for m in self.paths.values())

    def wrong(self, found: list[torch.Tensor], inputs: list[torch.Tensor], names: list[str]) -> str | None:
        """None, or the first output that is farther from float64 than PEFT's formula."""
        each = [x for x, group in zip(inputs, self.base.groups, strict=True) for _ in group]
        for y, x, (path, layer) in zip(found, each, self.paths.items(), strict=True):
            exact, theirs = x.double() @ layer.weight.double().T, x @ layer.weight.T
            for name in set(names):
                rows = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
                A, B, scaling = self.adapters[name][path]
                exact[rows] += (x[rows].double() @ A.double().T) @ B.double().T * scaling
                theirs[rows] += (x[rows] @ A.T) @ B.T * scaling
            if (message := no_worse(y, theirs, exact, path)) is not None:
                return message
        return None


@torch.no_grad()
def measure(point: DecodePoint, decode: Decode, report: Report, table: Table, arguments) -> None:
    """Check, time and add the rows of one point, eagerly and inside CUDA graphs."""
    names, inputs = decode.names(point), decode.inputs(point.M)
    served, store = decode.served[point.ranks], decode.stores[point.ranks]

    def eager() -> list[torch.Tensor]:
        with store.batch(names):
            return served(*inputs)

    calls = {("base", "eager"): lambda: decode.base(*inputs), ("fused_lora", "eager"): eager}
    with contextlib.ExitStack() as stack:
        if arguments.device.type == "cuda":
            calls["base", "graph"] = replayed(lambda: decode.base(*inputs), stack)
            # what the batch copies to the device is copied when it is entered, not at every replay
            buffers = store.row_buffers(point.M, point.D, max(RANKS[point.ranks]))
            stack.enter_context(store.batch_rows(names, [1] * point.M, buffers))
            calls["fused_lora", "graph"] = replayed(lambda: served(*inputs), stack)
        wrong = {key: decode.wrong(call(), inputs, names) for key, call in calls.items() if key[0] == "fused_lora"}
        right = {key: call for key, call in calls.items() if wrong.get(key) is None}
        ms = times_of(right, Clock(arguments.device), arguments)
    floor = decode.floor(names)
    for (provider, mode), message in {**dict.fromkeys(calls), **wrong}.items():
        row = vars(point) | dict(benchmark="decode", provider=provider, mode=mode, correct=True)
        if message is not None:
            report.add_wrong(table, row, message, point, mode, spread(ms["base", mode]))
            continue
        base, found = ms["base", mode], ms[provider, mode]
        share = round(found["median"] / base["median"], 4)
        report.rows.append(row | dict(ms=found, share=share, floor_share=round(floor, 4)))
        if provider != "base":
            table.row(point, mode, spread(base), spread(found), f"{share:.3f}", f"{floor:.3f}")


def add_bars(report: Report) -> None:
    """The package's goals for serving on a GPU, compared with the points measured in graphs."""
    rows = [r for r in report.rows if r["provider"] == "fused_lora" and r["correct"] and r["mode"] == "graph"]
    if single := [r["share"] for r in rows if r["D"] == 1]:
        report.bar("decode in a graph, one adapter: share of the base, most", max(single), 1.05, False)
    if many := [r["share"] / r["floor_share"] for r in rows if r["D"] == 32]:
        report.bar("decode in a graph, 32 adapters: share over the floor, most", max(many), 1.3, False)


def points(arguments) -> list[DecodePoint]:
    """Rank 16 first, many adapters before one; no more adapters than rows, and one adapter has one rank."""
    rows = [arguments.rows] if arguments.rows else [32, 16, 64, 1]
    found = [DecodePoint(M, D, ranks) for ranks in RANKS for M in rows for D in (32, 8, 1) if D <= M]
    return [point for point in found if point.D > 1 or len(RANKS[point.ranks]) == 1]


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="rows of x (M)")
    arguments = options.parse_args(argv)
    report = begin("decode", arguments)
    table = Table(COLUMNS)
    shapes = [(K, (N,)) for K, N in arguments.shapes] if arguments.shapes else LLAMA_3_8B
    decode = Decode(shapes, arguments.device, torch.bfloat16 if arguments.device.type == "cuda" else torch.float32)
    run_points(points(arguments), report, arguments.deadline, lambda p: measure(p, decode, report, table, arguments))
    add_bars(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
