"""Many adapters in one batch on a CPU: right against float64, base rows untouched, and no row knows its neighbours."""

import numpy as np
import pytest
import torch

from fused_lora import reference
from fused_lora.ops import native
from fused_lora.ops.grouped import tiles
from fused_lora.ops.grouped.op import RowLayout, Terms, lora_grouped_
from fused_lora.testing.numeric import assert_close, assert_no_worse

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")


@pytest.fixture(params=["C", "torch"])
def way(request, monkeypatch):
    """Both ways to the terms."""
    if request.param == "torch":
        monkeypatch.setattr(native, "usable", lambda: False)
    elif not native.usable():
        pytest.skip(native.describe())
    return request.param


class Subclass(torch.Tensor):
    pass


def adapter(K, N, r, scale=0.7, dtype=torch.float32):
    A, B = torch.randn(r, K) / K**0.5, torch.randn(N, r)
    return A.to(dtype), B.to(dtype), scale


def term(A, B, scale):
    """An adapter as the operator takes it."""
    return A.t(), B.t().contiguous(), scale


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
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16])
def test_every_row_gets_the_terms_of_its_adapters(dtype, kept, K, N, way):
    groups = {g: [adapter(K, N, r, 0.3 + g, kept)] for g, r in enumerate((1, 4, 7, 16, 64))}
    groups[5] = [adapter(K, N, 8, 0.7, kept), adapter(K, N, 3, -1.25, kept)]
    rows = np.random.randint(-1, 7, 150).tolist()  # group 6 has no adapters here
    x, y = torch.randn(150, K).to(dtype), torch.randn(150, N).to(dtype)
    ours = run(x, y, rows, {g: [term(*a) for a in members] for g, members in groups.items()})
    wide = {g: [(A.float(), B.float(), s) for A, B, s in m] for g, m in groups.items()}
    assert_no_worse(ours, eager(x, y, rows, wide), exact(x, y, rows, groups), draws=True)
    base = [m for m, g in enumerate(rows) if g in (-1, 6)]
    assert torch.equal(reference.bits(ours[base]), reference.bits(y[base]))


def test_a_16_bit_result_is_rounded_once(way):
    K, N = 32, 16
    A, B, scale = adapter(K, N, 4)
    x, y = torch.randn(6, K).bfloat16(), torch.randn(6, N).bfloat16()
    ours = run(x, y, [0] * 6, {0: [term(A, B, scale)]})
    wide = run(x.float(), y.float(), [0] * 6, {0: [term(A, B, scale)]})
    assert torch.equal(ours, wide.bfloat16())


def test_a_wider_y_is_not_rounded_to_fp32_meanwhile(way):
    A, B, _ = adapter(64, 32, 4)
    x, y = torch.randn(9, 64), torch.randn(9, 32, dtype=torch.float64)
    assert torch.equal(run(x, y, [0] * 9, {0: [term(A, B, 0.0)]}), y)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("K, N", [(64, 48), (100, 36), (576, 192), (33, 31)])
