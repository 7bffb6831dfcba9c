"""The LoRA term alone: as exact as PEFT's sum, y neither kept nor changed, and what torch asks of an operator."""

import itertools
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import reference
from fused_lora.functional import lora_linear, lora_term
from fused_lora.ops import guard
from fused_lora.ops.linear import eager, launch, plan
from fused_lora.ops.linear.op import draw_seeds
from fused_lora.ops.term.op import _lora_term, _lora_term_backward
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers.seeds import shifted
from helpers.thorough import pairwise, sampled
from helpers.wrapped import INDUCTOR

pytestmark = pytest.mark.numeric

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = [(1, 17, 129), (17, 129, 1), (33, 200, 17), (129, 1, 33)]
# y, x, adapters
DTYPES = [(F32, F32, F32), (BF16, BF16, F32), (BF16, BF16, BF16), (F16, F16, F32), (BF16, F32, F32), (F32, BF16, F32)]


def arguments(M=5, K=20, N=11, ranks=(2, 3), dtype=F32, dropout=(0.3, 0.0), bias=False, grad=True):
    """y, x, A, B, scaling, dropout, seeds, bias: as :func:`lora_term` takes them."""
    y, x = (torch.randn(M, columns, dtype=dtype, requires_grad=grad) for columns in (N, K))
    A = [torch.randn(r, K, dtype=dtype, requires_grad=grad) for r in ranks]
    B = [torch.randn(N, r, dtype=dtype, requires_grad=grad) for r in ranks]
    seeds = draw_seeds(len(ranks), x.device) if any(dropout) else None
    b = torch.randn(N, dtype=dtype, requires_grad=grad) if bias else None
    return y, x, A, B, [0.5, -2.0][: len(ranks)], list(dropout), seeds, b


def in_order_of_the_operator(y, x, A, B, s, p, seeds, bias):
    return y, x, bias, A, B, s, p, seeds


def by_peft(y, x, A, B, scaling, dropout, seeds, bias=None):
    """lora.Linear.forward after its base layer, with the masks that these seeds stand for."""
    result = y
    for i, (a, b, s, p) in enumerate(zip(A, B, scaling, dropout, strict=True)):
        x = x.to(a.dtype)
        dropped = x
        if p:
            dropped = x * reference.dropout_mask(seeds[i], x.shape, p, x.device) * reference.keep_scale(p)
        result = result + (dropped @ a.t()) @ b.t() * s
    return (result if bias is None else result + bias).to(y.dtype)


def draw(dtypes, size, ranks, dropout, device="cpu"):
    """(ours, PEFT's, exact) of the result and of every gradient, for one draw of everything."""
    (M, K, N), (y_dtype, x_dtype, adapter_dtype) = size, dtypes

    def numbers(*shape, dtype, scale=1.0):
        return (torch.randn(shape) * scale).to(device, dtype).requires_grad_()

    y, x = numbers(M, N, dtype=y_dtype), numbers(M, K, dtype=x_dtype)
    A = [numbers(r, K, dtype=adapter_dtype, scale=K**-0.5) for r in ranks]
    B = [numbers(N, r, dtype=adapter_dtype, scale=r**-0.5) for r in ranks]
    scaling, g = [2.0, 0.75, -1.5][: len(ranks)], torch.randn(M, N).to(device, y_dtype)
    seeds = draw_seeds(len(ranks), torch.device("cpu")).to(device) if any(dropout) else None
    rest = scaling, dropout, seeds
    found, wanted = [], [y, x, *A, *B]
    for function in (lora_term, by_peft):
        result = function(y, x, A, B, *rest)
        assert result.dtype == y_dtype
        found.append([result.detach(), *torch.autograd.grad(result, wanted, g)])
    y_, x_, *adapters = (t.detach() for t in wanted)
    exact, _ = reference.lora_term(y_, x_, adapters[: len(A)], adapters[len(A) :], *rest)
    dx, dA, dB = reference.lora_term_backward(g, x_, adapters[: len(A)], adapters[len(A) :], *rest)
    names = ["result", "dy", "dx", *(f"dA {i}" for i in range(len(A))), *(f"dB {i}" for i in range(len(A)))]
    assert torch.equal(found[0][1], g)
    return dict(zip(names, zip(*found, [exact, g.double(), dx, *dA, *dB], strict=True), strict=True))


