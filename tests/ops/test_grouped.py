"""Many adapters in one batch on a CPU: right against float64, base rows untouched, and no row knows its neighbours."""

import numpy as np
import pytest
import torch

from fused_lora import reference
from fused_lora.ops.grouped import invariant
from fused_lora.ops.grouped.op import Joint, RowLayout, Terms, form_terms, lora_grouped_
from fused_lora.testing.numeric import assert_no_worse

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")


def adapter(K, N, r, scale=0.7, dtype=torch.float32):
    A, B = torch.randn(r, K) / K**0.5, torch.randn(N, r)
    return A.to(dtype), B.to(dtype), scale


def term(A, B, scale):
    """An adapter as the operator takes it."""
    return A.t(), B.t().contiguous(), scale


def side_by_side(count, K, N, r, scale=0.7, gap=0):
    """``count`` adapters of one rank at equal distances in one memory, everything at multiples of 64 bytes."""
    start_B = -(-r * K // 16) * 16
    size = start_B + -(-r * N // 16) * 16 + gap
    memory = torch.randn(count * size)
    found = []
    for i in range(count):
        part = memory[i * size : (i + 1) * size]
        found.append((part[: r * K].view(r, K).t(), part[start_B : start_B + r * N].view(r, N), scale))
    return found


def run(x, y, rows, factors):
    return lora_grouped_(y.clone(), x, RowLayout(np.array(rows), CPU), Terms(factors))


def exact(x, y, rows, groups):
    """Row by row by the specification in float64. groups: of each group [(A, B, scale)]."""
    out = y.double()
    for m, g in enumerate(rows):
        for A, B, scale in groups.get(g, []) if g >= 0 else []:
            zero = torch.zeros(len(B), x.shape[1])
            out[m] += reference.lora_linear(x[m : m + 1], zero, None, [A], [B], [scale], [0.0])[0][0]
    return out


def eager(x, y, rows, groups):
    """What PEFT computes for a mixed batch, adapter after adapter."""
    out = y.clone()
    for g, members in groups.items():
        index = torch.tensor([m for m, h in enumerate(rows) if h == g], dtype=torch.long)
        for A, B, scale in members:
            out[index] += ((x[index].to(A.dtype) @ A.t() @ B.t()) * scale).to(y.dtype)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K, N", [(64, 32), (33, 17), (130, 257)])
def test_every_row_gets_the_terms_of_its_adapters(dtype, K, N):
    groups = {g: [adapter(K, N, r, 0.3 + g)] for g, r in enumerate((1, 4, 7, 16, 64))}
    groups[5] = [adapter(K, N, 8), adapter(K, N, 3, -1.25)]
    rows = np.random.randint(-1, 6, 150).tolist()
    x, y = torch.randn(150, K).to(dtype), torch.randn(150, N).to(dtype)
    ours = run(x, y, rows, {g: [term(*a) for a in members] for g, members in groups.items()})
    assert_no_worse(ours, eager(x, y, rows, groups), exact(x, y, rows, groups), draws=True)
    base = [m for m, g in enumerate(rows) if g < 0]
    assert torch.equal(reference.bits(ours[base]), reference.bits(y[base]))


def test_adapters_of_16_bits_are_summed_in_fp32():
    K, N = 64, 48
    groups = {0: [adapter(K, N, 8, dtype=torch.bfloat16)], 1: [adapter(K, N, 4, dtype=torch.bfloat16)]}
    rows = [0, 1, 0, 1, -1] * 8
    x, y = torch.randn(len(rows), K), torch.randn(len(rows), N)
    wide = {g: [(A.float(), B.float(), s) for A, B, s in m] for g, m in groups.items()}
    ours = run(x, y, rows, {g: [term(*a) for a in members] for g, members in groups.items()})
    adapted = [m for m, g in enumerate(rows) if g >= 0]
    found = ours, eager(x, y, rows, wide), exact(x, y, rows, groups)
    assert_no_worse(*(t[adapted] for t in found), draws=True)


def test_a_16_bit_result_is_rounded_once():
    K, N = 32, 16
    A, B, scale = adapter(K, N, 4)
    x, y = torch.randn(6, K).bfloat16(), torch.randn(6, N).bfloat16()
    ours = run(x, y, [0] * 6, {0: [term(A, B, scale)]})
    wide = run(x.float(), y.float(), [0] * 6, {0: [term(A, B, scale)]})
    assert torch.equal(ours, wide.bfloat16())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("K, N", [(64, 48), (100, 36), (576, 192), (33, 31)])
def test_a_row_has_the_same_bits_in_every_batch(K, N, threads):
    """Alone, with any number of neighbours of its own and of other adapters, in any order, at any place."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ranks = (1, 2, 3, 5, 8, 16, 64)
        factors = {g: [term(*adapter(K, N, r))] for g, r in enumerate(ranks)}
        factors[7] = [factors[2][0], factors[5][0]]
        for g, f in enumerate(side_by_side(4, K, N, 8, gap=64), 8):
            factors[g] = [f]
        x, y = torch.randn(300, K), torch.randn(300, N)
        rows = np.random.randint(-1, 12, 300)
        alone = torch.stack([run(x[m : m + 1], y[m : m + 1], rows[m : m + 1], factors)[0] for m in range(300)])
        for size in (2, 3, 4, 5, 7, 16, 17, 33, 64, 130, 299, 300):
            pick = np.random.permutation(300)[:size]
            assert torch.equal(run(x[pick], y[pick], rows[pick], factors), alone[pick])
        for g in range(12):  # one adapter alone: tiles of every size
            for size in (1, 4, 5, 20, 127, 128, 129, 600):
                pick = np.resize(np.flatnonzero(rows == g), size)
                assert torch.equal(run(x[pick], y[pick], rows[pick], factors), alone[pick])
    finally:
        torch.set_num_threads(before)


def test_adapters_at_equal_distances_share_a_product(monkeypatch):
    K, N = 64, 48
    factors = {g: [f] for g, f in enumerate(side_by_side(5, K, N, 8, gap=32))}
    terms = Terms(factors)
    assert terms.runs == ((0, 1, 2, 3, 4),)
    calls = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: calls.append(len(a)) or bmm(a, b))
    x, y = torch.randn(5, K), torch.randn(5, N)
    for n in (3, 5):
        tried(n, K, 8, N, "")
    calls.clear()
    together = run(x, y, [0, 1, 2, 3, 4], factors)
    assert calls == [5]
    alone = torch.cat([run(x[i : i + 1], y[i : i + 1], [i], factors) for i in range(5)])
    assert torch.equal(together, alone)
    # group 1 has no rows: 0 is no neighbour of 2, and the distance is not the same
    calls.clear()
    some = [0, 2, 3, 4]
    assert torch.equal(run(x[some], y[some], some, factors), alone[some])
    assert calls == [3]


def layers_of(groups, N, K, ranks, gap=0):
    """Of each layer the factors by group, an adapter's layers one after the other in one memory as a store has them."""
    found = [{} for _ in N]
    for g in range(groups):
        r = ranks[g % len(ranks)]
        sizes = [-(-r * columns // 16) * 16 for n in N for columns in (K, n)]
        memory = torch.randn(sum(sizes) + gap)
        starts = np.cumsum([0, *sizes])
        for i, n in enumerate(N):
            A, B = memory[starts[2 * i] :][: r * K].view(r, K), memory[starts[2 * i + 1] :][: r * n].view(r, n)
            found[i][g] = [(A.t(), B, 0.7)]
    return found


def need_tiles(K, r, N):
    """Skip where the bits of a row depend on its place in a tile, as in MKL's SSE code: tiles have one row there."""
    if invariant.row_tiles(K, r, N, torch.float32, CPU, torch.get_num_threads()) == (1,):
        pytest.skip("this BLAS rounds a row by its place in a product")


def tried(n, K, r, N, same):
    """Before calls are counted, so that those of a trial are not among them."""
    need_tiles(K, r, N)
    if not invariant.stacks(n, 4, K, r, N, torch.float32, CPU, torch.get_num_threads(), same):
        pytest.skip("this BLAS rounds a batched product otherwise")


def counting(monkeypatch):
    calls, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: calls.append((len(a), a.stride(0) == 0)) or bmm(a, b))
    return calls


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("K, N", [(64, (48, 16, 16)), (576, (192, 192)), (33, (31, 31, 31)), (100, (36, 20))])
def test_layers_that_share_an_input_have_the_bits_of_each_alone(K, N, threads):
    """Mixed ranks, combinations, groups that some of the layers lack, in batches of any size."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        layers = layers_of(7, N, K, (3, 8, 64, 1))
        for g, f in enumerate(side_by_side(3, K, N[0], 8, gap=64), 7):
            layers[0][g] = [f]
        for layer in layers:
            layer[10] = [*layer[0], *layer[2]]
        del layers[-1][1], layers[0][3]
        terms = [Terms(layer) for layer in layers]
        joint = Joint(terms)
        x, ys = torch.randn(300, K), [torch.randn(300, n) for n in N]
        rows = np.random.randint(-1, 11, 300)
        for size in (1, 2, 4, 5, 8, 33, 130, 300):
            pick = np.random.permutation(300)[:size]
            layout = RowLayout(rows[pick], CPU)
            # first, for it takes the buffers
            alone = [lora_grouped_(y[pick], x[pick], layout, term) for y, term in zip(ys, terms, strict=True)]
            together = form_terms(x[pick], layout, joint)
            for i, y in enumerate(ys):
                ours = y[pick]
                if together is not None:
                    together.add(i, ours)
                assert torch.equal(ours, alone[i] if together is not None else y[pick])
            assert (together is None) == (len(layout.chunks(joint.groups)) != 1)
    finally:
        torch.set_num_threads(before)


def test_layers_of_one_shape_share_a_product(monkeypatch):
    """Where the groups cannot, for they differ in rank."""
    K, N, ranks = 64, (96, 48, 48), (4, 8, 16)
    layers = layers_of(3, N, K, ranks)
    joint = Joint([Terms(layer) for layer in layers])
    assert all(runs == ((0,), (1, 2)) for runs in joint.across.values())
    for r in ranks:
        tried(2, K, r, 48, "input")
    calls = counting(monkeypatch)
    x = torch.randn(3, K)
    together = form_terms(x, RowLayout(np.arange(3), CPU), joint)
    assert calls == [(2, True)] * 3
    monkeypatch.setattr("fused_lora.ops.grouped.plan.stacks", lambda *args: False)
    calls.clear()
    one_by_one = form_terms(x, RowLayout(np.arange(3), CPU), joint)
    assert calls == []
    for i, n in enumerate(N):
        ours, theirs = torch.zeros(3, n), torch.zeros(3, n)
        together.add(i, ours)
        one_by_one.add(i, theirs)
        assert torch.equal(ours, theirs) and ours.abs().min() > 0


def test_three_layers_at_equal_distances_are_one_product_and_groups_come_first(monkeypatch):
    K, N = 64, (48, 48, 48)
    mixed, alike = Joint([Terms(f) for f in layers_of(2, N, K, (4, 8))]), [{}, {}, {}]
    assert mixed.across == {0: ((0, 1, 2),), 1: ((0, 1, 2),)}
    memory = torch.randn(2, 3, 2, 4 * K)  # group, layer, A or B
    for g in range(2):
        for i in range(3):
            A, B = memory[g, i, 0].view(4, K), memory[g, i, 1][: 4 * 48].view(4, 48)
            alike[i][g] = [(A.t(), B, 0.7)]
    for r, n, same in ((4, 3, "input"), (8, 3, "input"), (4, 2, "")):
        tried(n, K, r, 48, same)
    calls = counting(monkeypatch)
    x = torch.randn(2, K)
    form_terms(x, RowLayout(np.arange(2), CPU), mixed)
    assert calls == [(3, True)] * 2
    calls.clear()
    form_terms(x, RowLayout(np.arange(2), CPU), Joint([Terms(f) for f in alike]))
    assert calls == [(2, False)] * 3


def test_results_hold_until_the_buffers_are_taken():
    K, N = 32, (16, 8)
    joint, other = (Joint([Terms(f) for f in layers_of(2, N, K, (4, 8))]) for _ in range(2))
    layout, x = RowLayout(np.arange(2), CPU), torch.randn(2, K)
    first = form_terms(x, layout, joint)
    turn = first.turn
    assert first.hold(turn)
    form_terms(x, layout, other)
    assert not first.hold(turn)
    again = form_terms(x * 2, layout, joint)
    assert again.hold(again.turn) and not again.hold(turn)


@pytest.mark.parametrize("change", ["scale", "rank", "distance", "memory", "members"])
def test_different_adapters_do_not_share_a_product(change):
    K, N = 32, 16
    a, b, c = side_by_side(3, K, N, 4)
    factors = {0: [a], 1: [b], 2: [c]}
    if change == "scale":
        factors[2] = [(*c[:2], 0.9)]
    elif change == "rank":
        factors[2] = [(c[0][:, :3], c[1][:3], c[2])]
    elif change == "distance":
        factors[2] = [(a[0], a[1], a[2])]
    elif change == "memory":
        factors[2] = [(c[0].clone(), c[1].clone(), c[2])]
    else:
        factors[2] = [c, a]
    assert Terms(factors).runs == ((0, 1), (2,))


def test_products_that_disagree_are_not_used(monkeypatch):
    """Where a larger tile or a batched product rounds otherwise, rows still come out alike."""
    K, N = 64, 48
    need_tiles(K, 8, N)
    factors = {g: [f] for g, f in enumerate(side_by_side(3, K, N, 8))}
    x, y = torch.randn(200, K), torch.randn(200, N)
    rows = np.arange(200) % 3
    expected = run(x, y, rows, factors)
    monkeypatch.setattr("fused_lora.ops.grouped.plan.stacks", lambda *args: False)
    monkeypatch.setattr("fused_lora.ops.grouped.plan.row_tiles", lambda *args: (invariant.LEAST,))
    assert torch.equal(run(x, y, rows, factors), expected)
    monkeypatch.setattr("fused_lora.ops.grouped.plan.row_tiles", lambda *args: (1,))
    one = run(x, y, rows, factors)
    alone = torch.cat([run(x[i : i + 1], y[i : i + 1], rows[i : i + 1], factors) for i in range(200)])
    assert torch.equal(one, alone)


def test_the_check_finds_a_product_whose_rows_depend_on_the_height(monkeypatch):
    need_tiles(96, 8, 40)
    mm = torch.mm

    def other_order(a, b):
        return mm(a, b) if len(a) != 16 else mm(a.double(), b.double()).to(a.dtype)

    invariant.row_tiles.cache_clear()
    monkeypatch.setattr(torch, "mm", other_order)
    tiles = invariant.row_tiles(96, 8, 40, torch.float32, CPU, 1)  # 128 too, where this BLAS has one code for both
    assert 16 not in tiles and tiles[-1] == 4
    monkeypatch.setattr(torch, "mm", lambda a, b: mm(a, b) * torch.linspace(1, 1.01, len(a))[:, None])
    assert invariant.row_tiles(97, 8, 40, torch.float32, CPU, 1) == (1,)
    invariant.row_tiles.cache_clear()


def test_nothing_happens_without_adapters():
    x, y = torch.randn(3, 8), torch.randn(3, 4)
    assert torch.equal(run(x, y, [-1, -1, -1], {}), y)
    assert torch.equal(run(x, y, [-1, 0, 0], {0: []}), y)
    assert torch.equal(run(x[:0], y[:0], [], {0: [term(*adapter(8, 4, 2))]}), y[:0])


def test_rows_are_compared_with_the_layout():
    factors = {0: [term(*adapter(8, 4, 2))]}
    with pytest.raises(ValueError, match="expected 2 rows"):
        lora_grouped_(torch.randn(3, 4), torch.randn(3, 8), RowLayout(np.array([0, 0]), CPU), Terms(factors))
    with pytest.raises(ValueError, match="one dimension"):
        RowLayout(np.zeros((2, 2), int), CPU)


def test_a_layout_serves_layers_of_all_shapes_and_both_grad_modes():
    layout = RowLayout(np.array([0, 1, -1, 1]), CPU)
    shapes = [(16, 8), (8, 16), (16, 8), (8, 8)]
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for K, N in shapes:
            factors = {0: [term(*adapter(K, N, 4))], 1: [term(*adapter(K, N, 4))]}
            x, y = torch.randn(4, K), torch.randn(4, N)
            with mode():
                ours = lora_grouped_(y.clone(), x, layout, Terms(factors))
            assert torch.equal(ours, run(x, y, [0, 1, -1, 1], factors))


def test_products_are_kept_for_those_who_can_ask_again():
    factors = {0: [term(*adapter(16, 8, 4))]}
    layout, joint = RowLayout(np.array([0]), CPU), Joint([Terms(factors)])
    x, y = torch.randn(1, 16), torch.randn(1, 8)
    for _ in range(3):
        assert torch.equal(lora_grouped_(y.clone(), x, layout, Terms(factors)), run(x, y, [0], factors))
        lora_grouped_(y.clone(), x, layout, joint)
    (chunk,) = layout.chunks((0,))
    assert len(chunk._products) == 1
