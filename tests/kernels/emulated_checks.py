"""Compiled kernels that are wrong on purpose: what the emulated GPU has to find, and what it has to get right.

tests/kernels/test_emulated.py runs this file in a process of its own.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from helpers.emulated.driver import EmulatedDriver
from helpers.emulated.machine import EmulationError
from helpers.emulated.program import translate
from helpers.seeds import shifted


@triton.jit
def _copy(x_ptr, y_ptr, count, step, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i * step, tl.load(x_ptr + i, mask=i < count), mask=i < count)


@triton.jit
def _reversed(x_ptr, held_ptr, y_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(held_ptr + i, tl.load(x_ptr + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(y_ptr + i, tl.load(held_ptr + BLOCK - 1 - i))


@triton.jit
def _chosen(x_ptr, y_ptr, HINT: tl.constexpr, BLOCK: tl.constexpr):
    """The elements above 0, one after the other."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    place = tl.cumsum((x > 0).to(tl.int32), 0) - 1
    if HINT:
        place = tl.max_contiguous(tl.multiple_of(place, 4), 4)
    tl.store(y_ptr + place, x, mask=x > 0)


@triton.jit
def _product(a_ptr, b_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TRANSPOSED: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    if TRANSPOSED:
        b = tl.load(b_ptr + n[:, None] * K + k[None, :]).T
    else:
        b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(y_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, input_precision="tf32"))


@triton.jit
def _rounded(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@pytest.fixture
def warps_in_any_order(monkeypatch):
    def draw(seed):
        monkeypatch.setattr(EmulatedDriver.active, "rng", np.random.default_rng(shifted(seed)))

    return draw


def test_an_address_outside_of_a_tensor():
    x, y = torch.randn(64), torch.zeros(64)
    _copy[(1,)](x, y, 64, 1, BLOCK=64)
    assert torch.equal(x, y)
    with pytest.raises(EmulationError, match="_copy, program .* belongs to no tensor"):
        _copy[(1,)](x, y, 64, 1 << 28, BLOCK=64)


@pytest.mark.parametrize("barrier", [True, False])
def test_what_warps_exchange_without_a_barrier(barrier, warps_in_any_order):
    """With one it is right in every order, without it in few."""
    right = 0
    for seed in range(8):
        warps_in_any_order(seed)
        x, held, y = torch.randn(256), torch.full((256,), torch.nan), torch.empty(256)
        _reversed[(1,)](x, held, y, BARRIER=barrier, BLOCK=256)
        right += torch.equal(y, x.flip(0))
    assert right == 8 if barrier else right < 8


BELIEVES = pytest.param(True, marks=pytest.mark.skipif(triton.__version__ < "3.9", reason="believed since triton 3.9"))


@pytest.mark.parametrize("hint", [False, BELIEVES])
def test_a_hint_that_is_false(hint):
    """A compiler that believes it stores four neighbours at once, where there are none."""
    x = torch.randn(1024)
    y = torch.zeros(1024)
    try:
        _chosen[(1,)](x, y, HINT=hint, BLOCK=1024)
        same = torch.equal(y[: (x > 0).sum()], x[x > 0])
    except EmulationError:
        same = False
    assert same is not hint


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M, N, K", [(16, 16, 16), (64, 32, 64), (64, 128, 32), (128, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_product_of_whole_numbers_is_exact(dtype, M, N, K, transposed):
    a, b = torch.randint(-8, 9, (M, K)).to(dtype), torch.randint(-8, 9, (N, K) if transposed else (K, N)).to(dtype)
    y = torch.full((M, N), torch.nan)
    _product[(1,)](a, b, y, M=M, N=N, K=K, TRANSPOSED=transposed)
    assert torch.equal(y, a.float() @ (b.t() if transposed else b).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32, torch.int8], ids=str)
def test_roundings_are_those_of_torch(dtype):
    x = torch.cat([torch.randn(250) * 50, torch.tensor([0.0, -0.0, 1.5, -2.5, 100.5, 0.49999997])])
    y = torch.zeros(256, dtype=dtype)
    _rounded[(1,)](x, y, BLOCK=256)
    assert torch.equal(y, x.to(dtype))


def test_an_instruction_that_is_not_known_is_refused():
    text = ".visible .entry k(\n.param .u64 k_param_0\n)\n.reqntid 32\n{\n.reg .b32 %r<3>;\n{}\nret;\n}\n"
    assert translate(text.replace("{}", "mov.b32 %r1, 5;")).name == "k"
    with pytest.raises(NotImplementedError, match="brev"):
        translate(text.replace("{}", "brev.b32 %r1, %r2;"))
