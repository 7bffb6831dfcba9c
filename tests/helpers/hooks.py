"""The hooks of a module, without the two by which a model's calls are noted."""

from torch import nn

from fused_lora.modules import changes


def hooks(module: nn.Module) -> list:
    found = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [hook for hook in found if hook not in (changes._begin, changes._end)]
