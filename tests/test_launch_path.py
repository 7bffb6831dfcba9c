"""Triton's own way to a launch (binder, compiler, C launcher) for every launcher, against a libcuda without a device.

The interpreter takes another way: what binds or packs an argument wrongly shows here, or on a GPU.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__)
HEADER = Path(sysconfig.get_path("include"), "Python.h")
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
LAUNCHES = {
    "forward, recompute": 1,
    "forward, recompute, K split": 1,
    "forward, split, two masks, descriptors": 2,
    "forward, split, pointers": 2,
    "forward, split, fp32": 2,
    "shrink, mask, fp32 adapter": 1,
    "expand, bias": 1,
    "expand, two masks": 1,
    "backward_g": 1,
    "backward_x": 1,
    "backward_x, mask, fp32 adapter": 1,
    "weight_grad, mask": 1,
    "weight_grad, M split": 1,
    "grouped_shrink": 1,
    "grouped_expand": 1,
    "merge_scan": 1,
    "merge_apply": 1,
    "unmerge_scan": 1,
    "unmerge_apply": 1,
    "dropout_mask": 1,
}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the tests of the kernels launch natively")
@pytest.mark.skipif(COMPILER is None, reason="no C compiler, with which Triton builds its launchers")
@pytest.mark.skipif(not HEADER.exists(), reason="no Python.h, with which Triton builds its launchers")
def test_every_launcher_launches(tmp_path):
    stub = HERE.with_name("stub_cuda.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", stub], check=True)
    (tmp_path / "libcuda.so").symlink_to("libcuda.so.1")  # triton 3.4 links this name
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= dict.fromkeys(("TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"), str(tmp_path))
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")  # what is linked to the stub is for nobody else
    done = subprocess.run([sys.executable, HERE], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == LAUNCHES


def use_stub():
    """CPU tensors pass for those of an H100."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    stub = CudaDriver()
    stub.get_current_device = lambda: 0
    stub.get_current_stream = lambda device: 0
    stub.get_device_capability = lambda *_: (9, 0)
    stub.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    driver.set_active(stub)

    # before the launchers' own modules import these names
    from fused_lora.kernels import config, descriptors

    config.capability = lambda device: 90
    descriptors._allocate = lambda size, alignment, stream: torch.empty(size, dtype=torch.int8)
    memory = descriptors.descriptor_memory
    descriptors.descriptor_memory = lambda needed: memory(True)  # nobody asks for it with CPU tensors


def launches() -> dict[str, int]:
    """What the stub counts while each launcher runs; names as in LAUNCHES."""
    from fused_lora.kernels import merge
    from fused_lora.kernels.dropout import dropout_mask
    from fused_lora.kernels.grouped_shrink import grouped_shrink
    from fused_lora.kernels.lora_backward import lora_backward_g, lora_backward_x
    from fused_lora.kernels.lora_expand import lora_expand
    from fused_lora.kernels.lora_grad import lora_linear_weight_grad
    from fused_lora.kernels.lora_grouped import grouped_expand
    from fused_lora.kernels.lora_linear import lora_linear_forward
    from fused_lora.kernels.lora_shrink import lora_shrink
    from fused_lora.testing.grouped import GroupedCase
    from fused_lora.testing.layers import LayerCase

    count, found = ctypes.CDLL("libcuda.so.1").stub_launches, {}

    def counted(name, launcher, *args, **fixed):
        before = count()
        result = launcher(*args, **fixed)
        found[name] = count() - before
        return result

    bf16, fp32 = torch.bfloat16, torch.float32

    def forward(name, variant, M, K, dropout=(0.0,), dtype=bf16):
        case = LayerCase.make(M, 64, K, [8] * len(dropout), dropout, dtype)
        counted(name, lora_linear_forward, case.x, case.weight, case.bias, *case.adapters, variant=variant)

    def passes(name, p, adapter_dtype):
        case = LayerCase.make(600, 64, 64, [8], [p], bf16, adapter_dtype)
        dS = torch.zeros(600, 8)
        if not p:
            counted("backward_g", lora_backward_g, case.g, dS, case.lora_B[0], 2.0)
        counted(name, lora_backward_x, case.x, dS, case.lora_A[0], p, case.seeds)

    def weight_grad(name, M, p):
        case = LayerCase.make(M, 64, 64, [8], [p], bf16)
        S = torch.zeros(M, 8)
        args = case.g, case.x, S, S, case.scaling, case.dropout, case.seeds, case.ranks, bf16
        counted(name, lora_linear_weight_grad, *args)

    forward("forward, recompute", "recompute", 4, 64)
    forward("forward, recompute, K split", "recompute", 4, 4096)
    forward("forward, split, two masks, descriptors", "split", 600, 64, [0.1, 0.5])
    forward("forward, split, pointers", "split", 600, 60)
    forward("forward, split, fp32", "split", 600, 64, dtype=fp32)
    case = LayerCase.make(40, 64, 64, [8], [0.1], bf16, fp32)
    counted("shrink, mask, fp32 adapter", lora_shrink, case.x, case.lora_A, [1.0], case.dropout, case.seeds)
    two = LayerCase.make(40, 64, 64, [8, 24], [0.1, 0.5], bf16)
    S, B_t = torch.zeros(40, 32), [B.t() for B in two.lora_B]
    counted("expand, bias", lora_expand, S, B_t, two.scaling, two.dropout, None, two.bias, bf16)
    counted("expand, two masks", lora_expand, S, two.lora_A, [1.0, 1.0], two.dropout, two.seeds, None, bf16)
    passes("backward_x", 0.0, bf16)
    passes("backward_x, mask, fp32 adapter", 0.1, fp32)
    weight_grad("weight_grad, mask", 40, 0.1)
    weight_grad("weight_grad, M split", 600, 0.0)

    batch = GroupedCase.make([0, 1, 1], [[(0, 1.0)], [(0, 0.5), (1, 2.0)]], [[4, 8], [16, 0]], [64, 48], 64, bf16)
    tables, groups = batch.tables(), batch.row_groups()
    S = counted("grouped_shrink", grouped_shrink, batch.x, tables, groups)
    counted("grouped_expand", grouped_expand, S, batch.base, tables, groups)

    W, A, B = torch.zeros(40, 300, dtype=bf16), torch.zeros(4, 300), torch.zeros(40, 4)
    scan = counted("merge_scan", merge.merge_scan, W, A, B)
    corrections = merge.new_corrections(W, scan, 8)
    for name in ("merge_apply", "unmerge_scan", "unmerge_apply"):
        counted(name, getattr(merge, name), W, A, B, corrections)
    counted("dropout_mask", dropout_mask, torch.zeros(1, dtype=torch.int64), 40, 64, 0.1)
    return found


if __name__ == "__main__":
    use_stub()
    print(json.dumps(launches()))
