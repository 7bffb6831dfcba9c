"""What the plan launches: how often, how many bytes, and that the trial before first use is of exactly that."""

import itertools
import warnings

import pytest
import torch

from fused_lora.kernels import lora_grad, lora_linear, lora_shrink
from fused_lora.kernels.config import traffic
from fused_lora.ops import kernel, plan
from fused_lora.testing.layers import LayerCase

BF16 = torch.bfloat16


@pytest.fixture
def launched(kernels_on, monkeypatch):
    """Every launch as it happens: kernel, split of the grid, classes of the integers, dtypes, what is fixed."""
    seen = []
    for module, name in ((lora_linear, "_lora_linear_kernel"), (lora_grad, "_lora_weight_grad_kernel"),
                         (lora_shrink, "_lora_shrink_kernel")):  # fmt: skip
        original = getattr(module, name)

        class Recorded:
            def __init__(self, original, name):
                self.original, self.name = original, name

            def __getitem__(self, grid):
                def launch(*args, **fixed):
                    tensors = [a for a in args if isinstance(a, torch.Tensor)]
                    classes = [1 if a == 1 else a % 16 == 0 for a in args if isinstance(a, int)]
                    seen.append((self.name, grid[1:], classes, [t.dtype for t in tensors], fixed))
                    return self.original[grid](*args, **fixed)

                return launch

        monkeypatch.setattr(module, name, Recorded(original, name))
    return seen


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("M, forward", [(1, 1), (20, 1), (600, 2)])
def test_launches_of_a_layer(M, forward, p, device, launched, monkeypatch):
    """Forward 1, or 2 in the split form; backward 2."""
    monkeypatch.setenv("FUSED_LORA_CHECK", "0")
    case = LayerCase.make(M, 40, 1100 if M == 1 else 48, [8], [p], BF16, device=device)
    W, A, B = case.weight, case.lora_A, case.lora_B
    plan.forward(case.x, W, case.bias, A, B, case.dropout)(case.x, W, case.bias, *case.adapters)
    assert len(launched) == forward
    case.planned()
    assert len(launched) == 2 * forward + 2


def chosen_step(M, N, K, r, dropout, dtype=BF16, upcast=False):
    """The plans of forward and backward and the costs of their launches."""
    forward = plan.plan("linear", M, N, K, r, dtype, dropout, upcast, 1, 90)
    backward = plan.plan("input_grad", M, K, N, r, dtype, dropout, upcast, 1, 90)
    rest = r, dtype, dropout, 90, upcast, 1
    return (
        forward,
        backward,
        [
            traffic("linear", M, N, K, *rest, forward.variant),
            traffic("input_grad", M, K, N, *rest, backward.variant),
            traffic("weight_grad", M, N, K, *rest),
        ],
    )


@pytest.mark.parametrize(
    "N, K, upcast",
    # without fp32 adapters the library's GEMM takes the forward of a long contraction
    [*itertools.product((1024, 4096, 14336), (4096,), (False, True)), (4096, 14336, True)],
)
@pytest.mark.parametrize("M, r", [(2048, 16), (8192, 16), (8192, 32)])
def test_a_training_step_as_planned_moves_2x_and_y_beyond_its_base_products(M, r, N, K, upcast):
    """Two passes over x and one over g; what has a rank for a side is counted apart."""
    forward, backward, costs = chosen_step(M, N, K, r, True, upcast=upcast)
    assert (forward.variant, backward.variant) == ("split", "publish")
    assert [cost["launches"] for cost in costs] == [2, 1, 1]
    X, Y, base = 2 * M * K, 2 * M * N, 2 * (M * K + K * N + M * N)
    planes = 8 * backward.weight_grad.SPLIT_K
    narrow = 7 * 4 * M * r + ((4 if upcast else 2) * 3 + planes) * r * (K + N)  # S and dS, A and B, planes
    assert sum(cost["bytes"] for cost in costs) - 2 * base <= 2 * X + Y + narrow
    assert narrow < 0.4 * (2 * X + Y)


def test_the_trial_is_of_the_configurations_that_then_run(device, launched):
    for M, N, K, p in [(600, 48, 64, 0.1), (20, 33, 1040, 0.0), (1, 64, 40, 0.0), (70, 50, 80, 0.5)]:
        kernel._state.clear()
        launched.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            LayerCase.make(M, N, K, [8], [p], BF16, device=device).planned()
        trial_and_run = sorted(map(repr, launched))
        assert trial_and_run[::2] == trial_and_run[1::2], (M, N, K, p)


def test_one_trial_for_each_configuration(device, kernels_on, monkeypatch):
    tried = []
    small_case = kernel.small_case
    monkeypatch.setattr(kernel, "small_case", lambda case: tried.append(case) or small_case(case))

    def forward(M, N, K, r=8, dtype=torch.float32):
        case = LayerCase.make(M, N, K, [r], [0.0], dtype, device=device)
        run = plan.forward(case.x, case.weight, None, case.lora_A, case.lora_B, [0.0])
        run(case.x, case.weight, None, case.lora_A, case.lora_B, [1.0], [0.0], None)
        return len(tried)

    assert forward(5, 33, 40, dtype=BF16) == 1
    assert forward(7, 35, 42, dtype=BF16) == 1
    assert forward(9, 37, 48, dtype=BF16) == 2  # K is a multiple of 16: another binary
    assert forward(5, 33, 2000, dtype=BF16) == 3  # K long enough to be split
    assert forward(5, 33, 2000, r=20, dtype=BF16) == 4  # another rank block
    assert forward(5, 33, 2000, r=20, dtype=torch.float16) == 5
    assert forward(5, 33, 2000, r=20, dtype=torch.float16) == 5


def test_no_trial_while_a_graph_is_captured(monkeypatch):
    """Until something has passed outside, the eager path is captured; and that is no verdict."""
    monkeypatch.setattr(kernel, "_state", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run = kernel.guarded(("a",), lambda: "kernel", lambda: "eager", lambda: None)
    assert run() == "eager" and not kernel._state
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert run() == "kernel" and kernel._state == {("a",): True}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert run() == "kernel"


def test_a_run_that_fails_after_its_trial_is_dropped(monkeypatch):
    monkeypatch.setattr(kernel, "_state", {})

    def fails():
        raise RuntimeError("Triton Error [CUDA]: an illegal configuration")

    run = kernel.guarded(("b",), fails, lambda: "eager", lambda: None)
    with pytest.warns(UserWarning, match="is dropped.*illegal configuration"):
        assert run() == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run() == "eager"
