"""The hooks of a module, without those by which a model's calls are noted."""

from torch import nn

from fused_lora.modules import changes


def hooks(module: nn.Module) -> list:
    found = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return [h for h in found if h not in (changes._begin, changes._end) and not getattr(h, "stays", False)]
