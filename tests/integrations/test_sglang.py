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


A_BAD = {
    "inputs: expected floating": dict(inputs=torch.zeros(55, K, dtype=torch.int64)),
    "inputs: expected 2 dimensions": dict(inputs=torch.zeros(55)),
    f"inputs: expected {K} columns": dict(inputs=torch.zeros(55, K - 1)),
    "weights: expected 3 dimensions": dict(weights=torch.zeros(MAX_RANK, K)),
    "weight_indices: expected slots 0 to 3": dict(weight_indices=torch.tensor([0, 2, 0, 1, 3, -1])),
    "seg_len_tensor: expected 6 numbers of rows, 55 in all": dict(seg_len_tensor=torch.tensor([5, 1, 3, 4, 2, 39])),
    "lora_ranks: expected at most 4 ranks, each 0 to 8": dict(lora_ranks=torch.tensor([4, 0, 9, 3])),
    "scaling_tensor: expected 4": dict(scaling_tensor=torch.ones(3)),
}
B_BAD = {
    "inputs: expected floating": dict(inputs=torch.zeros(55, MAX_RANK, dtype=torch.int64)),
    "weight_indices: expected slots": dict(weight_indices=torch.tensor([0, 2, 0, 1, 3, 4])),
    "seg_len_tensor: expected 6": dict(seg_len_tensor=torch.tensor([55])),
    "lora_ranks: expected at most 4 ranks, each 0 to 7": dict(inputs=torch.zeros(55, MAX_RANK - 1)),
    "slice_offsets: expected rising numbers from 0 to 48": dict(slice_offsets=torch.tensor([0, 40])),
    "base_output: expected shape": dict(base_output=torch.ones(55, 49)),
}


@pytest.mark.parametrize(
    "text, bad", [*A_BAD.items(), *B_BAD.items()], ids=lambda value: value if type(value) is str else ""
)
def test_bad_arguments_are_named_and_nothing_is_written(text, bad):
    x, A, B, y, (slots, lengths, ranks) = drawn(torch.float32, (0, 48), seed=5)
    shared = dict(weight_indices=slots, seg_len_tensor=lengths, lora_ranks=ranks)
    before = y.clone()
    with pytest.raises((TypeError, ValueError), match=text):
        if text in A_BAD and bad is A_BAD[text]:
            sglang.sgemm_lora_a_fwd(
                **{**dict(inputs=x, weights=A, scaling_tensor=torch.tensor(SCALES)), **shared, **bad}
            )
        else:
            given = dict(inputs=torch.ones(55, MAX_RANK), weights=B, slice_offsets=torch.tensor([0, 48]), base_output=y)
            sglang.sgemm_lora_b_fwd(**{**given, **shared, **bad})
    assert torch.equal(y, before)


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
