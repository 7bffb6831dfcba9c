"""The operator: as exact as PEFT's own layer, right gradients, nothing stored but x, and what torch asks of an op."""

import itertools
import warnings
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fused_lora import reference
from fused_lora.ops import native
from fused_lora.ops.linear import eager as eager_path
from fused_lora.ops.linear.op import (
    _as_autocast,
    _autocasts,
    _lora_linear,
    _lora_linear_backward,
    draw_seeds,
    lora_linear,
)
from fused_lora.ops.term.op import lora_term
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers.seeds import shifted
from helpers.thorough import pairwise
from helpers.wrapped import INDUCTOR

pytestmark = pytest.mark.numeric

SIZES = [(1, 17, 129), (17, 129, 1), (129, 1000, 17), (17, 17, 1000), (129, 1, 129)]
RANKS = [1, 3, 24, 100]
DROPOUTS = [0.0, 0.1, 0.5, 0.9]


class GivenMask(nn.Module):
    """Dropout with a mask that was made elsewhere."""

    def __init__(self, mask, p):
        super().__init__()
        self.mask, self.scale = mask, reference.keep_scale(p)

    def forward(self, x):
        return x * self.mask * self.scale


def peft_layer(K, N, r, bias, dtype, adapter_dtype):
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.1, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = Linear(nn.Linear(K, N, bias=bias), "default", config, r=r, lora_alpha=2 * r)
    layer.base_layer.to(dtype).requires_grad_(False)
    for part in (layer.lora_A, layer.lora_B):
        part.to(adapter_dtype)
    return layer


DTYPES = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16",) * 2]


