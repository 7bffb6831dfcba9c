"""What all operators share: may kernels run here, have they passed their first use, who takes over when they fail.

Nothing runs that has not been tried once in the process. What fails is dropped with one warning, and the eager path
does the work from then on. ``FUSED_LORA_CHECK=0`` skips the trial, ``FUSED_LORA_PLAN=eager`` switches all kernels off.
Both are read when a shape is used for the first time.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Sequence

import torch

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
DEVICE = "cuda"  # type of the devices that kernels run on
_EAGER = "the eager path takes over"
HAS_TRITON = importlib.util.find_spec("triton") is not None
_state: dict[tuple, bool] = {}  # what was used -> whether it passed
_drops = 0  # how often something was dropped
# for trials and first runs: Triton publishes a kernel before it has loaded it, and another thread would launch nothing
_first_use = threading.RLock()


def usable(device: torch.device) -> bool:
    """Whether kernels may run on this device at all: CUDA with Triton, which can launch, and not switched off."""
    return why_not(device) is None


def why_not(device: torch.device) -> str | None:
    """Why no kernel may run on this device; None where they may."""
    if device.type != DEVICE:
        return f"there are no kernels for {device.type} devices"
    if not HAS_TRITON:
        return "Triton is not installed"
    return "FUSED_LORA_PLAN=eager" if os.environ.get("FUSED_LORA_PLAN") == "eager" else no_driver()


@functools.cache
def no_driver() -> str | None:
    """Why Triton's driver does not load, with one warning; Triton compiles it in C when it is first used."""
    if not torch.cuda.is_available():  # what launches nothing needs no driver
        return None
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises
        found = (
            "Triton could not load its driver, for which it needs a C compiler (gcc or clang), Python's headers "
            f"(python3-dev) and a folder to write to (TRITON_CACHE_DIR): {_text(error)}"
        )
        warnings.warn(f"fused_lora: no kernel runs, {_EAGER}: {found}", stacklevel=5)
        return found
    return None


def capturing(device: torch.device) -> bool:
    """Whether what is launched on the device's current stream goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def draws_masks(device: torch.device) -> bool:
    """Whether dropout masks are drawn there by one pass over x; by operations of torch they take about a hundred."""
    return device.type in ("cpu", "meta") or (device.type == DEVICE and HAS_TRITON)


def passes(key: tuple, check: Callable[[], str | None], instead: str = _EAGER) -> bool:
    """Whether ``key`` may run: ``check`` returned None (else it says what is wrong) the first time, in this process.

    instead: what the warning says of a ``key`` that may not.

    An out-of-memory error is no reason to drop anything and passes through.
    """
    passed = _state.get(key)
    if passed is None:
        with _first_use:
            passed = _try(key, check, instead)
            if passed:
                _state[key] = True
    return passed


def _try(key: tuple, check: Callable[[], str | None], instead: str = _EAGER) -> bool:
    if key in _state or os.environ.get("FUSED_LORA_CHECK") == "0":
        return _state.get(key, True)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        _warn_of_capture(key)
        return False  # a comparison would break the capture; no verdict: the next use outside tries it
    try:
        wrong = check()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises
        wrong = _text(error)
    if wrong is not None:
        _drop(key, wrong, instead)
    return wrong is None


@functools.cache  # once for a key
def _warn_of_capture(key: tuple) -> None:
    warnings.warn(
        f"fused_lora: {key} is first used while a CUDA graph is captured: the graph gets the eager path. Run a warm-up "
        "step before the capture, and it gets the kernels.",
        stacklevel=4,
    )


def verdicts() -> dict[tuple, bool]:
    """What has been used in this process, and whether it passed."""
    return dict(_state)


class guarded:  # a function to its callers
    """``run`` if ``key`` passes its ``check``, ``eager`` otherwise and after a failure of ``run`` itself."""

    __slots__ = ("_check", "_eager", "_key", "_trusted", "run")

    def __init__(self, key: tuple, run: Callable, eager: Callable, check: Callable[[], str | None]):
        self._key, self.run, self._eager, self._check = key, run, eager, check
        self._trusted = -1  # how much had been dropped when the key passed last: nothing since, and it passes still

    def __call__(self, *args):
        if self._trusted != _drops:
            drops, passed = _drops, _state.get(self._key)
            if passed is None:
                return self._first(args)
            if not passed:
                return self._eager(*args)
            self._trusted = drops
        try:
            return self.run(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a compiler or driver raises
            return self._failed(error, args)

    def _failed(self, error: Exception, args: tuple):
        _drop(self._key, _text(error))
        return self._eager(*args)

    def _first(self, args: tuple):
        with _first_use:
            if _try(self._key, self._check):
                self._trusted = _drops
                result = self(*args)
                _state.setdefault(self._key, True)  # loaded: no lock from here on
                return result
        return self._eager(*args)


def _drop(key: tuple, wrong: str, instead: str = _EAGER) -> None:
    global _drops
    _state[key] = False
    _drops += 1
    warnings.warn(f"fused_lora: {key} is dropped, {instead}: {wrong}", stacklevel=3)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def compare(
    ours: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], dtype: torch.dtype, library: bool = False
) -> str | None:
    """None if results are exact to the precision of ``dtype`` and of their own, else what differs.

    library: the first result is of a library GEMM, so that fp32 may have the precision of TF32.
    """
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        eps = max(torch.finfo(dtype).eps, torch.finfo(a.dtype).eps)  # gradients of 16-bit adapters over fp32 have 16
        tf32 = library and i == 0 and dtype == torch.float32
        a, b = a.float(), b.float()
        size = b.abs().max().item()
        error = (a - b).abs().max().item()
        if not error <= (2**-8 if tf32 else max(2 * eps, 2e-5)) * max(size, 1e-3):
            return f"result {i} is off by {error:.2e} of {size:.2e} on a small tile"
    return None
