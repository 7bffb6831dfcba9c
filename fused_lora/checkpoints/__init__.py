"""Models and adapters as files: merging without a model."""

from fused_lora.checkpoints.merge import MergeReport, merge_checkpoint, unmerge_checkpoint

__all__ = ["MergeReport", "merge_checkpoint", "unmerge_checkpoint"]
