"""The hooks of a module, without those by which a model's calls are noted and its first one is looked at."""

from torch import nn

from fused_lora.modules import changes
from fused_lora.modules.reads import FirstForward


def hooks(module: nn.Module) -> list:
    found = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    found = [hook for hook in found if hook not in (changes._begin, changes._end)]
    return [hook for hook in found if not isinstance(getattr(hook, "__self__", hook), FirstForward)]
