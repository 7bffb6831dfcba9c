"""Where kernels take over: which variant, checked before first use, dropped with one warning, autograd through them."""

import itertools
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fused_lora import reference
from fused_lora.ops import guard
from fused_lora.ops.dora import op as dora
from fused_lora.ops.linear import eager as cpu
from fused_lora.ops.linear import launch as kernel
from fused_lora.ops.linear import plan
from fused_lora.ops.linear.op import draw_seeds, lora_linear
from fused_lora.ops.term.op import lora_term
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers.seeds import shifted
from helpers.thorough import sampled

FP32 = torch.float32
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [("recompute", "passes"), ("split", "passes"), ("split", "library"), ("library", "library")]


@pytest.fixture
def ran(kernels_on, monkeypatch):
    """What the kernels ran: (direction, variant)."""
    found = []
    for name in ("lora_linear", "lora_linear_backward"):
        original = getattr(kernel, name)

        def recorded(chosen, *arguments, name=name, original=original):
            run = original(chosen, *arguments)
            return lambda *args: found.append((name, chosen.variant)) or run(*args)

        monkeypatch.setattr(kernel, name, recorded)
    return found


def arguments(device, M, K, N, ranks, dtype, adapter_dtype, dropout):
    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape).to(device, dtype)

    x = draw(M, K, dtype=dtype).requires_grad_()
    A = [draw(r, K, dtype=adapter_dtype).requires_grad_() for r in ranks]
    B = [draw(N, r, dtype=adapter_dtype).requires_grad_() for r in ranks]
    b = draw(N).requires_grad_()
    seeds = draw_seeds(len(ranks), device) if any(dropout) else None
    W = draw(N, K, dtype=dtype)
    return x, W, b, A, B, [0.5, -2.0][: len(ranks)], list(dropout), seeds


CASES = [
    ((33, 65, 17), (3,), (0.0,)),
    ((33, 65, 17), (16,), (0.1,)),
    ((1, 40, 50), (4,), (0.0,)),
    ((20, 48, 33), (4, 17), (0.5, 0.0)),
    ((20, 48, 33), (4,), (0.9,)),
]
DTYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")]


def combinations():
    """Every case in fp32 and one with a mask in the other dtypes, for variants of both directions that can take it."""
    for dtypes, case in itertools.product(DTYPES, CASES):
        if dtypes[0] == "float32" or case is CASES[1]:
            ranks, dropout = case[1:]
            for forward, backward in PAIRS:
                if (forward != "recompute" or not any(dropout)) and (backward != "passes" or len(ranks) == 1):
                    yield (forward, backward), dtypes, case


