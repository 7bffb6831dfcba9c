"""Run every kernel once on small layers of odd sizes against float64: for compute-sanitizer, or on a new machine.

python -m fused_lora.testing.smoke                                  the current GPU
python -m fused_lora.testing.smoke --subset                         one masked layer in bf16, for slow tools
TRITON_INTERPRET=1 python -m fused_lora.testing.smoke cpu --subset  in the interpreter
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

from fused_lora import reference
from fused_lora.kernels.config import variants
from fused_lora.ops.merge import op as merge

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
    for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 1 if subset else None]:
        W = (torch.randn(65, 300) * 0.02).to(dtype).to(device)
        A, B = torch.randn(3, 300).to(device), (torch.randn(65, 3) * 0.002).to(device)
        before = W.clone()
        record = merge.merge_(W, [A], [B], [2.0])
        exact = before.double() + reference.delta_weight([A], [B], [2.0])
        near = (W.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6
        assert near.all(), f"{dtype}: merged wrongly"
        merge.unmerge_(W, record)
        assert torch.equal(reference.bits(W), reference.bits(before)), f"{dtype}: not back to the bit"
        yield f"merge {dtype}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything on a device and print a line for each case."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("device", nargs="?", default="cuda", type=torch.device)
    options.add_argument("--subset", action="store_true", help="one masked layer in bf16")
    arguments = options.parse_args(argv)
    if arguments.device.type == "cpu":
        from .interpreter import install_shim

        install_shim()
    torch.manual_seed(0)
    for part in (layers, merges, grouped):
        for line in part(arguments.device, arguments.subset):
            print(line, flush=True)
    if arguments.device.type == "cuda":
        torch.cuda.synchronize(arguments.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
