"""Error bounds of correct results, and what a weight consists of: base, delta, grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fused_lora.diagnostics.tables import dtype_name
from fused_lora.ops.merge.exact import Adapter, change, columns, scale_error

CONFIDENCE = 10.0  # lambda of the bounds: exceeded with probability 2 n exp(-lambda^2 / 2), below 1e-17 for n = 16384
_BLOCK_ELEMENTS = 1 << 21


def _scale_error(units: Units, K: int, doubt: Tensor) -> Tensor:
    return scale_error(K, doubt, units.form, units.accumulate)


@dataclass
class Units:
    """Unit roundoffs of one layer's arithmetic: result, adapters, accumulation, operands, partial sums (0: none).

    ``step`` is absolute, [rows, 1] in float64: the most that an element of the input is moved when it is quantised.
    """

    result: float
    adapter: float
    accumulate: float
    operand: float = 0.0  # TF32 and autocast round what is multiplied
    partial: float = 0.0  # cuBLAS may round the parts of a split sum to 16 bits
    step: Tensor | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        adapters: list[Tensor],
        narrow: torch.dtype | None = None,
        step: Tensor | None = None,
    ) -> Units:
        """The roundoffs that apply to a layer with input x and output y under the current autocast and TF32 modes.

        ``narrow``: what the base layer rounds operands and result to by itself. ``step``: how it quantises x.
        """
        kind, operand, partial = x.device.type, 0.0, 0.0
        widths = [unit_of(t.dtype) for t in adapters]
        if kind != "cpu":  # the adapters' term may be formed with operands of the input's width
            widths.append(unit_of(x.dtype))
            partial = unit_of(y.dtype) if y.dtype in (torch.bfloat16, torch.float16) else 0.0
        if torch.is_autocast_enabled(kind):
            operand = unit_of(torch.get_autocast_dtype(kind))
            widths.append(operand)
        elif kind == "cuda" and weight.dtype == torch.float32 and _is_tf32():
            operand = 2.0**-11
            widths.append(operand)
        result = max(unit_of(y.dtype), unit_of(x.dtype))
        if narrow is not None and narrow.itemsize == 2:
            operand, result = max(operand, unit_of(narrow)), max(result, unit_of(narrow))
        double = {x.dtype, weight.dtype, y.dtype} == {torch.float64}
        accumulate = unit_of(torch.float64 if double else torch.float32)
        return cls(result, max(widths), accumulate, operand, partial, None if step is None else step.double())

    def folded(self, unit: float) -> Units:
        """Where W + D is formed in the weight's dtype for each call: operands and adapters are rounded to it."""
        return replace(self, adapter=max(self.adapter, unit), operand=max(self.operand, unit))

    @property
    def form(self) -> float:
        """Roundoff with which a merge forms its delta: the adapters' own where that is coarser than fp32."""
        return max(self.adapter, self.accumulate)


