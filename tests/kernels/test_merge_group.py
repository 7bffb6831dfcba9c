"""Merge, unmerge and switch of many weights in one launch: bits and records of launches one by one, or nothing."""

import dataclasses
import itertools
import warnings

import pytest
import torch

from fused_lora.kernels import merge as kernel
from fused_lora.kernels.merge import Member, MergeTile
from fused_lora.ops.merge import launch
from fused_lora.ops.merge import op as merging
from fused_lora.ops.native import CHANGED, DONE, LOST, MERGE, TORN, UNMERGE
from fused_lora.reference import bits
from fused_lora.testing.guards import guarded_allocations
from fused_lora.testing.interpreter import checked
from helpers.merges import corrections_of, make_factors, make_weight
from helpers.thorough import sampled

TILE = MergeTile(ROWS=16, COLS=64)
# N, K, R, and whether the columns are contiguous; a group of one launch is one column of them
SHAPES = {
    True: [(32, 128, 3, False), (64, 16, 5, True), (16, 64, 1, False)],
    False: [(33, 80, 3, False), (48, 21, 8, True), (1, 16, 2, False), (5, 304, 1, False)],
}
HOW = ["merge", "unmerge", "switch", "merge at random", "switch at random"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = [
    case for case in itertools.product(HOW, [True, False], DTYPES) if "random" not in case[0] or case[2].itemsize == 2
]


def members_of(even, dtype, device, guards, dither=None):
    """Weights between guard bands, in one memory with others' rows, and their records; ranks differ."""
    found = []
    for i, (N, K, R, transposed) in enumerate(SHAPES[even]):
        W = make_weight(N, K, dtype, device)
        W = guards.copy(W.t().contiguous(), f"W{i}").t() if transposed else guards.copy(W, f"W{i}")
        A, B = make_factors(N, K, R, device)
        if transposed:
            A, B = A.t().contiguous().t(), B.t().contiguous().t()
        A, B = guards.copy(A, f"A{i}"), guards.copy(B, f"B{i}")
        found.append(Member(W, A, B, kernel.new_record(W, N * K + 7, TILE, dither and (dither + i, i))))
    return found


def tensors_of(members):
    """All that a launch reaches by the addresses of its table."""
    found = []
    for W, A, B, record, old in members:
        own = [*old[:2], *parts(old[2])] if old is not None else []
        found += [W, A, B, *parts(record), *own]
    return found


def parts(record):
    return [t for t in (record.table, record.places, record.values, record.seed) if t is not None]


def one_by_one(members, how):
    for W, A, B, record, old in members:
        if how == "unmerge":
            kernel.unmerge(W, A, B, record, TILE)
        elif old is None:
            kernel.merge(W, A, B, record, TILE)
        else:
            kernel.switch(W, old, (A, B, record), TILE)


@pytest.mark.parametrize("how, even, dtype", sampled(CASES, 3), ids=str)
def test_a_group_is_its_launches_one_by_one(how, even, dtype, device, guards):
    how, _, random = how.partition(" ")
    dither = -5 if random else None
    with guarded_allocations():
        members = members_of(even, dtype, device, guards, dither)
        assert len({kernel.group_of(m.W, [(m.A, m.B)], m.record.form)[1:] for m in members}) == 1
        assert kernel.group_of(members[0].W, [(members[0].A, members[0].B)], members[0].record.form)[-1] is even
        original = [m.W.clone() for m in members]
        if how != "merge":
            one_by_one(members, "merge")
        if how == "switch":
            new = [(guards.copy(m.A[:1]), guards.copy(m.B[:, :1] * 0.5)) for m in members]
            along = [(A.t().contiguous().t(), B.t().contiguous().t()) if m.W.stride(0) == 1 else (A, B.contiguous())
                     for m, (A, B) in zip(members, new, strict=True)]  # fmt: skip
            fresh = [kernel.new_record(m.W, m.W.numel(), TILE, dither and (dither, 2)) for m in members]
            olds = [(m.A, m.B, m.record) for m in members]
            every = zip(members, along, fresh, olds, strict=True)
            members = [Member(m.W, A, B, record, old) for m, (A, B), record, old in every]
        alone = [m._replace(W=m.W.clone(), record=copied(m.record)) for m in members]
        alone = [m if m.old is None else m._replace(old=(*m.old[:2], copied(m.old[2]))) for m in alone]
        one_by_one(alone, how)
        with checked(extra=tensors_of(members)) as report:
            kernel.launch_group(members, how == "unmerge")
        assert not report.active or (report.launches == 1 and report.programs == sum(map(units, members)))
        for ours, theirs in zip(members, alone, strict=True):
            assert torch.equal(bits(ours.W.contiguous()), bits(theirs.W.contiguous()))
            assert_same_record(ours, theirs, dtype)
            assert ours.old is None or ours.old[2].refused == 0
        if how != "unmerge":
            kernel.launch_group([m._replace(old=None) for m in members], UNMERGE=True)
        for m, W in zip(members, original, strict=True):
            assert m.record.refused == 0 and torch.equal(bits(m.W.contiguous()), bits(W.contiguous()))


def copied(record):
    values = {name: getattr(record, name).clone() for name in ("table", "places", "values")}
    return dataclasses.replace(record, **values)


def units(member):
    return len(member.record.table) - 1


def assert_same_record(ours, theirs, dtype):
    assert ours.record.totals() == theirs.record.totals()
    assert torch.equal(ours.record.table[:, 1:], theirs.record.table[:, 1:])
    shape = (ours.W.t() if ours.W.stride(0) < ours.W.stride(1) else ours.W).shape
    pairs = zip(*(corrections_of(member.record, *shape, dtype) for member in (ours, theirs)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def layers_of(dtype, device, shapes=((70, 304), (33, 80), (128, 64), (5, 64)), size=0.1):
    """(W, adapters as a merge takes them) of each."""
    found = []
    for i, (N, K) in enumerate(shapes):
        A, B = make_factors(N, K, i + 1, device, size=size)
        found.append((make_weight(N, K, dtype, device), ([A], [B], [1.0], None, None)))
    return found


def prepared(layers, old=None):
    """(records, sweeps) of merges, or of switches from ``old`` records."""
    jobs = [merging.merge_later(W, a, False, own) for (W, a), own in zip(layers, old or [None] * 9, strict=False)]
    assert all(jobs)
    return [record for record, _ in jobs], [sweep for _, sweep in jobs]


@pytest.fixture
def launched(kernels_on, monkeypatch):
    """How many weights each launch of a group has; the trials of the first use are over."""
    monkeypatch.setattr(launch.guard, "passes", lambda *_: True)
    monkeypatch.setattr(launch, "_share", {})
    found, run = [], kernel.launch_group
    monkeypatch.setattr(kernel, "launch_group", lambda members, *a: found.append(len(members)) or run(members, *a))
    return found


def same(layers, expected):
    return all(torch.equal(bits(W), bits(other)) for (W, _), other in zip(layers, expected, strict=True))


MASKED = ((70, 304), (33, 80), (5, 64))


@pytest.mark.parametrize("dtype, why", sampled([*itertools.product(DTYPES, ["infinity", "changed"])], 3), ids=str)
def test_a_refusal_takes_the_whole_group_back(dtype, why, device, launched):
    """In the middle of a merge, a switch and an unmerge; what was right before is right after."""
    layers = layers_of(dtype, device, MASKED)
    original = [W.clone() for W, _ in layers]
    broken = layers[1][1][1][0]  # its lora_B
    before, broken[-1, 0] = broken[-1, 0].item(), float("inf")
    records, sweeps = prepared(layers)
    assert merging.run_together(sweeps, MERGE) == LOST and same(layers, original)
    assert all(record.device_corrections is None for record in records)
    broken[-1, 0] = before
    records, sweeps = prepared(layers)
    assert merging.run_together(sweeps, MERGE) == DONE and launched == [3, 3]
    merged = [W.clone() for W, _ in layers]
    assert not same(layers, original)
    new = layers_of(dtype, device, MASKED)
    new = [(W, adapters) for (W, _), (_, adapters) in zip(layers, new, strict=True)]
    if why == "infinity":
        new[1][1][1][0][-1, 0] = float("inf")
    else:
        bits(layers[1][0])[32, 79] ^= 1 << 5
    held = [W.clone() for W, _ in layers]
    later, sweeps = prepared(new, records)
    outcome = merging.run_together(sweeps, MERGE)
    assert outcome == (LOST if why == "infinity" else CHANGED) and same(layers, held) and len(launched) == 3
    assert all(record.device_corrections is None for record in later)
    if why == "changed":
        sweeps = [merging.unmerge_later(W, record) for (W, _), record in zip(layers, records, strict=True)]
        assert merging.run_together(sweeps, UNMERGE) == CHANGED and same(layers, held)
        layers[1][0].copy_(merged[1])
    sweeps = [merging.unmerge_later(W, record) for (W, _), record in zip(layers, records, strict=True)]
    assert merging.run_together(sweeps, UNMERGE) == DONE and same(layers, original)


@pytest.mark.parametrize("switching", [False, True])
def test_too_little_room_costs_a_second_launch_of_some(switching, device, launched, monkeypatch):
    layers = layers_of(torch.float32, device, [(96, 128)] * 3, size=1e6)
    layers[1][1][1][0].mul_(0.0)  # no corrections but those of -0
    original, old = [W.clone() for W, _ in layers], None
    if switching:
        plain = [(W, ([A], [-B], [1.0], None, None)) for W, ([A], [B], *_) in layers]
        old, sweeps = prepared(plain)
        assert merging.run_together(sweeps, MERGE) == DONE
        launched.clear()
    monkeypatch.setattr(launch, "_share", {(torch.float32, False): 0.0})
    records, sweeps = prepared(layers, old)
    assert merging.run_together(sweeps, MERGE) == DONE and launched == [3, 2]
    for (W, _), record, own in zip(layers, records, original, strict=True):
        found = record.device_corrections
        assert found.nbytes <= 6 * len(found.values) + found.table.nbytes + 6 * (W.numel() // 64 + 4096)
        merging.unmerge_(W, record)
        assert torch.equal(bits(W), bits(own))


def test_a_group_ends_at_some_bytes(device, launched, monkeypatch):
    layers = layers_of(torch.bfloat16, device, [(32, 64)] * 7)
    original = [W.clone() for W, _ in layers]
    monkeypatch.setattr(launch.Sweep, "at_once", 2 * layers[0][0].nbytes)
    records, sweeps = prepared(layers)
    assert merging.run_together(sweeps, MERGE) == DONE and launched == [2, 2, 2]  # and one alone
    assert all(record.device_corrections is not None for record in records)
    layers[6][0][3, 5] += 1  # of the last part
    merged = [W.clone() for W, _ in layers]
    sweeps = [merging.unmerge_later(W, record) for (W, _), record in zip(layers, records, strict=True)]
    assert merging.run_together(sweeps, UNMERGE) == CHANGED and same(layers, merged)
    layers[6][0][3, 5] -= 1
    for (W, _), record, own in zip(layers, records, original, strict=True):
        if W is not layers[6][0]:
            merging.unmerge_(W, record)
            assert torch.equal(bits(W), bits(own))


@pytest.mark.parametrize("how", ["merge", "switch", "unmerge"])
def test_an_interrupt_leaves_all_as_they_were(how, device, launched, monkeypatch):
    layers = layers_of(torch.bfloat16, device, MASKED)
    records, sweeps = prepared(layers)
    if how != "merge":
        assert merging.run_together(sweeps, MERGE) == DONE
        _, sweeps = prepared(layers_again(layers), records)
    if how == "unmerge":
        sweeps = [merging.unmerge_later(W, record) for (W, _), record in zip(layers, records, strict=True)]
    before, run, reached = [W.clone() for W, _ in layers], kernel.launch_group, []

    def interrupted(*args):
        run(*args)
        reached.append(same(layers, before))
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel, "launch_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merging.run_together(sweeps, UNMERGE if how == "unmerge" else MERGE)
    assert reached == [False] and same(layers, before)


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_switch_is_taken_back_once(meanwhile, device, launched, monkeypatch):
    """To an adapter with the same numbers; by the group, by whoever called it, and after an interrupt of that."""
    layers = layers_of(torch.bfloat16, device, MASKED)
    original = [W.clone() for W, _ in layers]
    records, sweeps = prepared(layers)
    assert merging.run_together(sweeps, MERGE) == DONE
    merged, (_, sweeps), unmerge, calls = [W.clone() for W, _ in layers], prepared(layers, records), kernel.unmerge, []
    no_room = torch.OutOfMemoryError("no room for the totals")
    monkeypatch.setattr(launch, "totals_of", lambda _: (_ for _ in ()).throw(no_room))

    def interrupted(*args):
        calls.append(args)
        if meanwhile and len(calls) == 5:  # of the way back the second, after three that compile
            raise KeyboardInterrupt
        unmerge(*args)

    monkeypatch.setattr(launch, "_way_back", set())
    monkeypatch.setattr(kernel, "unmerge", interrupted)
    with pytest.raises(KeyboardInterrupt if meanwhile else torch.OutOfMemoryError):
        merging.run_together(sweeps, MERGE)
    assert same(layers, merged) and len(calls) == 6 + meanwhile
    for sweep in sweeps:
        sweep.undo(UNMERGE)
    assert same(layers, merged)
    monkeypatch.undo()
    for (W, _), record in zip(layers, records, strict=True):
        kernel.unmerge(W, record.factors.right, record.factors.left, record.device_corrections)
    assert same(layers, original)


@pytest.mark.parametrize("how", ["merge", "switch"])
def test_what_is_changed_meanwhile_does_not_come_back_unsaid(how, device, launched, monkeypatch):
    """Between the launch and the way back, which the last weight asks for; the others do come back."""
    layers = layers_of(torch.bfloat16, device, MASKED)
    records, sweeps = prepared(layers)
    if how == "switch":
        assert merging.run_together(sweeps, MERGE) == DONE
        layers = layers_again(layers)
        layers[2][1][1][0][-1, 0] = float("inf")
        _, sweeps = prepared(layers, records)
    else:
        layers[2][1][1][0][-1, 0] = float("inf")
        _, sweeps = prepared(layers)
    before, run = [W.clone() for W, _ in layers], kernel.launch_group

    def changed(*args):
        run(*args)
        bits(layers[0][0])[3, 5] ^= 1 << 5

    monkeypatch.setattr(kernel, "launch_group", changed)
    with pytest.raises(RuntimeError, match="changed while it was merged.*partly merged"):
        merging.run_together(sweeps, MERGE)
    assert same(layers[1:], before[1:]) and not same(layers[:1], before[:1])
    assert [sweep.undo(UNMERGE) for sweep in sweeps] == [TORN, DONE, DONE] and same(layers[1:], before[1:])


def layers_again(layers):
    return [(W, ([A * 0.5], [B], [1.0], None, None)) for W, ([A], [B], *_) in layers]


def test_what_needs_a_launch_of_its_own(device, kernels_on, monkeypatch):
    """Odd sizes and addresses, strided columns, an old merge with other units."""
    memory = torch.zeros(33 * 80 + 16, dtype=torch.bfloat16, device=device)
    weights = [memory[1 : 33 * 80 + 1].view(33, 80), torch.zeros(20, 40, dtype=torch.bfloat16, device=device)]
    weights += [torch.zeros(20, 160, dtype=torch.bfloat16, device=device)[:, ::2]]
    weights += [torch.zeros(0, 80, dtype=torch.bfloat16, device=device)]
    for W in weights:
        A, B = make_factors(*W.shape, 2, device)
        assert merging.merge_later(W, ([A], [B], [1.0], None, None), False) is None
    turned = torch.zeros(80, 48, dtype=torch.bfloat16, device=device)
    A, B = make_factors(48, 80, 2, device)
    assert merging.merge_later(turned, ([A], [B], [1.0], None, None), True) is not None  # as Conv1D has it
    monkeypatch.setattr(kernel, "capability", lambda _: 90)  # whose units at random are smaller
    W = make_weight(33, 80, torch.bfloat16, device)
    A, B = make_factors(*W.shape, 2, device)
    record = merging.merge_(W, [A], [B], [1.0], seed=3)
    assert record.device_corrections.form != kernel.form_of(W, False)
    assert merging.merge_later(W, ([A], [B], [1.0], None, None), False, record) is None
    assert merging.merge_later(W, ([A], [B], [1.0], None, 4), False, record) is not None


TRIED = ("merge", "switch", "unmerge")
TRIALS = [(("wrong", "raises")[(i + j) % 2], how) for i, how in enumerate(TRIED) for j in (0, 1)]


@pytest.mark.parametrize("failure, how", sampled(TRIALS, 2))
def test_a_group_that_fails_its_trial_leaves_launches_one_by_one(how, failure, device, kernels_on, monkeypatch):
    run = kernel.launch_group
    layers = layers_of(torch.bfloat16, device, ((33, 80), (5, 64)))
    records = [merging.merge_(W, *adapters) for W, adapters in layers] if how != "merge" else [None] * 2

    def broken(members, *args):
        if failure == "raises":
            raise RuntimeError("out of registers")
        run([members[0]._replace(A=members[0].A * 2), *members[1:]], *args)

    def later():
        if how == "unmerge":
            return [merging.unmerge_later(W, record) for (W, _), record in zip(layers, records, strict=True)]
        return [merging.merge_later(W, a, False, own) for (W, a), own in zip(layers, records, strict=True)]

    monkeypatch.setattr(kernel, "launch_group", broken)
    reason = "out of registers" if failure == "raises" else "two small weights"
    with pytest.warns(UserWarning, match=rf"{how} of many weights.* launches one by one take over: .*{reason}"):
        assert later() == [None] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert later() == [None] * 2


@pytest.mark.parametrize("dtype, even", sampled([*itertools.product(reversed(DTYPES), [True, False])], 6), ids=str)
def test_the_first_use_is_tried(dtype, even, device, kernels_on, monkeypatch):
    """Once for each of merge, switch and unmerge, and for rounding at random: two weights in a launch."""
    W = make_weight(*((128, 64) if even else (33, 80)), dtype, device)
    A, B = make_factors(*W.shape, 2, device)
    adapters, run, seen = ([A], [B], [1.0], None), kernel.launch_group, []
    monkeypatch.setattr(kernel, "launch_group", lambda members, *a: seen.append(len(members)) or run(members, *a))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert merging.merge_later(W, (*adapters, None), False) is not None and seen == [2]
        record = merging.merge_(W, *adapters)
        assert merging.merge_later(W, (*adapters, None), False, record) is not None and seen == [2, 2]
        assert merging.unmerge_later(W, record) is not None and seen == [2, 2, 2]
        if dtype.itemsize == 2:
            assert merging.merge_later(W, (*adapters, 3), False) is not None and seen == [2, 2, 2, 2]