def assert_as_exact_as_peft(draws):
    for name in draws[0]:
        results = [torch.stack(tensors) for tensors in zip(*(found[name] for found in draws), strict=True)]
        assert results[0].dtype == results[1].dtype, name
        assert_no_worse(*results, name=name, draws=True)


@pairwise(dtypes=DTYPES, size=SIZES, r=[1, 3, 24, 100], p=[0.0, 0.1, 0.9])
def test_error_against_float64_is_no_larger_than_that_of_peft(dtypes, size, r, p):
    assert_as_exact_as_peft([draw(dtypes, size, [r], [p]) for _ in range(DRAWS)])


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [(0.0, 0.0, 0.0), (0.3, 0.0, 0.5), (1.0, 0.1, 0.0)], ids=str)
def test_several_adapters_with_masks_of_their_own(dtypes, dropout):
    assert_as_exact_as_peft([draw(dtypes, (33, 40, 29), [2, 24, 5], list(dropout)) for _ in range(DRAWS)])


@pytest.mark.parametrize("dropout", [(0.0, 0.0), (0.3, 0.0), (1.0, 0.1)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_in_float64(dropout, bias):
    y, x, A, B, s, p, seeds, b = arguments(M=4, K=7, N=5, dtype=torch.float64, dropout=dropout, bias=bias)

    def f(y, x, A0, A1, B0, B1, *b):
        return lora_term(y, x, [A0, A1], [B0, B1], s, p, seeds, *b)

    tensors = (y, x, *A, *B, *([b] if bias else []))
    assert torch.autograd.gradcheck(f, tensors)
    assert torch.autograd.gradgradcheck(f, tensors)


def test_second_derivatives_of_a_frozen_lora_A():
    """x is not kept then: they reach it through S."""
    y, x, A, B, s, p, seeds, _ = arguments()
    frozen, found = [a.detach() for a in A], []
    for function in (lora_term, by_peft):
        first = torch.autograd.grad(function(y, x, frozen, B, s, p, seeds).square().sum(), [x, B[0]], create_graph=True)
        found.append(torch.autograd.grad(sum(t.square().sum() for t in first), [y, x, *B]))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, terms=4 * (5 + 20 + 11 + 5))


@pytest.mark.parametrize("way", ["is_grads_batched", "vmap"])
def test_batches_of_gradients(way):
    y, x, A, B, s, p, seeds, _ = arguments()
    g, found = torch.randn(3, 5, 11), []
    for function in (lora_term, by_peft):
        out = function(y, x, A, B, s, p, seeds)
        if way == "vmap":
            found.append(torch.func.vmap(partial(torch.autograd.grad, out, (y, x, *A, *B)))(g))
        else:
            found.append(torch.autograd.grad(out, (y, x, *A, *B), g, is_grads_batched=True))
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs, terms=5 + 20 + 11 + 5)


def test_what_the_backward_does_not_read_may_change():
    y, x, A, B, s, p, seeds, _ = arguments(ranks=(3,), dropout=(0.3,), grad=False)
    B[0].requires_grad_()
    expected = torch.autograd.grad(lora_term(y, x, A, B, s, p, seeds).sum(), B)
    out = lora_term(y, x, A, B, s, p, seeds)
    with torch.no_grad():
        A[0].neg_(), y.neg_(), B[0].neg_()
    assert torch.equal(*expected, *torch.autograd.grad(out.sum(), B))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("wide_x", [False, True])
