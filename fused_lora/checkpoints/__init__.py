"""Models and adapters as files: merging without a model, and adapters made, compared and changed."""

from fused_lora.checkpoints.combine import NewAdapter, combine_adapters, extract_adapter, shrink_adapter
from fused_lora.checkpoints.convert import Converted, convert_adapter
from fused_lora.checkpoints.inspect import AdapterDiff, AdapterReport, diff_adapters, inspect_adapter
from fused_lora.checkpoints.merge import MergeReport, merge_checkpoint, unmerge_checkpoint

__all__ = [
    "AdapterDiff",
    "AdapterReport",
    "Converted",
    "MergeReport",
    "NewAdapter",
    "combine_adapters",
    "convert_adapter",
    "diff_adapters",
    "extract_adapter",
    "inspect_adapter",
    "merge_checkpoint",
    "shrink_adapter",
    "unmerge_checkpoint",
]
