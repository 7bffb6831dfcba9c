"""A switch: the bits and the record of an unmerge and a merge, in one pass, or the weight as it was."""

import copy

import pytest
import torch

from fused_lora.functional import merge_, switch_, unmerge_
from fused_lora.ops.merge import blocks
from fused_lora.reference import bits
from helpers.merges import unit_by_unit
from helpers.seeds import shifted
from helpers.thorough import pairwise

pytestmark = pytest.mark.usefixtures("loops")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (17, 129), (300, 256), (1000, 33)]
LAYOUTS = ["rows", "transposed", "strided", "fan_in_fan_out"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(shifted(3))


def same_bits(a, b):
    """Also of NaN, and of integers."""
    return torch.equal(*(bits(t.contiguous()) if t.is_floating_point() else t for t in (a, b)))


def weight(N, K, dtype, layout="rows"):
    """With infinities and NaN among the numbers, and bytes between them that nobody may touch."""
    W = (torch.randn(N, K) * 0.02).to(dtype)
    W.view(-1)[5::97], W.view(-1)[6::97], W.view(-1)[7::97] = float("inf"), float("nan"), -0.0
    if layout == "strided":
        return torch.zeros(N, 2 * K, dtype=dtype)[:, ::2].copy_(W)
    return W if layout == "rows" else W.t().contiguous().t() if layout == "transposed" else W.t().contiguous()


def adapters(N, K, ranks=(3,), size=0.01, dtype=torch.float32):
    """As a merge takes them: lora_A, lora_B, scaling."""
    B = [torch.randn(N, r, dtype=dtype) * 0.02 * size / r**0.5 for r in ranks]
    return [torch.randn(r, K, dtype=dtype) for r in ranks], B, [1.5] * len(ranks)


def in_two_steps(W, record, *new, **options):
    unmerge_(W, record)
    return merge_(W, *new, **options)


def tensors(record):
    """What is held, in an order that no thread decides."""
    checksums = [record.units.notes[2]] if record.units.copy is None else []  # unused beside a copy
    return [*record.factors.tensors, *checksums, unit_by_unit(record.units)]


@pairwise(layout=LAYOUTS, shape=SHAPES, dtype=DTYPES)
def test_it_is_an_unmerge_and_a_merge(shape, dtype, layout):
    """Also between several adapters and one, and rows that are scaled beside them."""
    W, options = weight(*shape, dtype, layout), dict(fan_in_fan_out=layout == "fan_in_fan_out")
    rows = torch.rand(shape[0]) + 0.5
    plain, several, scaled = adapters(*shape), adapters(*shape, (1, 4)), (*adapters(*shape), rows)
    steps, original = [several, scaled, plain, plain], W.clone()
    expected = W.clone()
    record, theirs = merge_(W, *plain, **options), merge_(expected, *plain, **options)
    for new in steps:
        if options["fan_in_fan_out"] and len(new) == 4:
            continue  # a Conv1D has no DoRA
        record = switch_(W, record, *new, **options)
        theirs = in_two_steps(expected, theirs, *new, **options)
        assert same_bits(W, expected)
        assert (record.dtype, record.transposed) == (theirs.dtype, theirs.transposed)
        assert all(map(same_bits, tensors(record), tensors(theirs)))
    unmerge_(W, record)
    assert same_bits(W, original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_at_random(dtype):
    """From a merge that rounded at random to another, and to one that does not."""
    W = weight(75, 333, dtype)
    old, new, original = adapters(75, 333), adapters(75, 333), W.clone()
    expected = W.clone()
    record, theirs = merge_(W, *old, seed=5), merge_(expected, *old, seed=5)
    for seed in (6, None, -2):
        record, theirs = switch_(W, record, *new, seed=seed), in_two_steps(expected, theirs, *new, seed=seed)
        assert same_bits(W, expected) and all(map(same_bits, tensors(record), tensors(theirs)))
    unmerge_(W, record)
    assert same_bits(W, original)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(100.0, 0.01), (0.01, 100.0), (100.0, 100.0)], ids=["old", "new", "both"])
def test_with_a_copy_of_the_weight(dtype, sizes):
    """Where the corrections of a merge would be larger."""
    W, expected = (weight(300, 256, dtype) for _ in range(2))
    expected.copy_(W)
    old, new = (adapters(300, 256, size=size) for size in sizes)
    original, record, theirs = W.clone(), merge_(W, *old), merge_(expected, *old)
    record, theirs = switch_(W, record, *new), in_two_steps(expected, theirs, *new)
    assert same_bits(W, expected) and all(map(same_bits, tensors(record), tensors(theirs)))
    unmerge_(W, record)
    assert same_bits(W, original)


