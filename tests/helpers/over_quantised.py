"""Models with LoRA over quantised layers, here and in PEFT: with the same adapters, side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_lora
from fused_lora import verify
from fused_lora.diagnostics.verification import report
from fused_lora.testing.numeric import assert_close, assert_no_worse
from helpers.twins import run_layer

FIELDS = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}  # scaling 1.5
KINDS = ["fused_lora", "peft", "accelerated"]


def with_adapters(model: nn.Module, kind: str, names: Sequence[str] = ("default",), **fields: Any) -> nn.Module:
    """``model`` under inject, PEFT, or PEFT and accelerate, in ``eval()``; all of ``names`` are active."""
    fields = {**FIELDS, **fields}
    if kind == "fused_lora":
        for name in names:
            fused_lora.inject(model, fused_lora.LoraConfig(**fields), name)
        fused_lora.set_adapter(model, list(names))
        return model.eval()
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(**fields), names[0])
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**fields))
    model.base_model.set_adapter(list(names))
    return (fused_lora.accelerate(model) if kind == "accelerated" else model).eval()


def three_models(base: nn.Module, names: Sequence[str] = ("default",), **fields: Any) -> tuple[nn.Module, ...]:
    """PEFT's accelerated, ours and PEFT's over copies of ``base``, with the same numbers in fp32, in ``train()``."""
    injected = with_adapters(copy.deepcopy(base), "fused_lora", names, **fields)
    theirs = with_adapters(base, "peft", names, **fields)
    for mine, other in zip(layers(injected), layers(theirs), strict=True):
        for name in names:
            for to, part in ((mine.lora_A, other.lora_A), (mine.lora_B, other.lora_B)):
                assert to[name].weight.dtype is part[name].weight.dtype is torch.float32
                to[name].weight.data.copy_(part[name].weight.data)
    theirs.train()
    return fused_lora.accelerate(copy.deepcopy(theirs)), injected.train(), theirs


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Layers with LoRA by path, of ours or of PEFT."""
    return {path: m for path, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")}


def layers(model: nn.Module) -> list[Any]:
    """The same in their order."""
    return list(lora_layers(model).values())


def results(
    models: Sequence[nn.Module], x: Tensor, g: Tensor, names: Sequence[str], y: Tensor, weight: Tensor
) -> list[dict[str, Tensor]]:
    """Output and all gradients of the first layer of each model, and at the end those of float64.

    y: what the base layer adds to the terms, float64. weight: by which it takes ``g`` to the gradient of x, [N, K].
    """
    layer = layers(models[-1])[0]
    own = x.double().requires_grad_()
    factors = {n: [p[n].weight.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B)] for n in names}
    term = sum(1.5 * own @ A.t() @ B.t() for A, B in factors.values())
    wanted = {"dx": own}
    for name, (A, B) in factors.items():
        wanted |= {f"dA {name}": A, f"dB {name}": B}
    exact = dict(zip(wanted, torch.autograd.grad(term, list(wanted.values()), g.double()), strict=True))
    exact["dx"] = exact["dx"] + g.double() @ weight.double()
    exact["y"] = y + term.detach()
    return [*(run_layer(layers(model)[0], x, g, names) for model in models), exact]


def assert_no_worse_than_peft(draws: Sequence[Sequence[Mapping[str, Tensor]]]) -> None:
    """For draws of :func:`results` of :func:`three_models`."""
    for which in range(2):
        for name in draws[0][-1]:
            mine, theirs, exact = (torch.stack([draw[i][name] for draw in draws]) for i in (which, 2, 3))
            assert mine.dtype is theirs.dtype, name
            assert_no_worse(mine, theirs, exact, name=name, draws=True)


def same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether tensors have the same numbers, and all else is equal."""
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(left, right, strict=True)
    )


def assert_requantised(
    model: nn.Module, kind: str, merged: bool, contents: Callable[[nn.Module], list], x: Tensor, bits: int, name: str
) -> None:
    """verify of a model with quantised layers up and down and a dense head, of which it changes nothing."""
    if merged:
        fused_lora.merge(model)
    before = contents(model)
    result = verify(model, x)
    assert same(contents(model), before)
    if kind == "peft" and merged:
        assert result.skipped.keys() == {path for path in lora_layers(model) if not path.endswith("head")}
        why = f"PEFT merged it into {bits} bits, the weight of before is gone"
        assert set(result.skipped.values()) == {why} and not result.ok
        return
    assert result.ok and result.verdict == "rounding" and not result.findings and not result.skipped, str(result)
    assert result.was_merged == merged and [check.dtype for check in result.layers] == [name, name, torch.float32]
    for check in result.layers[:2]:
        assert check.ok and check.lost > (0.05 if bits == 4 else 1e-3)
        assert check.difference_rms < 4 * check.expected_rms
    if kind != "peft":
        if not merged:
            fused_lora.merge(model)
        for path, lost in fused_lora.delta_fidelity(model).items():
            found = next(check.lost for check in result.layers if check.path.endswith(path))
            assert found == pytest.approx(lost, rel=1e-3, abs=1e-6)


def finds(cause: str, layers: tuple[str, ...], model: nn.Module, x: Tensor, **options: Any) -> report.Verification:
    """verify finds one cause, in these layers."""
    result = verify(model, x, **options)
    assert [(found.cause, found.layers) for found in result.findings] == [(cause, layers)], str(result)
    return result


def assert_lost(model: nn.Module, x: Tensor, name: str) -> None:
    """verify of such a model, whose quantised layers would lose a small adapter."""
    for layer in layers(model):
        layer.lora_B["default"].weight.data.mul_(1e-3)
    result = verify(model, x)
    assert result.verdict == "lost" and not result.ok, str(result)
    [finding] = result.findings
    assert finding.cause == report.LOST and finding.layers == ("up", "down")
    assert f"a merge into {name} keeps only" in finding.message and "unload(model, merge_adapters" in finding.message


def assert_chosen_alike(ours: nn.Module, theirs: nn.Module, x: Tensor, terms: int) -> None:
    """Adapters "default" and "second" of an accelerated model: one, both and none give what PEFT's give."""
    for step in (
        lambda m: m.set_adapter("second"),
        lambda m: m.base_model.set_adapter(["default", "second"]),
        lambda m: m.base_model.disable_adapter_layers(),
    ):
        for model in (ours, theirs):
            step(model)
        assert_close(ours(x), theirs(x), terms=terms)


def assert_merges_refused(ours: nn.Module, injected: nn.Module, x: Tensor, why_not_dense: str) -> None:
    """A model with a packed layer ``up``, accelerated and ours: merges are refused by name and change nothing."""
    before = injected(x)
    with pytest.raises(RuntimeError, match="up: base_layer: the weight is packed in qweight; .*nothing was merged"):
        fused_lora.merge(injected)
    with pytest.raises(RuntimeError, match=why_not_dense):
        fused_lora.unload(injected, merge_adapters=True, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="base_layer: the weight is packed in qweight, so nothing was merged"):
        ours.merge_adapter()
    assert torch.equal(injected(x), before) and not layers(ours)[0].merged