def _is_tf32() -> bool:
    """Whether fp32 products on a GPU round their operands to TF32."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, where the question below raises once this has been set
        return matmul.fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def product(x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """x W^T + b under the adapters, [rows, N]; all arguments float64."""
    y = torch.nn.functional.linear(x, weight, bias)
    for a, column in zip(adapters, columns(weight, adapters), strict=True):
        term = (x @ a.lora_A.t()) @ a.lora_B.t()
        y = y + a.scaling * (term if a.bias is None else term + a.bias)
        if column is not None:
            y = column.scale * y if bias is None else column.scale * (y - bias) + bias
    return y


def unmerged_bound(
    units: Units, x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], y: Tensor
) -> Tensor:
    """Bound on |y - (x W^T + b + sum_i s_i (x A_i^T) B_i^T)|, elementwise [rows, N]; all arguments float64.

    lambda sqrt(K + r) u_acc (|x||W|^T + |b|)              base product, and the adapters' terms added to it in turn
    + (lambda sqrt(K + r) u_acc + 4 u_adapter) sum_i |s_i| ((|x||A_i|^T) |B_i|^T + |lora_bias_i|)
                                                           x, S, S B^T and s S B^T each rounded to the adapters' dtype
    + tiny_adapter sum_i |s_i| (1 + |B_i| 1)               of which S and S B^T may be subnormal
    + (2 lambda u_operand + 4 u_partial) sqrt(x^2 (W^2)^T) rounding of operands and of partial sums, where it happens
    + step min(lambda |W|_2, |W|_1) by rows of W           quantisation of x, where it happens
    + 2 u (|y| + |x W^T + b| + adapters' magnitude)        base result and sum rounded to the layer's dtype

    lambda sqrt(n) u in place of Higham's n u / (1 - n u): Higham and Mary, "A new approach to probabilistic rounding
    error analysis", SIAM J. Sci. Comput. 41 (2019), theorem 2.4, roundings being independent of mean zero.

    A DoRA adapter multiplies what there is by c, and so the bound, and adds

    2 u |c - 1| (|z| + |z + b|) + error of c |c| (|x||W|^T + ...)      z = y - b, formed and rounded before
    + 2 u |c z|                                                        or with a bias c z + b, of a rounded z
    """
    base = x @ weight.t() + (0.0 if bias is None else bias)
    rank = sum(a.lora_A.shape[0] for a in adapters)
    chain = CONFIDENCE * math.sqrt(x.shape[1] + rank) * units.accumulate
    bound = _product_bound(units, x, weight, bias, x.shape[1] + rank) + 2 * units.result * base.abs()
    scaled = columns(weight, adapters)
    dora = any(column is not None for column in scaled)
    z, size = (base if bias is None else base - bias, x.abs() @ weight.abs().t()) if dora else (base, base)
    for a, column in zip(adapters, scaled, strict=True):
        s, part = abs(a.scaling), (x.abs() @ a.lora_A.abs().t()) @ a.lora_B.abs().t()
        term = s * (part if a.bias is None else part + a.bias.abs())
        bound = bound + (chain + 4 * units.adapter + 2 * units.result) * term
        bound = bound + s * tiny(units.adapter) * (1 + a.lora_B.abs().sum(1))
        if dora:
            z, size = z + a.scaling * ((x @ a.lora_A.t()) @ a.lora_B.t()), size + term
        if column is not None:
            c = column.scale
            rounded = (z if bias is None else z + bias).abs() + z.abs()
            bound = c.abs() * (bound + _scale_error(units, x.shape[1], column.doubt) * size)
            bound = bound + 2 * units.result * (c - 1).abs() * rounded
            if bias is not None:
                bound = bound + 2 * units.result * (c * z).abs()
            z, size = c * z, c.abs() * size
    return bound + 2 * units.result * y.abs() + tiny(units.result)


def merged_bound(units: Units, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Bound on |y - (x Wm^T + b)|, elementwise [rows, N], as :func:`unmerged_bound` without adapters."""
    return _product_bound(units, x, weight, bias, x.shape[1]) + 2 * units.result * y.abs() + tiny(units.result)


def _product_bound(units: Units, x: Tensor, weight: Tensor, bias: Tensor | None, terms: int) -> Tensor:
    magnitude = x.abs() @ weight.abs().t() + (0.0 if bias is None else bias.abs())
    bound = CONFIDENCE * math.sqrt(terms) * units.accumulate * magnitude
    if units.operand or units.partial:
        size = (x.square() @ weight.square().t()).sqrt()
        bound += (2 * CONFIDENCE * units.operand + 4 * units.partial) * size
    if units.step is not None:
        bound += units.step * torch.minimum(CONFIDENCE * weight.norm(dim=1), weight.abs().sum(1))
    return bound


def spread(x: Tensor, weight: Tensor, merged: Tensor, adapters: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
    """Squared size of x W^T and x Wm^T together, and of the adapters' term, were all signs independent: [rows, N]."""
    squares = x.square()
    base = squares @ (weight.square() + merged.square()).t()
    term = torch.zeros_like(base)
    for a, column in zip(adapters, columns(weight, adapters), strict=True):
        term += a.scaling**2 * ((squares @ a.lora_A.square().t()) @ a.lora_B.square().t())
        if column is not None:
            base, term = base * column.scale.square().clamp_min(1), term * column.scale.square()
    return base, term


@dataclass
class MergeScan:
    """A merge checked element by element: the largest |Wm - (W + D)| over its bound, and sums over all elements.

    ``shift`` is x (Wm - W - D)^T, the effect of rounding the weight. ``inner`` and ``part`` are <W, P> and <P, P>, P
    what the adapters add to W beside DoRA's scales of its rows. ``normed``: whether the rows of W have the norms that a
    merge of the last adapter leaves, the magnitude; None where that is no DoRA adapter, False where others are.
    """

    ratio: float
    error: float
    wanted: float
    inner: float
    part: float
    size: float
    count: int
    shift: Tensor
    normed: bool | None = None

    @property
    def lost(self) -> float:
        """||Wm - W - D|| / ||D||."""
        return math.sqrt(self.error / self.wanted) if self.wanted else 0.0

    @property
    def inside(self) -> float:
        """How many times W itself seems to hold P. With DoRA, which scales P by what W was, 0 or 1."""
        found = self.inner / self.part if self.part else 0.0
        return found if self.normed is None else float(self.normed and found > 0)

    @property
    def inside_std(self) -> float:
        """Its standard deviation for a W that knows nothing of P."""
        if not self.part or (self.normed is not None and not self.inside):
            return math.inf
        std = math.sqrt(self.size / max(self.count, 1) / self.part)
        return std if self.normed is None else std * self.part / self.inner

    def with_(self, other: MergeScan) -> MergeScan:
        """Both as one."""
        names = ("error", "wanted", "inner", "part", "size", "count")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        return MergeScan(max(self.ratio, other.ratio), shift=torch.cat([self.shift, other.shift], 1), **sums)


def scan_merge(
    weight: Tensor, merged: Tensor, adapters: Sequence[Adapter], x: Tensor, units: Units, grid: Any = None
) -> MergeScan:
    """Compare Wm with W + D, both [N, K], in float64 and by blocks of rows. D: what the adapters change, in turn.

    The bound of an element: (count + 1) u (|W| + |s||B||A|), the roundings of ``count`` adapters added in turn and of
    D itself to the weight's dtype, and (lambda sqrt(R) + 3) u' |s||B||A| for D formed with roundoff u'. With DoRA W and
    D are scaled by c, whose error adds, and two more roundings each.
    A merge that quantises again (``grid``: a ``bases.base.Grid``) has the bound of :func:`_quantised_bound` instead.
    """
    u = unit_of(weight.dtype if grid is None else grid.dtype)
    count = len(adapters) + 1 + 4 * sum(a.magnitude is not None for a in adapters)
    form = (CONFIDENCE * math.sqrt(sum(a.lora_A.shape[0] for a in adapters)) + 3) * units.form
    worst = lost = wanted = inner = part = size = 0.0
    shifts, normed = [], None
    scale_errors = weight if grid is None else _scale_errors(weight, adapters, 1, grid)  # unused without a grid
    for start, stop in blocks(weight):
        W, Wm = weight[start:stop].double(), merged[start:stop].double()
        mine = [a.rows(slice(start, stop)) for a in adapters]
        made = change(W, mine)
        if made.scale is not None:
            normed = normed is not False and _is_normed(W, mine[-1].magnitude, u, units)
        D = made.delta(W)
        error = Wm - W - D
        bound = count * u * made.size(W) + form * made.low + tiny(u)
        if made.doubt is not None:
            bound = bound + _scale_error(units, W.shape[1], made.doubt) * made.size(W)
        if grid is not None:
            bound = _quantised_bound(W + D, bound, grid, scale_errors[start:stop])
        worst = max(worst, ratio(error, bound))
        lost, wanted = lost + _dot(error, error), wanted + _dot(D, D)
        inner, part, size = inner + _dot(W, made.part), part + _dot(made.part, made.part), size + _dot(W, W)
        shifts.append(x @ error.t())
    return MergeScan(worst, lost, wanted, inner, part, size, weight.numel(), torch.cat(shifts, 1), normed)


def _is_normed(weight: Tensor, magnitude: Tensor | None, u: float, units: Units) -> bool:
    """Whether the rows of a weight, stored with unit roundoff u, have these norms."""
    if magnitude is None:
        return False
    error = (weight.norm(dim=1) - magnitude.abs()).abs()
    return bool((error <= 4 * u * magnitude.abs() + _scale_error(units, weight.shape[1], magnitude.abs())).all())


def _scale_errors(weight: Tensor, adapters: Sequence[Adapter], times: int, grid: Any) -> Tensor:
    """Bound on the error of each scale of W + times D as it is stored: [N, K / blocksize]; ``rounding`` of a float.

    Scales that are quantised, too, are codes of (scale - mean) / largest in a block of scales.
    """
    parts = []
    for start, stop in blocks(weight):
        W = weight[start:stop].double()
        target = W + times * change(W, [a.rows(slice(start, stop)) for a in adapters]).delta(W)
        parts.append(target.view(stop - start, -1, grid.blocksize).abs().amax(2))
    scales = torch.cat(parts)
    if grid.nested is None:
        return torch.full_like(scales, grid.rounding)
    code, blocksize = grid.nested
    gap = code.double().sort().values.diff().max() + 2.0**-13  # bitsandbytes finds the nearest code to about 2^-15
    around = (scales - scales.mean()).abs().flatten()
    padded = torch.nn.functional.pad(around, (0, -len(around) % blocksize)).view(-1, blocksize)
    largest = padded.amax(1, keepdim=True).expand_as(padded).flatten()[: len(around)]
    return (largest * gap / 2 + 16 * unit_of(torch.float32) * scales.max()).view_as(scales)


def _quantised_bound(target: Tensor, before: Tensor, grid: Any, scale_errors: Tensor) -> Tensor:
    """Bound on |Wm - target| for ``target`` = W + D [rows, K] that is known to ``before`` and then quantised.

    distance of target to the nearest code times its block's largest magnitude, as a quantisation must leave it
    + 2 before + (largest before in the block)      the target that was quantised is another one, and so is the scale
    + the error of the stored scale                 times a code, at most 1
    + 16 u_fp32 largest                             the decision between two codes, the product of code and scale
    """
    shape, code = target.shape, grid.code.double().sort().values
    values, before = (t.view(shape[0], -1, grid.blocksize) for t in (target, before))
    largest = values.abs().amax(2, keepdim=True)
    nearest = torch.bucketize(values / largest.clamp_min(1e-300), (code[1:] + code[:-1]) / 2)
    bound = (code[nearest] * largest - values).abs() + 2 * before + before.amax(2, keepdim=True)
    return (bound + scale_errors[..., None] + 16 * unit_of(torch.float32) * largest).view(shape)


@dataclass
class Relation:
    """A base weight against a reference's: how often D sits in the difference, or what else the difference is.

    ``times`` is k where W - R = k D within rounding, for k of 0, -1, 1 and -2, else None. ``grid`` names a coarser grid
    that W (or R) was rounded to. ``distance`` is ||W - R|| / ||R||, ``changed`` counts the elements that differ.
    """

    times: int | None
    grid: str
    distance: float
    changed: int


def relate(
    weight: Tensor, other: Tensor, adapters: Sequence[Adapter], grid: Any = None, other_grid: Any = None
) -> Relation:
    """Explain ``weight`` [N, K] by ``other`` [N, K] and what the adapters make of a weight; any two floating dtypes.

    ``grid`` and ``other_grid``: how the two are quantised, a ``bases.base.Grid``, or None.
    """
    unit = max(unit_of(weight.dtype), unit_of(other.dtype))
    fits: dict[int, float] = dict.fromkeys((0, -1, 1, -2), 0.0)
    moved = size = 0.0
    changed = 0
    for start, stop in blocks(weight):
        W, R = weight[start:stop].double(), other[start:stop].to(weight.device).double()
        mine = [a.rows(slice(start, stop)) for a in adapters]
        once = change(W, mine)
        bound = 3 * unit * (W.abs() + R.abs() + once.low) + tiny(unit)
        if once.scale is None:
            errors = {k: W - R - k * once.part for k in fits}
        else:  # the scales depend on the weight: that of the reference for k = 1, twice for k = -2
            D, back = once.delta(W), change(R, mine)
            twice = D + change(W + D, mine).delta(W + D)
            errors = {0: W - R, -1: W - R + D, 1: W - R - back.delta(R), -2: W - R + twice}
            bound = bound + 9 * unit * (once.size(W) + back.size(R))
        for k, error in errors.items():
            fits[k] = max(fits[k], ratio(error, bound))
        moved, size = moved + _dot(W - R, W - R), size + _dot(R, R)
        changed += int((W != R).sum())
    distance = math.sqrt(moved / size) if size else math.inf
    times = next((k for k, worst in fits.items() if worst <= 1.0), None)
    if not changed or grid is None and other_grid is None:
        return Relation(times, _grid(weight, other) if changed else "", distance, changed)
    if grid is not None and other_grid is not None:
        differ = f"{grid} here, {other_grid} there" if str(grid) != str(other_grid) else ""
        return Relation(times, differ, distance, changed)
    coarse, fine, own, k = (weight, other, grid, -1) if other_grid is None else (other, weight, other_grid, 1)
    for found, delta in ((0, 0), (-1, k)):  # of the two the reference may hold the adapter
        if times is None and _is_quantised(fine, coarse, adapters, delta, own):
            return Relation(found, str(own), distance, changed)
    return Relation(times, "", distance, changed)


def _is_quantised(fine: Tensor, coarse: Tensor, adapters: Sequence[Adapter], times: int, grid: Any) -> bool:
    """Whether ``coarse`` is ``fine`` + times D, quantised."""
    scale_errors, worst = _scale_errors(fine, adapters, times, grid), 0.0
    if grid.repacked:  # whether its scales were quantised is not known any more: codes are at most 2^-6 apart
        scale_errors = scale_errors + 2.0**-7 * coarse.abs().max().double()
    for start, stop in blocks(fine):
        W = fine[start:stop].to(coarse.device).double()
        made = change(W, [a.rows(slice(start, stop)) for a in adapters])
        target = W + times * made.delta(W)
        unit = max(unit_of(fine.dtype), unit_of(grid.dtype))  # int8 is quantised from fp16
        bound = _quantised_bound(target, 2 * unit * (W.abs() + abs(times) * made.low), grid, scale_errors[start:stop])
        found = coarse[start:stop].double()
        if grid.repacked:  # its scales were rounded to bf16 after it was quantised
            bound = bound + 2 * unit_of(torch.bfloat16) * found.abs()
        worst = max(worst, ratio(found - target, bound))
    return worst <= 1.0


def _grid(weight: Tensor, other: Tensor) -> str:
    """The coarser grid that one of two weights lies on and the other does not, or an empty string."""
    for coarse, fine in ((weight, other), (other, weight)):
        for dtype in (torch.bfloat16, torch.float16):
            rounded = fine.to(dtype).to(torch.float64)
            if torch.equal(coarse.double(), rounded.to(coarse.device)) and not torch.equal(fine.double(), rounded):
                return dtype_name(dtype)
        few, many = _distinct(coarse), _distinct(fine)
        if few <= 0.75 * many:
            return f"a grid of {few:.0f} values a row, the other has {many:.0f}"
    return ""


def _distinct(weight: Tensor) -> float:
    """How many values a row has, of 64 rows or some more."""
    rows = weight[:: max(1, weight.shape[0] // 64)].float()
    return sum(row.unique().numel() for row in rows) / len(rows)


def ratio(error: Tensor, bound: Tensor) -> float:
    """Largest |error| / bound; infinite where an error is NaN."""
    if not error.numel():
        return 0.0
    return torch.nan_to_num(error.abs() / bound, nan=math.inf, posinf=math.inf).max().item()


def rms(tensor: Tensor) -> float:
    """Root of the mean square."""
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def tiny(unit: float) -> float:
    """Room for the subnormals of the dtype with this unit roundoff, which have no relative error bound."""
    dtype = next((d for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16) if unit_of(d) == unit), None)
    info = torch.finfo(dtype or torch.float16)
    return 8 * info.smallest_normal * info.eps


def unit_of(dtype: torch.dtype) -> float:
    """Unit roundoff."""
    return torch.finfo(dtype).eps / 2


def blocks(weight: Tensor) -> Iterator[tuple[int, int]]:
    """Row ranges [start, stop) of a weight that are small enough to be held in float64 several times."""
    step = max(1, _BLOCK_ELEMENTS // max(weight.shape[1], 1))
    for start in range(0, weight.shape[0], step):
        yield start, min(start + step, weight.shape[0])


def _dot(a: Tensor, b: Tensor) -> float:
    return (a * b).sum().item()
