"""LoRA terms of rows under many adapters by the C loops: several outputs, instruction sets, threads, and the check."""

import weakref

import numpy as np
import pytest
import torch

from fused_lora.ops import native
from fused_lora.ops.grouped import loops
from fused_lora.ops.grouped.loops import add_terms_
from fused_lora.ops.grouped.op import RowLayout, Terms
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

pytestmark = pytest.mark.skipif(not native.usable(), reason=native.describe())
SLOTS, MOST, N = 4, 19, (40, 530, 16)  # columns: of less than the lanes' pieces, of several spans, of one piece
RANKS = [[16, 3, 0, 19], [16, 0, 1, 8], [0, 0, 0, 5]]  # of each output, by slot


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(shifted(3))


def layer(K, kept=torch.float32):
    A = [(torch.randn(SLOTS, MOST, K) * K**-0.5).to(kept) for _ in N]
    B_t = [(torch.randn(SLOTS, MOST, n) / 4).to(kept) for n in N]
    held = [
        {slot: [(a[slot, :r].t(), b[slot, :r], 1.0)] for slot, r in enumerate(ranks)}
        for a, b, ranks in zip(A, B_t, RANKS, strict=True)
    ]
    return A, B_t, Terms(*held, columns=N)


def rows_of(slots):
    return RowLayout(slots, torch.device("cpu"))


def exact(y, x, A, B_t, slots):
    y = y.double()
    for part, a, b, ranks in zip(y.split(N, 1), A, B_t, RANKS, strict=True):
        for i, slot in enumerate(slots):
            if slot >= 0:
                part[i] += x[i].double() @ a[slot, : ranks[slot]].double().t() @ b[slot, : ranks[slot]].double()
    return y


def slots_of(counts):
    """So many base rows, and rows of each slot, in a drawn order."""
    slots = np.repeat(np.arange(-1, SLOTS, dtype=np.int32), counts)
    return slots[torch.randperm(len(slots)).numpy()]


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@pytest.mark.parametrize("kept", native.TYPES, ids=str)
@pytest.mark.parametrize("K", [5, 64, 77])
def test_terms_are_those_of_float64(dtype, kept, K):
    A, B_t, factors = layer(K, kept)
    slots = slots_of([2, 1, 6, 0, 70])
    x, wide = torch.randn(len(slots), 2 * K).to(dtype)[:, :K], torch.randn(len(slots), sum(N) + 9).to(dtype)
    y, before = wide[:, : sum(N)], wide.clone()  # rows apart, as those of a step's logits are
    assert add_terms_(y, x, rows_of(slots), factors)
    assert_close(y, exact(before[:, : sum(N)], x, A, B_t, slots).to(dtype), K + MOST)
    assert torch.equal(wide[:, sum(N) :], before[:, sum(N) :])
    assert torch.equal(wide[slots < 0], before[slots < 0])
    assert not add_terms_(y.double(), x, rows_of(slots), factors)


@pytest.mark.parametrize("kept", native.TYPES, ids=str)
@pytest.mark.parametrize("variant", sorted({native.variant(), min(native.variant(), 1)}))
def test_a_row_has_the_same_bits_alone_in_any_batch_and_any_threads(variant, kept, monkeypatch):
    monkeypatch.setattr(native, "variant", lambda: variant)
    _, _, factors = layer(77, kept)
    slots = slots_of([1, 2, 3, 0, 70])
    x, y = torch.randn(len(slots), 77), torch.randn(len(slots), sum(N))

    def run(rows, threads):
        monkeypatch.setattr(native, "threads", lambda elements: threads)
        found = y[rows].clone()
        assert add_terms_(found, x[rows], rows_of(slots[rows]), factors)
        return found

    together = run(np.arange(len(slots)), 1)
    assert torch.equal(run(np.arange(len(slots)), 3), together)
    for i in np.flatnonzero(slots >= 0):
        assert torch.equal(run(np.array([i]), 1)[0], together[i])


def test_loops_that_compute_something_else_are_not_used(monkeypatch):
    monkeypatch.setattr(native, "_rejected", [])
    monkeypatch.setattr(native, "add_terms", lambda *fields: None)
    loops._agree.cache_clear()
    _, _, factors = layer(8)
    with pytest.warns(UserWarning, match="C loops are not used.*a LoRA term in torch.float32 differs"):
        assert not add_terms_(torch.zeros(3, sum(N)), torch.ones(3, 8), rows_of(slots_of([1, 2, 0, 0, 0])), factors)
    loops._agree.cache_clear()


def test_what_c_reads_stays_where_another_thread_works_it_out_again(monkeypatch):
    """A layout is used by all threads, and the last one's blocks stay in it."""
    *_, terms = layer(37)
    layout, add_terms = rows_of(np.array([0, 1, 1])), native.add_terms
    assert loops._agree()  # which calls C, too
    before = weakref.ref(layout.blocks[0])

    def meanwhile(*fields):
        del layout.blocks
        assert before() is not None
        add_terms(*fields)

    monkeypatch.setattr(native, "add_terms", meanwhile)
    assert add_terms_(torch.zeros(3, sum(N)), torch.randn(3, 37), layout, terms)