def test_a_row_has_the_same_bits_in_every_batch(K, N, threads, way):
    """Alone, with any number of neighbours of its own and of other adapters, in any order, at any place."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ranks = (1, 2, 3, 5, 8, 16, 64)
        factors = {g: [term(*adapter(K, N, r))] for g, r in enumerate(ranks)}
        factors[7] = [factors[2][0], factors[5][0]]
        x, y = torch.randn(300, K), torch.randn(300, N)
        rows = np.random.randint(-1, 8, 300)
        alone = torch.stack([run(x[m : m + 1], y[m : m + 1], rows[m : m + 1], factors)[0] for m in range(300)])
        for size in (2, 3, 4, 5, 7, 16, 17, 33, 64, 130, 299, 300):
            pick = np.random.permutation(300)[:size]
            assert torch.equal(run(x[pick], y[pick], rows[pick], factors), alone[pick])
        for g in range(8):  # one adapter alone
            for size in (1, 4, 5, 20, 127, 128, 129, 600):
                pick = np.resize(np.flatnonzero(rows == g), size)
                assert torch.equal(run(x[pick], y[pick], rows[pick], factors), alone[pick])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("K, N", [(64, 5), (64, 48)])
def test_and_over_matrices_that_lie_in_any_way(K, N, way):
    """C does not read these, and a BLAS has other code for them."""
    factors = {g: [(A.t().contiguous(), B.t(), s)] for g, (A, B, s) in enumerate(adapter(K, N, r) for r in (9, 100))}
    x, y = torch.randn(60, K), torch.randn(60, N)
    rows = np.arange(60) % 2
    alone = torch.cat([run(x[m : m + 1], y[m : m + 1], rows[m : m + 1], factors) for m in range(60)])
    assert torch.equal(run(x, y, rows, factors), alone)


@pytest.mark.parametrize("way", ["torch"], indirect=True)
def test_a_trial_has_matrices_that_lie_as_those_of_an_adapter(way, monkeypatch):
    """A BLAS may look at how far the rows of an operand are apart."""
    strides, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: strides.add((a.stride(), b.stride())) or mm(a, b))
    tiles.height_of.cache_clear()
    run(torch.randn(4, 33), torch.randn(4, 17), [0] * 4, {0: [term(*adapter(33, 17, 5))]})
    assert strides == {((48, 1), (1, 33))}


@pytest.mark.parametrize("way", ["torch"], indirect=True)
def test_rows_one_by_one(way, monkeypatch):
    """Where a row's place in a tile makes a difference, rows still come out alike."""
    factors = {g: [term(*adapter(64, 48, 8))] for g in range(3)}
    x, y = torch.randn(200, 64), torch.randn(200, 48)
    rows = np.arange(200) % 3
    monkeypatch.setattr(tiles, "height_of", lambda *args: 1)
    one = run(x, y, rows, factors)
    alone = torch.cat([run(x[i : i + 1], y[i : i + 1], rows[i : i + 1], factors) for i in range(200)])
    assert torch.equal(one, alone)


def test_the_check_finds_a_product_whose_rows_depend_on_their_place(monkeypatch):
    mm = torch.mm
    tiles.height_of.cache_clear()
    monkeypatch.setattr(torch, "mm", lambda a, b: mm(a, b) * torch.linspace(1, 1.01, len(a))[:, None])
    assert tiles.height_of(97, 8, 40, torch.float32, CPU, 1) == 1
    tiles.height_of.cache_clear()


def test_autocast_is_none_of_its_business(way):
    x, y, factors = torch.randn(5, 8), torch.randn(5, 4), {0: [term(*adapter(8, 4, 2))]}
    with torch.autocast("cpu", torch.bfloat16):
        found = run(x, y, [0] * 5, factors)
    assert torch.equal(found, run(x, y, [0] * 5, factors))


def test_nothing_happens_without_adapters(way):
    x, y = torch.randn(3, 8), torch.randn(3, 4)
    assert torch.equal(run(x, y, [-1, -1, -1], {}), y)
    assert torch.equal(run(x, y, [-1, 0, 0], {0: []}), y)
    assert torch.equal(run(x[:0], y[:0], [], {0: [term(*adapter(8, 4, 2))]}), y[:0])


def test_a_backward_that_has_kept_y_is_refused(way):
    y, weight = torch.randn(2, 4), torch.ones(4, requires_grad=True)
    product = (weight * y).sum()
    lora_grouped_(y, torch.randn(2, 8), RowLayout(np.array([0, 0]), CPU), Terms({0: [term(*adapter(8, 4, 2))]}))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_groups_may_have_any_numbers(way):
    groups = {0: [adapter(8, 4, 2)], 10**12: [adapter(8, 4, 3)]}
    x, y, rows = torch.randn(4, 8), torch.randn(4, 4), [0, 10**12, -1, 10**15]
    found = run(x, y, rows, {g: [term(*a) for a in members] for g, members in groups.items()})
    assert_close(found, exact(x, y, rows, groups).float(), 11)


