"""The LoRA linear over a packed weight: the dense operator's results, in blocks, and no weight kept."""

import itertools
import warnings
import weakref

import pytest
import torch

from fused_lora import reference
from fused_lora.ops import guard
from fused_lora.ops.dequant import FourBit, by_torch
from fused_lora.ops.linear import eager
from fused_lora.ops.linear import launch as kernel
from fused_lora.ops.linear.op import draw_seeds
from fused_lora.ops.linear.op import lora_linear as dense_lora_linear
from fused_lora.ops.linear.packed import Packed, lora_linear
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers.quantised import dequant_case
from helpers.seeds import shifted
from helpers.thorough import sampled

pytestmark = pytest.mark.numeric

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Int8(Packed):
    """int8 values and one scale; notes the blocks that it was asked for, and how many are held when one is made."""

    def __init__(self, N, K, dtype=F32, device="cpu"):
        self.values, self.asked = torch.randint(-127, 128, (N, K), dtype=torch.int8, device=device), []
        self.held, self.made = [], weakref.WeakSet()
        self.shape, self.dtype, self.device = (N, K), dtype, self.values.device

    def blocks(self, step):
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            self.asked.append(stop - start)
            self.held.append(len(self.made))
            values = (self.values[start:stop].float() / 512).to(self.dtype)
            self.made.add(values)
            yield start, stop, values
            del values


def arguments(N, K, M=7, x_dtype=F32, dtype=F32, ranks=(3, 2), dropout=(0.3, 0.0), bias=True, device="cpu"):
    weight = Int8(N, K, dtype, device)
    x = torch.randn(M, K, device=device).to(x_dtype).requires_grad_()
    A = [(torch.randn(r, K, device=device) * K**-0.5).requires_grad_() for r in ranks]
    B = [torch.randn(N, r, device=device).requires_grad_() for r in ranks]
    b = torch.randn(N, device=device, requires_grad=True) if bias else None
    return x, weight, b, A, B, [0.5, -2.0][: len(ranks)], list(dropout)[: len(ranks)]


def run(function, seed, x, weight, bias, A, B, scaling, dropout, g):
    torch.manual_seed(shifted(seed))
    y = function(x, weight, bias, A, B, scaling, dropout)
    wanted = [x, *A, *B, *([] if bias is None else [bias])]
    return [y.detach(), *torch.autograd.grad(y, wanted, g)]


@pytest.mark.parametrize("size", [(40, 24, 7), (1, 8, 3), (33, 16, 1), (64, 48, 130)], ids=str)
@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F64, F32)], ids=str
)
def test_as_exact_as_over_the_dense_weight(size, dtypes, monkeypatch):
    N, K, M = size
    monkeypatch.setattr(eager, "_WEIGHT_ELEMENTS", 16 * K)  # blocks of 16 rows
    found = [], [], []
    for i in range(DRAWS):
        x, weight, bias, A, B, s, p = arguments(N, K, M, *dtypes)
        g = torch.randn(M, N).to(x.dtype)
        ours = run(lora_linear, i, x, weight, bias, A, B, s, p, g)
        dense = weight.to(x.dtype)  # exact: int8 over a power of two
        torch.manual_seed(shifted(i))
        seeds = draw_seeds(2, x.device)
        theirs = run(dense_lora_linear, i, x, dense, bias, A, B, s, p, g)
        data = [t.detach() for t in A], [t.detach() for t in B], s, p, seeds
        y, _ = reference.lora_linear(x.detach(), weight.to(F64), bias.detach(), *data)
        dx, dA, dB, _, db = reference.lora_linear_backward(g, x.detach(), weight.to(F64), *data)
        for part, results in zip(found, (ours, theirs, [y, dx, *dA, *dB, db]), strict=True):
            part.append(results)
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    for k, name in enumerate(("y", "dx", "dA", "dA 2", "dB", "dB 2", "db")):
        assert_no_worse(*(torch.stack([draw[k] for draw in part]) for part in found), name=name, draws=True)


@pytest.mark.parametrize("M", [7, 12])
def test_a_cpu_never_has_more_than_a_block_of_the_weight(M, monkeypatch):
    monkeypatch.setattr(eager, "_WEIGHT_ELEMENTS", 24 * 10)
    *call, g = *arguments(64, 24, M), torch.randn(M, 64)
    run(lora_linear, 0, *call, g)
    assert call[1].asked == [10] * 6 + [4] + [10] * 6 + [4] and not any(call[1].held)


