"""Triton's launch path without a GPU: binder, compiler and C launcher are real, libcuda does nothing.

environment(source, folder)   build the library, for a process that has not loaded Triton yet
use_stub_driver()             in that process: CPU tensors pass for those of an H100
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

HAS_HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()  # of Python, which Triton's launcher includes
COMPILER = (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) if HAS_HEADERS else None
DEVICE = [0]  # which the driver says is current


def environment(source: Path, folder: Path) -> dict[str, str]:
    """Environment of a process whose libcuda is ``source``, compiled into ``folder``. Its Triton cache is there too."""
    if COMPILER is None:
        raise RuntimeError("the stub of libcuda needs Python's headers and a C compiler: gcc, clang or $CC")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    (folder / "libcuda.so").symlink_to("libcuda.so.1")  # triton 3.4 links this name
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found |= dict.fromkeys(("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"), str(folder))
    return found | {"TRITON_CACHE_DIR": str(folder / "cache")}  # what is linked to the stub is for nobody else


def take_cpu_tensors(active: object, capability: int) -> None:
    """From here on ``active`` is Triton's driver, and tensors of the CPU pass for those of a chip of ``capability``.

    Call it before the launchers' modules are imported, because they copy names that are replaced here.
    """
    import torch
    from triton.runtime import driver

    driver.set_active(active)

    from fused_lora.kernels import config, descriptors

    config.capability = lambda device: capability
    descriptors._allocate = lambda size, alignment, stream: torch.empty(size, dtype=torch.int8)


def use_stub_driver() -> None:
    """Call it as early as :func:`take_cpu_tensors`."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    stub = CudaDriver()
    stub.get_current_device = lambda: DEVICE[0]
    stub.get_current_stream = lambda device: 0
    stub.get_device_capability = lambda *_: (9, 0)
    stub.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    take_cpu_tensors(stub, 90)
