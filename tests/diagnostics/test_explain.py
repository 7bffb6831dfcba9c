"""fused_lora.explain: the plan and its cost without a GPU, and the layers of a model."""

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.ops import guard
from fused_lora.ops.linear import plan

BF16 = torch.bfloat16
SHAPE = dict(M=8192, K=4096, N=4096, r=16, dtype=BF16)


def cell(text, row, column):
    """The word in the table's row below the heading; columns are two blanks or more apart."""
    lines = text.splitlines()
    start = lines[1].index(column)
    return next(line for line in lines if line.startswith(row))[start:].split()[0]


def test_a_training_step_on_a_chip_that_is_not_there():
    found = fused_lora.explain(**SHAPE, dropout=0.1, device="H100")
    text = str(found)
    assert text.startswith("LoRA linear M=8192 K=4096 N=4096 r=16 dropout=0.1 bfloat16 on H100")
    assert (cell(text, "forward", "variant"), cell(text, "backward", "variant")) == ("split", "passes")
    assert (cell(text, "forward", "launches"), cell(text, "backward", "launches")) == ("2", "4")
    assert "forward, shrink: " in text and "forward, product: " in text and "tensor descriptors" in text
    assert "backward, pass over g: " in text and "backward, pass over x: " in text
    assert found.forward.flops == found.forward.floor_flops == 2 * 8192 * (4096 * 4096 + 16 * 8192)
    assert float(cell(text, "forward", "MB")) == pytest.approx(found.forward.bytes / 1e6, abs=0.1)


@pytest.mark.parametrize("chip", list(fused_lora.explain.__globals__["CHIPS"]) + ["sm_75", "sm_100"])
@pytest.mark.parametrize("M", [1, 64, 513, 8192])
def test_what_it_says_is_what_the_plan_says(M, chip):
    for dtype, upcast, dropout, adapters in [
        (BF16, False, 0.1, 1), (BF16, True, 0.0, 1), (torch.float32, False, 0.1, 2), (torch.float16, False, 0.0, 1),
    ]:  # fmt: skip
        adapter_dtype = torch.float32 if upcast else dtype
        found = fused_lora.explain(
            M=M, K=4096, N=14336, r=24, dropout=dropout, dtype=dtype, device=chip, adapter_dtype=adapter_dtype,
            adapters=adapters,
        )  # fmt: skip
        capability = fused_lora.explain.__globals__["_capability_of"](chip)
        rest = 24, dtype, dropout > 0, upcast, adapters, capability
        forward, backward = plan.plan("linear", M, 14336, 4096, *rest), plan.plan("backward", M, 4096, 14336, *rest)
        assert (found.forward.variant, found.backward.variant) == (forward.variant, backward.variant)
        assert dict(found.forward.configurations).get("product") == forward.product
        names = ("pass over g", "pass over x") if backward.variant == "passes" else ("shrink", "product")
        parts = dict(zip(names, (backward.shrink, backward.product), strict=True))
        parts["weight gradients"] = backward.weight_grad
        assert dict(found.backward.configurations) == {name: c for name, c in parts.items() if c is not None}
        for cost in (found.forward, found.backward):
            assert cost.flops >= cost.floor_flops > 0
            if capability < 80:
                assert cost.variant == "eager" and cost.bytes is None and "eager path" in str(found)
            else:
                assert cost.bytes >= cost.floor_bytes > 0 and cost.launches >= 1


@pytest.mark.parametrize("chip", ["H100", "A100", "B200", "RTX 5090"])
@pytest.mark.parametrize(
    "N, r, adapters, launches, variant",
    [
        (4096, 32, 1, 4, "passes"),
        (64, 32, 1, 3, "passes"),
        (4096, 33, 1, 4, "library"),
        (4096, 16, 2, 4, "library"),
    ],
)
def test_launches_of_the_backward(N, r, adapters, launches, variant, chip):
    """The library's GEMM after two passes and, for more columns than one tile, a sum of dS; or after three launches."""
    found = fused_lora.explain(**(SHAPE | dict(N=N, r=r)), adapters=adapters, dropout=0.1, device=chip)
    assert (found.backward.launches, found.backward.variant) == (launches, variant)