def test_nothing_as_large_as_the_weight_is_kept():
    x, weight, bias, A, B, s, p = arguments(64, 48, 9)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, bias, A, B, s, p)
    assert sorted(t.numel() for t in saved) == sorted([x.numel(), 9 * 5, 2, *(t.numel() for t in (*A, *B))])
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


@pytest.mark.parametrize("wanted", [w for w in itertools.product([True, False], repeat=4) if any(w)], ids=str)
def test_only_what_is_wanted(wanted):
    x, weight, bias, A, B, s, p = arguments(20, 24, ranks=(3,), dropout=(0.3,))
    given = x, A[0], B[0], bias
    for tensor, flag in zip(given, wanted, strict=True):
        tensor.requires_grad_(flag)
    torch.manual_seed(shifted(1))
    lora_linear(x, weight, bias, A, B, s, p).square().sum().backward()
    found = [t.grad for t in given]
    assert [grad is not None for grad in found] == list(wanted)
    for tensor in given:
        tensor.grad = None
    torch.manual_seed(shifted(1))
    dense_lora_linear(x, weight.to(F32), bias, A, B, s, p).square().sum().backward()
    for ours, tensor in zip(found, given, strict=True):
        assert (ours is None) == (tensor.grad is None)
        if ours is not None:
            assert_close(ours, tensor.grad, terms=24 + 20 + 7)


@pytest.mark.parametrize("shape", [(24,), (2, 3, 24), (0, 24), (2, 0, 24)], ids=str)
def test_shapes_of_the_input(shape):
    _, weight, bias, A, B, s, p = arguments(20, 24)
    x = torch.randn(shape, requires_grad=True)
    y = lora_linear(x, weight, bias, A, B, s, p)
    y.mul_(2).sum().backward()  # no view of anything: it may be changed in place
    assert y.shape == (*shape[:-1], 20) and x.grad.shape == shape


def test_derivatives_of_second_order():
    x, weight, bias, A, B, s, _ = arguments(6, 5, 3, F64, F64, ranks=(2,), dropout=(0.0,))
    A, B, bias = ([t.detach().double().requires_grad_() for t in part] for part in (A, B, [bias]))
    weight.dtype = F64

    def function(x, a, b, bias):
        return lora_linear(x, weight, bias, [a], [b], s[:1], [0.0])

    inputs = x, A[0], B[0], bias[0]
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


