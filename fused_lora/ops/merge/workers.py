"""Work over the row blocks of a weight: Python threads on a CPU, with single-threaded torch operations inside.

One parallel region per weight instead of one per operation, and a GEMM whose bits do not depend on the number of
threads. The calling thread works too, and a block goes to whoever is free: a core that is busy elsewhere delays nobody.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch

_THREADED_ELEMENTS = 1 << 19  # below this one thread is faster than waking several
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()
_turns = threading.Lock()
forked = False  # whether this process is a child that was forked off: OpenMP would wait for its parent's threads


class Team:
    """As many workers as torch has threads, for as long as a merge takes: ``with Team(W.device) as team``.

    torch itself is single-threaded meanwhile, also between the blocks: the threads of a parallel operation go on
    spinning for milliseconds after its end, on the cores that the workers need. Teams on a CPU take turns, so that
    none sets the count back while another is at work.

    Attributes:
        threads: how many torch had.
    """

    def __init__(self, device: torch.device):
        self.threads, self._device = 1, device

    def __enter__(self) -> Team:
        with ExitStack() as stack:
            stack.enter_context(_ieee_matmul(self._device))
            if self._device.type == "cpu":
                stack.enter_context(_turns)
                self.threads = torch.get_num_threads()
                stack.callback(torch.set_num_threads, self.threads)
                torch.set_num_threads(1)
            self._end = stack.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        self._end.close()

    def over_blocks(
        self, W: torch.Tensor, tasks: Iterable[tuple], workspace: Callable[[], object], work: Callable[..., None]
    ) -> BaseException | None:
        """Run ``work(workspace(), *task)`` over ``tasks``, one workspace a worker; returns a first exception or None.

        After a failure no further task is started; those in flight end first.
        """
        tasks = list(tasks)
        workers = min(self.threads, max(len(tasks), 1)) if W.numel() >= _THREADED_ELEMENTS else 1
        left, failures = iter(tasks), []

        def run() -> None:
            try:
                with torch.no_grad():
                    ws = None
                    for task in left:
                        if failures:
                            return
                        ws = ws or workspace()
                        work(ws, *task)
            except BaseException as e:  # noqa: B036 - handed to the caller, which rolls back and raises it
                failures.append(e)

        def help_out() -> None:
            # a thread's first parallel operation reads the process-wide count again, whatever it is by then: asking
            # for it now settles this thread, so that its GEMMs stay single-threaded
            torch.get_num_threads()
            torch.set_num_threads(1)
            run()

        beside(workers, help_out, run, failures)
        return failures[0] if failures else None


def beside(threads: int, help_out: Callable[[], object], run: Callable[[], object], failures: list) -> None:
    """``run`` in this thread and ``help_out`` in the others of so many; ends when all have ended."""
    helpers = []
    try:
        for _ in range(threads - 1):
            helpers.append(_helpers().submit(help_out))
        run()
    except BaseException as e:  # noqa: B036 - an interrupt before or after the work is a failure like any other
        failures.append(e)
    for helper in helpers:
        _settle(helper, failures)


def _settle(helper, failures: list[BaseException]) -> None:
    """Wait for a helper that has begun; one that never got a thread has nothing left to do."""
    while not helper.cancel():
        try:
            return helper.result()
        except BaseException as e:  # noqa: B036 - an interrupt of the waiting thread stops the workers too
            failures.append(e)


def _helpers() -> ThreadPoolExecutor:
    """Threads that stay: starting them anew costs as much as merging a small layer."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="fused_lora-merge")
        return _pool


def _forget_helpers() -> None:
    global _pool, _pool_lock, _turns, forked
    forked = True
    # a forked child has no threads but its own, and maybe held locks
    _pool, _pool_lock, _turns = None, threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


class _ieee_matmul:
    """fp32 products stay fp32 on GPUs whatever the process-wide TF32 switch says."""

    _lock = threading.Lock()

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"

    def __enter__(self) -> None:
        if self._cuda:
            self._lock.acquire()
            self._old = torch.backends.cuda.matmul.allow_tf32
            torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_) -> None:
        if self._cuda:
            torch.backends.cuda.matmul.allow_tf32 = self._old
            self._lock.release()