@pytest.mark.parametrize("adapter_dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("M, N, K", [(2048, 4096, 4096), (8192, 14336, 4096), (8192, 4096, 14336), (8192, 1024, 4096)])
def test_what_a_training_step_moves_beyond_its_base_products(M, N, K, adapter_dtype):
    """Forward a read of x, and y there and back where the library adds to it; backward g, x, and dx there and back."""
    found = fused_lora.explain(M=M, N=N, K=K, r=16, dropout=0.1, device="H100", adapter_dtype=adapter_dtype)
    X, Y, S, AB = 2 * M * K, 2 * M * N, 4 * M * 16, adapter_dtype.itemsize * 16 * (N + K)
    base = X + Y + 2 * N * K
    wide = X + (2 * Y if found.forward.variant == "library" else 0)
    planes = 2 * S * dict(found.forward.configurations)["shrink"].SPLIT_K
    assert base + wide <= found.forward.bytes <= base + wide + planes + 2 * S + 2 * AB
    parts = dict(found.backward.configurations)
    over_g, over_x = parts["pass over g"], parts["pass over x"]
    planes = 8 * 16 * (over_g.SPLIT_K * N + over_x.SPLIT_K * K) + 2 * S * -(-N // over_g.BLOCK_N)
    assert base + Y + 3 * X + planes <= found.backward.bytes <= base + Y + 3 * X + planes + 4 * S + 4 * AB


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = str(fused_lora.explain(**SHAPE))
    assert " on cpu\n" in text and cell(text, "forward", "variant") == "eager"
    assert text.endswith("cpu takes the CPU path: plain torch, no kernels; launches and bytes are not counted")
    assert "meta takes the eager path: there are no kernels for meta devices" in str(
        fused_lora.explain(**SHAPE, device="meta")
    )


def test_what_keeps_a_gpu_from_kernels_is_named(monkeypatch):
    monkeypatch.setattr(guard, "HAS_TRITON", True)
    monkeypatch.setenv("FUSED_LORA_PLAN", "eager")
    assert "FUSED_LORA_PLAN=eager" in str(fused_lora.explain(**SHAPE, device="cuda"))
    monkeypatch.delenv("FUSED_LORA_PLAN")
    monkeypatch.setattr(guard, "HAS_TRITON", False)
    assert "Triton is not installed" in str(fused_lora.explain(**SHAPE, device="cuda"))
    doubles = SHAPE | dict(dtype=torch.float64)
    assert "fp32, bf16 and fp16" in str(fused_lora.explain(**doubles, device="H100"))


def test_a_plan_that_has_failed_is_named(monkeypatch):
    chosen = plan.plan("backward", 8192, 4096, 4096, 16, BF16, True, False, 1, 90)
    monkeypatch.setattr(guard, "_state", {("backward", chosen, "a case"): False, ("merge", "x", "y"): False})
    text = str(fused_lora.explain(**SHAPE, dropout=0.1, device="H100"))
    assert "passes has failed its first use in this process" in text and "split has failed" not in text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(M=None), ValueError, "M: expected a positive integer, got None"),
        (dict(r=0), ValueError, "r: expected a positive integer, got 0"),
        (dict(dropout=1.5), ValueError, "dropout: expected a probability"),
        (dict(dropout="half"), TypeError, "dropout: expected a number, got 'half'"),
        (dict(device=["cpu"]), ValueError, "device: expected a torch device or one of A100"),
        (dict(device="H3000"), ValueError, "device: expected a torch device or one of A100"),
        (dict(dtype="bf16"), TypeError, "dtype: expected a torch.dtype, got 'bf16'"),
        (dict(adapters=0), ValueError, "adapters: expected a positive integer"),
        (dict(model=nn.Linear(2, 2)), ValueError, "model: expected a model or M, K, N and r, got both"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        fused_lora.explain(**{**SHAPE, **change})
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        fused_lora.explain(3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_that_is_not_here():
    with pytest.raises(ValueError, match="device: expected a device that is here or the name of a chip"):
        fused_lora.explain(**SHAPE, device="cuda")


def test_the_layers_of_a_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    assert str(fused_lora.explain(model)) == "no LoRA layers"
    fused_lora.inject(model, fused_lora.LoraConfig(r=2, target_modules=["0", "2"]))
    lines = str(fused_lora.explain(model)).splitlines()
    assert lines[1].split() == ["*", "2", "LoraLinear", "fused"] and lines[-1] == "2 of 2 layers run fused"
    fused_lora.merge(model)
    lines = str(fused_lora.explain(model)).splitlines()
    assert len(lines) == 3 and "no: " in lines[1]
    assert lines[-1] == "0 of 2 layers run fused; 2 do not: merged: the base layer alone"