def test_a_batch_of_gradients():
    x, weight, bias, A, B, s, _ = arguments(6, 5, 3)
    y = lora_linear(x, weight, bias, A, B, s, [0.0, 0.0])
    g = torch.randn(4, *y.shape)
    together = torch.autograd.grad(y, (x, *A), g, retain_graph=True, is_grads_batched=True)
    for i in range(4):
        for one, all_of_them in zip(torch.autograd.grad(y, (x, *A), g[i], retain_graph=True), together, strict=True):
            assert_close(all_of_them[i], one, terms=20)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast_keeps_the_input_s_dtype(dtype):
    x, weight, bias, A, B, s, p = arguments(20, 24, x_dtype=dtype)
    found = []
    for on in (True, False):
        torch.manual_seed(shifted(4))
        with torch.autocast("cpu", BF16, enabled=on):
            y = lora_linear(x, weight, bias, A, B, s, p)
            assert y.dtype == dtype
            found.append([y, *torch.autograd.grad(y.sum(), (x, *A, *B))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # a CPU computes in fp32 either way


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_kernels(dropout, device, kernels_on, kernel_memory):
    """A GPU dequantises the weight whole and takes the kernels of the dense layer."""
    call = arguments(48, 32, 20, ranks=(4,), dropout=(dropout,), device=device)
    g = torch.randn(20, 48, device=device)
    ours, theirs = run(lora_linear, 2, *call, g), run(dense_lora_linear, 2, call[0], call[1].to(F32), *call[2:], g)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert call[1].asked == [48] * 3  # forward, backward, and the line above


class FourBits(Packed):
    """A random 4-bit weight; counts how often it was dequantised."""

    def __init__(self, N, K, dtype, device, blocksize=64, nested=True):
        packed, code, absmax, inner, *kind = dequant_case(N, K, blocksize, nested, device)
        self.four_bit = FourBit(packed, code / 8, absmax, inner, *kind, dtype)
        self.shape, self.dtype, self.device, self.dequantised = (N, K), dtype, packed.device, 0

    def blocks(self, step):
        self.dequantised += 1
        yield 0, self.shape[0], by_torch(self.four_bit)


# rows, K, blocksize, dtype of x and of the weight; is a forward to read 4 bits
FEW = [
    ((1, 64, 64, BF16, BF16), True),
    ((64, 128, 4096, F16, F16), True),
    ((16, 192, 128, F32, F32), True),
    ((65, 64, 64, BF16, BF16), False),
    ((17, 64, 64, F32, F32), False),
    ((4, 96, 64, BF16, BF16), False),
    ((4, 64, 32, BF16, BF16), False),
    ((0, 64, 64, BF16, BF16), False),
]


ADAPTERS = [(False, (3,), (0.0,)), (True, (3, 20), (0.0, 0.5))]
READ = [(*few, *ADAPTERS[(i + j) % 2]) for i, few in enumerate(FEW) for j in (0, 1)]


@pytest.mark.parametrize("kind, few, nested, ranks, dropout", sampled(READ, 3), ids=str)
def test_few_rows_read_4_bits(kind, few, nested, ranks, dropout, device, kernels_on, kernel_memory):
    (M, K, blocksize, x_dtype, dtype), N = kind, 40
    x, _, bias, A, B, s, p = arguments(N, K, M, x_dtype, dtype, ranks, dropout, device=device)
    A, B = ([t.detach().to(dtype).requires_grad_() for t in part] for part in (A, B))
    weight = FourBits(N, K, dtype, x.device, blocksize, nested)
    g = torch.randn(M, N, device=device).to(x_dtype)
    torch.manual_seed(shifted(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a dropped kernel would warn
        y = lora_linear(x, weight, bias, A, B, s, p)
        assert weight.dequantised == (0 if few else 1)
        found = torch.autograd.grad(y, [x, *A, *B, bias], g)
    assert weight.dequantised == (1 if few else 2)  # the backward's
    torch.manual_seed(shifted(3))
    seeds = draw_seeds(len(A), x.device)
    data = [t.detach() for t in A], [t.detach() for t in B], s, p, seeds
    dense = by_torch(weight.four_bit)
    exact, _ = reference.lora_linear(x.detach(), dense, bias.detach(), *data)
    dx, dA, dB, _, db = reference.lora_linear_backward(g, x.detach(), dense, *data)
    eps = max(4 * torch.finfo(dtype).eps, 4e-5)
    for ours, right in zip((y, *found), (exact, dx, *dA, *dB, db), strict=True):
        assert ours.shape == right.shape
        if right.numel():
            assert (ours.double() - right).abs().max() <= eps * right.abs().max()


def test_a_kernel_of_4_bits_that_is_wrong_is_dropped(device, kernels_on, monkeypatch):
    original = kernel.lora_linear

    def wrong(chosen, x, weight, *others):
        run = original(chosen, x, weight, *others)
        return (lambda *args: (run(*args)[0] * 1.5, run(*args)[1])) if isinstance(weight, FourBit) else run

    monkeypatch.setattr(kernel, "lora_linear", wrong)
    x, _, bias, A, B, s, p = arguments(40, 64, 3, ranks=(3,), dropout=(0.0,), device=device)
    weight = FourBits(40, 64, F32, x.device)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="linear_4bit.*is dropped, the eager path takes over"):
            y = lora_linear(x, weight, bias, A, B, s, p)
        again = lora_linear(x, weight, bias, A, B, s, p)
    assert weight.dequantised == 2 and torch.equal(y, again)
    assert_close(y, reference.lora_linear(x, by_torch(weight.four_bit), bias, A, B, s, p, None)[0], terms=100)


def test_another_weight_of_the_same_kind_takes_the_same_launch(device, kernels_on):
    x, _, bias, A, B, s, p = arguments(40, 64, 3, ranks=(3,), dropout=(0.0,), device=device)
    found = []
    for _ in range(2):
        weight = FourBits(40, 64, F32, x.device)
        with torch.no_grad():
            found.append(lora_linear(x, weight, bias, A, B, s, p))
        assert_close(
            found[-1], reference.lora_linear(x, by_torch(weight.four_bit), bias, A, B, s, p, None)[0], terms=100
        )
    assert not torch.equal(*found) and sum("linear_4bit" in key for key in guard.verdicts()) == 1


def test_arguments_that_do_not_fit():
    x, weight, bias, A, B, s, p = arguments(20, 24)
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 24\]"):
        lora_linear(x[:, :5], weight, bias, A, B, s, p)
    with pytest.raises(ValueError, match=r"adapter 0: expected lora_A"):
        lora_linear(x, weight, bias, [A[0].t(), A[1]], B, s, p)
    with pytest.raises(ValueError, match="bias: expected"):
        lora_linear(x, weight, bias[:3], A, B, s, p)
