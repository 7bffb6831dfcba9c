"""The kernel of 4-bit weights: the bits of its definition and of bitsandbytes, every shape, its bytes."""

import pytest
import torch

from fused_lora.kernels import dequant_4bit as kernel
from fused_lora.kernels.dequant_4bit import dequant_4bit, traffic
from fused_lora.ops import guard
from fused_lora.ops.dequant import FourBit, by_torch, dequantise_4bit, small_case
from helpers.quantised import dequant_case, linear4bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N, K, blocksize",
    [(1, 1, 32), (3, 65, 64), (64, 64, 64), (64, 128, 4096), (33, 255, 128), (2, 4097, 2048), (0, 64, 64)],
)
def test_the_bits_of_the_definition(N, K, blocksize, dtype, nested, device, kernel_memory):
    case = dequant_case(N, K, blocksize, nested, device)
    assert torch.equal(dequant_4bit(*case, dtype), by_torch(FourBit(*case, dtype)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_bitsandbytes(dtype, quant_type, nested, device, kernels_on, kernel_memory):
    functional = pytest.importorskip("bitsandbytes").functional
    from fused_lora.bases.bitsandbytes_4bit import Weight

    for storage, blocksize in ((torch.uint8, 64), (torch.bfloat16, 256), (torch.float32, 1024)):
        layer = linear4bit(
            13, 1024, dtype=dtype, quant_type=quant_type, nested=nested, storage=storage, blocksize=blocksize
        ).to(device)
        theirs = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(Weight(layer, dtype).to(dtype), theirs)
    assert guard.verdicts()[("dequant_4bit", dtype, nested, theirs.device)]


def test_a_kernel_with_other_bits_is_dropped(device, kernels_on, monkeypatch):
    case = dequant_case(5, 64, 64, True, device)
    monkeypatch.setattr(kernel, "dequant_4bit", lambda *args: by_torch(FourBit(*args)) * 1.0001)
    with pytest.warns(UserWarning, match="is dropped, the eager path takes over: a small weight has other bits"):
        found = dequantise_4bit(FourBit(*case, torch.float32), lambda: torch.full((5, 64), 7.0))
    assert torch.equal(found, torch.full((5, 64), 7.0))


def test_bytes_of_a_launch(device):
    """What the formula counts is what the tensors hold."""
    for N, K, nested in ((33, 255, False), (64, 128, True)):
        packed, code, absmax, inner, blocksize, shape = dequant_case(N, K, 64, nested, device)
        held = [packed, code, absmax, torch.empty(shape, dtype=torch.bfloat16)]
        held += [t for t in inner or () if isinstance(t, torch.Tensor)]
        expected = sum(t.nbytes for t in held)
        assert traffic(N, K, blocksize, torch.bfloat16, inner[2] if inner else 0)["bytes"] == expected


def test_torchs_default_dtype_drops_no_kernel(device, kernels_on):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert small_case((21, 407), True, torch.float32, device).nested[3].dtype is torch.float32
    finally:
        torch.set_default_dtype(before)