@pytest.mark.parametrize("pair, dtypes, case", sampled(combinations(), 4))
def test_gradients_through_the_kernels(case, dtypes, pair, device, ran, monkeypatch):
    dtype, adapter_dtype = (getattr(torch, d) for d in dtypes)
    size, ranks, dropout = case
    monkeypatch.setattr(plan, "choose", lambda op, *_: pair[op == "backward"])
    x, W, b, A, B, s, p, seeds = arguments(device, *size, ranks, dtype, adapter_dtype, dropout)
    leaves = (x, *A, *B, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a dropped configuration would warn
        y = lora_linear(x, W, b, A, B, s, p, seeds)
        g = torch.randn_like(y)
        ours = [y, *torch.autograd.grad(y, leaves, g)]
    assert ("lora_linear", pair[0]) in ran and ("lora_linear_backward", pair[1]) in ran
    plain = [t.detach() for t in (x, *A, *B)]
    n = len(A)
    exact, _ = reference.lora_linear(x.detach(), W, b.detach(), plain[1 : n + 1], plain[n + 1 :], s, p, seeds)
    dx, dA, dB, _, db = reference.lora_linear_backward(g, x.detach(), W, plain[1 : n + 1], plain[n + 1 :], s, p, seeds)
    eps = torch.finfo(dtype).eps
    for result, true in zip(ours, (exact, dx, *dA, *dB, db), strict=True):
        assert (result.double() - true).abs().max() <= max(4 * eps, 4e-5) * true.abs().max()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_fp32_adapters_beside_16_bit_ones_are_not_rounded(dtype, device, ran):
    x, W, _, A, B, s, p, seeds = arguments(device, 20, 48, 33, (4, 7), dtype, FP32, (0.0, 0.0))
    A[0], B[0] = (t.detach().bfloat16().requires_grad_() for t in (A[0], B[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a dropped configuration would warn
        y = lora_linear(x, W, None, A, B, s, p, seeds)
        g = torch.randn_like(y)
        found = torch.autograd.grad(y, (*A, *B), g)
    assert "lora_linear_backward" in {name for name, _ in ran}
    wide = [t.detach().double() for t in (g, x, W, *A, *B)]
    _, dA, dB, _, _ = reference.lora_linear_backward(*wide[:3], wide[3:5], wide[5:], s, p, seeds)
    for ours, true, given in zip(found, (*dA, *dB), (*A, *B), strict=True):
        assert ours.dtype is given.dtype
        assert (ours.double() - true).abs().max() <= max(torch.finfo(given.dtype).eps, 4e-6) * true.abs().max()


def under_autocast(device, dtype, size, ranks, dropout):
    """(leaves, call, exact results, y of copies) of fp32 tensors under autocast, which rounds the adapters, too."""
    x, W, b, A, B, s, p, seeds = arguments(device, *size, ranks, FP32, FP32, dropout)
    n, leaves = len(A), (x, *A, *B)

    def call():
        with torch.autocast(device.type, dtype):
            return lora_linear(x, W, b.detach(), A, B, s, p, seeds)

    def exact(g):
        narrow = [t.detach().to(dtype) for t in (*leaves, W)]
        args = narrow[0], narrow[-1], narrow[1 : n + 1], narrow[n + 1 : -1], s, p, seeds
        y, _ = reference.lora_linear(*args[:2], b.detach(), *args[2:])
        dx, dA, dB, _, _ = reference.lora_linear_backward(g, *args)
        return y, dx, *dA, *dB

    def of_copies():
        x, *adapters, W16 = (t.detach().to(dtype) for t in (*leaves, W))
        return lora_linear(x, W16, b.detach(), adapters[:n], adapters[n:], s, p, seeds)

    return leaves, call, exact, of_copies


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "pair, ranks, dropout",
    [
        (("recompute", "passes"), (16,), (0.0,)),
        (("split", "passes"), (4,), (0.1,)),
        (("library", "passes"), (16,), (0.1,)),
        (("library", "library"), (4, 40), (0.5, 0.0)),
        (("eager", "eager"), (4,), (0.1,)),
    ],
    ids=str,
)
def test_fp32_adapters_under_autocast(pair, ranks, dropout, dtype, device, ran, monkeypatch):
    """They are rounded without copies of theirs in the graph, and their gradients are not rounded."""
    monkeypatch.setattr(plan, "choose", lambda op, *_: pair[op == "backward"])
    leaves, call, exact, of_copies = under_autocast(device, dtype, (33, 64, 48), ranks, dropout)
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a dropped configuration would warn
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = call()
        g = torch.randn_like(y)
        found = [y, *torch.autograd.grad(y, leaves, g)]
    if device.type == "cpu":
        assert torch.equal(y, of_copies())  # products in 16 bits, as of copies
    assert pair[0] == "eager" or {name for name, _ in ran} == {"lora_linear", "lora_linear_backward"}
    own = {t.data_ptr() for t in leaves[1:]}
    assert all(t.data_ptr() in own for t in kept if t.shape in {a.shape for a in leaves[1:]})
    assert y.dtype is dtype and all(t.dtype is FP32 for t in found[1:])
    for ours, true in zip(found, exact(g), strict=True):
        assert (ours.double() - true).abs().max() <= 4 * torch.finfo(dtype).eps * true.abs().max()
    if pair[1] != "eager":
        assert not any(torch.equal(t, t.to(dtype).float()) for t in found[2:])


@pytest.mark.parametrize("bias_dtype", [None, FP32], ids=["own", "fp32"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("variant", ["recompute", "split", "library"])
def test_a_bias_that_cancels_the_product_is_rounded_with_it(variant, dtype, bias_dtype, device, ran, monkeypatch):
    monkeypatch.setattr(plan, "choose", lambda op, *_: variant)
    found = []
    for _ in range(DRAWS):
        x, W, _, A, B, s, p, _ = arguments(device, 20, 48, 33, (4,), dtype, dtype, (0.0,))
        x = (x.detach()[:1] + 2**-6 * x.detach()).contiguous()
        bias = -(x[:1] @ W.t())[0].to(bias_dtype or dtype)
        A, B = ([t.detach() * 2**-6] for t in (*A, *B))
        with torch.no_grad():
            y = lora_linear(x, W, bias, A, B, s, p)
            base = torch.nn.functional.linear(x.float(), W.float(), bias.to(dtype).float()).to(dtype)
            eager = base + s[0] * (x @ A[0].t() @ B[0].t())
        exact = reference.lora_linear(*(t.double() for t in (x, W, bias)), *([u[0].double()] for u in (A, B)), s, p)[0]
        found.append((y, eager, exact))
    assert ran.count(("lora_linear", variant)) >= DRAWS  # the trial is one more
    assert_no_worse(*map(torch.stack, zip(*found, strict=True)), draws=True)


def test_second_derivatives_under_autocast_are_those_of_rounded_adapters(device, ran):
    leaves, call, exact, _ = under_autocast(device, torch.bfloat16, (33, 64, 48), (4,), (0.1,))
    y = call()
    g = torch.randn_like(y).requires_grad_()
    first = torch.autograd.grad(y, leaves, g, create_graph=True)
    again = torch.autograd.grad(call(), leaves, g.detach())
    for ours, true, other in zip(first, exact(g.detach())[1:], again, strict=True):
        assert (ours.double() - true).abs().max() <= 2**-6 * true.abs().max()
        assert ours.dtype is other.dtype is FP32
    dg, dA = torch.autograd.grad(first[0].sum(), (g, leaves[1]))
    assert dg.dtype is torch.bfloat16 and dA.dtype is FP32 and dA.abs().max() > 0


@pytest.mark.parametrize("turned", ["x", "W", "A", "B", "bias", "y", "g"])
@pytest.mark.parametrize("function", [lora_linear, lora_term, dora.dropped], ids=["linear", "term", "dropped"])
def test_lazily_negated_views_have_their_sign(function, turned, device, kernels_on):
    """A kernel reads memory, which does not tell."""
    sizes = dict(x=(40, 24), W=(16, 24), A=(4, 24), B=(16, 4), bias=(16,), y=(40, 16), g=(40, 16))
    drawn = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    seeds, found = torch.tensor([3], device=device), []
    for turn in (torch.clone, lambda t: torch._neg_view(-t)):
        given = drawn | {turned: turn(drawn[turned])}
        x, A, B = leaves = [given[name].detach().requires_grad_() for name in "xAB"]
        rest = [A], [B], [1.5], [0.4], seeds
        if function is lora_linear:
            out = lora_linear(x, given["W"], given["bias"], *rest)
        elif function is lora_term:
            out = lora_term(given["y"], x, *rest, given["bias"])
        else:
            out = dora.dropped(x, seeds, 0.4) @ A.t() @ B.t()
        found.append([out.detach(), *torch.autograd.grad(out, leaves, given["g"])])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("ranks", [(0,), (3, 0)], ids=str)
def test_an_adapter_without_ranks_drops_nothing(ranks, device, ran):
    x, W, b, A, B, s, p, _ = arguments(device, 5, 64, 48, ranks, FP32, FP32, (0.0, 0.0)[: len(ranks)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = lora_linear(x, W, b, A, B, s, p)
        dx, *others = torch.autograd.grad(y.sum(), (x, *A, *B))
    rest = [t.detach() for t in A[:-1]], [t.detach() for t in B[:-1]], s[:-1], p[:-1]
    exact, _ = reference.lora_linear(x.detach(), W, b.detach(), *rest)
    assert_close(y, exact, terms=64 + 3)
    assert [t.shape for t in (dx, *others)] == [t.shape for t in (x, *A, *B)] and not ran


@pytest.mark.parametrize("ranks", [(4,), (4, 40)], ids=str)
@pytest.mark.parametrize("wanted", sampled(["xAB", "x", "A", "AB", "B", "xA"], 3))
def test_any_of_the_gradients(wanted, ranks, device, ran):
    """The passes form all of them, so they run where all are wanted, and for one adapter."""
    x, W, b, A, B, s, p, seeds = arguments(device, 70, 48, 33, ranks, FP32, FP32, (0.5, 0.1)[: len(ranks)])
    leaves = [*[x][: "x" in wanted], *A[: len(A) * ("A" in wanted)], *B[: len(B) * ("B" in wanted)]]
    for t in (x, b, *A, *B):
        t.requires_grad_(any(t is leaf for leaf in leaves))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = lora_linear(x, W, b, A, B, s, p, seeds)
        g = torch.randn_like(y)
        ours = torch.autograd.grad(y, leaves, g)
    whole = wanted == "xAB" and len(ranks) == 1
    assert ("lora_linear_backward", "passes" if whole else "library") in ran
    x, *factors = (t.detach() for t in (x, *A, *B))
    dx, dA, dB, _, _ = reference.lora_linear_backward(g, x, W, factors[: len(A)], factors[len(A) :], s, p, seeds)
    exact = [*[dx][: "x" in wanted], *dA[: len(A) * ("A" in wanted)], *dB[: len(B) * ("B" in wanted)]]
    for result, true in zip(ours, exact, strict=True):
        assert (result.double() - true).abs().max() <= 4e-5 * true.abs().max()


def test_error_of_the_split_kernel_is_no_larger_than_eager(device, kernels_on, monkeypatch):
    monkeypatch.setattr(plan, "choose", lambda *_: "split")
    results = []
    for _ in range(DRAWS):
        x, W, b, A, B, s, p, seeds = arguments(device, 40, 100, 60, (8,), torch.bfloat16, torch.bfloat16, (0.1,))
        with torch.no_grad():
            ours = lora_linear(x, W, b, A, B, s, p, seeds)
            dropped = x * reference.dropout_mask(seeds, x.shape, p[0]) * reference.keep_scale(p[0])
            base = torch.nn.functional.linear(x, W, b.bfloat16())
            shrunk = torch.nn.functional.linear(dropped.bfloat16(), A[0])
            theirs = base + torch.nn.functional.linear(shrunk, B[0]) * s[0]
            results.append((ours, theirs, reference.lora_linear(x, W, b, A, B, s, p, seeds)[0]))
    assert_no_worse(*(torch.stack(t) for t in zip(*results, strict=True)), factor=1.0, draws=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_sees_the_same_mask_through_the_kernels(use_reentrant, device, ran):
    x, W, b, A, B, s, _, _ = arguments(device, 20, 48, 16, (4,), torch.float32, torch.float32, (0.0,))

    def f(x):
        return lora_linear(x, W, b, A, B, [2.0], [0.5]).square()

    grads = []
    for run in (lambda: f(x), lambda: checkpoint(f, x, use_reentrant=use_reentrant)):
        torch.manual_seed(shifted(5))
        y = run()
        for leaf in (x, *A, *B):
            leaf.grad = None
        y.sum().backward()
        grads.append([leaf.grad.clone() for leaf in (x, *A, *B)])
    assert ran
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_kernel_and_eager_path_draw_the_same_mask(device, kernels_on, monkeypatch):
    x, W, b, A, B, s, _, _ = arguments(device, 40, 64, 16, (4,), torch.float32, torch.float32, (0.0,))
    results = []
    for pair in (("split", "passes"), ("library", "library"), ("eager", "eager")):
        monkeypatch.setattr(plan, "choose", lambda op, *_, pair=pair: pair[op == "backward"])
        plan.forget()
        torch.manual_seed(shifted(3))
        y = lora_linear(x, W, b, A, B, s, [0.5])
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, *A, *B))])
    for *kernels, eager in zip(*results, strict=True):
        for found in kernels:
            assert_close(found, eager, terms=300)


@pytest.mark.parametrize("failure", ["raises", "is wrong"])
def test_a_bad_configuration_is_dropped_with_one_warning(failure, device, kernels_on, monkeypatch):
    monkeypatch.setattr(plan, "choose", lambda *_: "split")
    calls = []

    def bad(chosen, *arguments):
        def run(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds):
            calls.append(chosen.variant)
            if failure == "raises":
                raise RuntimeError("out of resource: shared memory")
            y, S = cpu.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout, seeds)
            return y * 1.01, S

        return run

    monkeypatch.setattr(kernel, "lora_linear", bad)
    args = arguments(device, 20, 48, 16, (4,), torch.float32, torch.float32, (0.0,))
    with pytest.warns(UserWarning, match="split.*is dropped, the eager path takes over") as caught:
        y = lora_linear(*args)
    assert len(caught) == 1 and len(calls) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = lora_linear(*args)
    exact, _ = reference.lora_linear(*(t.detach() if isinstance(t, torch.Tensor) else t for t in args))
    assert_close(y, exact, terms=300)
    assert torch.equal(y, again) and len(calls) == 1


def test_the_check_can_be_switched_off_and_memory_errors_pass_through(device, ran, monkeypatch):
    monkeypatch.setattr(plan, "choose", lambda *_: "split")
    monkeypatch.setenv("FUSED_LORA_CHECK", "0")
    args = arguments(device, 20, 48, 16, (4,), torch.float32, torch.float32, (0.0,))
    lora_linear(*args)
    assert ran == [("lora_linear", "split")]  # no second run on a small tile

    def exhausted(chosen, *arguments):
        def run(*args):
            raise torch.OutOfMemoryError("full")

        return run

    monkeypatch.setattr(kernel, "lora_linear", exhausted)
    plan.forget()
    with pytest.raises(torch.OutOfMemoryError):
        lora_linear(*args)


def test_eager_switch_disables_all_kernels(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(guard, "HAS_TRITON", True)
    monkeypatch.delenv("FUSED_LORA_PLAN", raising=False)
    assert guard.usable(cuda) and not guard.usable(torch.device("cpu"))
    monkeypatch.setenv("FUSED_LORA_PLAN", "eager")
    assert not guard.usable(cuda)
    monkeypatch.delenv("FUSED_LORA_PLAN")
    monkeypatch.setattr(guard, "HAS_TRITON", False)
    assert not guard.usable(cuda)


def test_choose_is_total_and_names_what_exists():
    sizes = itertools.product(
        (1, 64, 512, 513, 2048, 8192), (64, 4096, 14336), (1, 16, 100, 512),
        (torch.float32, torch.bfloat16, torch.float16), (False, True), (False, True), (1, 2), (0, 75, 80, 90, 100, 120),
    )  # fmt: skip
    seen = {(op, plan.choose(op, *size)) for size in sizes for op in ("linear", "backward")}
    assert {variant for op, variant in seen if op == "linear"} == {"eager", "recompute", "split", "library"}
    assert {variant for op, variant in seen if op == "backward"} == {"eager", "passes", "library"}
    bf16 = torch.bfloat16
    assert plan.choose("linear", 1, 4096, 16, bf16, False, False, 1, 90) == "recompute"
    assert plan.choose("linear", 8192, 4096, 16, bf16, True, False, 1, 90) == "split"
    assert plan.choose("linear", 8192, 14336, 16, bf16, True, False, 1, 90) == "library"
    assert plan.choose("linear", 8192, 4096, 16, bf16, True, True, 1, 90) == "library"
    assert plan.choose("linear", 8192, 4096, 16, bf16, True, False, 1, 100) == "library"
    assert plan.choose("linear", 512, 4096, 16, bf16, True, False, 1, 90) == "library"
    assert plan.choose("linear", 64, 4096, 16, bf16, False, False, 1, 90) == "recompute"
    assert plan.choose("linear", 64, 4096, 16, bf16, True, False, 1, 90) == "library"
    assert plan.choose("backward", 8192, 4096, 32, bf16, True, True, 1, 90) == "passes"
    assert plan.choose("backward", 8192, 4096, 33, bf16, True, False, 1, 90) == "library"
    assert plan.choose("backward", 8192, 4096, 16, bf16, True, False, 2, 90) == "library"
    assert plan.choose("backward", 8192, 4096, 16, bf16, True, False, 1, 90, whole=False) == "library"
    assert plan.choose("linear", 8192, 4096, 16, bf16, True, False, 1, 0) == "eager"


@pytest.mark.parametrize("fan_in_fan_out, dtype", sampled(itertools.product([False, True], FLOATS), 2))
def test_merge_and_unmerge_by_the_kernel(dtype, fan_in_fan_out, device, kernels_on):
    from fused_lora.ops.merge import op as merge

    W, A, B = torch.randn(40, 70) * 0.02, torch.randn(3, 70), torch.randn(40, 3) * 0.002
    W, A, B = W.to(device, dtype), A.to(device), B.to(device)
    weight = W.t().contiguous() if fan_in_fan_out else W.clone()
    before = weight.clone()
    record = merge.merge_(weight, [A], [B], [2.0], fan_in_fan_out=fan_in_fan_out)
    assert record.device_corrections is not None and record.device_corrections.values.numel() > 0 and record.nbytes > 0
    delta = reference.delta_weight([A], [B], [2.0], fan_in_fan_out=fan_in_fan_out)
    exact = before.double() + delta
    summed = reference.delta_weight([A.abs()], [B.abs()], [2.0], fan_in_fan_out=fan_in_fan_out) * 2.0**-21
    spacing = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((weight.double() - exact).abs() <= spacing + summed).all()
    assert merge.delta_fidelity(weight, record) < 0.3
    merged = weight.clone()
    weight[3, 5] += 1
    with pytest.raises(RuntimeError, match="weight"):
        merge.unmerge_(weight, record)
    weight.copy_(merged)
    merge.unmerge_(weight, record)
    assert torch.equal(reference.bits(weight), reference.bits(before))
    A[1, 1] = float("nan")
    with pytest.raises(ValueError, match="broken"):
        merge.merge_(weight, [A], [B], [2.0], fan_in_fan_out=fan_in_fan_out)
    assert torch.equal(reference.bits(weight), reference.bits(before))


def test_a_merge_kernel_that_fails_its_check_is_dropped(device, kernels_on, monkeypatch):
    from fused_lora.ops.merge import launch as merge_kernel
    from fused_lora.ops.merge import op as merge

    monkeypatch.setattr(merge_kernel, "_check", lambda device, dtype: "a small weight did not come back to the bit")
    W, A, B = (torch.randn(shape).to(device) for shape in ((20, 30), (2, 30), (20, 2)))
    with pytest.warns(UserWarning, match="merge.* is dropped"):
        record = merge.merge_(W, [A], [B], [1.0])
    assert record.device_corrections is None and record.units is not None
