"""Run every kernel once on small layers of odd sizes against float64: for compute-sanitizer, or on a new machine.

python -m fused_lora.testing.smoke                                  the current GPU
python -m fused_lora.testing.smoke --subset                         a few cases in bf16, for slow tools
TRITON_INTERPRET=1 python -m fused_lora.testing.smoke cpu --subset  in the interpreter
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch

from fused_lora import reference
from fused_lora.kernels.config import variants
from fused_lora.ops.dequant import by_torch, small_case
from fused_lora.ops.merge import launch
from fused_lora.ops.merge import op as merge
from fused_lora.ops.native import DONE, MERGE, UNMERGE

from .grouped import GroupedCase
from .layers import LayerCase
from .numeric import assert_no_worse

LAYERS = [(70, 40, 72, 8), (5, 33, 130, 3), (530, 48, 64, 24)]
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
]
DENSE = (torch.bfloat16, torch.float16, torch.float32)
GROUPED = [(torch.bfloat16, 5), (torch.bfloat16, 70), (torch.float16, 33), (torch.float32, 130)]


def layers(device: torch.device | str, subset: bool = False) -> Iterator[str]:
    """Every variant of forward and backward that a shape can take; yields a line for each. AssertionError if wrong."""
    for M, N, K, r in LAYERS[: 1 if subset else None]:
        for dtype, adapter_dtype in DTYPES[: 2 if subset else None]:
            for p in (0.25,) if subset else (0.0, 0.25):
                case = LayerCase.make(M, N, K, [r], [p], dtype, adapter_dtype, device=device)
                label = f"M={M} N={N} K={K} r={r} p={p} {dtype} {adapter_dtype}"
                for variant in (*variants(M, r, dtype, p > 0, dtype != adapter_dtype), "library"):
                    y, S = case.by(variant)
                    case.check(dict(y=y, S=S))
                    yield f"forward {variant} {label}"
                for variant in ("passes", "library"):
                    case.check(backward(case, variant))
                    yield f"backward {variant} {label}"


def backward(case: LayerCase, variant: str) -> dict[str, torch.Tensor]:
    """dx, dA and dB of one variant."""
    dx, dA, dB, _, _ = case.by(variant, case.exact()["S"].float())
    return dict(dx=dx, dA=torch.cat(dA), dB=torch.cat(dB, 1))


def grouped(device: torch.device | str, subset: bool = False) -> Iterator[str]:
    """Many adapters in one batch: two outputs of one input, ranks apart, a row without and a row with two adapters."""
    groups, ranks = [[(0, 1.0)], [(1, -0.7)], [(2, 0.5), (0, 0.25)]], [(4, 17), (64, 1), (8, 0)]
    for dtype, T in GROUPED[: 1 if subset else None]:
        case = GroupedCase.make([i % 4 - 1 for i in range(T)], groups, ranks, (40, 72), 136, dtype, device=device)
        outputs, guards = case.run()
        guards.assert_intact()
        eager, exact, bounds = case.eager(), case.exact(), case.fp32_bounds()
        for g, y in enumerate(outputs):
            if dtype == torch.float32:
                assert ((y - exact[g]).abs() <= bounds[g]).all(), f"y[{g}]: off by more than fp32 sums lose"
            else:
                assert_no_worse(y, eager[g], exact[g], name=f"y[{g}]")
        yield f"grouped T={T} {dtype}"


def merges(device: torch.device | str, subset: bool = False) -> Iterator[str]:
    """Merge, and unmerge to the original bits, in every dtype."""
    for dtype in DENSE[: 1 if subset else None]:
        W = (torch.randn(65, 300) * 0.02).to(dtype).to(device)
        A, B = torch.randn(3, 300).to(device), (torch.randn(65, 3) * 0.002).to(device)
        before = W.clone()
        record = merge.merge_(W, [A], [B], [2.0])
        exact = before.double() + reference.delta_weight([A], [B], [2.0])
        assert_merged(W, exact, f"{dtype}")
        merge.unmerge_(W, record)
        assert torch.equal(reference.bits(W), reference.bits(before)), f"{dtype}: not back to the bit"
        yield f"merge {dtype}"


def assert_merged(weight: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """Fail unless each element is the float64 one, rounded once after a sum in fp32."""
    near = (weight.double() - exact).abs() <= torch.finfo(weight.dtype).eps * exact.abs() + 1e-6
    assert near.all(), f"{name}: wrong"


def switches(device: torch.device | str, subset: bool = False) -> Iterator[str]:
    """One weight, and two in a launch: merged, switched to other factors, and unmerged to the original bits."""
    for dtype, shapes in product(DENSE[: 1 if subset else None], ([(65, 300)], [(65, 304), (33, 512)])):
        olds: list[launch.Old | None] = [None] * len(shapes)
        weights = [(torch.randn(shape) * 0.02).to(dtype).to(device) for shape in shapes]
        before, label = [W.clone() for W in weights], f"{len(shapes)} of {dtype}"
        for how in ("merge", "switch"):
            factors = [(torch.randn(len(W), 3) * 0.002, torch.randn(3, W.shape[1])) for W in weights]
            sweeps = [
                launch.Sweep(W, left.to(device), right.to(device), old=old)
                for W, (left, right), old in zip(weights, factors, olds, strict=True)
            ]
            assert launch.run_together(sweeps, MERGE) == DONE, f"{label}: {how} refused"
            for sweep, original in zip(sweeps, before, strict=True):
                exact = original.double() + sweep.left.double() @ sweep.right.double()
                assert_merged(sweep.W, exact, f"{how} of {label}")
            olds = [(sweep.left, sweep.right, sweep.corrections) for sweep in sweeps]
        sweeps = [replace(sweep, old=None) for sweep in sweeps]
        assert launch.run_together(sweeps, UNMERGE) == DONE, f"{label}: unmerge refused"
        for W, original in zip(weights, before, strict=True):
            assert torch.equal(reference.bits(W), reference.bits(original)), f"{label}: not back to the bit"
        yield f"merge, switch and unmerge {label}"


def others(device: torch.device | str, subset: bool = False) -> Iterator[str]:
    """Masks, dropped inputs, the row norms of DoRA, and weights of 4 bits."""
    # doctor imports this where there is no Triton, too
    from fused_lora.kernels.dequant_4bit import dequant_4bit
    from fused_lora.kernels.dropout import dropout_mask
    from fused_lora.kernels.dropped import dropped
    from fused_lora.kernels.lora_linear import lora_linear_forward
    from fused_lora.kernels.row_norms import row_norms

    seed, p = torch.tensor([12345], device=device), 0.25
    for dtype in DENSE[: 1 if subset else None]:
        x = torch.randn(17, 530).to(dtype).to(device)
        keep = reference.dropout_mask(seed, x.shape, p, x.device)
        assert torch.equal(dropout_mask(seed, *x.shape, p), keep), "another mask than the reference's"
        assert torch.equal(dropped(x, seed, p), x * keep * reference.keep_scale(p)), f"{dtype}: dropped wrongly"
        W, A, B = (torch.randn(shape).to(dtype).to(device) for shape in ((33, 130), (5, 130), (33, 5)))
        dense, exact = (
            (W.to(wide) + 1.5 * B.to(wide) @ A.to(wide)).norm(dim=1) for wide in (torch.float32, torch.float64)
        )
        assert_no_worse(row_norms(W, A, B, 1.5), dense, exact, ulps=2, name="row norms")
        for nested in (False, True):
            case = LayerCase.make(5, 40, 192, [8], [0.0], dtype, device=device)
            packed = small_case((40, 192), nested, dtype, case.x.device)
            case.weight = by_torch(packed)
            assert torch.equal(dequant_4bit(*packed), case.weight), f"{dtype}: dequantised wrongly"
            y, S = lora_linear_forward(case.x, packed, case.bias, *case.adapters)
            case.check(dict(y=y, S=S))
        yield f"masks, norms and 4 bits {dtype}"


PARTS = (layers, merges, switches, grouped, others)


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything on a device and print a line for each case; 1 if a part failed, after the others have run."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("device", nargs="?", default="cuda", type=torch.device)
    options.add_argument("--subset", action="store_true", help="a few cases in bf16")
    arguments = options.parse_args(argv)
    if arguments.device.type == "cpu":
        from .interpreter import install_shim

        install_shim()
    torch.manual_seed(0)
    warnings.filterwarnings("error", message=".*is dropped.*")  # what takes over is right, too
    failed = 0
    for part in PARTS:
        try:
            for line in part(arguments.device, arguments.subset):
                print(line, flush=True)
            if arguments.device.type == "cuda":
                torch.cuda.synchronize(arguments.device)
        except Exception:  # noqa: BLE001 - the others are of interest, too
            traceback.print_exc()
            failed += 1
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
