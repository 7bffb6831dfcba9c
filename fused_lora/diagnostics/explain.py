"""What runs and what it costs: for one layer's shape on any chip, or for every LoRA layer of a model.

print(fused_lora.explain(M=8192, K=4096, N=4096, r=16, dropout=0.1, dtype=torch.bfloat16, device="H100"))
print(fused_lora.explain(model))
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch

from fused_lora.diagnostics.tables import dtype_name, grouped, pattern, table
from fused_lora.ops import guard
from fused_lora.ops.linear import tuned
from fused_lora.ops.linear.plan import Plan, plan

if TYPE_CHECKING:
    from fused_lora.integrations.peft import LayerRow
    from fused_lora.kernels.config import LaunchConfig

CHIPS = {  # NVIDIA chip -> 10 * major + minor of its compute capability
    "A100": 80, "A10": 86, "A40": 86, "RTX 3090": 86, "L4": 89, "L40S": 89, "RTX 4090": 89,
    "H100": 90, "H200": 90, "GH200": 90, "B200": 100, "GB200": 100, "B300": 103, "RTX 5090": 120, "RTX PRO 6000": 120,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of a forward or a backward. Launches and bytes are None on the eager path, which is not counted."""

    name: str
    variant: str
    configurations: tuple[tuple[str, LaunchConfig], ...]
    launches: int | None
    bytes: int | None
    flops: int
    floor_bytes: int
    floor_flops: int


@dataclass(frozen=True)
class Explanation:
    """Variant, configurations and cost of forward and backward; ``str()`` is a table.

    The floor counts every operand, every result and every multiplication once. The results of the backward are the
    input gradient and the two weight gradients.
    """

    title: str
    forward: Cost
    backward: Cost
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = ("", "variant", "launches", "MB", "of floor", "GFLOP", "of floor")
        rows = [_cells(cost) for cost in (self.forward, self.backward)]
        lines = [self.title, *table([head, *rows])]
        for cost in (self.forward, self.backward):
            lines += [f"{cost.name}, {name}: {_tile(config)}" for name, config in cost.configurations]
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class ModelExplanation:
    """Every LoRA layer of a model: whether it runs fused, or why not. ``str()`` is a table, equal layers in one row."""

    layers: tuple[LayerRow, ...]

    def __str__(self) -> str:
        if not self.layers:
            return "no LoRA layers"
        groups = grouped(self.layers, lambda row: (pattern(row.path), row.kind, str(row)))
        rows = [(path, str(len(members)), kind, runs) for (path, kind, runs), members in groups.items()]
        from fused_lora.integrations.peft import summary

        return "\n".join([*table([("layers", "n", "kind", "runs"), *rows]), summary(self.layers)])


class _Call(NamedTuple):
    """A layer's call, in the order of a plan's arguments. dropout: whether there is some. capability: 0 without one."""

    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    dropout: bool
    upcast: bool
    adapters: int
    capability: int


@overload
def explain(
    model: None = None,
    *,
    M: int,
    K: int,
    N: int,
    r: int,
    dropout: float = ...,
    dtype: torch.dtype = ...,
    device: torch.device | str | None = ...,
    adapter_dtype: torch.dtype | None = ...,
    adapters: int = ...,
) -> Explanation: ...


@overload
def explain(model: torch.nn.Module) -> ModelExplanation: ...