def test_second_derivatives_are_those_of_the_sum(dtype, wide_x):
    found = []
    for function in (lora_term, by_peft):
        torch.manual_seed(shifted(0))
        y, x, A, B, s, p, seeds, _ = arguments(dtype=dtype)
        x = x.detach().to(F32 if wide_x else dtype).requires_grad_()
        A, B = [[t.detach().float().requires_grad_() for t in ts] for ts in (A, B)]
        first = torch.autograd.grad(function(y, x, A, B, s, p, seeds).square().sum(), [y, x, *A], create_graph=True)
        found.append(torch.autograd.grad(sum(t.float().square().sum() for t in first), [y, x, *A, *B]))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        if dtype == F32:  # sums over the rows, columns and ranks, twice
            assert_close(ours, theirs, terms=4 * (5 + 20 + 11 + 5))
        else:  # some six roundings to bf16 on the way, and no more
            assert (ours.double() - theirs.double()).abs().max() <= 8 * torch.finfo(dtype).eps * theirs.abs().max()


def test_it_is_the_linear_without_its_base():
    y, x, A, B, s, p, seeds, b = arguments(bias=True, grad=False)
    W = torch.randn(11, 20)
    term, linear = lora_term(x @ W.t(), x, A, B, s, p, seeds, b), lora_linear(x, W, b, A, B, s, p, seeds)
    assert_close(term, linear, terms=20 + 20 + 3)


