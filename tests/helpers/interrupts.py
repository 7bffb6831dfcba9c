"""KeyboardInterrupts where CPython 3.11 and later handle signals."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import fused_lora

PACKAGE = str(Path(fused_lora.__file__).parent)


def everywhere(
    begin: Callable[[], Any], act: Callable[[], Any], package: str = PACKAGE, step: int = 1
) -> Iterator[str]:
    """Run ``act`` stopped at the first such place in the package, then at each ``step``-th one after it.

    Signals are handled where a function begins, behind a call of C and one with stars, and where a loop goes round, but
    not behind another call of Python. Yields the place each time. ``begin`` runs ahead of each.
    """
    stop, place = 1, "the first"
    while place:
        begin()
        place = _stopped(act, stop, package)
        stop += step
        if place:
            yield place


def _stopped(act: Callable[[], Any], stop: int, package: str) -> str:
    """Where ``act`` was stopped, at the ``stop``-th place; "" if it was not."""
    places: list[str] = []
    before: dict[FrameType | None, str] = {}  # the last instruction, where signals are handled behind it

    def reached(frame: FrameType) -> None:
        places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        if len(places) == stop:
            raise KeyboardInterrupt

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "call":
            if before.get(frame.f_back) != "CALL_FUNCTION_EX":
                before.pop(frame.f_back, None)
            # Python drops what is raised where it closes an expression's generator
            if not frame.f_code.co_filename.startswith(package) or frame.f_code.co_name == "<genexpr>":
                return None
            frame.f_trace_opcodes = True
            reached(frame)
        elif event == "opcode":
            handled = before.pop(frame, None)
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if name in ("CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD"):
                before[frame] = name
            if handled:
                reached(frame)
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return places[-1]
    finally:
        sys.settrace(outer)
    return ""
