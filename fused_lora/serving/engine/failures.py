"""How a request of the engine can fail, and how many failures in a row end the engine."""

from __future__ import annotations

from typing import Any

# a model that fails in so many steps in a row is not going to recover
MAX_FAILED_STEPS = 16


class StepFailed(RuntimeError):
    """The model raised in a step with this request. Any request of the step may be the cause.

    Args:
        error: what was raised; ``kind`` is the name of its type.
    """

    def __init__(self, error: Exception):
        self.kind = type(error).__name__
        super().__init__(f"the model failed in a step with this request: {self.kind}: {error}")


def failure_of(output: Any) -> Exception | None:
    """Why a request of the engine failed, or None.

    Args:
        output: transformers' ``GenerationOutput``.

    Returns:
        :class:`StepFailed`; ``NonFiniteOutput``; what the store raised for its adapter (``AdapterNotFound``,
        ``StoreFull``, ``AdapterError``); or a RuntimeError when the engine was stopped.

    Raises:
        TypeError: output is not a GenerationOutput.
    """
    if not hasattr(output, "error"):
        raise TypeError(f"output: expected a GenerationOutput of the engine, got {type(output).__name__}")
    return getattr(output, "exception", None) or (RuntimeError(output.error) if output.error else None)
