"""Every kernel once, on small ragged layers, against float64: for compute-sanitizer, or for a first look at a machine.

python -m fused_lora.testing.smoke            the current GPU
TRITON_INTERPRET=1 python -m fused_lora.testing.smoke cpu
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from fused_lora import reference
from fused_lora.kernels.config import variants
from fused_lora.ops import kernel, merge

from .layers import LayerCase

LAYERS = [(70, 40, 72, 8), (5, 33, 130, 3), (530, 48, 64, 24)]
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
]


def layers(device: torch.device | str) -> Iterator[str]:
    """Forward and backward of every variant that a shape can take; yields a line for each. AssertionError if wrong."""
    for M, N, K, r in LAYERS:
        for dtype, adapter_dtype in DTYPES:
            for p in (0.0, 0.25):
                case = LayerCase.make(M, N, K, [r], [p], dtype, adapter_dtype, device=device)
                args = M, r, dtype, p > 0, dtype != adapter_dtype
                for variant in {*variants("linear", *args), *variants("input_grad", *args)}:
                    found = {}
                    if variant in variants("linear", *args):
                        found["y"], found["S"] = kernel.lora_linear(variant)(
                            case.x, case.weight, case.bias, *case.adapters
                        )
                    if variant in variants("input_grad", *args):
                        found |= backward(case, variant)
                    case.check(found)
                    yield f"{variant} M={M} N={N} K={K} r={r} p={p} {dtype} {adapter_dtype}"


def backward(case: LayerCase, variant: str) -> dict[str, torch.Tensor]:
    """dx, dA and dB of one variant of the input gradient."""
    S = case.exact()["S"].float()
    each = [True] * len(case.lora_A)
    dx, dA, dB, _, _ = kernel.lora_linear_backward(variant)(
        case.g, case.x, case.weight, case.lora_A, case.lora_B, S, case.scaling, case.dropout, case.seeds,
        True, each, each, False, False,
    )  # fmt: skip
    return dict(dx=dx, dA=torch.cat(dA), dB=torch.cat(dB, 1))


def merges(device: torch.device | str) -> Iterator[str]:
    """Merge and unmerge back to the bit, in every dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
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


def main(arguments: list[str]) -> int:
    """Run everything on a device and print a line for each case."""
    device = torch.device(arguments[0] if arguments else "cuda")
    torch.manual_seed(0)
    for part in (layers, merges):
        for line in part(device):
            print(line, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