def test_what_does_not_fit_is_refused():
    factors = {0: [term(*adapter(8, 4, 2))]}
    layout = RowLayout(np.array([0, 0]), CPU)
    with pytest.raises(ValueError, match="expected 2 rows"):
        lora_grouped_(torch.randn(3, 4), torch.randn(3, 8), layout, Terms(factors))
    for N, K in ((3, 8), (4, 7)):
        with pytest.raises(ValueError, match=f"expected 8 and 4 columns.*got {K} and {N}"):
            lora_grouped_(torch.randn(2, N), torch.randn(2, K), layout, Terms(factors))
    (A_t, B_t, scale), other = factors[0][0], term(*adapter(8, 4, 2))
    for bad in ((A_t[:7], B_t), (A_t, B_t[:, :3]), (A_t, B_t[:1]), (A_t.double(), B_t.double())):
        with pytest.raises(ValueError, match=r"outputs: expected A\^T \(8, r\) and B\^T \(r, 4\) in torch.float32"):
            Terms({0: [other], 1: [(*bad, scale)]})
    for x, y in ((torch.randn(8), torch.randn(2, 4)), (torch.randn(2, 8), torch.ones(2, 4, dtype=torch.long))):
        with pytest.raises(ValueError, match="x, y: expected two dimensions of floating numbers"):
            lora_grouped_(y, x, layout, Terms(factors))
    for bad in ((A_t[0], B_t), (A_t[0, 0], B_t), (A_t, B_t[0]), (A_t, B_t[None]), (A_t.long(), B_t.long())):
        with pytest.raises(ValueError, match=r"outputs: expected A\^T \(\d, r\) and B\^T \(r, \d\) in .*, got"):
            Terms({0: [(*bad, scale)]})
    with pytest.raises(ValueError, match="columns: expected one for each of 2 outputs"):
        Terms(factors, factors)
    with pytest.raises(RuntimeError, match="no gradient"):
        lora_grouped_(torch.randn(2, 4), torch.randn(2, 8, requires_grad=True), layout, Terms(factors))
    with pytest.raises(ValueError, match="one dimension"):
        RowLayout(np.zeros((2, 2), int), CPU)


def test_a_layout_serves_layers_of_all_shapes_and_both_grad_modes(way):
    layout = RowLayout(np.array([0, 1, -1, 1]), CPU)
    shapes = [(16, 8), (8, 16), (16, 8), (8, 8)]
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        for K, N in shapes:
            factors = {0: [term(*adapter(K, N, 4))], 1: [term(*adapter(K, N, 4))]}
            x, y = torch.randn(4, K), torch.randn(4, N)
            with mode():
                ours = lora_grouped_(y.clone(), x, layout, Terms(factors))
            assert torch.equal(ours, run(x, y, [0, 1, -1, 1], factors))


def test_matrices_may_lie_in_any_way(way):
    """x, y and the factors transposed, apart or repeated; an adapter of rank 0."""
    K, N = 33, 17
    groups = {0: [adapter(K, N, 5), adapter(K, N, 0)], 1: [adapter(K, N, 3)]}
    x, y, rows = torch.randn(9, K), torch.randn(9, N), [0, 1, -1, 1, 0, 0, 0, 1, 0]
    expected = exact(x, y, rows, groups)

    def close(found):
        assert_close(found, expected.float(), K + 5)

    lying = {g: [(A.t(), B.t(), s) for A, B, s in members] for g, members in groups.items()}  # columns of B^T apart
    close(run(x, y, rows, lying))
    factors = {g: [term(*a) for a in members] for g, members in groups.items()}
    close(run(x.t().contiguous().t(), y, rows, factors))
    layout = RowLayout(np.array(rows), CPU)
    for wide in (torch.empty(N, 9).t(), torch.empty(9, 2 * N)[:, ::2], torch.empty(9, N + 5)[:, :N]):
        close(lora_grouped_(wide.copy_(y), x, layout, Terms(factors)))
    same = run(x[:1].expand(9, K), y, rows, factors)
    assert_close(same, exact(x[:1].expand(9, K), y, rows, groups).float(), K + 5)