CASES = [
    dict(dropout=(0.0, 0.0)),
    dict(dropout=(0.3, 0.1), bias=True),
    dict(ranks=(4,), dropout=(0.5,)),
    dict(M=1, K=1, N=1, ranks=(1,), dropout=(0.2,)),
    dict(dropout=(1.0, 1.0)),
    dict(dtype=torch.float64),
    dict(grad=False, bias=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    args = in_order_of_the_operator(*arguments(**case))
    torch.library.opcheck(_lora_term, args)
    y, x, b, A, B, s, p, seeds = (t.detach() if isinstance(t, torch.Tensor) else t for t in args)
    A, B = [t.detach() for t in A], [t.detach() for t in B]
    out, S = _lora_term(y, x, b, A, B, s, p, seeds)
    g, n = torch.randn_like(out), len(A)
    for needs in ([True] * (2 * n + 1) + [b is not None], [False] + [True] * (2 * n) + [False]):
        backward = (g, x, A, B, S, s, p, seeds, x.dtype, None if b is None else b.dtype, needs)
        torch.library.opcheck(_lora_term_backward, backward)


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_torch_compile_fullgraph(p):
    y, x, A, B, _, _, _, b = arguments(M=9, ranks=(3,), dropout=(0.0,), bias=True)
    seeds = draw_seeds(1, x.device)

    def f(y, x):
        return lora_term(y, x, A, B, [2.0], [p], seeds if p else None, b).relu()

    grads = []
    for run in (f, torch.compile(f, fullgraph=True, backend=INDUCTOR)):
        out = run(y, x)
        grads.append([out.detach(), *torch.autograd.grad(out.sum(), (y, x, *A, *B, b))])
    for plain, compiled in zip(*grads, strict=True):
        assert_close(plain, compiled, terms=100)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_the_gradients_that_are_needed_are_computed(needed, monkeypatch):
    y, x, A, B, s, p, seeds, _ = arguments(ranks=(3,), dropout=(0.4,), grad=False)
    for tensor, need in zip((y, x, A[0], B[0]), needed, strict=True):
        tensor.requires_grad_(need)
    out = lora_term(y, x, A, B, s, p, seeds)
    assert out.requires_grad == any(needed)
    if not any(needed):
        return
    seen, original = [], eager.lora_linear_backward
    monkeypatch.setattr(eager, "lora_linear_backward", lambda *a: seen.append(a[9:12]) or original(*a))
    out.sum().backward()
    assert seen == ([(needed[1], [needed[2]], [needed[3]])] if any(needed[1:]) else [])
    assert [t.grad is not None for t in (y, x, A[0], B[0])] == list(needed)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_neither_y_nor_a_mask_nor_a_copy_of_x_is_saved(p):
    saved = []
    y, x, A, B, s, _, _, _ = arguments(M=64, K=128, N=96, ranks=(4,), dropout=(0.0,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        q, k = (lora_term(y, x, A, B, s, [p]) for _ in range(2))
    (q + k).sum().backward()
    assert {t.data_ptr() for t in saved if t.numel() >= y.numel()} == {x.data_ptr()}


@pytest.mark.parametrize("route", ["direct", "operator"])
def test_y_is_not_changed_and_the_result_may_be(route):
    y, x, A, B, s, p, seeds, b = arguments(bias=True)
    before = y.detach().clone()
    if route == "direct":
        out = lora_term(y.reshape(1, 5, 11), x.reshape(1, 5, 20), A, B, s, p, seeds, b)
    else:
        out, _ = _lora_term(*in_order_of_the_operator(y, x, A, B, s, p, seeds, b))
    out.relu_().sum().backward()
    assert torch.equal(y, before) and (y.grad != 0).sum() == (out > 0).sum()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_with_the_same_mask(use_reentrant):
    y, x, A, B, _, _, _, _ = arguments(M=30, ranks=(3,), dropout=(0.0,))

    def f(y, x):
        return lora_term(y, x, A, B, [2.0], [0.5]).square()

    grads = []
    for run in (f, lambda y, x: checkpoint(f, y, x, use_reentrant=use_reentrant)):
        torch.manual_seed(shifted(5))
        out = run(y, x)
        grads.append([out.detach(), *torch.autograd.grad(out.sum(), (y, x, *A, *B))] if not use_reentrant else [])
        if use_reentrant:  # takes backward() alone
            for leaf in (y, x, *A, *B):
                leaf.grad = None
            out.sum().backward()
            grads[-1] = [out.detach()] + [leaf.grad.clone() for leaf in (y, x, *A, *B)]
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_call_draws_the_seeds_that_the_linear_draws():
    y, x, A, B, s, _, _, _ = arguments(M=30, ranks=(3,), dropout=(0.0,), grad=False)
    W = torch.zeros(11, 20)
    torch.manual_seed(shifted(1))
    ours = lora_term(torch.zeros(30, 11), x, A, B, s, [0.5])
    torch.manual_seed(shifted(1))
    assert_close(ours, lora_linear(x, W, None, A, B, s, [0.5]), terms=20 + 3)
    state = torch.get_rng_state()
    lora_term(y, x, A, B, s, [0.0])
    assert torch.equal(torch.get_rng_state(), state)  # p = 0 draws nothing


@pytest.mark.parametrize("y_dtype", [BF16, F32])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_autocast_is_as_exact_as_that_of_peft(dtype, y_dtype):
    """x and the adapters of PEFT are rounded to the autocast dtype, the sum is in the dtype of y."""
    draws = []
    for _ in range(DRAWS):
        x = torch.randn(9, 20, requires_grad=True)
        y = torch.randn(9, 11).to(y_dtype).requires_grad_()
        A, B = torch.randn(3, 20, requires_grad=True), torch.randn(11, 3, requires_grad=True)
        g, found = torch.randn(9, 11).to(y_dtype), []
        for function in (lora_term, by_peft):
            with torch.autocast("cpu", dtype=dtype):
                out = function(y, x, [A], [B], [2.0], [0.0], None)
            found.append([out.detach(), *torch.autograd.grad(out, (y, x, A, B), g)])
        exact, _ = reference.lora_term(y.detach(), x.detach(), [A.detach()], [B.detach()], [2.0], [0.0])
        dx, dA, dB = reference.lora_term_backward(g, x.detach(), [A.detach()], [B.detach()], [2.0], [0.0])
        right = [exact, g.double(), dx, *dA, *dB]
        draws.append(dict(zip(("result", "dy", "dx", "dA", "dB"), zip(*found, right, strict=True), strict=True)))
    assert_as_exact_as_peft(draws)


@pytest.mark.parametrize("y_dtype", [BF16, F32])
@pytest.mark.parametrize("ranks, dropout", [([16], [0.1]), ([4, 40], [0.0, 0.5])], ids=str)
def test_fp32_adapters_under_autocast_through_the_kernels(ranks, dropout, y_dtype, device, kernels_on):
    """They are rounded without copies of theirs in the graph, and their gradients are not rounded."""
    M, K, N = 33, 64, 48
    x, y = (torch.randn(size, device=device) for size in ((M, K), (M, N)))
    y = y.to(y_dtype)
    A = [torch.randn(r, K, device=device) * K**-0.5 for r in ranks]
    B = [torch.randn(N, r, device=device) for r in ranks]
    seeds = draw_seeds(len(ranks), device)
    leaves = [t.requires_grad_() for t in (y, x, *A, *B)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast(device.type, BF16):
            out = lora_term(y, x, A, B, [2.0, 0.5][: len(ranks)], dropout, seeds)
        g = torch.randn_like(out)
        found = [out, *torch.autograd.grad(out, leaves, g)]
    x, *adapters = (t.detach().bfloat16() for t in leaves[1:])
    rest = adapters[: len(A)], adapters[len(A) :], [2.0, 0.5][: len(ranks)], dropout, seeds
    exact, _ = reference.lora_term(y.detach(), x, *rest)
    dx, dA, dB = reference.lora_term_backward(g, x, *rest)
    assert out.dtype is y_dtype and all(t.dtype is F32 for t in found[2:])
    for ours, true in zip(found, (exact, g.double(), dx, *dA, *dB), strict=True):
        assert (ours.double() - true).abs().max() <= 2**-6 * true.abs().max()


@pytest.mark.parametrize("shape", [(20,), (0, 20), (3, 4, 20), (2, 0, 5, 20), (2, 3, 4, 20)], ids=str)
def test_any_number_of_leading_dimensions_and_none_of_rows(shape):
    _, _, A, B, s, _, _, _ = arguments(grad=False, dropout=(0.0, 0.0))
    x, y = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 11, requires_grad=True)
    out = lora_term(y, x, A, B, s, [0.3, 0.0])
    assert out.shape == y.shape
    out.sum().backward()
    assert x.grad.shape == x.shape and torch.equal(y.grad, torch.ones_like(y))


def test_strided_arguments_give_the_same_as_contiguous_ones():
    y, x, A, B, s, p, seeds, _ = arguments(M=8, grad=False)
    strided = [torch.randn(t.shape[0], 2 * t.shape[1])[:, ::2].copy_(t) for t in (y, x, *A, *B)]
    strided[0] = y.t().contiguous().t()
    out = lora_term(strided[0], strided[1], strided[2:4], strided[4:], s, p, seeds)
    assert_close(out, lora_term(y, x, A, B, s, p, seeds), terms=20 + 3)


def test_no_adapter_leaves_y():
    y, x, *_ = arguments()
    assert lora_term(y, x, [], [], []) is y
    assert torch.equal(lora_term(y, x, [], [], [], bias=torch.ones(11)), y + 1)


BAD = {
    "y: expected the rows": dict(y=torch.randn(4, 11)),
    "y: expected at least": dict(y=torch.tensor(1.0)),
    "bias: expected": dict(bias=torch.randn(3)),
    "adapter 1: expected lora_A": dict(lora_A=[torch.randn(2, 20), torch.randn(3, 21)]),
    "adapter 0: expected lora_A": dict(lora_B=[torch.randn(11, 5), torch.randn(11, 3)]),
    "one entry per adapter": dict(scaling=[1.0]),
    "dropout: expected": dict(dropout=[0.5, 1.5]),
    "scaling: expected": dict(scaling=[1.0, float("nan")]),
    "seeds: expected": dict(seeds=torch.zeros(3, dtype=torch.int64)),
    "y: expected device": dict(y=torch.empty(5, 11, device="meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_shapes_and_values_name_the_argument(message):
    names = ("y", "x", "lora_A", "lora_B", "scaling", "dropout", "seeds", "bias")
    args = dict(zip(names, arguments(grad=False), strict=True))
    with pytest.raises(ValueError, match=message):
        lora_term(**{**args, **BAD[message]})


def test_bad_types_name_the_argument():
    y, x, A, B, s, p, seeds, _ = arguments(grad=False)
    for bad, name in (((y, x.long()), "x"), ((y.long(), x), "y"), ((None, x), "y"), ((y, 3), "x")):
        with pytest.raises(TypeError, match=f"{name}: expected"):
            lora_term(*bad, A, B, s, p, seeds)
    with pytest.raises(TypeError, match="adapter 0"):
        lora_term(y, x, [A[0].int(), A[1]], B, s, p, seeds)
    lists = ((A, B, 2.0), "scaling"), ((A, None, s), "lora_B"), ((None, B, s), "lora_A"), ((A, B, s, 0.1), "dropout")
    for bad, name in lists:
        with pytest.raises(TypeError, match=f"^{name}: expected a list with an entry for each adapter, got"):
            lora_term(y, x, *bad)
    state = torch.get_rng_state()
    for bad in ("2", [1.0], torch.ones(1)):
        with pytest.raises(TypeError, match="^scaling: expected a number for each adapter, got"):
            lora_term(y, x, A, B, [bad, 1.0], p)
    for bad in ("2", 2, [1.0], x.numpy()):
        for given, name in (({"bias": bad}, "bias"), ({"lora_B": [bad, B[1]]}, "adapter 0")):
            with pytest.raises(TypeError, match=f"^{name}: expected"):
                lora_term(**{**dict(y=y, x=x, lora_A=A, lora_B=B, scaling=s, dropout=p), **given})
    assert torch.equal(torch.get_rng_state(), state)  # no seed is drawn for a call that is refused


@pytest.mark.parametrize("which", ["y", "x", "lora_A", "lora_B"])
def test_forward_mode_is_refused(which):
    """It would otherwise return a tangent of zeros."""
    y, x, A, B, s, p, seeds, _ = arguments(grad=False)
    names = dict(y=y, x=x, lora_A=A[0], lora_B=B[0])

    def f(tensor):
        given = names | {which: tensor}
        return lora_term(given["y"], given["x"], [given["lora_A"], A[1]], [given["lora_B"], B[1]], s, p, seeds)

    tensor = names[which]
    with pytest.raises(NotImplementedError, match="lora_term has no forward-mode derivative"), fwAD.dual_level():
        f(fwAD.make_dual(tensor, torch.ones_like(tensor)))
    for transformed in (
        lambda: torch.func.grad(lambda t: f(t).sum())(tensor),
        lambda: torch.func.vmap(f)(tensor[None]),
    ):
        with pytest.raises(NotImplementedError, match="lora_term does not run inside torch.func transforms"):
            transformed()


def test_meta_tensors():
    y, x, A, B, s, p, _, b = arguments(bias=True)
    y, x, b = (t.detach().to("meta").requires_grad_() for t in (y, x, b))
    A, B = [[t.detach().to("meta").requires_grad_() for t in ts] for ts in (A, B)]
    out = lora_term(y, x, A, B, s, [0.5, 0.0], None, b)
    assert out.is_meta and out.shape == y.shape
    out.sum().backward()
    assert all(t.grad.shape == t.shape for t in (y, x, b, *A, *B))


@pytest.mark.parametrize("needs", [("x", "A", "B"), ("A",), ("x",), ("B",)], ids="".join)
def test_flops_are_those_of_the_formulas(needs):
    M, K, N, ranks = 5, 6, 4, (2, 3)
    y, x = torch.randn(M, N), torch.randn(M, K)
    A, B = [torch.randn(r, K) for r in ranks], [torch.randn(N, r) for r in ranks]
    for name, tensors in (("x", [x]), ("A", A), ("B", B)):
        for tensor in tensors if name in needs else ():
            tensor.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = lora_term(y, x, A, B, [1.0, 2.0], [0.5, 0.0])
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * M * (K + N) * sum(ranks)
    per_rank = N if {"x", "A"} & set(needs) else 0  # dS
    per_rank += K * (("x" in needs) + ("A" in needs)) + N * ("B" in needs)
    assert counter.get_total_flops() - forward == 2 * M * per_rank * sum(ranks)


# ---- the kernel route


def check_one(found, size, ranks):
    """One draw: 16-bit results by the error rule, fp32 ones by what their sums can lose."""
    M, K, N = size
    for name, (ours, theirs, exact) in found.items():
        if ours.dtype == F32:
            assert_close(ours, exact, terms=M + K + N + ranks, name=name)
        else:
            assert_no_worse(ours, theirs, exact, name=name)


SIZES = [((1, 33, 17), (0.0,)), ((40, 65, 70), (0.1,)), ((40, 65, 70), (0.3, 0.0))]
BY_KERNELS = [(d, *SIZES[(i + j) % 3]) for i, d in enumerate(DTYPES) if d[0] == d[1] for j in range(3)]


@pytest.mark.parametrize("dtypes, size, dropout", sampled(BY_KERNELS, 3), ids=str)
def test_kernels_are_as_exact_as_peft(dtypes, size, dropout, device, kernels_on, kernel_memory):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = draw(dtypes, size, [8, 3][: len(dropout)], list(dropout), device)
    check_one(found, size, 11)
    assert {key[0] for key in guard.verdicts()} == {"term", "backward"} and all(guard.verdicts().values())


def test_kernels_add_a_bias_and_take_strides(device, kernels_on, kernel_memory):
    y, x, A, B, s, p, seeds, b = arguments(M=40, bias=True, grad=False)
    args = [y.t().contiguous().t(), torch.randn(40, 40)[:, ::2].copy_(x)]
    args = [t.to(device) for t in args]
    A, B = [[t.to(device) for t in ts] for ts in (A, B)]
    out = lora_term(*args, A, B, s, p, seeds.to(device), b.to(device))
    exact, _ = reference.lora_term(*args, A, B, s, p, seeds.to(device), b.to(device))
    assert_close(out, exact, terms=20 + 3)
    assert all(guard.verdicts().values()) and guard.verdicts()


def test_y_and_x_of_two_dtypes_take_the_eager_path(device, kernels_on):
    check_one(draw((BF16, F32, F32), (20, 33, 17), [4], [0.0], device), (20, 33, 17), 4)
    assert not guard.verdicts()


@pytest.mark.parametrize("part", ["lora_term", "lora_linear_backward"])
def test_a_kernel_that_is_off_is_dropped_before_its_first_use(part, device, kernels_on, monkeypatch):
    right = getattr(launch, part)

    def off(*arguments):
        run = right(*arguments)
        return lambda *a: (run(*a)[0] * 1.01, *run(*a)[1:])

    monkeypatch.setattr(launch, part, off)
    with pytest.warns(UserWarning, match="(term|backward).*is dropped.*result 0 is off"):
        found = draw((F32, F32, F32), (40, 33, 17), [4], [0.1], device)
    check_one(found, (40, 33, 17), 4)
    assert sorted(guard.verdicts().values()) == [False, True]


@pytest.mark.parametrize("dtype, adapter_dtype", [d[1:] for d in DTYPES if d[0] == d[1]], ids=str)
def test_what_a_plan_launches_is_compiled_ahead(dtype, adapter_dtype, device, kernels_on):
    from fused_lora.kernels.config import candidates

    upcast = dtype != adapter_dtype
    listed = {op: {c for c, _, u in candidates(op, dtype, 90) if u == upcast} for op in ("shrink", "expand")}
    for M, K, r, p in itertools.product((1, 20, 70, 8192), (64, 16384), (8, 40, 100), (0.0, 0.1)):
        case = plan.Case(M, 4096, K, device, dtype, ((r, adapter_dtype, adapter_dtype),), (p,), None)
        chosen = plan.planned("term", case, case.outputs, case.inputs)
        for op, config in (("expand", chosen.product), ("shrink", chosen.shrink)):
            assert replace(config, SPLIT_K=min(config.SPLIT_K, 2)) in listed[op], (M, K, r, p)


def test_the_eager_switch_reaches_the_term(device, kernels_on, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_PLAN", "eager")
    draw((F32, F32, F32), (40, 33, 17), [4], [0.1], device)
    assert not guard.verdicts()


@pytest.mark.parametrize("seeds", [[1], (1,), 3, "a"], ids=str)
def test_seeds_that_are_no_tensor_are_refused(seeds):
    x, W, A, B = torch.randn(4, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    with pytest.raises(TypeError, match="^seeds: expected an int64 tensor, got"):
        lora_term(torch.zeros(4, 6), x, [A], [B], [1.0], [0.5], seeds)
    with pytest.raises(TypeError, match="^seeds: expected an int64 tensor, got"):
        lora_linear(x, W, None, [A], [B], [1.0], [0.5], seeds)
