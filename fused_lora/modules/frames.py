"""Generators that yield inside of a context: other code of the thread runs before the context ends."""

from __future__ import annotations

import contextlib
import inspect
import sys
from types import FrameType

_YIELDS = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def generator_around() -> FrameType | None:
    """The frame of the innermost generator that called this, or None. What ``contextlib`` drives is none: there the
    caller's code runs while it is suspended."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_flags & _YIELDS and not (frame.f_back and _is_contextlib(frame.f_back)):
            return frame
        frame = frame.f_back
    return None


def is_running(generator: FrameType) -> bool:
    """Whether this thread runs the generator now, or what it has called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not generator:
        frame = frame.f_back
    return frame is not None


def _is_contextlib(frame: FrameType) -> bool:
    return frame.f_code.co_filename == contextlib.__file__
