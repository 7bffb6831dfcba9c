"""Memory for tensor descriptors: ours during a launch that needs it, the caller's allocator before and after."""

import pytest
import torch
import triton
from triton.runtime import _allocation

from fused_lora.kernels.descriptors import describable, descriptor_memory


def current():
    held = _allocation._allocator
    return held.get() if hasattr(held, "reset") else held


@pytest.fixture(params=["context variable", "global"])
def callers_allocator(request, monkeypatch):
    """What the caller has set, in either form that triton has had."""

    def allocate(size, alignment, stream):
        return torch.empty(size, dtype=torch.int8)

    if request.param == "global":  # triton 3.4
        monkeypatch.setattr(_allocation, "_allocator", allocate)
        monkeypatch.setattr(triton, "set_allocator", lambda new: setattr(_allocation, "_allocator", new))
        yield allocate
    else:
        before = current()
        triton.set_allocator(allocate)
        yield allocate
        triton.set_allocator(before)


def test_the_callers_allocator_is_back_after_the_launch(callers_allocator):
    with descriptor_memory():
        assert current() is not callers_allocator
    assert current() is callers_allocator


def test_it_is_back_after_a_launch_that_fails(callers_allocator):
    with pytest.raises(RuntimeError, match="launch"), descriptor_memory():
        raise RuntimeError("launch failed")
    assert current() is callers_allocator


def test_what_a_descriptor_can_address():
    x = torch.zeros(9, 64, dtype=torch.bfloat16)
    assert describable(x) and describable(x[:, :56]) and describable(x[1:])
    assert not describable(x.t())  # columns apart
    assert not describable(x[:, 1:])  # starts between two multiples of 16 bytes
    assert not describable(torch.zeros(9, 65, dtype=torch.bfloat16))  # so does every row but the first
    assert not describable(x[:1].expand(9, 64))  # one row over and over, as the gradient of y.sum(0) is
    assert not describable(x.view(-1).as_strided((9, 64), (32, 1)))  # rows that overlap