def explain(
    model: torch.nn.Module | None = None,
    *,
    M: int | None = None,
    K: int | None = None,
    N: int | None = None,
    r: int | None = None,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    adapter_dtype: torch.dtype | None = None,
    adapters: int = 1,
) -> Explanation | ModelExplanation:
    """Explain which variant runs for y = x W^T + s D(x) A^T B^T, x [M, K], W [N, K], rank r, and its cost.

    Nothing runs.

    Args:
        model: a model instead of a shape. The result is a table of its LoRA layers: fused, or why not.
        M, K, N, r: rows of x, in_features, out_features, rank of each adapter.
        dropout: of the adapters. dtype: of x and W. adapter_dtype: of A and B, default that of x.
        device: where it would run: a torch device, or the name of an NVIDIA chip ("H100", "sm_90"), which need not be
            present. Default: the current GPU, or the CPU.
        adapters: how many are active in one call.

    Returns:
        An object whose ``str()`` is a table: variant, launches, bytes and flops of forward and backward against the
        floor, and the configuration of each launch. A call takes the same plan.

    Raises:
        ValueError: a size is missing or not positive; dropout is outside [0, 1]; an unknown chip; or model and a shape.
        TypeError: model is not a module, or dtype not a torch.dtype.
    """
    sizes: dict[str, Any] = dict(M=M, K=K, N=N, r=r)
    if model is not None:
        if any(size is not None for size in sizes.values()):
            raise ValueError("model: expected a model or M, K, N and r, got both")
        from fused_lora.integrations.peft import layer_report

        return ModelExplanation(tuple(layer_report(model)))
    _check(sizes | dict(adapters=adapters), dropout, dtype, adapter_dtype)
    adapter_dtype = adapter_dtype or dtype
    place, capability, notes, measured = _place(device, (dtype, adapter_dtype))
    upcast = adapter_dtype != dtype
    call = _Call(**sizes, dtype=dtype, dropout=dropout > 0, upcast=upcast, adapters=adapters, capability=capability)
    plans = [Plan("eager"), Plan("eager")]
    if capability:
        plans = [
            plan("linear", *call, table=measured),
            plan("backward", call.M, call.K, call.N, *call[3:], table=measured),
        ]
    notes += _dropped(plans)
    of_adapters = "" if adapters == 1 else f" adapters={adapters}"
    over = f" with {dtype_name(adapter_dtype)} adapters" if upcast else ""
    title = f"LoRA linear M={M} K={K} N={N} r={r}{of_adapters} dropout={dropout:g} {dtype_name(dtype)}{over} on {place}"
    return Explanation(title, _forward(plans[0], call), _backward(plans[1], call), notes)


def _check(sizes: dict[str, int | None], dropout: float, dtype, adapter_dtype) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout: expected a number, got {dropout!r}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1], got {dropout!r}")
    for name, value in (("dtype", dtype), ("adapter_dtype", adapter_dtype)):
        if not isinstance(value, torch.dtype) and not (name == "adapter_dtype" and value is None):
            raise TypeError(f"{name}: expected a torch.dtype, got {value!r}")


def _place(device, dtypes: Iterable[torch.dtype]) -> tuple[str, int, tuple[str, ...], tuned.Table | None]:
    """(name, capability or 0 for the eager path, notes, tuned plans) of the device that was asked for."""
    chip = _capability_of(device) if isinstance(device, str) else None
    if chip is not None:
        return *_of_dtypes(device, chip, dtypes), None
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected a torch device or one of {', '.join(CHIPS)}, got {device!r}") from None
    if why := guard.why_not(device):
        why = "the CPU path: plain torch, no kernels" if device.type == "cpu" else f"the eager path: {why}"
        return str(device), 0, (f"{device} takes {why}; launches and bytes are not counted",), None
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected a device that is here or the name of a chip ('H100'), got {str(device)!r}")
    from fused_lora.kernels.config import capability

    return *_of_dtypes(torch.cuda.get_device_name(device), capability(device), dtypes), tuned.table(device)


def _capability_of(name: str) -> int | None:
    chips = {chip.replace(" ", "").lower(): number for chip, number in CHIPS.items()}
    plain = name.replace(" ", "").lower()
    if plain.startswith("sm_") and plain[3:].isdigit():
        return int(plain[3:])
    return chips.get(plain)


def _of_dtypes(name: str, capability: int, dtypes: Iterable[torch.dtype]) -> tuple[str, int, tuple[str, ...]]:
    if not guard.DTYPES.issuperset(dtypes):
        return name, 0, ("the kernels do fp32, bf16 and fp16; other dtypes take the eager path, which is not counted",)
    if capability < 80:
        return name, 0, (f"no kernels for {name}: the eager path, which is not counted",)
    return name, capability, ()


