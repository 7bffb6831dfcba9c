"""The merge kernel: one rounding, the same bits for every tile, and every bit of W back."""

import copy
import itertools
import pickle
import random

import pytest
import torch

from fused_lora import reference
from fused_lora.kernels import merge as kernel
from fused_lora.kernels.config import capability
from fused_lora.kernels.merge import MergeTile, default_tile
from fused_lora.ops.merge import launch as merge_kernel
from fused_lora.ops.merge import op as merging
from fused_lora.ops.merge.blocks import Dither, dithered
from fused_lora.ops.native import MERGE, UNMERGE
from fused_lora.reference import bits
from helpers.merges import corrections_of, make_factors, make_weight
from helpers.thorough import pairwise, sampled

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["transposed", "padded_rows", "every_second_column"]
SHAPES = [  # N, K, R: one element, ragged tiles and segments, ranks that are no power of two
    pytest.param(1, 1, 1, id="1x1-r1"),
    pytest.param(70, 300, 3, id="70x300-r3"),
    pytest.param(5, 1030, 16, id="5x1030-r16"),
    pytest.param(33, 65, 100, id="33x65-r100"),
]
TILES = [
    MergeTile(ROWS=16, COLS=64, num_warps=4),
    MergeTile(ROWS=32, COLS=128, num_warps=8),
    MergeTile(ROWS=64, COLS=64, num_warps=8),
    MergeTile(ROWS=8, COLS=256, num_warps=4),
    MergeTile(ROWS=128, COLS=32, num_warps=4),
]


def merge(W, A, B, tile=None, room=None):
    """The merge, with room for every element; returns the totals and the corrections."""
    record = kernel.new_record(W, W.numel() if room is None else room, tile)
    kernel.merge(W, A, B, record, tile)
    corrections, lost = record.totals()
    return (corrections, lost), record.trimmed(corrections, slack=0)


def unmerge(W, A, B, record, tile=None):
    kernel.unmerge(W, A, B, record, tile)
    assert record.refused == 0


def words_of(W):
    """[N, words of 32 bits], a missing right neighbour as 0."""
    if W.dtype == torch.float32:
        return bits(W)
    return torch.nn.functional.pad(bits(W), (0, W.shape[1] % 2)).view(torch.int32)


def chain(A, B):
    """The kernel's delta: float64 holds each product exactly, so rounding each sum to float32 is an fma."""
    d = torch.zeros(len(B), A.shape[1], dtype=torch.float64, device=A.device)
    for j in range(len(A)):
        d = (d + B[:, j, None].double() * A[None, j].double()).float().double()
    return d.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "R"), SHAPES)
def test_round_trip_is_bit_exact(N, K, R, dtype, device, kernel_memory):
    W, (A, B) = make_weight(N, K, dtype, device), make_factors(N, K, R, device)
    original = W.clone()
    (corrections, lost), record = merge(W, A, B)
    assert lost == 0 and len(record.values) == corrections
    if W.numel() > 1:
        assert corrections > 0 and not torch.equal(bits(W), bits(original))
    unmerge(W, A, B, record)
    assert torch.equal(bits(W), bits(original))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda record: pickle.loads(pickle.dumps(record))])
def test_a_copy_of_a_record_unmerges(copied, device, kernel_memory):
    """Also a pickled one, as a merged model that is sent to another process has."""
    W, (A, B) = make_weight(70, 300, torch.bfloat16, device), make_factors(70, 300, 3, device)
    original = W.clone()
    record = copied(merge(W, A, B)[1])
    assert record.places.dtype is torch.uint16 and len(record.places)
    unmerge(W, A, B, record)
    assert torch.equal(bits(W), bits(original))


