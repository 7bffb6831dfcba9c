"""Triton's own way to a launch (binder, compiler, C launcher) for every launcher, against a libcuda without a device.

The interpreter takes another way: what binds or packs an argument wrongly shows here, or on a GPU.
"""

import ctypes
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import stub_driver

pytest.importorskip("triton")
HERE = Path(__file__)
HEADER = Path(sysconfig.get_path("include"), "Python.h")
LAUNCHES = {
    "forward, recompute": 1,
    "forward, recompute, K split": 1,
    "forward, split, two masks, descriptors": 2,
    "forward, split, pointers": 2,
    "forward, split, fp32": 2,
    "shrink, mask, fp32 adapter": 1,
    "expand, bias": 1,
    "expand onto a product": 1,
    "expand, two masks": 1,
    "backward_g": 1,
    "backward_x": 1,
    "backward_x, mask, fp32 adapter": 1,
    "weight_grad, mask": 1,
    "weight_grad, M split": 1,
    "grouped_shrink": 1,
    "grouped_expand": 1,
    "merge": 1,
    "unmerge": 1,
    "merge_again": 1,
    "switch": 1,
    "merge, group": 1,
    "unmerge, group": 1,
    "switch, group": 1,
    "merge_apply": 1,
    "unmerge_apply": 1,
    "dropout_mask": 1,
    "dropped": 1,
    "dequant_4bit": 1,
    "row_norms": 1,
    "forward, 4 bits": 1,
    "forward, 4 bits, double quantised": 1,
}
# of a model with six layers that has been merged before: launches, and waits of the host, one of a merge for the sample
# of what rounding to the nearest loses
MODEL = {"merge": [1, 2], "switch": [1, 2], "unmerge": [1, 1], "merge at random": [1, 1]}
# who launches: Triton itself, or a kept launch with what Triton passed before
WAYS = {
    "again": ["triton", "kept", "kept"],
    "another scale": ["triton", "kept"],
    "not aligned": ["triton", "triton"],
    "aligned again": ["kept"],
    "under a hook": ["triton"],
    "under a hook before the run": ["triton"],
    "without hooks": ["kept"],
    "from another device": ["triton"],
    "descriptors": ["triton", "triton", "kept", "kept"],
    "a tuple of tensors": ["triton", "kept", "triton"],  # the last one has one that is not aligned
}


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the tests of the kernels launch natively")
@pytest.mark.skipif(stub_driver.COMPILER is None, reason="no C compiler, with which Triton builds its launchers")
@pytest.mark.skipif(not HEADER.exists(), reason="no Python.h, with which Triton builds its launchers")
def test_every_launcher_launches(tmp_path):
    environment = stub_driver.environment(HERE.with_name("stub_cuda.c"), tmp_path)
    done = subprocess.run([sys.executable, HERE], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "UserWarning" not in done.stderr, done.stderr  # Triton's, of a default that changes between its releases
    found = json.loads(done.stdout)
    assert found["launches"] == LAUNCHES
    assert found["ways"] == WAYS
    assert found["model"] == MODEL


def record(run, prepare) -> tuple[list[str], list[list]]:
    """Who makes each launch from here on, and what the C launcher is given, a tensor as its address."""
    who, given = [], []

    def recorded_run(self, *args, **kwargs):
        kernel = run(self, *args, **kwargs)
        who[-1] = "triton"
        return kernel

    def recorded_prepare(self, *args):
        prepare(self, *args)
        launch = self.launch

        def recorded_launch(*args):
            who.append("kept")
            *first, last = args
            flat = (*first, *last) if type(last) is tuple else args  # some Tritons give the kernel's own in one tuple
            given.append([address(a) for a in flat])
            return launch(*args)

        self.launch = recorded_launch

    JITFunction.run, CudaLauncher.__init__ = recorded_run, recorded_prepare
    return who, given


def address(argument):
    """A tensor as its address, a tuple of them as a tuple of addresses."""
    if isinstance(argument, tuple):
        return tuple(map(address, argument))
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def alike(a, b) -> bool:
    """Equal, or addresses."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    # lower ones no process has, not even that of a Python at a fixed place
    return a == b or (type(a) is type(b) is int and min(a, b) > 1 << 22)


def assert_alike(first, again):
    """Two launches of a launcher differ in addresses alone, and in the hooks, which a kept launch does not pass."""
    assert len(first) == len(again)
    for i, (a, b) in enumerate(zip(first, again, strict=True)):
        assert alike(a, b) or (not isinstance(a, (int, tuple)) and (b is None or type(a) is type(b))), (i, a, b)


def launches(given: list[list]) -> dict[str, int]:
    """What the stub counts while each launcher runs; names as in LAUNCHES."""
    from fused_lora.kernels import merge
    from fused_lora.kernels.dequant_4bit import dequant_4bit
    from fused_lora.kernels.dropout import dropout_mask
    from fused_lora.kernels.dropped import dropped
    from fused_lora.kernels.grouped_expand import grouped_expand
    from fused_lora.kernels.grouped_shrink import grouped_shrink
    from fused_lora.kernels.lora_backward import prepare_backward_g, prepare_backward_x
    from fused_lora.kernels.lora_expand import prepare_expand
    from fused_lora.kernels.lora_grad import prepare_weight_grad
    from fused_lora.kernels.lora_linear import prepare_linear
    from fused_lora.kernels.lora_shrink import prepare_shrink
    from fused_lora.kernels.row_norms import row_norms
    from fused_lora.ops.dequant import FourBit
    from fused_lora.testing.grouped import GroupedCase
    from fused_lora.testing.layers import LayerCase

    count, found = ctypes.CDLL("libcuda.so.1").stub_launches, {}

    def counted(name, launcher, *args, **fixed):
        before = count()
        given.clear()
        launcher(*args, **fixed)
        found[name] = count() - before
        first = list(given)
        given.clear()
        result = launcher(*args, **fixed)
        for pair in zip(first, given, strict=True):
            assert_alike(*pair)
        return result

    bf16, fp32 = torch.bfloat16, torch.float32

    def forward(name, variant, M, K, dropout=(0.0,), dtype=bf16):
        case = LayerCase.make(M, 64, K, [8] * len(dropout), dropout, dtype)
        tensors = case.x, case.weight, case.bias, case.lora_A, case.lora_B
        run = prepare_linear(*tensors, case.scaling, dropout, any(dropout), variant=variant)
        counted(name, run, *tensors, case.seeds)

    def passes(name, p, adapter_dtype):
        case = LayerCase.make(600, 64, 64, [8], [p], bf16, adapter_dtype)
        dS = torch.zeros(600, 8)
        if not p:
            run, room = prepare_backward_g(case.g, case.lora_B[0], 2.0)
            counted("backward_g", run, case.g, dS, case.lora_B[0], torch.empty(room))
        run, room = prepare_backward_x(case.x, case.lora_A[0], p, p > 0)
        counted(name, run, case.x, dS, case.lora_A[0], case.seeds, torch.empty(room))

    def weight_grad(name, M, p):
        case = LayerCase.make(M, 64, 64, [8], [p], bf16)
        S = torch.zeros(M, 8)
        run = prepare_weight_grad(case.g, case.x, case.scaling, case.dropout, p > 0, case.ranks, bf16)
        counted(name, run, case.g, case.x, S, S, case.seeds)

    forward("forward, recompute", "recompute", 4, 64)
    forward("forward, recompute, K split", "recompute", 4, 4096)
    forward("forward, split, two masks, descriptors", "split", 600, 64, [0.1, 0.5])
    forward("forward, split, pointers", "split", 600, 60)
    forward("forward, split, fp32", "split", 600, 64, dtype=fp32)
    case = LayerCase.make(40, 64, 64, [8], [0.1], bf16, fp32)
    run = prepare_shrink(case.x, case.lora_A, [1.0], case.dropout, True)
    counted("shrink, mask, fp32 adapter", run, case.x, case.lora_A, case.seeds)
    two = LayerCase.make(40, 64, 64, [8, 24], [0.1, 0.5], bf16)
    S, B_t = torch.zeros(40, 32), [B.t() for B in two.lora_B]
    run = prepare_expand(40, B_t, two.scaling, two.dropout, False, True, bf16, by_columns=True)
    counted("expand, bias", run, S, two.lora_B, None, two.bias)
    run = prepare_expand(40, B_t, two.scaling, two.dropout, False, False, bf16, by_columns=True, onto=True)
    counted("expand onto a product", run, S, two.lora_B, None, None, torch.zeros(40, 64, dtype=bf16))
    run = prepare_expand(40, two.lora_A, [1.0, 1.0], two.dropout, True, False, bf16)
    counted("expand, two masks", run, S, two.lora_A, two.seeds, None)
    passes("backward_x", 0.0, bf16)
    passes("backward_x, mask, fp32 adapter", 0.1, fp32)
    weight_grad("weight_grad, mask", 40, 0.1)
    weight_grad("weight_grad, M split", 600, 0.0)

    batch = GroupedCase.make([0, 1, 1], [[(0, 1.0)], [(0, 0.5), (1, 2.0)]], [[4, 8], [16, 0]], [64, 48], 64, bf16)
    tables, groups = batch.tables(), batch.row_groups()
    S = counted("grouped_shrink", grouped_shrink, batch.x, tables, groups)
    counted("grouped_expand", grouped_expand, S, batch.base, tables, groups)

    W, A, B = torch.zeros(40, 300, dtype=bf16), torch.zeros(4, 300), torch.zeros(40, 4)
    record = merge.new_record(W, 8)
    for name in ("merge", "unmerge", "merge_again"):
        counted(name, getattr(merge, name), W, A, B, record)
    counted("switch", merge.switch, W, (A, B, record), (A, B, merge.new_record(W, 8)))
    wide = torch.zeros(33, 80, dtype=bf16), torch.zeros(4, 80), torch.zeros(33, 4)
    tall = torch.zeros(48, 21, dtype=bf16).t(), torch.zeros(48, 2).t(), torch.zeros(2, 21).t()
    members = [merge.Member(*tensors, merge.new_record(tensors[0], 8)) for tensors in (wide, tall)]
    counted("merge, group", merge.launch_group, members)
    counted("unmerge, group", merge.launch_group, members, True)
    later = [m._replace(record=merge.new_record(m.W, 8), old=(m.A, m.B, m.record)) for m in members]
    counted("switch, group", merge.launch_group, later)
    for name in ("merge_apply", "unmerge_apply"):
        counted(name, getattr(merge, name), W, A, B)
    counted("dropout_mask", dropout_mask, torch.zeros(1, dtype=torch.int64), 40, 64, 0.1)
    counted("dropped", dropped, W, torch.zeros(1, dtype=torch.int64), 0.1)
    packed, code, absmax = torch.zeros(40 * 32, dtype=torch.uint8), torch.zeros(16), torch.zeros(40)
    counted("dequant_4bit", dequant_4bit, packed, code, absmax, None, 64, (40, 64), bf16)
    counted("row_norms", row_norms, W, A, B, 2.0)
    for name, scales, inner in (
        ("forward, 4 bits", absmax, None),
        ("forward, 4 bits, double quantised", absmax.byte(), (torch.zeros(256), torch.zeros(1), 256, torch.zeros(()))),
    ):
        case = LayerCase.make(4, 40, 64, [8], [0.0], bf16)
        weight = FourBit(packed, code, scales, inner, 64, (40, 64), bf16)
        tensors = case.x, weight, case.bias, case.lora_A, case.lora_B
        counted(name, prepare_linear(*tensors, case.scaling, [0.0], False), *tensors, None)
    return found


def model() -> dict[str, list[int]]:
    """Launches and waits of MODEL. Whatever asks for a number waits on a GPU."""
    import warnings

    import fused_lora
    from fused_lora.ops import guard

    guard.DEVICE = "cpu"
    os.environ["FUSED_LORA_CHECK"] = "0"  # nothing is computed
    warnings.simplefilter("ignore")
    count, waits, found = ctypes.CDLL("libcuda.so.1").stub_launches, [], {}
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        method = getattr(torch.Tensor, name)
        setattr(torch.Tensor, name, lambda self, *a, method=method: waits.append(1) or method(self, *a))

    def counted(name, call):
        launches = count()
        waits.clear()
        call()
        found[name] = [count() - launches, len(waits)]

    shapes = (64, 48), (32, 80), (96, 64), (48, 48), (64, 48), (16, 5)
    net = torch.nn.Sequential(*(torch.nn.Linear(*shape, dtype=torch.bfloat16) for shape in shapes))
    fused_lora.inject(net, fused_lora.LoraConfig(r=4, target_modules="all-linear"))
    for _ in range(2):
        counted("merge", lambda: fused_lora.merge(net))
        counted("switch", lambda: fused_lora.switch(net, ["default"]))
        counted("unmerge", lambda: fused_lora.unmerge(net))
        counted("merge at random", lambda: fused_lora.merge(net, stochastic=3))
        fused_lora.unmerge(net)
    return found


def ways(who: list[str], given: list[list]) -> dict[str, list[str]]:
    """Who launches in each situation of WAYS."""
    from triton import knobs

    from fused_lora.kernels.grouped_expand import grouped_expand
    from fused_lora.kernels.grouped_shrink import grouped_shrink
    from fused_lora.kernels.lora_linear import prepare_linear
    from fused_lora.kernels.lora_shrink import _lora_shrink_kernel, prepare_shrink
    from fused_lora.testing.grouped import GroupedCase
    from fused_lora.testing.layers import LayerCase

    case, found = LayerCase.make(600, 64, 64, [8], [0.1], torch.bfloat16), {}

    runs = {scale: prepare_shrink(case.x, case.lora_A, [scale], case.dropout, True) for scale in (1.0, 2.0)}

    def shrink(situation, x=case.x, scale=1.0):
        runs[scale](x, case.lora_A, case.seeds)
        found.setdefault(situation, []).append(who[-1])
        return given[-1]

    for _ in range(3):
        again = shrink("again")
    x_at = again.index(case.x.data_ptr())
    assert again[:x_at].count(None) >= 3  # metadata and hooks, as of a launch without any
    assert {t.data_ptr() for t in (case.lora_A[0], case.seeds)} <= set(again[x_at:])
    for _ in range(2):
        scaled = shrink("another scale", scale=2.0)
        assert (2.0,) in scaled and (1.0,) not in scaled
    shifted = torch.zeros(600 * 64 + 1, dtype=torch.bfloat16)[1:].view(600, 64)
    for _ in range(2):
        shrink("not aligned", shifted)
    shrink("aligned again")

    seen, hook = [], knobs.runtime.launch_enter_hook
    if hook is None:  # triton 3.4
        knobs.runtime.launch_enter_hook = seen.append
    else:
        hook.add(seen.append)
    shrink("under a hook")
    assert len(seen) == 1
    if hook is None:
        knobs.runtime.launch_enter_hook = None
    else:
        hook.calls.clear()
    _lora_shrink_kernel.pre_run_hooks.append(lambda *args, **kwargs: seen.append(args))
    shrink("under a hook before the run")
    assert len(seen) == 2
    _lora_shrink_kernel.pre_run_hooks.clear()
    shrink("without hooks")
    stub_driver.DEVICE[0] = 1
    shrink("from another device")
    stub_driver.DEVICE[0] = 0

    who.clear()
    tensors = case.x, case.weight, case.bias, case.lora_A, case.lora_B
    run = prepare_linear(*tensors, case.scaling, case.dropout, True, variant="split")
    for _ in range(2):
        run(*tensors, case.seeds)
    found["descriptors"] = list(who)

    batch = GroupedCase.make([0, 0], [[(0, 1.0)]], [[4, 4]], [64, 64], 64, torch.bfloat16)
    S = grouped_shrink(batch.x, batch.tables(), batch.row_groups())
    shifted = torch.zeros(2 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 64)
    who.clear()
    for last in (batch.base[1], batch.base[1], shifted):
        grouped_expand(S, [batch.base[0], last], batch.tables(), batch.row_groups())
    found["a tuple of tensors"] = list(who)
    return found


if __name__ == "__main__":
    from triton.backends.nvidia.driver import CudaLauncher
    from triton.runtime.jit import JITFunction

    stub_driver.use_stub_driver()
    who, given = record(JITFunction.run, CudaLauncher.__init__)
    print(json.dumps({"launches": launches(given), "ways": ways(who, given), "model": model()}))
