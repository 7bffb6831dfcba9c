"""The loops that numba compiles: the bits of numpy's and torch's, and what happens where they cannot be had."""

import os
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fused_lora import reference
from fused_lora.ops import compiled, compiled_mask, merge_arrays
from fused_lora.ops import merge as merging
from fused_lora.reference import bits

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
loops = compiled.loops()


def weight(shape, dtype, nan=True):
    """Normal numbers and every awkward one that a merge keeps finite or leaves alone."""
    W = torch.randn(shape, dtype=torch.float64) * 0.02
    awkward = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 6e-8, -6e-8, 3e4, float("inf"), -float("inf"), float("nan")])
    awkward = awkward if nan else awkward[:-1]
    W.view(-1)[: len(awkward)] = awkward[: W.numel()]
    return W.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 0.02, 1.0], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (64, 64), (130, 1021), (33, 2048)], ids=str)
def test_a_record_is_the_same_with_and_without_them(shape, scale, dtype, monkeypatch):
    A, B = torch.randn(3, shape[1]), torch.randn(shape[0], 3) * scale
    original, merged, records = weight(shape, dtype, nan=dtype.itemsize > 2), [], []
    for use in (True, False):
        with monkeypatch.context() as patch:
            if not use:
                patch.setattr(compiled, "loops", lambda: None)
            W = original.clone()
            records.append(merging.merge_(W, [A], [B], [1.0]))
            merged.append(W)
    assert torch.equal(*map(bits, merged))
    for a, b in zip(records[0].blocks, records[1].blocks, strict=True):
        assert a.fingerprint == b.fingerprint and (a.start, a.stop) == (b.start, b.stop)
        for x, y in zip(a.tensors, b.tensors, strict=True):
            assert x.dtype == y.dtype and x.numpy().tobytes() == y.numpy().tobytes()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first, second", [(True, False), (False, True)], ids=str)
def test_one_undoes_what_the_other_did(first, second, dtype, monkeypatch):
    # torch rounds a 16-bit NaN in several ways, and without the loops that is not on record
    W = weight((70, 333), dtype, nan=dtype.itemsize > 2 or first)
    before, A, B = W.clone(), torch.randn(3, 333), torch.randn(70, 3) * 0.01
    with monkeypatch.context() as patch:
        if not first:
            patch.setattr(compiled, "loops", lambda: None)
        record = merging.merge_(W, [A], [B], [1.0])
    with monkeypatch.context() as patch:
        if not second:
            patch.setattr(compiled, "loops", lambda: None)
        merging.unmerge_(W, record)
    assert torch.equal(bits(W), bits(before))


