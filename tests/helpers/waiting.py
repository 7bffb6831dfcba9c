"""Waiting in tests: for progress, not for seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

HANG = 600.0  # seconds: only what hangs takes so long, however busy the machine is


def wait_for(condition: Callable[[], bool], interval: float = 0.01) -> None:
    """Until ``condition()`` holds; AssertionError where it hangs."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(interval)
