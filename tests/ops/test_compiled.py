"""The loops that numba compiles: the bits of numpy's and torch's, and what happens where they cannot be had."""

import ctypes
import os
import pickle
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fused_lora import reference
from fused_lora.ops import compiled, compiled_mask, compiled_team
from fused_lora.ops.merge import arrays as merge_arrays
from fused_lora.ops.merge import op as merging
from fused_lora.ops.merge import units as merge_units
from fused_lora.reference import bits
from helpers.seeds import shifted

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
loops = compiled.loops()


def weight(shape, dtype, nan=True):
    """Normal numbers and every awkward one that a merge keeps finite or leaves alone."""
    W = torch.randn(shape, dtype=torch.float64) * 0.02
    awkward = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 6e-8, -6e-8, 3e4, float("inf"), -float("inf"), float("nan")])
    awkward = awkward if nan else awkward[:-1]
    W.view(-1)[: len(awkward)] = awkward[: W.numel()]
    return W.to(dtype)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(shifted(5))


def case(shape, r, scale, dtype):
    """W, left, right and what merging should give: the merged weight, and where the candidate is not W to the bit."""
    wide = torch.promote_types(dtype, torch.float32)
    W = weight(shape, dtype)
    left, right = torch.randn(shape[0], r, dtype=wide) * scale, torch.randn(r, shape[1], dtype=wide)
    delta = chain(left.numpy(), right.numpy())
    merged = (W.to(wide) + delta).to(dtype)
    differs = bits((merged.to(wide) - delta).to(dtype)) != bits(W)
    return W, left, right, merged, differs | (merged.isnan() if dtype.itemsize == 2 else False)


def chain(left, right):
    """left @ right in the order of k, by fused multiply-adds in fp32."""
    total = np.zeros((left.shape[0], right.shape[1]), left.dtype)
    exact = np.longdouble if left.dtype == np.float32 else np.float64  # a product is exact, a sum all but
    for k in range(right.shape[0]):
        product = left[:, k : k + 1].astype(exact) * right[k].astype(exact)
        total = (total.astype(exact) + product).astype(left.dtype)
    return torch.from_numpy(total)


