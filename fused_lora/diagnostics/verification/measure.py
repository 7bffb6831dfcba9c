"""The numbers of a verification: one layer against float64, and two outputs of the model against each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fused_lora.bases import base_of
from fused_lora.diagnostics.verification.experts import ExpertsLayer, replay, units_of
from fused_lora.diagnostics.verification.layers import Layer
from fused_lora.diagnostics.verification.passes import Pass, run
from fused_lora.diagnostics.verification.report import LayerCheck, OutputCheck
from fused_lora.diagnostics.verification.weights import (
    MergeScan,
    Units,
    blocks,
    merged_bound,
    product,
    ratio,
    rms,
    scan_merge,
    spread,
    unmerged_bound,
)


def check_layer(layer: Layer, unmerged: Pass) -> list[LayerCheck]:
    """Replay the kept rows of one layer in float64 and measure its three errors against their bounds, a weight each."""
    if isinstance(layer, ExpertsLayer):
        return _check_experts(layer, unmerged)
    x, y = unmerged.x[layer.path], unmerged.y[layer.path]
    base = layer.base
    kind = base_of(base)
    with layer.shown(False):
        weight = used = layer.weight
        bias, operand, before = layer.bias, None, kind.grid(base)
        if kind.bits:  # a call may repack it with narrower scales, for this call and later ones
            layer.call(x)
            used, operand = layer.weight, kind.operand_dtype(base, x)
    with layer.shown(True):
        merged_weight, merged_bias, grid = layer.weight, layer.bias, kind.grid(base)
        ym = layer.call(x)
        used_merged = layer.weight if kind.bits else merged_weight
    if grid is not None and before is not None:
        grid = grid._replace(dtype=before.dtype)
    step, x = kind.input_step(base, x), layer.rows(x, y)
    units = Units.of(x, y, weight, list(layer.parts().values()), operand, step)
    rows, adapters = x.double(), layer.adapters()
    scan = scan_merge(weight, merged_weight, adapters, rows, units, grid)
    plain = folded = base_size = term_size = moved = 0.0
    for start, stop in blocks(weight):
        part = slice(start, stop)
        W, b = used[part].double(), None if bias is None else bias[part].double()
        mine = [a.rows(part) for a in adapters]
        got = y[:, part].double()
        error = got - product(rows, W, b, mine)
        plain = max(plain, ratio(error, unmerged_bound(units, rows, W, b, mine, got)))
        Wm, bm = used_merged[part].double(), None if merged_bias is None else merged_bias[part].double()
        got = ym[:, part].double()
        error = got - product(rows, Wm, bm, [])
        folded = max(folded, ratio(error, merged_bound(units, rows, Wm, bm, got)))
        of_base, of_term = spread(rows, W, Wm, mine)
        base_size, term_size = base_size + of_base.sum().item(), term_size + of_term.sum().item()
        moved += (units.step**2 * (Wm - W).square().sum(1) / 3).sum().item() if units.step is not None else 0.0
    # the weight's rounding as it acts on these rows, two roundings of the result, half of sqrt(K) in the sums
    count = max(y.numel(), 1)
    sums = math.sqrt(x.shape[-1]) * units.accumulate / 2 + 2 * units.operand + units.partial
    sums *= math.sqrt((base_size + term_size) / count)
    narrow = units.adapter * math.sqrt(term_size / count)
    shift = rms(scan.shift) if scan.ratio <= 1 else 0.0
    # an input that is quantised meets another weight
    expected = math.hypot(shift, math.sqrt(moved / count), 2 * units.result * rms(y) + sums + narrow)
    difference = ym.double() - y.double()
    largest = difference.abs().max().item() if difference.numel() else 0.0
    name = weight.dtype if grid is None else grid.name
    return [
        LayerCheck(
            layer.path, name, tuple(layer.names), largest, rms(difference), expected, plain, scan.ratio, folded,
            scan.lost, scan.inside, scan.inside_std,
        )
    ]  # fmt: skip


def _check_experts(layer: ExpertsLayer, unmerged: Pass) -> list[LayerCheck]:
    """One call of all experts, whose outputs are compared once; the merge of each parameter."""
    x, y = unmerged.x[layer.path], unmerged.y[layer.path].double()
    changes = layer.changes()
    with layer.shown(False):
        weights, units = layer.weights(), units_of(layer, x, unmerged.y[layer.path])
        exact, bound = replay(layer, x, weights, changes, units)
    with layer.shown(True):
        merged, units = layer.weights(), units_of(layer, x, unmerged.y[layer.path])
        exact_merged, bound_merged = replay(layer, x, merged, {}, units)
        ym = layer.call(x).double()
    difference = ym - y
    largest = difference.abs().max().item() if difference.numel() else 0.0
    plain, folded = ratio(y - exact, bound), ratio(ym - exact_merged, bound_merged)
    scans: dict[str, MergeScan] = {}
    for path, stored in weights.items():
        for W, Wm, own in zip(layer.matrices(stored), layer.matrices(merged[path]), changes[path], strict=True):
            scan = scan_merge(W, Wm, own, x.new_zeros(0, W.shape[1]), units)
            scans[path] = scans[path].with_(scan) if path in scans else scan
    # the weights' rounding as it acts on these rows, and that of both calls, each where it is rounding
    right = all(scan.ratio <= 1 for scan in scans.values())
    parts = ((exact_merged - exact, right), (y - exact, plain <= 1), (ym - exact_merged, folded <= 1))
    expected = math.hypot(*(rms(error) for error, rounds in parts if rounds))
    return [
        LayerCheck(
            stack.path, weights[stack.path].dtype, tuple(stack.names), largest, rms(difference), expected,
            plain, scans[stack.path].ratio, folded,
            scans[stack.path].lost, scans[stack.path].inside, scans[stack.path].inside_std,
        )
        for stack in layer.stacks
    ]  # fmt: skip


def output_noise(
    model: nn.Module, inputs: object, layers: list[Layer], checks: list[LayerCheck], unmerged: Pass, seed: int
) -> float:
    """How far the output moves (RMS, the larger of two passes) when every LoRA layer's output is off by rounding."""
    expected = {check.path: check.expected_rms for check in checks}
    size = {layer.path: expected[layer.paths[0]] for layer in layers if layer.paths[0] in expected}

    def change(path: str, y: Tensor) -> Tensor:
        noise = torch.randn(y.shape, dtype=torch.float64, device=y.device) * size.get(path, 0.0)
        return (y.double() + noise).to(y.dtype)

    moved = 0.0
    for draw in range(2):
        other = run(model, inputs, layers, False, seed + draw, change=change)
        moved = max(moved, rms(_difference(other.output, unmerged.output)))
    return moved


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a - b in float64, 0 where both are the same infinity."""
    return torch.where(a == b, 0.0, a.double() - b.double())


def compare_outputs(output: Tensor, expected: Tensor, noise: float) -> OutputCheck:
    """Two outputs of the model; ``noise`` is the RMS difference that rounding is expected to cause."""
    difference = _difference(output, expected)
    largest = difference.abs().max().item() if difference.numel() else 0.0
    changed = margin = 0.0
    if output.dim() > 1 and output.shape[-1] > 1 and output.numel():
        old, new = expected.argmax(-1, keepdim=True), output.argmax(-1, keepdim=True)
        changed = (old != new).double().mean().item()
        margin = (expected.gather(-1, old) - expected.gather(-1, new)).max().item()
    finite = expected[torch.isfinite(expected)]
    return OutputCheck(largest, rms(difference), noise, changed, margin, rms(finite))
