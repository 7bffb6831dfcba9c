"""Continuous batching with an adapter per request, on the engine of transformers."""

from fused_lora.serving.engine.continuous import continuous_batching, generate_batch
from fused_lora.serving.engine.failures import StepFailed, failure_of

__all__ = ["StepFailed", "continuous_batching", "failure_of", "generate_batch"]