@pairwise(
    lambda why, place, seed, dtype: seed is None or dtype.itemsize == 2,
    why=["changed", "overflow", "nan", "overflow with a copy"],
    place=[(0, 0), (150, 100), (299, 255)],
    seed=[None, 4],
    dtype=DTYPES,
)
def test_a_switch_that_is_refused_changes_nothing(why, place, dtype, seed, monkeypatch):
    monkeypatch.setattr(blocks, "_BAND", 4096)
    W = weight(300, 256, dtype).nan_to_num(0.0, 0.0, 0.0)
    W[place] = torch.finfo(dtype).max / 2
    old, original = adapters(300, 256, size=100.0 if "copy" in why else 0.01), W.clone()
    new = adapters(300, 256, dtype=torch.promote_types(dtype, torch.float32))
    record = merge_(W, *old, seed=seed)
    if why == "nan":
        new[1][0][place[0], 1] = float("nan")
    elif why != "changed":
        new[0][0][:, place[1]], new[1][0][place[0]] = 1.0, torch.finfo(dtype).max
    merged, held = W.clone(), copy.deepcopy(record)
    if why == "changed":
        bits(W)[place] ^= 1 << (10 if dtype.itemsize == 2 else 28)
    before, kind = W.clone(), RuntimeError if why == "changed" else ValueError
    with pytest.raises(kind, match="not what the merge left" if why == "changed" else "merged weights"):
        switch_(W, record, *new, seed=seed)
    assert same_bits(W, before) and all(map(same_bits, tensors(record), tensors(held)))
    W.copy_(merged)
    unmerge_(W, record)
    assert same_bits(W, original)


def test_both_at_once_is_a_changed_weight():
    """What is read from a weight that nobody merged is not called a broken adapter."""
    W = weight(300, 256, torch.bfloat16).nan_to_num(0.0, 0.0, 0.0)
    record = merge_(W, *adapters(300, 256))
    W[0, 0] = 3e38
    with pytest.raises(RuntimeError, match="not what the merge left"):
        switch_(W, record, [torch.full((1, 256), 1e38)], [torch.ones(300, 1)], [3.0])


def test_records_that_do_not_fit():
    W = weight(30, 40, torch.float32)
    record = merge_(W, *adapters(30, 40))
    before = W.clone()
    with pytest.raises(RuntimeError, match="expected shape, dtype and device"):
        switch_(W[:20], record, *adapters(20, 40))
    with pytest.raises(ValueError, match="adapter 0"):
        switch_(W, record, *adapters(30, 41))
    for none in (None, {}):
        with pytest.raises(TypeError, match="record: expected the MergeRecord"):
            switch_(W, none, *adapters(30, 40))
        with pytest.raises(TypeError, match="record: expected the MergeRecord"):
            unmerge_(W, none)
    record.units.height += 1
    with pytest.raises(RuntimeError, match="not what the merge left"):
        switch_(W, record, *adapters(30, 40))
    assert same_bits(W, before)


def test_units_of_another_size(monkeypatch):
    """Of a record that another release may have made."""
    W, expected = weight(300, 256, torch.float32), None
    original = W.clone()
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "AREA", 512)
        record = merge_(W, *adapters(300, 256))
    new, expected = adapters(300, 256), original.clone()
    theirs = merge_(expected, *new)
    record = switch_(W, record, *new)
    assert same_bits(W, expected) and all(map(same_bits, tensors(record), tensors(theirs)))


@pytest.mark.parametrize("threads", [1, 2])
def test_many_switches(threads, loops):
    """200 in a row, of adapters from a thousandth to ten times the weight: every bit is back."""
    W, before = weight(128, 512, torch.bfloat16), torch.get_num_threads()
    original = W.clone()
    torch.set_num_threads(threads)
    try:
        record = merge_(W, *adapters(128, 512))
        for i in range(200 if loops == "C" else 10):
            record = switch_(W, record, *adapters(128, 512, (1 + i % 9,), 10.0 ** (i % 5 - 3)))
        unmerge_(W, record)
    finally:
        torch.set_num_threads(before)
    assert same_bits(W, original)
