"""SGLang's two LoRA products by the grouped operators: against float64, and SGLang's own where it is installed."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

from fused_lora.integrations import sglang
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

# of sglang.srt.lora.torch_ops.lora_ops in SGLang 0.5.23; importing its package takes much more than torch
SIGNATURES = {
    "sgemm_lora_a_fwd": "inputs weights weight_indices seg_len_tensor lora_ranks scaling_tensor num_slices",
    "sgemm_lora_b_fwd": "inputs weights weight_indices seg_len_tensor lora_ranks slice_offsets base_output",
}
SEGMENTS = [(0, 5), (2, 1), (0, 3), (1, 4), (3, 2), (2, 40)]  # slot 1 is the base model
RANKS, MAX_RANK, SCALES, K = [4, 0, 8, 3], 8, [2.0, 1.0, 0.5, 1.0], 64


@pytest.fixture(scope="module")
def theirs():
    """SGLang's functions: its file imports torch alone."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SGLang is not installed")
    path = Path(spec.submodule_search_locations[0]) / "srt" / "lora" / "torch_ops" / "lora_ops.py"
    own = importlib.util.spec_from_file_location("sglang_lora_ops", path)
    module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    return module


def drawn(dtype, offsets, seed):
    """(x, A, B, y, arguments that both products take)."""
    draw = torch.Generator().manual_seed(shifted(seed))
    rows, n = sum(length for _, length in SEGMENTS), len(offsets) - 1
    x, y = torch.randn(rows, K, generator=draw), torch.randn(rows, offsets[-1], generator=draw)
    A = torch.randn(len(RANKS), n * MAX_RANK, K, generator=draw)
    B = torch.randn(len(RANKS), offsets[-1], MAX_RANK, generator=draw)
    slots, lengths = (torch.tensor(part, dtype=torch.int32) for part in zip(*SEGMENTS, strict=True))
    return (*(t.to(dtype) for t in (x, A, B, y)), (slots, lengths, torch.tensor(RANKS, dtype=torch.int32)))


def both(ops, x, A, B, y, shared, offsets):
    S = ops.sgemm_lora_a_fwd(x, A, *shared, torch.tensor(SCALES), len(offsets) - 1)
    return S, ops.sgemm_lora_b_fwd(S.to(x.dtype), B, *shared, torch.tensor(offsets), y.clone())


def exact(x, A, B, y, offsets):
    y, row = y.double(), 0
    for slot, length in SEGMENTS:
        r, rows = RANKS[slot], slice(row, row + length)
        for g, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            S = x[rows].double() @ A[slot, g * r : (g + 1) * r].double().T * SCALES[slot]
            y[rows, start:end] += S @ B[slot, start:end, :r].double().T
        row += length
    return y


@pytest.mark.numeric
@pytest.mark.parametrize("offsets", [(0, 48), (0, 64, 96, 128), (0, 33, 66)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_float64(offsets, dtype):
    x, A, B, y, shared = drawn(dtype, offsets, seed=1)
    S = sglang.sgemm_lora_a_fwd(x, A, *shared, torch.tensor(SCALES), len(offsets) - 1)
    found = sglang.sgemm_lora_b_fwd(S, B, *shared, torch.tensor(offsets), y.clone())
    assert S.dtype == torch.float32 and found.dtype == dtype
    assert_close(found, exact(x, A, B, y, offsets).to(dtype), K + MAX_RANK)
    assert torch.equal(found[9:13], y[9:13])  # the base model's rows


def test_without_a_base_output_it_is_the_term():
    x, A, B, y, shared = drawn(torch.float32, (0, 48), seed=2)
    found = both(sglang, x, A, B, torch.zeros_like(y), shared, (0, 48))[1]
    S = sglang.sgemm_lora_a_fwd(x, A, *shared, torch.tensor(SCALES))
    assert torch.equal(sglang.sgemm_lora_b_fwd(S, B, *shared, torch.tensor((0, 48))), found)


def test_a_batch_of_the_base_model_alone():
    x, A, B, y, _ = drawn(torch.float32, (0, 48), seed=3)
    shared = torch.tensor([1]), torch.tensor([len(x)]), torch.tensor(RANKS)
    S, found = both(sglang, x, A, B, y, shared, (0, 48))
    assert not S.any() and torch.equal(found, y)


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_are_sglangs(name):
    assert [*inspect.signature(getattr(sglang, name)).parameters] == SIGNATURES[name].split()


@pytest.mark.numeric
@pytest.mark.parametrize("offsets", [(0, 48), (0, 64, 96, 128)])
def test_products_are_sglangs(theirs, offsets):
    for name, parameters in SIGNATURES.items():
        assert [*inspect.signature(getattr(theirs, name)).parameters] == parameters.split()
    drew = drawn(torch.float32, offsets, seed=4)
    for ours, wanted in zip(both(sglang, *drew, offsets), both(theirs, *drew, offsets), strict=True):
        assert_close(ours, wanted, K + MAX_RANK)
