"""The same layer or model twice, here and in PEFT, with the same weights: what side-by-side tests compare."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import fused_lora
from fused_lora.ops.linear.op import draw_seeds
from fused_lora.reference import dropout_mask, keep_scale
from helpers.seeds import shifted


def twin_models(
    model: nn.Module, adapters: Mapping[str, Mapping], *, seed: int = 0, randomize: bool = True
) -> tuple[nn.Module, nn.Module]:
    """``model`` injected by fused_lora and a copy of it wrapped by PEFT, each built under ``torch.manual_seed(seed)``.

    Args:
        model: any module; it is changed in place and returned first.
        adapters: name -> fields of the LoraConfig; the first one is active on both sides.
        randomize: give every adapter parameter, lora_B included, the same random values on both sides.

    Returns:
        (the fused_lora model, the PeftModel).
    """
    import peft

    copied = copy.deepcopy(model)
    torch.manual_seed(shifted(seed))
    for name, fields in adapters.items():
        fused_lora.inject(model, fused_lora.LoraConfig(**fields), name)
    torch.manual_seed(shifted(seed))
    theirs = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fan_in_fan_out, which PEFT sets by itself
        for name, fields in adapters.items():
            config = peft.LoraConfig(**copy.deepcopy(dict(fields)))
            if theirs is None:
                theirs = peft.get_peft_model(copied, config, adapter_name=name)
            else:
                theirs.add_adapter(name, config)
    theirs.train(model.training)
    if randomize:
        randomize_adapters(model)
        copy_parameters(model, theirs)
    return model, theirs


def twin_layers(
    base: nn.Module, adapters: Mapping[str, Mapping] | None = None, *, active: Sequence[str] | None = None, **fields
) -> tuple[fused_lora.LoraLinear, nn.Module]:
    """One LoRA layer over ``base`` here and one in PEFT, same weights; ``fields`` are those of every adapter's config.

    ``adapters`` (name -> further fields) default to one called "default"; ``active`` chooses, default the first.
    """
    adapters = {"default": {}} if adapters is None else adapters
    configs = {name: {"target_modules": ["lin"], **fields, **own} for name, own in adapters.items()}
    holder = nn.Sequential(OrderedDict(lin=base)).train(base.training)
    ours, theirs = twin_models(holder, configs)
    layers = ours.lin, theirs.base_model.model.lin
    if active is not None:
        for layer in layers:
            layer.set_adapter(list(active))
    return layers


def randomize_adapters(model: nn.Module, std: float = 0.05) -> None:
    """Normal values in every adapter parameter, in ``named_parameters`` order."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in f".{name}" or ".lora_B." in f".{name}":
            parameter.data.normal_(std=std)


def copy_parameters(ours: nn.Module, theirs: nn.Module) -> None:
    """Every parameter of ours into the PeftModel's of the same name."""
    target = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        target[f"base_model.model.{name}"].data.copy_(parameter.data)


class ExportedDropout(nn.Module):
    """Dropout with the mask that fused_lora exports for a seed, in place of PEFT's nn.Dropout."""

    def __init__(self, seed: Tensor, p: float):
        super().__init__()
        self.seed, self.p = seed, p

    def forward(self, x: Tensor) -> Tensor:
        return x * dropout_mask(self.seed, x.shape, self.p, x.device) * keep_scale(self.p) if self.training else x


def share_dropout(theirs: nn.Module, names: Sequence[str], p: float, seed: int) -> None:
    """Let a PEFT layer drop what ours drops in its first call after ``torch.manual_seed(seed)``."""
    torch.manual_seed(shifted(seed))
    for name, one in zip(names, draw_seeds(len(names), torch.device("cpu")), strict=True):
        theirs.lora_dropout[name] = ExportedDropout(one, p).train(theirs.training)


def run_layer(layer: nn.Module, x: Tensor, g: Tensor | None = None, names: Sequence[str] = ("default",)):
    """y, and with ``g`` the gradients of x and of each adapter's A, B and bias of B: name -> tensor."""
    x = x.detach().requires_grad_(g is not None)
    y = layer(x)
    found = {"y": y.detach()}
    if g is None:
        return found
    wanted = {"dx": x}
    for name in names:
        wanted |= {f"dA {name}": layer.lora_A[name].weight, f"dB {name}": layer.lora_B[name].weight}
        if layer.lora_B[name].bias is not None:
            wanted[f"dbias {name}"] = layer.lora_B[name].bias
    return found | dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), g), strict=True))