def test_every_pattern_of_differences_is_found():
    """Corrections at any distance, around the ends of words, of strips and of chunks."""
    edges = {0, 1, 7, 8, 63, 64, loops.STRIP - 1, loops.STRIP, merge_arrays.CHUNK - 1, merge_arrays.CHUNK}
    for size in (1, 63, 65, loops.STRIP + 1, merge_arrays.CHUNK + 70):
        for wanted in (edges, set(range(size)), set(range(0, size, 3)), {size - 1}, set()):
            index = np.array(sorted(i for i in wanted if i < size), np.int64)
            w, delta = np.ones(size, np.float32), np.zeros(size, np.float32)
            w[index], delta[index] = 1e-9, 1.0  # lost in the sum
            room = size + loops.MARGIN
            counts = np.empty(-(-size // merge_arrays.CHUNK), np.int32)
            kept = np.empty(room, np.uint16), np.empty(room, np.int32), counts
            words = merge_arrays.words_of(w)
            n, _ = loops.merge(w, w.view(np.int32), words, delta.copy(), None, *kept, np.ones(3, np.int64), 5)
            assert n == len(index) and np.array_equal(kept[0][:n], index.astype(np.uint16))
            assert np.array_equal(kept[1][:n], w.view(np.int32)[index])
            assert np.array_equal(kept[2], merge_arrays.counts_of(index, size))


@pytest.mark.parametrize("width", [1, 8])
def test_fingerprints_are_those_of_numpy(width, monkeypatch):
    words = np.random.default_rng(1).integers(-(2**62), 2**62, 1021 * 1030 + 77)
    words = words if width == 8 else words.astype(np.int8)
    ours = merge_arrays.fold(words)
    monkeypatch.setattr(compiled, "loops", lambda: None)
    assert merge_arrays.fold(words) == ours


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    "shape, start", [((1, 1), 0), ((3, 16), 5), ((7, 33), 2**20), ((2, 1000), 1), ((67, 1001), 9), ((3, 0), 1)], ids=str
)
def test_masks_are_those_of_the_reference(shape, start, p, dtype):
    cut = reference.dropout_threshold(p) - 32768
    rows = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    rows.reshape(-1)[:1] = -np.inf  # dropped, it is a NaN, as with F.dropout
    seed = -(2**63) + 12345
    kept = reference.dropout_lanes(seed, start, *shape)[:, : shape[1]] >= cut
    with np.errstate(invalid="ignore"):
        exact = rows * kept
    out, other, alone = np.full_like(rows, np.nan), rows.copy(), rows.copy()
    tensors = [torch.from_numpy(array) for array in (rows, out, other)]
    loops.multiply_by_mask(seed, start, cut, *tensors)
    loops.multiply_by_mask(seed, start, cut, None, None, torch.from_numpy(alone))
    assert np.array_equal(alone, exact, equal_nan=True)
    assert np.array_equal(out, exact, equal_nan=True) and np.array_equal(other, exact, equal_nan=True)
    assert np.array_equal(np.signbit(out[~np.isnan(out)]), np.signbit(exact[~np.isnan(exact)]))


def masked(seed, guard=5):
    """ones * mask of enough elements for all threads, between rows that nobody may write."""
    out = torch.full((60 + 2 * guard, 1003), 7.0)
    inside = out[guard:-guard]
    loops.multiply_by_mask(seed, 3, -20000, torch.ones_like(inside), inside, None)
    assert (out[:guard] == 7).all() and (out[-guard:] == 7).all()
    return inside


@pytest.fixture
def expected():
    return torch.from_numpy(reference.dropout_lanes(11, 3, 60, 1003)[:, :1003] >= -20000).float()


def test_a_mask_is_the_same_in_any_number_of_threads(expected, monkeypatch):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(masked(11), expected) for _ in range(20))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(compiled_mask, "_run", None)  # where torch has no such threads
    assert torch.equal(masked(11), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="one thread draws a mask there")
def test_enough_of_a_mask_is_drawn_by_all_threads(monkeypatch):
    runs = []
    monkeypatch.setattr(compiled_mask, "_run", lambda *arguments: runs.append(arguments))
    masked(11)
    assert len(runs) == 1
    loops.multiply_by_mask(1, 0, 0, torch.ones(2, 100), torch.empty(2, 100), None)
    assert len(runs) == 1


def test_masks_are_drawn_beside_each_other(expected):
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(masked, [11] * 100))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_draws_masks_in_one_thread(expected):
    """With more than one it would wait for its parent's threads, in torch's own operations as well."""

    def child():
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(masked(11), expected) else 1)

    masked(11)
    process = torch.multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0


@pytest.mark.parametrize("name", ["merge", "restore", "multiply_by_mask"])
def test_loops_that_compute_something_else_are_not_used(name):
    def broken(*arguments):
        result = getattr(loops, name)(*arguments)
        for argument in arguments:
            if str(getattr(argument, "dtype", None)).endswith("float32"):
                argument += 1
        return result

    names = ("merge", "restore", "multiply_by_mask", "MARGIN")
    stand_in = types.SimpleNamespace(**{n: broken if n == name else getattr(loops, n) for n in names})
    assert compiled._first_difference(loops) is None
    with np.errstate(all="ignore"):
        assert compiled._first_difference(stand_in) is not None


def test_a_failure_is_said_once_and_numpy_takes_over(monkeypatch):
    monkeypatch.setattr(compiled, "_first_difference", lambda loops: "everything differs")
    compiled.loops.cache_clear()
    try:
        with pytest.warns(UserWarning, match="numba.*everything differs"):
            assert compiled.loops() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert compiled.loops() is None
    finally:
        monkeypatch.undo()
        compiled.loops.cache_clear()
    assert compiled.loops() is not None


def test_the_package_works_without_numba():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch, fused_lora\n"
        "layer = fused_lora.LoraLinear(torch.nn.Linear(40, 30), r=4, lora_dropout=0.5)\n"
        "torch.nn.init.normal_(layer.lora_B['default'].weight)\n"
        "before = layer.base_layer.weight.clone()\n"
        "layer(torch.randn(3, 40, requires_grad=True)).sum().backward()\n"
        "layer.merge(); layer.unmerge()\n"
        "assert torch.equal(before, layer.base_layer.weight)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