@pytest.mark.parametrize("why, dtype", sampled(itertools.product(["room", "infinity"], DTYPES), 2), ids=str)
def test_a_refused_merge_is_undone(why, dtype, device, kernel_memory):
    W, (A, B) = make_weight(70, 300, dtype, device), make_factors(70, 300, 3, device)
    original, tile = W.clone(), TILES[0]
    if why == "infinity":
        B[66, 0] = float("inf")
        record = kernel.new_record(W, W.numel(), tile)
    else:
        needed = merge(original.clone(), A, B, tile)[0][0]
        record = kernel.new_record(W, needed - 1, tile)
    kernel.merge(W, A, B, record, tile)
    found, lost = record.totals()
    assert (lost > 0) == (why == "infinity") and (why == "infinity" or found == needed)
    written = record.table[:-1, 0] != 0
    assert written.any() and not written.all() and not torch.equal(bits(W), bits(original))
    kernel.unmerge(W, A, B, record, tile)
    assert record.refused == 0 and torch.equal(bits(W), bits(original))


def test_an_unmerge_before_the_merge_changes_nothing(device, kernel_memory):
    W, (A, B) = make_weight(20, 300, torch.bfloat16, device), make_factors(20, 300, 3, device)
    original, record = W.clone(), kernel.new_record(W, 0)
    kernel.unmerge(W, A, B, record)
    kernel.merge_again(W, A, B, record)
    assert record.refused == 0 and torch.equal(bits(W), bits(original))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_remembered_is_what_the_specification_says(dtype, device, kernel_memory):
    W, (A, B) = make_weight(40, 600, dtype, device), make_factors(40, 600, 2, device)
    original, delta = W.clone(), chain(A, B)
    (corrections, _), record = merge(W, A, B)
    number = ~original.isnan()
    assert torch.equal(bits(W)[number], bits(reference.merge(original, delta))[number])
    wrong = reference.unmerge_correction(original, W, delta)
    # the interpreter and the hardware differ in the payloads of NaN, which are remembered or not accordingly
    each = 1 if dtype == torch.float32 else 2
    wrong = (wrong & number).unflatten(1, (-1, each)).any(2)
    number = number.unflatten(1, (-1, each)).all(2)
    rows, cols, values = corrections_of(record, *W.shape, dtype)
    assert torch.equal(values, words_of(original)[rows, cols // each].long())
    keep = number[rows, cols // each]
    assert torch.equal(torch.stack([rows, cols // each], 1)[keep], (wrong & number).nonzero())
    assert corrections == len(record.values) >= keep.sum() > 0


@pytest.mark.parametrize("layout, dtype", sampled(itertools.product(LAYOUTS, DTYPES), 2), ids=str)
def test_any_strides(layout, dtype, device, kernel_memory):
    N, K, R = 40, 300, 5
    storage = make_weight(2 * K, 2 * N, dtype, device)
    views = {"transposed": storage[:K, :N].t(), "padded_rows": storage[:N, :K], "every_second_column": storage[:N, ::2]}
    if layout == "padded_rows":
        storage = make_weight(2 * N, 2 * K, dtype, device)
        views["padded_rows"] = storage[:N, :K]
    W = views[layout]
    A, B = make_factors(*W.shape, R, device)
    before, contiguous = storage.clone(), W.contiguous()
    _, record = merge(W, A, B)
    merge(contiguous, A, B)
    assert torch.equal(bits(W.contiguous()), bits(contiguous))
    unmerge(W, A, B, record)
    assert torch.equal(bits(storage), bits(before))


def test_factor_strides_do_not_matter(device, kernel_memory):
    W, (A, B) = make_weight(40, 300, torch.bfloat16, device), make_factors(40, 300, 7, device)
    expected = W.clone()
    merge(expected, A, B)
    merge(W, A.t().contiguous().t(), B.t().contiguous().t())
    assert torch.equal(bits(W), bits(expected))


@pytest.mark.parametrize("dtype", sampled([torch.bfloat16, torch.float32], 2), ids=str)
def test_every_tile_gives_the_same_bits_and_undoes_every_other(dtype, device):
    N, K, R = 40, 264, 2
    W0, (A, B) = make_weight(N, K, dtype, device), make_factors(N, K, R, device)
    results = []
    for tile in TILES:
        W = W0.clone()
        results.append((W, *merge(W, A, B, tile)))
    merged, totals, record = results[0]
    expected = corrections_of(record, N, K, dtype)
    for W, other_totals, other in results[1:]:
        assert torch.equal(bits(W), bits(merged)) and other_totals == totals
        assert all(map(torch.equal, corrections_of(other, N, K, dtype), expected))
    combinations = 0
    for W, _, record in results:
        for tile in TILES:
            back = W.clone()
            unmerge(back, A, B, record, tile)
            combinations += torch.equal(bits(back), bits(W0))
    assert combinations == len(TILES) ** 2 >= 18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merged_weights_are_correctly_rounded(dtype, device):
    N, K, R = 128, 1024, 16
    W, (A, B) = make_weight(N, K, dtype, device, special=False), make_factors(N, K, R, device)
    expected = reference.merge(W, reference.delta_weight([A], [B], [1.0]))
    kernel.merge_apply(W, A, B)
    wrong = bits(W) != bits(expected)
    assert wrong.float().mean() <= 1e-4
    # neighbours in value are neighbours in bits where the signs agree
    assert torch.equal(W.sign()[wrong], expected.sign()[wrong])
    assert ((bits(W).int() - bits(expected).int()).abs() <= 1).all()


def test_float32_merge_is_as_good_as_float32_allows(device):
    N, K, R = 64, 512, 16
    W, (A, B) = make_weight(N, K, torch.float32, device, special=False), make_factors(N, K, R, device)
    exact = W.double() + reference.delta_weight([A], [B], [1.0])
    kernel.merge_apply(W, A, B)
    chain_size = reference.delta_weight([A.abs()], [B.abs()], [1.0])
    bound = 2.0**-24 * (exact.abs() + R * chain_size)  # one rounding of the sum, one per step of the chain
    assert ((W.double() - exact).abs() <= bound).all()
    assert (W == exact.float()).double().mean() > 0.7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_that_would_lose_finite_elements_are_counted(dtype, device, kernel_memory):
    W, (A, B) = make_weight(40, 300, dtype, device), make_factors(40, 300, 3, device)
    B[3, 0], A[1, 7], A[2, 9] = float("inf"), float("nan"), 3e38
    expected = W.isfinite() & ~reference.merge(W, chain(A, B)).isfinite()
    tile = default_tile(dtype, True, capability(W.device))
    rows, cols = tile.ROWS, tile.COLS
    units = (
        torch.nn.functional.pad(expected, (0, -300 % cols, 0, -40 % rows))
        .unflatten(0, (-1, rows))
        .unflatten(2, (-1, cols))
    )
    assert merge(W, A, B)[0][1] == units.any(3).any(1).sum() > 2


def test_float16_overflow_is_counted(device, kernel_memory):
    W = torch.full((3, 50), 65504.0, dtype=torch.float16, device=device)
    A, B = torch.ones(1, 50, device=device), torch.tensor([[15.0], [16.0], [-16.0]], device=device)
    assert merge(W, A, B)[0][1] == 1  # 65504 + 16 is the first value that rounds to infinity


def test_every_change_of_a_merged_weight_is_seen(device):
    N, K, R = 6, 300, 2
    for dtype in DTYPES:
        W, (A, B) = make_weight(N, K, dtype, device), make_factors(N, K, R, device)
        _, record = merge(W, A, B)
        for bit in range(0, 8 * W.element_size(), 5):
            tampered = W.clone()
            row, col = torch.randint(N, ()), torch.randint(K, ())
            mask = 1 << bit if bit < 8 * W.element_size() - 1 else -(1 << bit)
            bits(tampered)[row, col] ^= mask
            assert_refused(tampered, A, B, record)
        for first, second in [((0, 1), (0, 290)), ((0, 12), (4, 12)), ((2, 30), (2, 31)), ((1, 5), (3, 77))]:
            swapped = W.clone()
            swapped[first], swapped[second] = W[second], W[first]
            assert not torch.equal(bits(swapped), bits(W))
            assert_refused(swapped, A, B, record)


def test_signs_that_change_places_are_seen(device):
    """x and -x differ by the top bit alone: of all exchanges the one that a sum modulo a power of two sees last."""
    for dtype in DTYPES:
        W, (A, B) = torch.full((32, 128), 0.5, dtype=dtype, device=device), make_factors(32, 128, 1, device)
        B.zero_()
        W[0, 0] = W[2, 5] = -0.5
        _, record = merge(W, A, B)
        for row, col in [(31, 127), (31, 0), (0, 127), (16, 0), (8, 64), (0, 1)]:
            swapped = W.clone()
            swapped[0, 0], swapped[row, col] = W[row, col], W[0, 0]
            assert_refused(swapped, A, B, record)


def assert_refused(W, A, B, record):
    """An unmerge of W notices that it is not what the merge left, and leaves it as it is."""
    before = W.clone()
    kernel.unmerge(W, A, B, record)
    assert record.refused > 0
    kernel.merge_again(W, A, B, record)
    assert torch.equal(bits(W), bits(before))


@pytest.mark.parametrize("what", ["value", "place", "factor"])
def test_a_damaged_record_is_seen(what, device):
    for dtype in DTYPES:
        W, (A, B) = make_weight(40, 300, dtype, device, special=False), make_factors(40, 300, 2, device)
        _, record = merge(W, A, B)
        merged, middle = W.clone(), len(record.values) // 2
        if what == "value":
            record.values[middle] ^= 1
        elif what == "place":
            record.places[middle : middle + 1] = record.places[middle : middle + 1].int().sub(1).to(torch.uint16)
        else:
            A[1, 7] *= 1.5
        kernel.unmerge(W, A, B, record)
        assert 0 < record.refused < len(record.table) - 1
        if what != "factor":  # with other factors there is no way back
            kernel.merge_again(W, A, B, record)
            assert torch.equal(bits(W), bits(merged))


@pytest.mark.experiment("A2", full=200, quick=4)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cycles_of_the_kernel(dtype, count, device, kernel_memory):
    """Merge and unmerge by the kernels, random adapters, tiles and ragged shapes, accesses checked: all bits back"""
    for i in range(count):
        N, K, R = random.randint(1, 40), random.randint(1, 150), random.randint(1, 5)
        W, tiles = make_weight(N, K, dtype, device), [None, *TILES]
        original = W.clone()
        factors = make_factors(N, K, R, device, size=10.0 ** random.randint(-4, 2))
        _, record = merge(W, *factors, random.choice(tiles))
        unmerge(W, *factors, record, random.choice(tiles))
        assert torch.equal(bits(W), bits(original)), (N, K, R, i)


@pytest.mark.parametrize(("size", "most"), [(0.001, 0.04), (0.01, 0.11), (0.1, 0.48)])
def test_the_record_is_small(size, most, device):
    W = make_weight(64, 512, torch.bfloat16, device, special=False)
    _, record = merge(W, *make_factors(64, 512, 4, device, size=size))
    assert record.nbytes / W.numel() <= most


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_weights(shape, device):
    W = torch.empty(shape, dtype=torch.bfloat16, device=device)
    totals, record = merge(W, *make_factors(*shape, 2, device))
    unmerge(W, *make_factors(*shape, 2, device), record)
    assert totals == (0, 0)


def test_unmerge_of_a_zero_delta_restores_the_bits(device, kernel_memory):
    """B = 0, a fresh adapter: -0 + 0 is +0, which only the corrections undo."""
    W, (A, B) = make_weight(20, 300, torch.bfloat16, device), make_factors(20, 300, 2, device)
    original = W.clone()
    _, record = merge(W, A, torch.zeros_like(B))
    unmerge(W, A, torch.zeros_like(B), record)
    assert torch.equal(bits(W), bits(original))


@pytest.mark.parametrize("switching", [False, True])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_too_little_memory_for_corrections_costs_a_second_merge(share, switching, device, kernels_on, monkeypatch):
    W, (A, B) = make_weight(96, 128, torch.float32, device), make_factors(96, 128, 2, device, size=1e6)
    original, merges, old = W.clone(), [], None
    if switching:
        old = -B, A, merged_alone(W, -B, A)
    name = "switch" if switching else "merge"
    launch = getattr(kernel, name)
    monkeypatch.setattr(merge_kernel, "_share", {(W.dtype, False): share})
    monkeypatch.setattr(kernel, name, lambda *args: merges.append(args) or launch(*args))
    record = merged_alone(W, B, A, old=old)
    assert len(merges) == (1 if share else 2) and len(record.values) > 4096
    assert record.nbytes <= 6 * len(record.values) + record.table.nbytes + 6 * (W.numel() // 64 + 4096)
    unmerged_alone(W, B, A, record)
    assert torch.equal(bits(W), bits(original))


def test_a_merge_at_random_by_the_operator(device, kernels_on):
    W, (A, B) = make_weight(70, 300, torch.bfloat16, device), make_factors(70, 300, 3, device)
    original = W.clone()
    record = merging.merge_(W, [A], [B], [1.0], seed=-5)
    assert record.device_corrections is not None
    expected = torch.where(original.isfinite(), dithered(original.float() + chain(A, B), W.dtype, Dither(-5)), original)
    assert torch.equal(bits(W), bits(expected))
    merging.unmerge_(W, record)
    assert torch.equal(bits(W), bits(original))


def test_an_interrupt_leaves_the_weight_as_it_was(device, kernels_on, monkeypatch):
    W, (A, B) = make_weight(70, 300, torch.bfloat16, device), make_factors(70, 300, 3, device)
    original = W.clone()
    record = merged_alone(W, B, A)
    merged = W.clone()
    for name, call, before in [
        ("unmerge", lambda: unmerged_alone(W, B, A, record), merged),
        ("merge", lambda: merged_alone(W, B, A), original),
        ("switch", lambda: merged_alone(W, B * 2, A, old=(B, A, record)), merged),
    ]:
        W.copy_(before)
        launch, reached = getattr(kernel, name), []

        def interrupted(*args, launch=launch, reached=reached):
            launch(*args)
            if not reached:
                reached.append(W.clone())
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(kernel, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert not torch.equal(bits(reached[0]), bits(before)) and torch.equal(bits(W), bits(before))


def merged_alone(W, left, right, dither=None, old=None):
    """A merge, or a switch, in a launch of its own; returns the corrections."""
    sweep = merge_kernel.Sweep(W, left, right, dither, old)
    assert sweep.alone(MERGE)
    return sweep.corrections


def unmerged_alone(W, left, right, corrections):
    merge_kernel.Sweep(W, left, right, corrections=corrections).alone(UNMERGE)


@pytest.fixture
def trusted(kernels_on, monkeypatch):
    """The trials of the first use are over, and nothing is compiled yet."""
    monkeypatch.setattr(merge_kernel.guard, "passes", lambda *_: True)
    monkeypatch.setattr(merge_kernel, "_way_back", set())


@pytest.mark.parametrize("dither", [None, (5, 3)])
def test_an_unmerge_is_taken_back_once(dither, device, kernel_memory):
    """By whoever tries again after an interrupt. Torch lets nobody write to the record of a merge in inference mode."""
    W, (A, B) = make_weight(70, 300, torch.bfloat16, device), make_factors(70, 300, 3, device, size=1.0)
    with torch.inference_mode():
        record = kernel.new_record(W, W.numel(), TILES[0], dither)
        kernel.merge(W, A, B, record, TILES[0])
    bits(W)[69, 299] ^= 1 << 5
    before = W.clone()
    kernel.unmerge(W, A, B, record, TILES[0])
    assert record.refused == 1 and not torch.equal(bits(W), bits(before))
    for _ in range(2):
        kernel.merge_again(W, A, B, record, TILES[0])
        assert record.refused == 0 and torch.equal(bits(W), bits(before))


@pytest.mark.parametrize("action", ["unmerge", "switch"])
def test_a_fidelity_is_no_unmerge(action, device, trusted, monkeypatch):
    """What goes wrong before a later launch takes nothing back."""
    W, (A, B) = make_weight(70, 300, torch.bfloat16, device), make_factors(70, 300, 3, device, size=1.0)
    record = merging.merge_(W, [A], [B], [1.0])
    merging.delta_fidelity(W, record)
    merged, calls = W.clone(), []

    def no_memory(*args, **options):
        calls.append(args)
        raise torch.OutOfMemoryError("no memory for the launch")

    monkeypatch.setattr(merge_kernel, "_launch", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        merging.unmerge_(W, record) if action == "unmerge" else merging.switch_(W, record, [A], [B], [0.5])
    assert calls and torch.equal(bits(W), bits(merged))


@pytest.mark.parametrize("shape", [(70, 304), (304, 70), (64, 64), (1, 70)], ids=str)
def test_a_weight_that_is_laid_out_anew_while_merged(shape, device, trusted):
    """Its units are counted as at the merge, also in a switch, whose record is of the new rows."""
    W, (A, B) = make_weight(*shape, torch.bfloat16, device), make_factors(*shape, 3, device, size=1.0)
    original, W = W.clone(), W.t().contiguous().t()
    record = merging.merge_(W, [A], [B], [1.0])
    W = W.contiguous()
    record = merging.switch_(W, record, [A], [B], [0.5])
    W = W.t().contiguous().t()
    merging.unmerge_(W, record)
    assert torch.equal(bits(W.contiguous()), bits(original))


def test_the_way_back_is_compiled_first(device, trusted, monkeypatch):
    """Of each mode, and of units of each size."""
    W, (A, B) = make_weight(33, 80, torch.bfloat16, device), make_factors(33, 80, 2, device)
    calls = []
    for name in ("merge", "unmerge", "merge_again", "switch"):
        run = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *args, name=name, run=run: calls.append(name) or run(*args))
    for dither in (None, (7, 0)):
        for _ in range(2):
            record = merged_alone(W, B, A, dither)
            unmerged_alone(W, B, A, record)
        assert calls == ["unmerge", "merge", "merge_again", "unmerge", "merge", "unmerge"]
        calls.clear()
    record = merged_alone(W, B, A)
    merged_alone(W, B * 2, A, old=(B, A, record))
    assert calls == ["merge", "unmerge", "merge_again", "switch"]


def test_a_merge_kernel_whose_way_back_is_wrong_is_dropped(device, kernels_on, monkeypatch):
    run = kernel.merge_again
    monkeypatch.setattr(kernel, "merge_again", lambda W, A, B, record: run(W, A * 2, B, record))
    with pytest.warns(UserWarning, match="merge.* is dropped, the eager path takes over: .*back"):
        assert not merge_kernel.applies(torch.zeros(2, 2, device=device))


@pairwise(
    lambda layout, shape, dtype: layout != "at random" or dtype is not torch.float32,
    layout=["rows", "transposed", "at random"],
    shape=[(1, 1, 1), (33, 65, 16), (32, 128, 2)],
    dtype=DTYPES,
)
def test_a_switch_is_an_unmerge_and_a_merge(layout, shape, dtype, device, kernel_memory):
    """The same bits and the same record, of adapters with different ranks."""
    N, K, R = shape
    dither = Dither(5, 3) if layout == "at random" else None
    W, tile = make_weight(N, K, dtype, device), TILES[0]
    W = W.t().contiguous().t() if layout == "transposed" else W
    (A, B), new = make_factors(N, K, R, device), make_factors(N, K, R + 1, device)
    original, expected = W.clone(), W.clone()
    records = [kernel.new_record(W, W.numel(), tile, dither) for _ in range(3)]
    kernel.merge(W, A, B, records[0], tile)
    kernel.switch(W, (A, B, records[0]), (*new, records[1]), tile)
    kernel.merge(expected, *new, records[2], tile)
    assert records[0].refused == 0 and records[1].totals() == records[2].totals()
    assert torch.equal(bits(W.contiguous()), bits(expected.contiguous()))
    shape = (W.t() if layout == "transposed" else W).shape
    ours, theirs = (corrections_of(record, *shape, dtype) for record in records[1:])
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(records[1].table[:, 2:5], records[2].table[:, 2:5])
    unmerge(W, *new, records[1], tile)
    assert torch.equal(bits(W.contiguous()), bits(original.contiguous()))


@pytest.mark.parametrize("dtype, why", sampled([*itertools.product(DTYPES, ["changed", "infinity"])], 6), ids=str)
def test_a_refused_switch_by_the_operator(why, dtype, device, kernels_on, monkeypatch):
    """Some units are new then, some old, some neither: all of them are old again."""
    W, (A, B) = make_weight(70, 300, dtype, device), make_factors(70, 300, 3, device)
    new = make_factors(70, 300, 2, device)
    original, record = W.clone(), merging.merge_(W, [A], [B], [1.0])
    switches, launch = [], kernel.switch
    monkeypatch.setattr(kernel, "switch", lambda *args: switches.append(args[0].clone()) or launch(*args))
    merged = W.clone()
    if why == "changed":
        bits(W)[69, 299] ^= 1 << 5
    else:
        new[1][69, 0] = float("inf")
    before, error = W.clone(), RuntimeError if why == "changed" else ValueError
    with pytest.raises(error, match="not what the merge left" if why == "changed" else "merged weights"):
        merging.switch_(W, record, [new[0]], [new[1]], [1.0])
    assert len(switches) == 1 and torch.equal(bits(W), bits(before))
    W.copy_(merged)
    merging.unmerge_(W, record)
    assert torch.equal(bits(W), bits(original))


@pytest.mark.gpu
def test_more_than_2_31_elements():
    N, K = 70_000, 32_768
    W = torch.randn(N, K, dtype=torch.bfloat16, device="cuda")
    A, B = torch.randn(2, K, device="cuda"), torch.randn(N, 2, device="cuda") * 1e-3
    corner, expected = W[-3:].clone(), reference.merge(W[-3:], chain(A, B[-3:]))
    _, record = merge(W, A, B)
    assert torch.equal(W[-3:], expected)
    unmerge(W, A, B, record)
    assert torch.equal(bits(W[-3:]), bits(corner))


@pytest.mark.parametrize(
    "shape, dtype, transposed",
    sampled([*itertools.product([p.values for p in SHAPES], DTYPES[1:], [False, True])], 3),
    ids=str,
)
def test_rounding_at_random(shape, dtype, transposed, device, kernel_memory):
    N, K, R = shape
    """The specification's bits, for every tile; all of them come back; undoing an unmerge gives the same ones again."""
    W, (A, B) = make_weight(N, K, dtype, device), make_factors(N, K, R, device)
    original, dither = W.clone(), Dither(-(2**62) - 5, 2**31 + 3)
    rounded = dithered(W.float() + chain(A, B), dtype, dither)
    expected = torch.where(W.isfinite(), rounded, W)
    if transposed:
        W = W.t().contiguous().t()
        expected = torch.where(W.t().isfinite(), dithered(W.t().float() + chain(A, B).t(), dtype, dither), W.t()).t()
    tile = TILES[4] if transposed else None  # few programs over a tall weight
    record = kernel.new_record(W, W.numel(), tile, dither)
    kernel.merge(W, A, B, record, tile)
    assert record.totals()[1] == 0 and torch.equal(bits(W.contiguous()), bits(expected.contiguous()))
    unmerge(W, A, B, record, tile)
    assert torch.equal(bits(W.contiguous()), bits(original))
    kernel.merge_again(W, A, B, record, tile)
    assert torch.equal(bits(W.contiguous()), bits(expected.contiguous()))
