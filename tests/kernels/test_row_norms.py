"""The kernel of DoRA's row norms: float64's values, every shape and stride, its bytes."""

import pytest
import torch

from fused_lora.kernels import row_norms as kernel
from fused_lora.kernels.row_norms import row_norms, traffic
from fused_lora.ops import guard
from fused_lora.ops.dora import op
from fused_lora.testing.numeric import assert_close, assert_no_worse


def case(N, K, r, dtype, adapter_dtype, device):
    W, A, B = torch.randn(N, K) * 0.1, torch.randn(r, K) * 0.1, torch.randn(N, r) * 0.1
    return W.to(device, dtype), A.to(device, adapter_dtype), B.to(device, adapter_dtype)


@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("N, K, r", [(1, 1, 1), (33, 65, 5), (40, 64, 33), (32, 130, 16), (0, 8, 2)])
def test_norms_are_as_exact_as_a_dense_sum(N, K, r, dtype, adapter_dtype, device, kernel_memory):
    W, A, B = case(N, K, r, dtype, adapter_dtype, device)
    exact = (W.double() + 1.5 * B.double() @ A.double()).norm(dim=1)
    dense = (W.float() + 1.5 * B.float() @ A.float()).norm(dim=1)
    assert_no_worse(row_norms(W, A, B, 1.5), dense, exact, ulps=2)
    backwards = W.t().contiguous().t()
    assert_no_worse(row_norms(backwards, A, B, 1.5), dense, exact, ulps=2)


def test_the_operator_launches_it_and_drops_a_wrong_one(device, kernels_on, monkeypatch):
    W, A, B = case(40, 70, 4, torch.bfloat16, torch.float32, device)
    eager = op._eager_norms(W, A, B, 2.0)
    assert_close(op.row_norms(W, A, B, 2.0), eager, terms=1000)
    assert guard.verdicts()[("row_norms", torch.bfloat16, torch.float32, torch.float32, W.device)]
    monkeypatch.setattr(kernel, "row_norms", lambda *args: op._eager_norms(*args) * 1.001)
    with pytest.warns(UserWarning, match="row_norms.*is dropped, the eager path takes over: result 0 is off"):
        found = op.row_norms(W.float(), A, B, 2.0)
    assert_close(found, eager, terms=1000)


def test_bytes_of_a_launch(device):
    """What the formula counts is what the tensors hold."""
    tensors = case(33, 65, 5, torch.bfloat16, torch.float32, device)
    held = sum(t.nbytes for t in (*tensors, torch.empty(33)))
    assert traffic(33, 65, 5, torch.bfloat16, torch.float32)["bytes"] == held
