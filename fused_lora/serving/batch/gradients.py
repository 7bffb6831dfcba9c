"""Gradients off in a thread while batches are open in it, whatever the order in which they end."""

from __future__ import annotations

import threading

import torch

_thread = threading.local()


class GradientsOff:
    """From its making to :meth:`end` gradients are off in this thread.

    The batches of asyncio's tasks and of generators overlap, so the first that began may end first. What was set before
    it is then set again at the end of the one that began after it.
    """

    def __init__(self):
        self._open: list[GradientsOff] = vars(_thread).setdefault("open", [])
        self._before = torch.is_grad_enabled()
        self._open.append(self)
        torch.set_grad_enabled(False)

    @property
    def of_another_thread(self) -> bool:
        """Whether another thread made it."""
        return self._open is not vars(_thread).get("open")

    def end(self) -> None:
        """In another thread than the one that made it nothing is set."""
        later = self._open[self._open.index(self) + 1 :]
        self._open.remove(self)
        if later:
            later[0]._before = self._before
        elif not self.of_another_thread:
            torch.set_grad_enabled(self._before)
