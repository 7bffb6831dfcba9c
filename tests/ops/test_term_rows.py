"""The term on some rows is the term of those rows, and the others keep their bits and gradients."""

import pytest
import torch

from fused_lora.ops.term.op import lora_term
from fused_lora.ops.term.rows import lora_term_on_rows
from fused_lora.reference import bits
from helpers.seeds import shifted

K, N, R = 20, 12, 3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2], ids=str
)
@pytest.mark.parametrize("rows", [[], [4], [7, 2, 3], list(range(8))], ids=str)
def test_bits_and_gradients_are_those_of_the_rows_alone(rows, dtypes, dropout):
    dtype, adapters = dtypes
    y, x = (torch.randn(2, 4, n).to(dtype).requires_grad_() for n in (N, K))
    A, B, bias = (torch.randn(s).to(adapters).requires_grad_() for s in ((R, K), (N, R), (N,)))
    g, picked = torch.randn(2, 4, N).to(dtype), torch.tensor(rows, dtype=torch.long)
    torch.manual_seed(shifted(2))
    out = lora_term_on_rows(y, x, picked, [A], [B], [1.5], [dropout], bias=bias)
    torch.manual_seed(shifted(2))
    alone = lora_term(y.view(8, N)[picked], x.view(8, K)[picked], [A], [B], [1.5], [dropout], bias=bias)
    expected = y.view(8, N).index_copy(0, picked, alone).view_as(y)
    assert out.dtype == dtype and torch.equal(bits(out.detach()), bits(expected.detach()))
    dy, *found = torch.autograd.grad(out, [y, x, A, B, bias], g)
    _, *wanted = torch.autograd.grad(expected, [y, x, A, B, bias], g)
    assert torch.equal(bits(dy), bits(g))
    for mine, right in zip(found, wanted, strict=True):
        assert mine.dtype == right.dtype and torch.equal(mine, right)
    assert rows or not any(t.any() for t in found)


@pytest.mark.parametrize("grad", [False, True])
def test_rows_under_autocast_to_the_other_16_bit_dtype(grad):
    """As in PEFT, which adds in place. A CPU's autocast refuses index_copy of it."""
    y, x, rows = torch.randn(5, N).half(), torch.randn(5, K).half(), torch.tensor([1, 3])
    A, B = (torch.randn(s).requires_grad_(grad) for s in ((R, K), (N, R)))
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_term_on_rows(y, x, rows, [A], [B], [1.5])
        alone = lora_term(y[rows], x[rows], [A], [B], [1.5])
    assert out.dtype is torch.float16 and torch.equal(out[rows], alone)
