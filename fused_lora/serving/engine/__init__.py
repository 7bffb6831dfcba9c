"""Continuous batching with an adapter per request, on the engine of transformers."""

from fused_lora.serving.engine.continuous import StepFailed, continuous_batching, generate_batch

__all__ = ["StepFailed", "continuous_batching", "generate_batch"]