@pytest.mark.parametrize("turned", ["x", "y", "A", "B"])
def test_a_negative_view_is_read_and_written_as_its_numbers(turned, way):
    """Its memory holds them with the other sign."""
    A_t, B_t, scale = term(*adapter(33, 17, 3))
    given, rows = {"x": torch.randn(4, 33), "y": torch.randn(4, 17), "A": A_t, "B": B_t}, [0, -1, 0, 0]

    def found(x, y, A, B):
        return lora_grouped_(y, x, RowLayout(np.array(rows), CPU), Terms({0: [(A, B, scale)]}))

    expected = found(**{**given, "y": given["y"].clone()})
    given[turned] = torch._neg_view(-given[turned])
    assert_close(found(**given), expected, 36)  # another way may take it


def test_what_torch_would_take_is_refused_too():
    """Without numbers, of overlapping memory, or with a gradient that would be lost."""
    A_t, B_t, scale = term(*adapter(8, 4, 2))
    x, y, layout, terms = (
        torch.randn(2, 8),
        torch.randn(2, 4),
        RowLayout(np.array([0, 0]), CPU),
        Terms({0: [(A_t, B_t, scale)]}),
    )
    before = y.clone()
    for name, call in {
        "y, x, layout, terms: expected": (None, x, layout, terms),
        "y, x, layout, terms: .*, got Tensor, Tensor, list, Terms": (y, x, [0, 0], terms),
        "x, y: expected one device": (y, x.to("meta"), layout, terms),
        "x, y: expected two dimensions.*": (y, x.to_sparse(), layout, terms),
        "y: expected memory of its own": (y[:1].expand(2, 4), x, layout, terms),
        "y: expected memory of its own for": (torch.zeros(6).as_strided((2, 4), (2, 1)), x, layout, terms),
        "terms, layout: expected them on cpu": (
            y.double(),
            x,
            RowLayout(np.array([0, 0]), torch.device("meta")),
            terms,
        ),
    }.items():
        with pytest.raises((ValueError, TypeError), match=f"^{name}"):
            lora_grouped_(*call)
    with pytest.raises(RuntimeError, match="terms: .*no gradient"):
        lora_grouped_(y, x, layout, Terms({0: [(A_t.clone().requires_grad_(), B_t, scale)]}))
    assert torch.equal(y, before)
    for wrong in (None, [0, 0], np.array([0.0, 0.0])):
        with pytest.raises(TypeError, match="group_of_row: expected"):
            RowLayout(wrong, CPU)
    for wrong in (None, [(A_t, B_t, scale)]):
        with pytest.raises(TypeError, match="outputs: expected a mapping"):
            Terms(wrong)
    for bad in ((A_t, B_t.to("meta")), (A_t.to_sparse(), B_t), (A_t, None), (A_t.tolist(), B_t)):
        with pytest.raises((ValueError, TypeError), match="outputs: expected"):
            Terms({0: [(*bad, scale)]})
    for wrong in (None, "x", 10**400, 1e39, float("nan")):
        with pytest.raises((ValueError, TypeError), match="scaling: expected"):
            Terms({0: [(A_t, B_t, wrong)]})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace`:DeprecationWarning")
def test_c_reads_and_writes_no_memory_that_is_not_there(monkeypatch):
    """As that of another default device, of what Dynamo traces, and of subclasses."""
    A_t, B_t, scale = term(*adapter(8, 4, 2))
    x, y, rows = torch.randn(2, 8), torch.randn(2, 4), [0, -1]
    expected = run(x, y, rows, {0: [(A_t, B_t, scale)]})
    with torch.device("meta"):
        assert torch.equal(run(x, y, rows, {0: [(A_t, B_t, scale)]}), expected)
    compiled = torch.compile(run, backend="eager")
    assert torch.equal(compiled(x, y, rows, {0: [(A_t, B_t, scale)]}), expected)
    monkeypatch.setattr(native, "add_terms", lambda *fields: pytest.fail("read by C"))
    traced = torch.jit.trace(lambda x, y: run(x, y, rows, {0: [(A_t, B_t, scale)]}), (x, y), check_trace=False)
    assert_close(traced(x, y), expected, 10)
    for i in range(4):
        x_, y_, A_, B_ = (t.as_subclass(Subclass) if i == n else t for n, t in enumerate((x, y, A_t, B_t)))
        assert_close(run(x_, y_, rows, {0: [(A_, B_, scale)]}).as_subclass(torch.Tensor), expected, 10)
