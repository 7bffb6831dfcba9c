"""What this machine is; installs the checkout where it is not, and unpacks compiled kernels. For first_contact.py."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "pytest", "pytest-xdist")


def describe(without_gpu: bool) -> None:
    """Print versions, compiler and GPU; RuntimeError where torch finds no GPU or multiplies wrongly."""
    found = {"python": sys.version.split()[0], "cores": len(os.sched_getaffinity(0))}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    print("  ".join(f"{name} {version}" for name, version in found.items()), flush=True)
    for library in Path(importlib.util.find_spec("triton").origin).parent.glob("_C/libtriton*.so"):
        print(library.name, "sha256", hashlib.sha256(library.read_bytes()).hexdigest()[:16])
    if (driver := Path("/proc/driver/nvidia/version")).exists():
        print(driver.read_text().splitlines()[0])
    import torch

    print(f"torch is built for CUDA {torch.version.cuda}; GPUs: {torch.cuda.device_count()}", flush=True)
    if without_gpu:
        return
    gpu, (free, total) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    print(f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors")
    print(f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    x = torch.eye(4096, device="cuda", dtype=torch.bfloat16)
    if not torch.equal(x @ x, x):
        raise RuntimeError("torch multiplies identity matrices wrongly on this GPU")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--cache", default="", help="file of tools/precompile.py pack")
    options.add_argument("--without-gpu", action="store_true")
    arguments = options.parse_args()
    describe(arguments.without_gpu)
    try:
        import fused_lora.kernels  # noqa: F401
    except ModuleNotFoundError:
        install = "-m pip install --quiet --no-build-isolation --no-deps --break-system-packages -e .".split()
        subprocess.run([sys.executable, *install], cwd=ROOT, check=True)
        print("installed the checkout", flush=True)
    if arguments.cache:
        subprocess.run([sys.executable, str(ROOT / "tools" / "precompile.py"), "unpack", arguments.cache], check=True)


if __name__ == "__main__":
    main()
