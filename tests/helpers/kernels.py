"""Cases that the tests of several kernels share."""

import pytest
import torch

# of x and W, and of A and B
PAIRS = [
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
each_pair = pytest.mark.parametrize("dtype, adapter_dtype", PAIRS, ids=str)
several_adapters = pytest.mark.parametrize(
    "ranks, dropout", [([3, 24], [0.1, 0.5]), ([16, 16], [0.0, 0.9]), ([1, 2, 40], [0.0] * 3)]
)