SHAPES = [(1, 1), (7, 9), (64, 64), (130, 1021), (33, 2048), (2, 5000), (40, 4097), (19, 9001), (70000, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 0.02, 1.0], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_merge_rounds_as_torch_and_records_what_differs(shape, scale, dtype):
    W, left, right, merged, differs = case(shape, 3, scale, dtype)
    guarded = torch.full((shape[0] + 2, shape[1]), 7.0, dtype=dtype)
    inside = guarded[1:-1].copy_(W)
    units = merge_units.merge(inside, left, right)
    assert (guarded[0] == 7).all() and (guarded[-1] == 7).all()
    if units is None:
        assert torch.equal(bits(inside), bits(W)) and differs.float().mean() > 0.1
        return
    numbers = ~merged.isnan()  # a NaN of 16 bits has several spellings
    assert torch.equal(bits(inside)[numbers], bits(merged)[numbers]) and torch.equal(inside.isnan(), merged.isnan())
    found = torch.zeros(shape, dtype=torch.bool)
    for unit, count in enumerate(units.counts.tolist()):
        rows, columns = place(units, unit, shape)
        start = int(units.starts[unit])
        offsets, values = (kept[unit // units.wave][start : start + count] for kept in (units.offsets, units.values))
        here = torch.zeros(found[rows, columns].shape, dtype=torch.bool).reshape(-1)
        here[torch.from_numpy(offsets.numpy().view(np.uint16).astype(np.int64))] = True
        found[rows, columns] = here.reshape(found[rows, columns].shape)
        assert torch.equal(bits(W)[rows, columns].reshape(-1)[here], values)
    assert torch.equal(found, differs)
    assert merge_units.restore(inside, left, right, units)
    assert torch.equal(bits(inside), bits(W)) and (guarded[0] == 7).all() and (guarded[-1] == 7).all()


def place(units, unit, shape):
    panels = -(-shape[1] // units.width)
    row, column = unit // panels * units.height, unit % panels * units.width
    return slice(row, row + units.height), slice(column, column + units.width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(70, 333), (35, 4097), (300, 500)], ids=str)
def test_what_they_merged_comes_back_without_them(shape, dtype, monkeypatch):
    W, left, right, merged, _ = case(shape, 3, 0.01, dtype)
    before, W = W.clone(), W.repeat(1, 2)[:, : shape[1]].contiguous()
    record = pickle.loads(pickle.dumps(merging.merge_(W, [right], [left], [1.0])))
    monkeypatch.setattr(compiled, "loops", lambda: None)
    changed = W.clone()
    changed[shape[0] // 2] += 1
    kept = changed.clone()
    with pytest.raises(RuntimeError, match="not what the merge left"):
        merging.unmerge_(changed, record)
    assert torch.equal(bits(changed), bits(kept))
    merging.unmerge_(W, record)
    assert torch.equal(bits(W), bits(before))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_undo_what_was_merged_without_them(dtype, monkeypatch):
    W = weight((70, 333), dtype, nan=dtype.itemsize > 2)  # torch rounds a 16-bit NaN in several ways
    before, A, B = W.clone(), torch.randn(3, 333), torch.randn(70, 3) * 0.01
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "loops", lambda: None)
        record = merging.merge_(W, [A], [B], [1.0])
    assert record.units is None
    merging.unmerge_(W, record)
    assert torch.equal(bits(W), bits(before))


DAMAGES = {
    "counts": lambda units: units.counts.fill_(1 << 30),
    "negative counts": lambda units: units.counts.fill_(-1),
    "starts": lambda units: units.starts.fill_(1 << 50),
    "offsets": lambda units: units.offsets[0].fill_(-1),
    "fewer values": lambda units: units.values.__setitem__(0, units.values[0][:-1]),
    "starts that overflow": lambda units: (units.starts.fill_(2**63 - 1), units.counts.fill_(1)),
    "other values": lambda units: units.values.__setitem__(0, units.values[0].to(torch.int16)),
    "strided values": lambda units: units.values.__setitem__(0, units.values[0].repeat_interleave(2)[::2]),
    "no height": lambda units: setattr(units, "height", 0),
    "negative sizes": lambda units: (setattr(units, "height", -40), setattr(units, "width", -300)),
    "narrow": lambda units: setattr(units, "width", 150),
    "units too large": lambda units: setattr(units, "height", 1000),
    "no waves": lambda units: units.offsets.clear(),
    "fingerprints": lambda units: setattr(units, "fingerprints", units.fingerprints[:, :2]),
}


@pytest.mark.parametrize("with_loops", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_refused(damage, with_loops, monkeypatch):
    W, left, right, *_ = case((40, 300), 3, 0.01, torch.float32)
    units = merge_units.merge(W, left, right)
    merged = W.clone()
    DAMAGES[damage](units)
    if not with_loops:
        monkeypatch.setattr(compiled, "loops", lambda: None)
    assert not merge_units.restore(W, left, right, units)
    assert torch.equal(bits(W), bits(merged))


@pytest.mark.parametrize("dense", [False, True])
def test_many_units_that_fail_in_many_threads(dense):
    """Everyone who finds a failure ends the work of all."""
    W, left, right, *_ = case((600, 4096), 2, 0.001, torch.float32)
    before, threads = W.clone(), torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        for _ in range(5):
            if dense:
                assert merge_units.merge(W, left * 1e6, right) is None
                assert torch.equal(bits(W), bits(before))
                continue
            units = merge_units.merge(W, left, right)
            merged = W.clone()
            W += 1
            changed = W.clone()
            assert not merge_units.restore(W, left, right, units)
            assert torch.equal(bits(W), bits(changed))
            W.copy_(merged)
            assert merge_units.restore(W, left, right, units) and torch.equal(bits(W), bits(before))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("with_loops", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_laid_out_anew_between_merge_and_unmerge(dtype, with_loops, monkeypatch):
    A, B = torch.randn(3, 333), torch.randn(70, 3) * 0.01
    before = weight((70, 333), dtype, nan=False)
    for first, second in [(lambda W: W, turned), (turned, lambda W: W.contiguous())]:
        W = first(before.clone())
        record = merging.merge_(W, [A], [B], [1.0])
        W = second(W)
        with monkeypatch.context() as patch:
            if not with_loops:
                patch.setattr(compiled, "loops", lambda: None)
            merging.unmerge_(W, record)
        assert torch.equal(bits(W.contiguous()), bits(before))


def turned(W):
    return W.t().contiguous().t()


@pytest.mark.parametrize("setting", ["torch.set_default_device('meta')", "torch.set_default_dtype(torch.float64)"])
def test_defaults_of_torch_change_nothing(setting):
    code = (
        f"import torch, fused_lora; {setting}\n"
        "from fused_lora.ops import compiled\nfrom fused_lora.ops.merge import op as merge\n"
        "W, A, B = (torch.ones(s, device='cpu', dtype=torch.float32) / 3 for s in [(80, 900), (2, 900), (80, 2)])\n"
        "before = W.clone()\n"
        "record = merge.merge_(W, [A], [B], [0.1])\n"
        "assert record.units is not None and record.corrections >= 0 and not torch.equal(W, before)\n"
        "merge.unmerge_(W, record)\n"
        "assert torch.equal(W, before)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_no_rank_at_all():
    W = torch.randn(30, 40)
    before = W.clone()
    record = merging.merge_(W, [torch.empty(0, 40)], [torch.empty(30, 0)], [1.0])
    assert torch.equal(W, before)
    merging.unmerge_(W, record)
    assert torch.equal(W, before)


def test_corrections_are_counted():
    W, left, right, _, differs = case((70, 333), 3, 0.01, torch.float32)
    assert merging.merge_(W, [right], [left], [1.0]).corrections == differs.sum()


def test_threads_that_round_otherwise_than_the_caller_do_nothing():
    """torch.set_flush_denormal is a setting of one thread, which those that it starts inherit."""
    code = (
        "import torch\n"
        "from fused_lora.ops import compiled\nfrom fused_lora.ops.merge import units as merge_units\n"
        "from fused_lora.reference import bits\n"
        "torch.manual_seed(0)\n"
        "torch.set_num_threads(3)\n"
        "W, left, right = torch.rand(600, 700) * 1e-38, torch.rand(600, 1) * 1e-39, torch.ones(1, 700)\n"
        "if torch.set_flush_denormal(True):\n"
        "    torch.rand(1000, 1000) + 1\n"
        "    for mine in (False, True):\n"
        "        torch.set_flush_denormal(mine)\n"
        "        masked = set()\n"
        "        for _ in range(20):\n"
        "            merged = W.clone()\n"
        "            units = merge_units.merge(merged, left, right)\n"
        "            assert units is None or merge_units.restore(merged, left, right, units)\n"
        "            assert torch.equal(bits(merged), bits(W))\n"
        "            out = torch.empty_like(W)\n"
        "            compiled.loops().multiply_by_mask(1, 0, 0, W, out, None)\n"
        "            masked.add(out.numpy().tobytes())\n"
        "        assert len(masked) == 1\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_a_mask_without_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(compiled_mask, "run", lambda *arguments, **options: None)
    with pytest.raises(MemoryError, match="dropout"):
        masked(11)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_is_the_first_to_use_them():
    code = (
        "import os, signal, torch\n"
        "from fused_lora.ops.merge import op as merge\n"
        "torch.set_num_threads(2)\n"
        "W, A, B = torch.randn(1500, 1500), torch.randn(8, 1500), torch.randn(1500, 8) * 0.01\n"
        "W.mul_(1.0)\n"
        "before = W.numpy().copy()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    signal.alarm(60)\n"
        "    record = merge.merge_(W, [A], [B], [1.0])\n"
        "    changed = (W.numpy() != before).any()\n"
        "    merge.unmerge_(W, record)\n"
        "    os._exit(0 if record.units is not None and changed and (W.numpy() == before).all() else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("restoring", [False, True])
def test_no_memory_for_the_buffers_is_an_error(restoring, monkeypatch):
    """numba prints an exception of such a function and returns, so the work is not done."""
    W, left, right, *_ = case((600, 700), 3, 0.01, torch.float32)
    original = W.clone()
    units = merge_units.merge(W, left, right)
    merged = W.clone()
    run, calls = loops.run, []

    def once_nothing(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            run(*arguments)

    if not restoring:
        W.copy_(original)
    monkeypatch.setattr(loops, "run", once_nothing)
    with pytest.raises(MemoryError, match="weight"):
        merge_units.restore(W, left, right, units) if restoring else merge_units.merge(W, left, right)
    assert torch.equal(bits(W), bits(merged if restoring else original))


@pytest.mark.parametrize("restoring", [False, True])
def test_a_weight_that_changes_meanwhile_is_said_to_be_torn(restoring, monkeypatch):
    W, left, right, *_ = case((600, 700), 3, 0.01, torch.float32)
    units = merge_units.merge(W, left, right) if restoring else None
    run, calls = loops.run, []

    def late(function, work, alone):
        calls.append(work.restoring)
        run(function, work, alone)
        work.failed = 1  # what was done has to be taken back, and cannot be

    monkeypatch.setattr(loops, "run", late)
    with pytest.raises(RuntimeError, match="weight.*partly merged"):
        merge_units.restore(W, left, right, units) if restoring else merge_units.merge(W, left, right)
    assert calls == [1, 0] if restoring else [0, 1]


def exit_code_of(child):
    """Of a forked process that runs ``child``; None where that does not end."""
    process = torch.multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    code = process.exitcode
    process.kill()
    return code


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("size", [300, 1500])
def test_a_forked_child_merges(size):
    """torch's own operations would wait for the parent's threads."""
    W, A, B = torch.randn(size, size), torch.randn(20, size), torch.randn(size, 20) * 0.01
    before, threads = W.numpy().copy(), torch.get_num_threads()

    def child():
        record = merging.merge_(W, [A], [B], [1.0])
        changed = not np.array_equal(W.numpy(), before)
        merging.unmerge_(W, record)
        os._exit(0 if changed and np.array_equal(W.numpy(), before) else 1)

    torch.set_num_threads(2)
    try:
        merging.unmerge_(W, merging.merge_(W, [A], [B], [1.0]))
        assert exit_code_of(child) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("r", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_rank(r, dtype):
    W, left, right, merged, _ = case((45, 131), r, 0.01, dtype)
    units = merge_units.merge(W, left, right)
    assert units is not None and torch.equal(W[~merged.isnan()], merged[~merged.isnan()])


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("shape", [(300, 1500), (21, 30000)], ids=str)
def test_a_merge_is_the_same_in_any_number_of_threads(shape, openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(compiled_team, "_run_parallel", None)
    W, left, right, merged, differs = case(shape, 5, 0.001, torch.float32)
    before, numbers, threads = W.clone(), ~merged.isnan(), torch.get_num_threads()
    try:
        for n in (1, 2, 7, 3):
            torch.set_num_threads(n)
            units = merge_units.merge(W, left, right)
            assert torch.equal(W[numbers], merged[numbers]) and units.counts.sum() == differs.sum()
            torch.set_num_threads(8 - n)
            assert merge_units.restore(W, left, right, units) and torch.equal(bits(W), bits(before))
    finally:
        torch.set_num_threads(threads)


def test_every_pattern_of_differences_is_found():
    """Corrections at any distance, around the ends of words, of strips and of units; few enough to be no copy."""
    edges = {0, 1, 7, 8, 63, 64, loops.STRIP - 1, loops.STRIP, (1 << 16) - 1, 1 << 16}
    for size in (63, 65, loops.STRIP + 1, (1 << 16) + 70):
        for wanted in (edges, set(range(0, size, 2)), set(range(0, size, 3)), {size - 1}, set(range(50)), set()):
            index = torch.tensor(sorted(i for i in wanted if i < size), dtype=torch.int64)
            W, left, right = torch.ones(size, 1), torch.zeros(size, 1), torch.ones(1, 1)
            W[index], left[index] = 1e-9, 1.0  # lost in the sum
            before, units = W.clone(), merge_units.merge(W, left, right)
            if units is None:
                assert len(index) >= 50
                assert torch.equal(W, before)
                continue
            assert int(units.counts.sum()) == len(index)
            assert merge_units.restore(W, left, right, units) and torch.equal(W, before)


@pytest.mark.parametrize("width", [1, 8])
def test_fingerprints_are_those_of_numpy(width, monkeypatch):
    words = np.random.default_rng(shifted(1)).integers(-(2**62), 2**62, 1021 * 1030 + 77)
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
    rows = np.random.default_rng(shifted(0)).standard_normal(shape).astype(dtype)
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
    out = np.full((60 + 2 * guard, 1003), 7.0, np.float32)
    inside = torch.from_numpy(out[guard:-guard])
    loops.multiply_by_mask(seed, 3, -20000, torch.from_numpy(np.ones((60, 1003), np.float32)), inside, None)
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
    monkeypatch.setattr(compiled_team, "_run_parallel", None)  # where torch has no such threads
    assert torch.equal(masked(11), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="helpers of ours draw a mask there")
def test_enough_of_a_mask_is_drawn_by_all_threads(monkeypatch):
    runs = []

    def parallel(function, work, threads, flags):
        runs.append(threads)
        ctypes.c_int64.from_address(work).value = 1 << 20  # rows taken

    monkeypatch.setattr(compiled_team, "_run_parallel", parallel)
    masked(11)
    assert len(runs) == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        with ThreadPoolExecutor(1) as pool:  # a thread in which torch has done nothing yet
            pool.submit(masked, 11).result()
    finally:
        torch.set_num_threads(threads)
    assert runs.pop() == 5
    loops.multiply_by_mask(1, 0, 0, torch.ones(2, 100), torch.empty(2, 100), None)
    assert len(runs) == 1


def test_masks_are_drawn_beside_each_other(expected):
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(masked, [11] * 100))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_its_own_threads(expected):
    """OpenMP would wait for those of the parent."""

    def child():  # in numpy, where torch would wait
        units = merge_units.merge(W, left, right)
        fine = not np.array_equal(W.numpy(), before) and merge_units.restore(W, left, right, units)
        os._exit(0 if fine and np.array_equal(W.numpy(), before) and np.array_equal(masked(11), expected) else 1)

    W, left, right = torch.randn(300, 500), torch.randn(300, 2) * 0.01, torch.randn(2, 500)
    before, threads = W.numpy().copy(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(masked(11), expected)
        merge_units.restore(W, left, right, merge_units.merge(W, left, right))
        assert exit_code_of(child) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["merge", "restore", "notice", "keep"])
def test_a_merge_that_computes_something_else_is_not_used(name, monkeypatch):
    def broken(function, work, alone):
        if (name, work.restoring) in (("merge", 0), ("restore", 1)):
            return
        run(function, work, alone)
        if name == "notice":
            work.failed = 0
        elif name == "keep" and not work.restoring:
            ctypes.c_int32.from_address(work.counts).value -= 1

    run, function = loops.run, loops.function(torch.float32)

    def tried():
        return compiled.tried(lambda: function, merge_units._first_difference, torch.float32)

    assert tried() is function
    monkeypatch.setattr(loops, "run", broken)
    with pytest.warns(UserWarning, match="numba is installed but its loops cannot be used"):
        assert tried() is None


@pytest.mark.parametrize("name", ["multiply_by_mask"])
def test_loops_that_compute_something_else_are_not_used(name):
    def broken(*arguments):
        result = getattr(loops, name)(*arguments)
        for argument in arguments:
            if str(getattr(argument, "dtype", None)).endswith("float32"):
                argument += 1
        return result

    stand_in = types.SimpleNamespace(**{name: broken})
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
