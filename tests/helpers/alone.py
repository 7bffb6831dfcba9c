"""Forked processes: a test in one of its own with limits of memory and time, and work that is killed."""

from __future__ import annotations

import functools
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch

from helpers.waiting import HANG

MEMORY = 64 << 20  # bytes beyond what the process has at its start
CPU_SECONDS = 20


def alone(test: Callable) -> Callable:
    """``test`` in a forked process; it fails as the test does, and when the process dies, hangs or exceeds a limit."""

    @functools.wraps(test)
    def inner(*args, **kwargs) -> None:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            _run(writing, lambda: test(*args, **kwargs))
        os.close(writing)
        status = _wait(child)
        with os.fdopen(reading, errors="replace") as said:
            assert status == 0, said.read() or f"the process ended with {status}"

    return inner


def run_killed(work: Callable[[], None], wait: Callable[[], None]) -> None:
    """Run ``work`` in a forked child and kill it when ``wait()`` returns."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    wait()
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def _run(writing: int, test: Callable[[], None]) -> None:
    try:
        torch.set_num_threads(1)  # the pool of the parent's threads is not here
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        if sys.platform == "linux":
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[0])
            most = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        test()
    except BaseException:  # pytest's own exceptions of a failure are no Exception
        os.write(writing, traceback.format_exc()[-8000:].encode())
        os._exit(1)
    os._exit(0)


def _wait(child: int) -> int:
    """The exit code; negative: the signal that ended it."""
    end = time.monotonic() + HANG
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