@pairwise(dtypes=DTYPES, size=SIZES, r=RANKS, p=DROPOUTS)
def test_error_against_float64_is_no_larger_than_that_of_peft(dtypes, size, r, p):
    draws = [_draw_against_peft(*(getattr(torch, d) for d in dtypes), size, r, p) for _ in range(DRAWS)]
    for name, results in zip(("y", "dx", "dA", "dB"), zip(*draws, strict=True), strict=True):
        assert_no_worse(*(torch.stack(tensors) for tensors in zip(*results, strict=True)), name=name, draws=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_an_adapter_of_rank_0_adds_nothing(p):
    x, W, A, B = torch.randn(5, 40, requires_grad=True), torch.randn(30, 40), torch.randn(0, 40), torch.randn(30, 0)
    y = lora_linear(x, W, None, [A], [B], [0.5], [p], torch.tensor([3]) if p else None)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert_close(y, x @ W.t(), terms=100)
    assert_close(dx, torch.ones(5, 30) @ W, terms=100)


@pytest.mark.parametrize("view", ["beside it", "negative"])
def test_a_view_like_the_transpose_of_a_frozen_parameter(view):
    memory = torch.randn(48)
    parameter = nn.Parameter(memory[:24].view(4, 6), requires_grad=False)
    W = parameter.as_strided((6, 4), (1, 6), 24) if view == "beside it" else torch._neg_view(parameter).t()
    x, A, B = torch.randn(5, 4, requires_grad=True), torch.randn(2, 4), torch.randn(6, 2)
    y = lora_linear(x, W, None, [A], [B], [0.5], [0.0])
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert_close(dx, torch.ones(5, 6) @ (W + 0.5 * B @ A), terms=100)


@pytest.fixture
def onednn(monkeypatch):
    """Used on any processor that has it, for products of any size."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch was built without oneDNN")
    slow = native.mkl_is_slow()
    eager_path._onednn.cache_clear()
    monkeypatch.setattr(native, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(eager_path, "_WORTH_ONEDNN", 0)
    yield slow
    eager_path._onednn.cache_clear()


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (33, 1000, 65), (64, 128, 200), (8, 129, 17)])
def test_a_product_of_onednn_is_as_exact_as_torchs(M, N, K, onednn):
    draws, before = [], torch.get_num_threads()
    for _ in range(DRAWS):
        dx, g, W, found = torch.randn(M, K), torch.randn(M, 2 * N)[:, N:], torch.randn(N, K), []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(eager_path._plus_product(dx.clone(), g, W))
        torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        draws.append((found[0], dx.addmm(g, W), dx.double() + g.double() @ W.double()))
    assert eager_path._onednn() is torch.ops.mkldnn._linear_pointwise.binary
    ours, theirs, exact = (torch.stack(tensors) for tensors in zip(*draws, strict=True))
    if onednn:  # where it is used
        assert_no_worse(ours, theirs, exact, draws=True)
    assert_close(ours, exact, terms=N + 10)


def test_weights_that_do_not_lie_together_are_left_to_torch(onednn, monkeypatch):
    """As those of Conv1D: oneDNN has no fast way there, and takes seconds."""
    dx, g = torch.randn(20, 40), torch.randn(20, 300)
    with monkeypatch.context() as patch:
        patch.setattr(eager_path, "_onednn", lambda: pytest.fail("asked for"))
        for W in (torch.randn(40, 300).t(), torch.randn(300, 41)[:, 1:]):
            assert torch.equal(eager_path._plus_product(dx.clone(), g, W), dx.addmm(g, W))


def test_onednn_is_not_used_where_it_computes_something_else(onednn, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", SimpleNamespace(binary=lambda x, y, *more: y + 0))
    dx, g, W = torch.randn(20, 40), torch.randn(20, 300), torch.randn(300, 40)
    with pytest.warns(UserWarning, match="oneDNN.*not used"):
        assert torch.equal(eager_path._plus_product(dx.clone(), g, W), dx.addmm(g, W))


@pytest.mark.parametrize("M", [2, 3, 7, 9])
def test_few_rows_are_as_exact_as_pefts(M):
    """Some BLAS code paths add every product of few rows to the result, where others add up the sum first."""
    draws = [_draw_against_peft(torch.float32, torch.float32, (M, 576, 192), 16, 0.0) for _ in range(DRAWS)]
    for name, results in zip(("y", "dx", "dA", "dB"), zip(*draws, strict=True), strict=True):
        assert_no_worse(*(torch.stack(tensors) for tensors in zip(*results, strict=True)), name=name, draws=True)


def _draw_against_peft(dtype, adapter_dtype, size, r, p):
    """(ours, PEFT's, exact) of y, dx, dA and dB for one draw of everything."""
    M, K, N = size
    bias = (M + r) % 2 == 0
    layer = peft_layer(K, N, r, bias, dtype, adapter_dtype)
    W, b = layer.base_layer.weight, layer.base_layer.bias
    A, B, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    x, seeds = torch.randn(M, K).to(dtype).requires_grad_(), draw_seeds(1, torch.device("cpu"))
    layer.lora_dropout["default"] = GivenMask(reference.dropout_mask(seeds, (M, K), p), p)
    theirs = layer(x)
    g = torch.randn(M, N).to(dtype)
    their_grads = torch.autograd.grad(theirs, (x, A, B), g)
    ours = lora_linear(x, W, b, [A], [B], [s], [p], seeds)
    our_grads = torch.autograd.grad(ours, (x, A, B), g)
    exact, _ = reference.lora_linear(x.detach(), W, b, [A.detach()], [B.detach()], [s], [p], seeds)
    dx, dA, dB, _, _ = reference.lora_linear_backward(g, x.detach(), W, [A.detach()], [B.detach()], [s], [p], seeds)
    assert ours.dtype == theirs.dtype == dtype
    results = list(zip((ours, *our_grads), (theirs, *their_grads), (exact, dx, dA[0], dB[0]), strict=True))
    assert all(our.dtype == their.dtype for our, their, _ in results)
    return results


def arguments(M=5, K=20, N=11, ranks=(2, 3), dtype=torch.float32, dropout=(0.3, 0.0), bias=True, grad=True):
    x = torch.randn(M, K, dtype=dtype, requires_grad=grad)
    A = [torch.randn(r, K, dtype=dtype, requires_grad=grad) for r in ranks]
    B = [torch.randn(N, r, dtype=dtype, requires_grad=grad) for r in ranks]
    b = torch.randn(N, dtype=dtype) if bias else None
    seeds = draw_seeds(len(ranks), x.device) if any(dropout) else None
    return x, torch.randn(N, K, dtype=dtype), b, A, B, [0.5, -2.0][: len(ranks)], list(dropout), seeds


@pytest.mark.parametrize("dropout", [(0.0, 0.0), (0.3, 0.0), (0.5, 0.9), (1.0, 0.1)])
def test_gradcheck_in_float64(dropout):
    x, W, b, A, B, s, p, seeds = arguments(M=4, K=7, N=5, dtype=torch.float64, dropout=dropout)
    W.requires_grad_(), b.requires_grad_()

    def f(x, W, b, A0, A1, B0, B1):
        return lora_linear(x, W, b, [A0, A1], [B0, B1], s, p, seeds)

    assert torch.autograd.gradcheck(f, (x, W, b, *A, *B))


@pytest.mark.parametrize("dropout", [(0.0, 0.0), (0.3, 0.0), (0.5, 0.9), (1.0, 0.1)])
def test_several_adapters_with_masks_of_their_own(dropout):
    x, W, b, A, B, s, p, seeds = arguments(M=40, dropout=dropout, grad=False)
    y = lora_linear(x, W, b, A, B, s, p, seeds)
    exact, _ = reference.lora_linear(x, W, b, A, B, s, p, seeds)
    assert_close(y, exact, terms=100)


CASES = [
    dict(dropout=(0.0, 0.0)),
    dict(dropout=(0.3, 0.1)),
    dict(ranks=(4,), dropout=(0.5,)),
    dict(ranks=(4,), dropout=(0.0,), bias=False),
    dict(M=1, K=1, N=1, ranks=(1,), dropout=(0.2,)),
    dict(M=17, K=33, N=9, ranks=(1, 24), dropout=(0.0, 0.9)),
    dict(dropout=(1.0, 1.0)),
    dict(dtype=torch.float64),
    dict(grad=False),
    dict(M=3, K=64, N=8, ranks=(16,), dropout=(0.1,), grad=False, bias=False),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case):
    args = arguments(**case)
    torch.library.opcheck(_lora_linear, args)
    x, W, b, A, B, s, p, seeds = (t.detach() if isinstance(t, torch.Tensor) else t for t in args)
    A, B = [t.detach() for t in A], [t.detach() for t in B]
    y, S = _lora_linear(x, W, b, A, B, s, p, seeds)
    g, n = torch.randn_like(y), len(A)
    for needs in ([True] * (2 * n + 2) + [b is not None], [False] + [True] * (2 * n) + [False, False]):
        backward = (g, x, W, A, B, S, s, p, seeds, None if b is None else b.dtype, needs)
        torch.library.opcheck(_lora_linear_backward, backward)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_the_gradients_that_are_needed_are_computed(needed, monkeypatch):
    from fused_lora.ops.linear import eager as cpu

    x, W, b, A, B, s, p, seeds = arguments(ranks=(3,), dropout=(0.4,), grad=False)
    for tensor, need in zip((x, A[0], B[0]), needed, strict=True):
        tensor.requires_grad_(need)
    y = lora_linear(x, W, b, A, B, s, p, seeds)
    assert y.requires_grad == any(needed)
    if not any(needed):
        return
    seen = []
    original = cpu.lora_linear_backward
    monkeypatch.setattr(cpu, "lora_linear_backward", lambda *a: seen.append(a[9:12]) or original(*a))
    y.sum().backward()
    assert seen == [(needed[0], (needed[1],), (needed[2],))]
    assert [t.grad is not None for t in (x, A[0], B[0])] == list(needed)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_nothing_of_the_size_of_x_is_saved_but_x(p):
    saved = []
    x, W, b, A, B, s, _, _ = arguments(M=64, K=128, N=32, ranks=(4,), dropout=(0.0,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        q = lora_linear(x, W, b, A, B, s[:1], [p])
        k = lora_linear(x, W, b, A, B, s[:1], [p])
    (q + k).sum().backward()
    large = {t.data_ptr() for t in saved if t.numel() >= x.numel() and t.data_ptr() != W.data_ptr()}
    assert large == {x.data_ptr()}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_with_the_same_mask(use_reentrant):
    x, W, b, A, B, s, _, _ = arguments(M=30, ranks=(3,), dropout=(0.0,))

    def f(x):
        return lora_linear(x, W, b, A, B, [2.0], [0.5]).square()

    grads = []
    for run in (lambda: f(x), lambda: checkpoint(f, x, use_reentrant=use_reentrant)):
        torch.manual_seed(shifted(5))
        y = run()
        for leaf in (x, *A, *B):
            leaf.grad = None
        y.sum().backward()
        grads.append([y.detach()] + [leaf.grad.clone() for leaf in (x, *A, *B)])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_seed_follows_torchs_generator():
    x, W, b, A, B, s, _, _ = arguments(M=30, ranks=(3,), dropout=(0.0,))

    def run():
        return lora_linear(x, W, b, A, B, [2.0], [0.5])

    torch.manual_seed(shifted(1))
    first, second = run(), run()
    torch.manual_seed(shifted(1))
    with torch.random.fork_rng():
        assert torch.equal(run(), first)
    assert torch.equal(run(), first) and torch.equal(run(), second) and not torch.equal(first, second)
    state = torch.get_rng_state()
    lora_linear(x, W, b, A, B, [2.0], [0.0])
    assert torch.equal(torch.get_rng_state(), state)  # p = 0 draws nothing


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_torch_compile_fullgraph(p):
    x, W, b, A, B, s, _, _ = arguments(M=9, ranks=(3,), dropout=(0.0,))
    seeds = draw_seeds(1, x.device)

    def f(x):
        return lora_linear(x, W, b, A, B, [2.0], [p], seeds if p else None).relu()

    grads = []
    for run in (f, torch.compile(f, fullgraph=True, backend=INDUCTOR)):
        y = run(x)
        grads.append([y.detach(), *torch.autograd.grad(y.sum(), (x, *A, *B))])
    for eager, compiled in zip(*grads, strict=True):
        assert_close(eager, compiled, terms=100)


@pytest.mark.parametrize("option, value", [("activation_memory_budget", 0.5), ("aggressive_recomputation", True)])
def test_compiled_dropout_warns_where_seeds_may_be_drawn_again(option, value):
    x, W, b, A, B, *_ = arguments(M=9, ranks=(3,), dropout=(0.0,))

    def warned(p):
        torch.compiler.reset()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.compile(lambda x: lora_linear(x, W, b, A, B, [2.0], [p]), fullgraph=True, backend="aot_eager")(x)
        return [str(w.message) for w in said if "draw seeds again" in str(w.message)]

    assert not warned(0.5)
    with torch._functorch.config.patch(**{option: value}):
        assert not warned(0.0)
        (message,) = warned(0.5)
    assert f"{option} = {value}" in message


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_autocast_of_devices_without_kernels(kind):
    try:
        torch.autocast(kind, dtype=torch.bfloat16)
    except RuntimeError:  # of torch 2.8
        pytest.skip("this torch asks macOS for its version")
    with FakeTensorMode(), torch.no_grad():
        x, W, A, B = (torch.empty(shape, device=kind) for shape in ((3, 8), (6, 8), (2, 8), (6, 2)))
        assert not _autocasts(x) and lora_linear(x, W, None, [A], [B], [1.0]).dtype == torch.float32
        with torch.autocast(kind, dtype=torch.bfloat16):
            assert _autocasts(x)
            y = lora_linear(x, W, None, [A], [B], [1.0])
            assert y.dtype == lora_term(y, x, [A], [B], [1.0]).dtype == torch.bfloat16
            assert [t.dtype for t in _as_autocast([A, B], torch.bfloat16)] == [torch.bfloat16] * 2
        assert not _autocasts(x.to("meta"))


def test_autocast_casts_x_and_weight_and_keeps_the_adapters():
    x, W, b, A, B, s, _, _ = arguments(M=9, ranks=(3,), dropout=(0.0,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, W, b, A, B, [2.0])
    assert y.dtype == torch.bfloat16
    (y.float() ** 2).sum().backward()
    expected, _ = reference.lora_linear(x.detach().bfloat16(), W.bfloat16(), b, A, B, [2.0], [0.0])
    assert (y.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
    assert A[0].grad.dtype == B[0].grad.dtype == x.grad.dtype == torch.float32
    # fp32 adapters are not rounded to bf16 on the way
    dA = reference.lora_linear_backward(2 * y.detach(), x.detach().bfloat16(), W.bfloat16(), A, B, [2.0], [0.0])[1][0]
    assert_close(A[0].grad, dA, terms=100)


@pytest.mark.parametrize("shape", [(20,), (0, 20), (3, 4, 20), (2, 0, 5, 20), (2, 3, 4, 20)], ids=str)
def test_any_number_of_leading_dimensions_and_none_of_rows(shape):
    _, W, b, A, B, s, _, _ = arguments(grad=False, dropout=(0.0, 0.0))
    x = torch.randn(shape, requires_grad=True)
    y = lora_linear(x, W, b, A, B, s, [0.3, 0.0])
    assert y.shape == (*shape[:-1], 11)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_strided_arguments_give_the_same_as_contiguous_ones():
    x, W, b, A, B, s, p, seeds = arguments(M=8, grad=False)
    wide = [torch.randn(t.shape[0], 2 * t.shape[1]) for t in (x, W, *A, *B)]
    views = [w[:, ::2] for w in wide]
    views[1] = W.t().contiguous().t()
    for view, t in zip(views, (x, W, *A, *B), strict=True):
        view.copy_(t)
    y = lora_linear(views[0], views[1], b, views[2:4], views[4:], s, p, seeds)
    assert_close(y, lora_linear(x, W, b, A, B, s, p, seeds), terms=100)


@pytest.mark.parametrize("M, p", [(4, 0.0), (20, 0.3)])
@pytest.mark.parametrize("term", [False, True])
def test_kernels_read_a_strided_bias_and_seeds_as_they_are(term, M, p, device, kernels_on):
    x, W, _, A, B, s, _, _ = arguments(M=M, grad=False)
    x, W, *adapters = (t.to(device) for t in (x, W, *A, *B))
    A, B, dropout = adapters[:2], adapters[2:], [p, p / 2]
    bias = torch.randn(11, 3, device=device)[:, 1]
    seeds = torch.arange(4, device=device).view(2, 2)[:, 1] if p else None
    first = (x @ W.t(), x) if term else (x, W, bias)
    last = (seeds, bias) if term else (seeds,)
    ours = (lora_term if term else lora_linear)(*first, A, B, s, dropout, *last)
    exact = reference.lora_linear(x, W, bias, A, B, s, dropout, seeds)[0]
    assert_close(ours, exact, terms=100)


def test_torchs_default_device_and_dtype_change_nothing():
    generator = torch.Generator().manual_seed(shifted(5))
    tensors = [torch.randn(shape, generator=generator) for shape in ((5, 20), (11, 20), (3, 20), (11, 3))]
    seeds, dtype = torch.tensor([3]), torch.get_default_dtype()

    def derivatives():
        x, W, A, B = leaves = [t.detach().requires_grad_() for t in tensors]
        y = lora_linear(x, W, None, [A], [B], [0.5], [0.3], seeds)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)]

    expected = derivatives()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = derivatives()
    finally:
        torch.set_default_dtype(dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


BAD = {
    "x: expected": dict(x=torch.randn(5, 19)),
    "weight: expected": dict(weight=torch.randn(11)),
    "bias: expected": dict(bias=torch.randn(3)),
    "adapter 1: expected lora_A": dict(lora_A=[torch.randn(2, 20), torch.randn(3, 21)]),
    "adapter 0: expected lora_A": dict(lora_B=[torch.randn(11, 5), torch.randn(11, 3)]),
    "one entry per adapter": dict(scaling=[1.0]),
    "dropout: expected": dict(dropout=[0.5, 1.5]),
    "scaling: expected": dict(scaling=[1.0, float("nan")]),
    "scaling: expected numbers that float32 can hold, got 1e": dict(scaling=[1.0, 1e39]),
    "scaling: expected numbers that float32 can hold, got one": dict(scaling=[1.0, -(10**400)]),
    "seeds: expected": dict(seeds=torch.zeros(3, dtype=torch.int64)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_shapes_and_values_name_the_argument(message):
    names = ("x", "weight", "bias", "lora_A", "lora_B", "scaling", "dropout", "seeds")
    args = dict(zip(names, arguments(grad=False), strict=True))
    with pytest.raises(ValueError, match=message):
        lora_linear(**{**args, **BAD[message]})


def test_without_adapters_it_is_the_base_product():
    x, W, b = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    assert torch.equal(lora_linear(x, W, b, [], [], []), torch.nn.functional.linear(x, W, b))
    wide = lora_linear(x.bfloat16(), W.bfloat16(), b, [], [], [])
    assert wide.dtype is torch.bfloat16
    for message, call in {
        "x: expected": (x[:, :4], W, b, [], [], []),
        "x, weight: expected one floating dtype": (x.double(), W, b, [], [], []),
        "lora_A, lora_B, scaling, dropout: expected one entry": (x, W, b, [], [torch.randn(4, 2)], []),
    }.items():
        with pytest.raises((ValueError, TypeError), match=message):
            lora_linear(*call)


def test_bad_dtypes_name_the_argument():
    x, W, b, A, B, s, p, seeds = arguments(grad=False)
    for bad in ((x.long(), W), (x.half(), W), (x, W.double())):
        with pytest.raises(TypeError, match="x, weight"):
            lora_linear(*bad, b, A, B, s, p, seeds)
    with pytest.raises(TypeError, match="adapter 0"):
        lora_linear(x, W, b, [A[0].int(), A[1]], B, s, p, seeds)
    lists = [((A, B, 2.0), "scaling"), ((A, None, s), "lora_B"), ((None, B, s), "lora_A"), ((A, B, s, 0.1), "dropout")]
    lists += [((A[0], B[:1], s[:1]), "lora_A"), ((A[:1], B[0][None], s[:1]), "lora_B")]  # a matrix has a length, too
    for bad, name in lists:
        with pytest.raises(TypeError, match=f"^{name}: expected a list with an entry for each adapter, got"):
            lora_linear(x, W, b, *bad)
    for bad in ("2", 2, [1.0], b.numpy()):
        for given, name in (
            ({"weight": bad}, "weight"),
            ({"bias": bad}, "bias"),
            ({"lora_A": [bad, A[1]]}, "adapter 0"),
        ):
            with pytest.raises(TypeError, match=f"^{name}: expected"):
                lora_linear(**{**dict(x=x, weight=W, bias=b, lora_A=A, lora_B=B, scaling=s, dropout=p), **given})
    for bad in ("0.5", None, [0.5], b, b.numpy(), torch.tensor(0.5, requires_grad=True)):
        for bad_s, bad_p, name in (([bad, 1.0], p, "scaling"), (s, [bad, 0.0], "dropout")):
            with pytest.raises(TypeError, match=f"^{name}: expected a number for each adapter, got"):
                lora_linear(x, W, b, A, B, bad_s, bad_p)


@pytest.mark.parametrize("name", ["x", "weight", "y", "bias", "lora_A", "lora_B", "seeds"])
def test_what_is_not_dense_is_named(name):
    x, W, b, A, B, s, p, seeds = arguments(grad=False)
    given = dict(x=x, bias=b, lora_A=A, lora_B=B, scaling=s, dropout=p, seeds=seeds)
    for kind in (torch.Tensor.to_sparse, lambda t: torch.nested.nested_tensor([t])):
        for operator, base in ((lora_linear, dict(weight=W)), (lora_term, dict(y=nn.functional.linear(x, W)))):
            args = given | base
            if name in args:
                bad = [kind(args[name][0]), args[name][1]] if name.startswith("lora") else kind(args[name])
                with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got"):
                    operator(**args | {name: bad})


@pytest.mark.parametrize("operator", [lora_linear, lora_term])
def test_numbers_of_any_kind_are_floats(operator):
    """Equal numbers share what is prepared for a call, so the first of them must not decide its type."""
    x, W, b, A, B, _, _, _ = arguments(grad=False)
    first = (x, W, b) if operator is lora_linear else (nn.functional.linear(x, W, b), x)
    found = [operator(*first, A, B, [half, 1.0]) for half in (Fraction(1, 2), Decimal("0.5"), np.float64(0.5), 0.5)]
    assert all(torch.equal(y, found[-1]) for y in found)


def test_bf16_never_runs_a_bf16_product_on_the_cpu():
    from torch.utils._python_dispatch import TorchDispatchMode

    products = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear):
                products.append({t.dtype for t in args if isinstance(t, torch.Tensor)})
            return func(*args, **(kwargs or {}))

    from fused_lora.ops.linear import eager as cpu

    x, W, b, A, B, s, p, seeds = arguments(dtype=torch.bfloat16, grad=False)
    with Watch():
        y, S = cpu.lora_linear(x, W, b, A, B, s, p, seeds)
        cpu.lora_linear_backward(y, x, W, A, B, S, s, p, seeds, True, [True] * 2, [True] * 2, True, True)
    assert len(products) > 6 and all(dtypes == {torch.float32} for dtypes in products)


@pytest.mark.parametrize("which", ["x", "weight", "lora_A", "lora_B"])
def test_forward_mode_is_refused(which):
    """torch.func.jvp would otherwise return a tangent of zeros."""
    x, W, b, A, B, s, p, seeds = arguments(grad=False)
    names = dict(x=x, weight=W, lora_A=A[0], lora_B=B[0])

    def f(tensor):
        given = names | {which: tensor}
        adapters = [given["lora_A"], *A[1:]], [given["lora_B"], *B[1:]]
        return lora_linear(given["x"], given["weight"], b, *adapters, s, p, seeds)

    tensor = names[which]
    with pytest.raises(NotImplementedError, match="lora_linear does not run inside torch.func transforms"):
        torch.func.jvp(f, (tensor,), (torch.ones_like(tensor),))
    with pytest.raises(NotImplementedError, match="lora_linear does not run inside torch.func transforms"):
        torch.func.grad(lambda t: f(t).sum())(tensor)
    with pytest.raises(NotImplementedError, match="lora_linear does not run inside torch.func transforms"):
        torch.func.vmap(f)(tensor[None])
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"), fwAD.dual_level():
        f(fwAD.make_dual(tensor, torch.ones_like(tensor)))


@pytest.mark.parametrize("needs", [("x", "A", "B"), ("A",), ("x",), ("B",)], ids="".join)
def test_flops_are_those_of_the_formulas(needs):
    M, K, N, ranks = 5, 6, 4, (2, 3)
    x, W = torch.randn(M, K), torch.randn(N, K)
    A, B = [torch.randn(r, K) for r in ranks], [torch.randn(N, r) for r in ranks]
    for name, tensors in (("x", [x]), ("A", A), ("B", B)):
        for tensor in tensors if name in needs else ():
            tensor.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(x, W, None, A, B, [1.0, 2.0], [0.5, 0.0])
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * M * (K * N + (K + N) * sum(ranks))
    per_rank = 0
    per_rank += N if {"x", "A"} & set(needs) else 0  # dS
    per_rank += K * (("x" in needs) + ("A" in needs)) + N * ("B" in needs)
    assert counter.get_total_flops() - forward == 2 * M * (K * N * ("x" in needs) + per_rank * sum(ranks))