def _dropped(plans: Sequence[Plan]) -> tuple[str, ...]:
    """A note for each plan that has failed its first use in this process."""
    failed = {key[1] for key, passed in guard.verdicts().items() if not passed and isinstance(key[1], Plan)}
    said = "has failed its first use in this process; the eager path does its work"
    return tuple(f"{p.variant} {said}" for p in plans if p in failed)


def _traffic(op: str, call: _Call, variant: str | None = None, **sizes: Any) -> dict[str, int]:
    """What a launch of the call costs; ``sizes``: those that it has of its own, or no dropout."""
    from fused_lora.kernels.config import traffic

    M, N, K, r, dtype, dropout, upcast, adapters, capability = call._replace(**sizes)
    return traffic(op, M, N, K, r * adapters, dtype, dropout, capability, upcast, adapters, variant)


def _forward(chosen: Plan, call: _Call) -> Cost:
    whole = _traffic("linear", call, chosen.variant if chosen.variant == "recompute" else "split")
    costs = [whole]
    if chosen.variant == "library":
        costs = [_traffic("shrink", call, N=0), _traffic("expand", call, K=0, dropout=False), _library(call)]
    return _sum("forward", chosen, costs, whole["floor_bytes"], whole["floor_flops"])


def _backward(chosen: Plan, call: _Call) -> Cost:
    M, N, K, R, e = call.M, call.N, call.K, call.r * call.adapters, call.dtype.itemsize
    if chosen.variant == "passes":
        costs = [_traffic("backward_g", call, K=0, dropout=False), _traffic("backward_x", call, N=K, K=0)]
    else:
        costs = [_traffic("shrink", call, N=0, K=N, dropout=False), _traffic("expand", call, N=K, K=0)]
        costs.append(_traffic("weight_grad", call))
    # g, x, dx, W, S, and A, B and their gradients once each
    floor_bytes = e * (M * N + 2 * M * K + N * K) + 4 * M * R + 2 * (4 if call.upcast else e) * R * (N + K)
    costs.append(_library(call._replace(N=K, K=N)))
    return _sum("backward", chosen, costs, floor_bytes, 2 * M * N * K + 4 * M * R * (N + K))


def _library(call: _Call) -> dict[str, int]:
    """The library's GEMM that adds to Y [M, N]: it is read and written."""
    M, N, K = call[:3]
    return dict(bytes=call.dtype.itemsize * (M * K + K * N + 2 * M * N), flops=2 * M * N * K, launches=1)


def _sum(name: str, chosen: Plan, costs: list[dict[str, int]], floor_bytes: int, floor_flops: int) -> Cost:
    launches, moved, flops = (sum(cost[key] for cost in costs) for key in ("launches", "bytes", "flops"))
    eager, passes = chosen.variant == "eager", chosen.variant == "passes"
    first, second = ("pass over g", "pass over x") if passes else ("shrink", "product")
    parts = {first: chosen.shrink, second: chosen.product, "weight gradients": chosen.weight_grad}
    return Cost(
        name,
        chosen.variant,
        tuple((part, config) for part, config in parts.items() if config is not None),
        None if eager else launches,
        None if eager else moved,
        floor_flops if eager else flops,
        floor_bytes,
        floor_flops,
    )


def _cells(cost: Cost) -> tuple[str, ...]:
    moved = ("-", "-") if cost.bytes is None else (f"{cost.bytes / 1e6:.1f}", f"{cost.bytes / cost.floor_bytes:.3f}")
    flops = f"{cost.flops / 1e9:.2f}", f"{cost.flops / cost.floor_flops:.3f}"
    return cost.name, cost.variant, "-" if cost.launches is None else str(cost.launches), *moved, *flops


def _tile(config: LaunchConfig) -> str:
    text = f"{config.BLOCK_M}x{config.BLOCK_N}x{config.BLOCK_K} rank block {config.BLOCK_R}"
    text += f", {config.num_warps} warps, {config.num_stages} stages"
    return text + f", split {config.SPLIT_K}" * (config.SPLIT_K > 1) + ", tensor descriptors" * config.tma
