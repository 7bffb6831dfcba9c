"""fused_lora: LoRA layers in one pass. Train, merge exactly, serve many adapters at once.

inject / LoraConfig / LoraLinear          LoRA on a model or a layer, PEFT's names and rules
save_adapter / load_adapter               PEFT checkpoints, both ways
set_adapter / delete_adapter / disable_adapters / adapter_batch
merge / unmerge / switch / merged / delta_fidelity / unload
merge_checkpoint / unmerge_checkpoint     the same for a model's files, without a model
inspect_adapter / diff_adapters / convert_adapter / combine_adapters / shrink_adapter / extract_adapter
dropout_mask                              the mask that a call used
accelerate / restore                      an existing PEFT model, fast in place and back
explain                                   what runs and what it costs, of a shape or of a model
verify                                    merged against unmerged: rounding, or a bug and which
functional                                the operators, for layers of your own
"""

from fused_lora import functional
from fused_lora._version import __version__
from fused_lora.adapters import AdapterError, load_adapter, save_adapter
from fused_lora.checkpoints import (
    combine_adapters,
    convert_adapter,
    diff_adapters,
    extract_adapter,
    inspect_adapter,
    merge_checkpoint,
    shrink_adapter,
    unmerge_checkpoint,
)
from fused_lora.diagnostics.explain import explain
from fused_lora.diagnostics.verify import verify
from fused_lora.integrations.peft import accelerate, restore
from fused_lora.modules.config import LayerTensors, LoraConfig
from fused_lora.modules.inject import (
    AdapterNotFound,
    active_adapters,
    adapter_batch,
    adapter_configs,
    delete_adapter,
    disable_adapters,
    inject,
    lora_layers,
    set_adapter,
)
from fused_lora.modules.linear import LoraLinear
from fused_lora.modules.merging import delta_fidelity, merge, merged, switch, unload, unmerge
from fused_lora.reference import dropout_mask
from fused_lora.serving.residency.lease import Lease
from fused_lora.serving.residency.residency import StoreFull
from fused_lora.serving.store import AdapterStore

__all__ = [
    "AdapterError",
    "AdapterNotFound",
    "AdapterStore",
    "LayerTensors",
    "Lease",
    "LoraConfig",
    "LoraLinear",
    "StoreFull",
    "__version__",
    "accelerate",
    "active_adapters",
    "adapter_batch",
    "adapter_configs",
    "combine_adapters",
    "convert_adapter",
    "delete_adapter",
    "delta_fidelity",
    "diff_adapters",
    "disable_adapters",
    "dropout_mask",
    "explain",
    "extract_adapter",
    "functional",
    "inject",
    "inspect_adapter",
    "load_adapter",
    "lora_layers",
    "merge",
    "merge_checkpoint",
    "merged",
    "restore",
    "save_adapter",
    "set_adapter",
    "shrink_adapter",
    "switch",
    "unload",
    "unmerge",
    "unmerge_checkpoint",
    "verify",
]
