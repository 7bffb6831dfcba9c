"""The kernel of a dropped input: torch's bits, the specification's mask, every shape and stride, its gradients."""

import pytest
import torch

from fused_lora import reference
from fused_lora.kernels import dropped as kernel
from fused_lora.kernels.dropped import dropped, traffic
from fused_lora.ops import guard
from fused_lora.ops.dora import op
from helpers.seeds import shifted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def expected(x, seed, p):
    return x * reference.dropout_mask(seed, x.shape, p, x.device) * reference.keep_scale(p)


@pytest.mark.parametrize("p", [2.0**-17, 0.1, 0.5, 1 - 2.0**-17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, K", [(1, 1), (9, 33), (17, 512), (8, 1041), (0, 5), (5, 0)])
def test_it_is_torch_s_product_to_the_bit(M, K, dtype, p, device, kernel_memory):
    x, seed = torch.randn(M, K, device=device).to(dtype), torch.tensor([shifted(5)], device=device)
    for rows in (x, x.t().contiguous().t()):
        assert torch.equal(dropped(rows, seed, p), expected(x, seed, p))


def test_what_is_not_finite_shows(device, kernel_memory):
    x = torch.full((3, 40), float("inf"), device=device)
    found = dropped(x, torch.tensor([1], device=device), 0.5)
    assert torch.equal(found.nan_to_num(7.0, 8.0), expected(x, 1, 0.5).nan_to_num(7.0, 8.0))
    assert found.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_launches_it_and_drops_a_wrong_one(dtype, device, kernels_on, monkeypatch):
    x, seed = torch.randn(2, 3, 48, device=device).to(dtype), torch.tensor([shifted(3)], device=device)
    flat = expected(x.reshape(6, 48), seed, 0.25).reshape(x.shape)
    assert torch.equal(op.dropped(x, seed, 0.25), flat)
    assert guard.verdicts()[("dropped", dtype, 528, x.device)]
    monkeypatch.setattr(kernel, "dropped", lambda *args: dropped(*args) * 1.02)
    with pytest.warns(UserWarning, match="dropped.*is dropped, the eager path takes over: result 0 is off"):
        found = op.dropped(x[..., :47], seed, 0.25)
    assert torch.equal(found, expected(x[..., :47].reshape(6, 47), seed, 0.25).reshape(2, 3, 47))


def test_derivatives_draw_the_same_mask(device, kernels_on):
    x, seed = torch.randn(5, 48, device=device, requires_grad=True), torch.tensor([shifted(3)], device=device)
    keep = expected(torch.ones_like(x), seed, 0.4)
    (g,) = torch.autograd.grad((op.dropped(x, seed, 0.4) ** 2).sum(), x, create_graph=True)
    assert torch.equal(g.detach(), 2 * (x * keep).detach() * keep)
    (second,) = torch.autograd.grad(g.sum(), x)
    assert torch.equal(second, 2 * keep * keep)
    several = torch.autograd.grad(
        op.dropped(x, seed, 0.4), x, torch.ones(2, 5, 48, device=device), is_grads_batched=True
    )
    assert torch.equal(several[0], keep.expand(2, 5, 48))
    negative = torch.complex(torch.zeros_like(x), x).detach().conj().imag  # a view with the negative bit
    assert torch.equal(op.dropped(negative, seed, 0.4), -x.detach() * keep)


def test_bytes_of_a_launch(device):
    """What the formula counts is what the tensors hold."""
    x = torch.zeros(33, 65, dtype=torch.bfloat16)
    assert traffic(33, 65, torch.bfloat16)["bytes"] == 2 * x.nbytes
