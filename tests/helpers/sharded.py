"""One PEFT layer over a linear that is sharded over two processes, stock and accelerated: what each process finds."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import fused_lora
from helpers.accelerated import wrap
from helpers.processes import WORLD
from helpers.training import counted_calls

K, N, M = 24, 16, 9
TERMS = 2 * K + N + M  # of the sums of a layer and its backward
STYLES = {
    # of the base layer, of lora_A, of lora_B
    "column, gathered": (lambda: ColwiseParallel(output_layouts=Replicate()), None, None),
    "row, scattered": (lambda: RowwiseParallel(input_layouts=Replicate()), None, None),
    # as transformers and PEFT shard them: the adapter's sharded half has hooks and a DTensor of its own
    "column": (ColwiseParallel, None, ColwiseParallel),
    "row": (RowwiseParallel, RowwiseParallel, None),
}


def run(style: str, **fields: Any) -> dict[str, Any]:
    """Results of the stock and the accelerated layer, and what the layer is without any sharding, in float64.

    Returns:
        stock, ours, exact: output, gradients of x and of the adapter, whole; calls: how the accelerated layer ran;
        layer: the row of ``explain``.
    """
    torch.manual_seed(0)
    plain = wrap(nn.Sequential(nn.Linear(K, N)), target_modules=["0"], **fields)
    x, g = torch.randn(M, K), torch.randn(M, N)
    mesh = init_device_mesh("cpu", (WORLD,))
    found: dict[str, Any] = {"exact": _results(copy.deepcopy(plain).double(), x.double(), g.double(), "whole")}
    for name in ("stock", "ours"):
        model = copy.deepcopy(plain)
        layer = model.base_model.model[0]
        parts = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
        for part, of_part in zip(parts, STYLES[style], strict=True):
            if of_part is not None:
                parallelize_module(part, mesh, of_part())
        if name == "ours":
            fused_lora.accelerate(model)
            found["layer"] = str(fused_lora.explain(model).layers[0])
        with counted_calls() as calls:
            found[name] = _results(model, x, g, style)
    return {**found, "calls": calls}


def _results(model: nn.Module, x: torch.Tensor, g: torch.Tensor, style: str) -> dict[str, torch.Tensor]:
    rank = torch.distributed.get_rank()
    x = (x.chunk(WORLD, 1)[rank] if style == "row" else x).clone().requires_grad_()
    y = model(x)
    y.backward(g.chunk(WORLD, 1)[rank] if style == "column" else g)
    layer = model.base_model.model[0]
    gradients = {"dx": x.grad}
    for name, part in (("dA", layer.lora_A), ("dB", layer.lora_B)):
        gradients[name] = part["default"].weight.grad
    found = {"y": y.detach()} | gradients
    found = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}
    for name, split in (("y", style == "column"), ("dx", style == "row")):
        if split:
            pieces = [torch.empty_like(found[name]) for _ in range(WORLD)]
            torch.distributed.all_gather(pieces, found[name].contiguous())
            found[name] = torch.cat(pieces, 1)
    return found


def layer_over_a_dtensor() -> str:
    """What a base layer that returns DTensors makes of plain adapters: the error, the same for both."""
    plain = wrap(nn.Sequential(nn.Linear(K, N)), target_modules=["0"])
    mesh, errors = init_device_mesh("cpu", (WORLD,)), []
    for accelerated in (False, True):
        model = copy.deepcopy(plain)
        parallelize_module(model.base_model.model[0].base_layer, mesh, ColwiseParallel(use_local_output=False))
        if accelerated:
            fused_lora.accelerate(model)
        try:
            model(torch.ones(M, K))
            errors.append("none")
        except Exception as error:  # noqa: BLE001 - compared
            errors.append(f"{type(error).__name__}: {error}")
    assert errors[0] == errors[1] and peft.__name__
    return errors[0]


def run_case(kind: str, **fields: Any) -> dict[str, Any]:
    """:func:`run`, or :func:`layer_over_a_dtensor` for the kind "dtensor"."""
    return {"error": layer_over_a_dtensor()} if kind == "dtensor" else run(kind, **fields)
