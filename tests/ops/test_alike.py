"""When the answer for some tensors stands for others."""

import pytest
import torch

from fused_lora.ops.alike import Alike


def kept(x, W, any_rows=False):
    alike = Alike()
    alike.keep("answer", (x, W), any_rows)
    return alike


X, W = torch.zeros(4, 6), torch.nn.Parameter(torch.zeros(3, 6))


def test_tensors_like_these():
    assert kept(X, W).find(torch.ones(4, 6), torch.nn.Parameter(torch.ones(3, 6))) == "answer"
    assert Alike().find(X, W) is None


OTHERS = {
    "rows": torch.zeros(5, 6),
    "features": torch.zeros(4, 7),
    "dimensions": torch.zeros(1, 4, 6),
    "strides": torch.zeros(6, 4).t(),
    "dtype": torch.zeros(4, 6, dtype=torch.float64),
    "device": torch.zeros(4, 6, device="meta"),
    "gradient": torch.zeros(4, 6, requires_grad=True),
    "class": torch.nn.Parameter(torch.zeros(4, 6), requires_grad=False),
    "negative": torch.zeros(4, 6, dtype=torch.complex64).conj().imag,
    "sparse": torch.zeros(4, 6).to_sparse(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_tensors(name):
    assert kept(X, W).find(OTHERS[name], W) is None
    any_rows = kept(X, W, any_rows=True).find(OTHERS[name], W)
    assert any_rows == ("answer" if name in ("rows", "strides") else None)


def test_who_looks_on():
    alike = kept(X, W)
    with torch.autocast("cpu"):
        assert alike.find(X, W) is None
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert alike.find(X, W) is None
    assert torch.func.vmap(lambda x: x.sum() + (alike.find(x, W) is not None))(X[None]).item() == 0
    assert alike.find(X, W) == "answer"


def test_the_newest_are_kept():
    alike = Alike()
    for rows in range(1, 10):
        alike.keep(rows, (torch.zeros(rows, 6), W))
    assert [alike.find(torch.zeros(rows, 6), W) for rows in range(1, 10)] == [None, *range(2, 10)]
