"""Gradients off in a thread while batches are open in it, whatever the order in which they end."""

from __future__ import annotations

import threading

import torch

_thread = threading.local()


class GradientsOff:
    """From :meth:`begin` to :meth:`end` gradients are off in this thread.

    The batches of asyncio's tasks and of generators overlap, so the first that began may end first. What was set before
    it is then set again at the end of the one that began after it.
    """

    def __init__(self):
        self._open: list[GradientsOff] = []  # of the thread that began

    def begin(self) -> None:
        """An interrupt in it leaves to :meth:`end` what it has done."""
        self._open = vars(_thread).setdefault("open", [])
        self._before = torch.is_grad_enabled()
        self._open.append(self)
        torch.set_grad_enabled(False)

    @property
    def of_another_thread(self) -> bool:
        """Whether another thread began it."""
        return self._open is not vars(_thread).get("open")

    def end(self) -> None:
        """In another thread than the one that began it nothing is set. Does nothing the second time."""
        if self not in self._open:
            return
        later = self._open[self._open.index(self) + 1 :]
        if later:
            later[0]._before = self._before
        elif not self.of_another_thread:
            torch.set_grad_enabled(self._before)
        self._open.remove(self)
