"""On a GPU: layers of real size against float64, bit-equal repeats, launches by the profiler, 64-bit offsets."""

import copy
import warnings

import pytest
import torch

import fused_lora
from fused_lora import reference
from fused_lora.kernels import config, sync
from fused_lora.kernels.lora_backward import lora_backward_g
from fused_lora.kernels.lora_grad import lora_linear_weight_grad
from fused_lora.kernels.lora_linear import lora_linear_forward
from fused_lora.ops.linear import eager as cpu
from fused_lora.ops.linear import launch as kernel
from fused_lora.ops.linear import plan
from fused_lora.ops.merge import op as merge
from fused_lora.testing import smoke
from fused_lora.testing.layers import LayerCase

pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [  # M, N, K, r, p
    (8192, 4096, 4096, 16, 0.1),
    (4096, 1024, 4096, 64, 0.0),
    (2048, 4096, 14336, 16, 0.05),
    (2049, 1001, 3003, 24, 0.5),
    (513, 4096, 4096, 32, 0.1),
    (300, 4096, 11008, 8, 0.0),
    (33, 4096, 4096, 16, 0.1),
    (16, 1024, 4096, 64, 0.0),
    (1, 14336, 4096, 16, 0.0),
    (4096, 4096, 1024, 512, 0.1),
]
DTYPES = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP32, FP32)]


@pytest.fixture(autouse=True)
def nothing_is_dropped():
    """A configuration that fails its first use would hand over to the eager path, and the test would see nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is dropped.*")
        yield


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_as_planned(shape, dtypes, device):
    M, N, K, r, p = shape
    case = LayerCase.make(M, N, K, [r], [p], *dtypes, device=device)
    case.check(case.planned())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_with_fp32_adapters_under_autocast(shape, device):
    M, N, K, r, p = shape
    case = LayerCase.make(M, N, K, [r], [p], BF16, FP32, device=device)
    found = case.planned(BF16)
    assert found["dA"].dtype is found["dB"].dtype is FP32
    case.rounded().check(found | {name: found[name].to(BF16) for name in ("dA", "dB")})


@pytest.mark.parametrize("shape", [(2049, 1001, 3003, 24, 0.5), (8192, 4096, 4096, 16, 0.1)], ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_variant(shape, dtypes, device):
    M, N, K, r, p = shape
    case = LayerCase.make(M, N, K, [r], [p], *dtypes, device=device)
    for variant in (*config.variants(M, r, dtypes[0], p > 0, dtypes[0] != dtypes[1]), "library"):
        y, S = case.by(variant)
        case.check(dict(y=y, S=S))
    for variant in ("passes", "library"):
        case.check(smoke.backward(case, variant))


def test_the_eager_path(device):
    """What takes over from a dropped kernel is no less exact than eager PEFT at real size, masks included."""
    case = LayerCase.make(8192, 512, 1024, [16], [0.1], BF16, device=device)
    S = case.exact()["S"].float()
    y, _ = cpu.lora_linear(case.x, case.weight, case.bias, *case.adapters)
    dx, dA, dB, _, _ = cpu.lora_linear_backward(
        case.g, case.x, case.weight, case.lora_A, case.lora_B, S, case.scaling, case.dropout, case.seeds,
        True, [True], [True], False, False,
    )  # fmt: skip
    case.check(dict(y=y, dx=dx, dA=dA[0], dB=dB[0]))


def test_several_adapters(device):
    case = LayerCase.make(3000, 4096, 2048, [16, 3, 100], [0.1, 0.0, 0.5], BF16, device=device)
    case.check(case.planned())


def test_transposed_weight_and_strided_input(device):
    case = LayerCase.make(3000, 1024, 2048, [16], [0.1], BF16, device=device)
    case.weight = case.weight.t().contiguous().t()
    case.x = torch.cat([case.x, case.x], 1)[:, :2048]
    case.check(case.planned())


@pytest.mark.parametrize("shape", [(8192, 4096, 4096, 16, 0.1), (40, 1024, 4096, 16, 0.0)], ids=str)
def test_repeats_are_bit_equal(shape, device):
    M, N, K, r, p = shape
    case = LayerCase.make(M, N, K, [r], [p], BF16, device=device)
    first = case.planned()
    for _ in range(20):
        again = case.planned()
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not t.any() for t in sync._of_stream.values())


LAUNCHES = {"recompute": (1, 0), "split": (2, 0), "library": (2, 1)}  # our kernels, GEMMs of the library


@pytest.mark.parametrize("rounded", [None, BF16], ids=str)
@pytest.mark.parametrize("M", [1, 48, 512, 8192])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_launches_that_the_profiler_sees(M, p, rounded, device):
    """Forward as its variant says; backward one pass over g, whose dS torch adds up, one over x, the library's GEMM.

    fp32 adapters that are rounded are copied for a forward of many rows alone.
    """
    case = LayerCase.make(M, 4096, 4096, [16], [p], BF16, FP32 if rounded else BF16, device=device)
    case.planned(rounded)  # compiled and tried
    W, A, B = case.weight, case.lora_A, case.lora_B
    forward = plan.forward(case.x, W, case.bias, A, B, case.scaling, case.dropout, None, rounded)
    y, S = forward(case.x, W, case.bias, A, B, case.seeds)
    needs = True, True, True, False, False
    backward = plan.backward(case.g, case.x, W, A, B, case.scaling, case.dropout, needs, None, rounded)

    def launches(call):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        ours = [name for name in names if name.startswith("_lora")]
        # a GEMM of the library may zero its workspace, and add the parts of its K in a launch of its own
        others = [name for name in names if not name.startswith(("_lora", "Memset")) and "splitKreduce" not in name]
        return (len(ours), len(others)), names

    variant = plan.choose("linear", M, 4096, 16, BF16, p > 0, False, 1, config.capability(device))
    found, names = launches(lambda: forward(case.x, W, case.bias, A, B, case.seeds))
    ours, others = LAUNCHES[variant]
    assert found == (ours, others + 2 * (rounded is not None and M > config.ROUND_ROWS)), names
    found, names = launches(lambda: backward(*case.of_backward(S)))
    assert found == (2, 2) and sum("::reduce_kernel" in name for name in names) == 1, names


def need_memory(gigabytes):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, there are {free:.0f}")


def relative(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


def kept_rows(case, start):
    """The mask of the rows from ``start`` on, without the mask of those before them."""
    M, K = case.x.shape
    lanes = reference.dropout_lanes(case.seeds[0], start, M - start, K, case.x.device)[:, :K]
    return lanes >= reference.dropout_threshold(case.dropout[0]) - 32768


def test_x_beyond_2_31_elements(device, rows=2**31 // 4096 + 300, columns=4096):
    need_memory(20)
    case = LayerCase.make(16, 64, columns, [8], [0.25], BF16, FP32, device=device)
    case.x = torch.randn(rows, columns, dtype=BF16, device=device)
    case.g = torch.randn(rows, 64, dtype=BF16, device=device)
    tail = slice(rows - 200, rows)
    keep, scale = kept_rows(case, rows - 200), reference.keep_scale(0.25)
    x, g, W, A, B = (t.double() for t in (case.x[tail], case.g[tail], case.weight, case.lora_A[0], case.lora_B[0]))
    S = (x * keep * scale) @ A.t()
    dS = case.scaling[0] * g @ B
    exact = dict(y=x @ W.t() + case.bias.double() + case.scaling[0] * S @ B.t(), S=S)
    exact["dx"] = g @ W + keep * scale * (dS @ A)
    ours = case.planned()
    for name, true in exact.items():
        assert relative(ours[name][tail], true) < 2**-7, name
    # rows beyond 2^31 elements alone: the same sums as those of the rows cut out
    head = LayerCase(**{**case.__dict__, "x": case.x[: rows - 200], "g": case.g[: rows - 200]}).planned()
    ours_tail = ours["dA"].double() - head["dA"].double()
    assert relative(ours_tail, dS.t() @ (x * keep * scale)) < 2**-6


def test_y_and_weight_beyond_2_31_elements(device, rows=2**31 // 4096 + 300, columns=4096):
    need_memory(20)
    case = LayerCase.make(300, columns, 32, [8], [0.0], BF16, device=device)
    case.x = torch.randn(rows, 32, dtype=BF16, device=device)
    y, S = lora_linear_forward(case.x, case.weight, case.bias, *case.adapters, variant="split")
    last = LayerCase(**{**case.__dict__, "x": case.x[-300:], "g": case.g})
    assert relative(y[-300:], last.exact()["y"]) < 2**-7
    dA, dB = lora_linear_weight_grad(y, case.x, S, torch.zeros_like(S), case.scaling, [0.0], None, [8], FP32)
    true = sum(y[i : i + 8192].double().t() @ S[i : i + 8192].double() for i in range(0, rows, 8192))
    assert relative(dB[0], case.scaling[0] * true) < 2**-7 and not dA[0].any()
    dS, dB = lora_backward_g(y, S, case.lora_B[0], case.scaling[0])
    assert relative(dB, case.scaling[0] * true) < 2**-7
    assert relative(dS[-300:], case.scaling[0] * y[-300:].double() @ case.lora_B[0].double()) < 2**-7
    del y
    case = LayerCase.make(8, 8, rows, [8], [0.0], BF16, device=device)
    case.weight = torch.randn(columns, rows, dtype=BF16, device=device)
    case.lora_B = [torch.randn(columns, 8, dtype=BF16, device=device)]
    case.bias = None
    y, _ = lora_linear_forward(case.x, case.weight, None, *case.adapters)
    part = case.weight[-50:].double()
    exact = case.x.double() @ part.t()
    exact += case.scaling[0] * (case.x.double() @ case.lora_A[0].double().t()) @ case.lora_B[0][-50:].double().t()
    assert relative(y[:, -50:], exact) < 2**-7


def test_merge_beyond_2_31_elements(device, rows=2**31 // 4096 + 300, columns=4096):
    need_memory(24)
    W = torch.randn(rows, columns, dtype=BF16, device=device) * 0.02
    A, B = torch.randn(4, columns, device=device), torch.randn(rows, 4, device=device) * 0.002
    before = W.clone()
    record = merge.merge_(W, [A], [B], [2.0])
    exact = before[-100:].double() + 2.0 * B[-100:].double() @ A.double()
    assert ((W[-100:].double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    merge.unmerge_(W, record)
    assert torch.equal(reference.bits(W), reference.bits(before))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_merge_and_unmerge(dtype, fan_in_fan_out, device):
    W = (torch.randn(4096, 14336, device=device) * 0.02).to(dtype)
    adapters = [torch.randn(r, 14336, device=device) for r in (16, 5)]
    outs = [torch.randn(4096, r, device=device) * 0.001 for r in (16, 5)]
    W = W.t().contiguous() if fan_in_fan_out else W
    before = W.clone()
    for _ in range(3):
        record = merge.merge_(W, adapters, outs, [2.0, -1.0], fan_in_fan_out=fan_in_fan_out)
        assert record.device_corrections is not None
        delta = reference.delta_weight(adapters, outs, [2.0, -1.0], fan_in_fan_out=fan_in_fan_out)
        exact = before.double() + delta
        assert ((W.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
        merge.unmerge_(W, record)
        assert torch.equal(reference.bits(W), reference.bits(before))
    changed = merge.merge_(W, adapters, outs, [2.0, -1.0], fan_in_fan_out=fan_in_fan_out)
    W[7, 9] += 1
    with pytest.raises(RuntimeError, match="weight"):
        merge.unmerge_(W, changed)


def test_a_model_merges_in_one_launch_and_one_wait(device):
    """The bits of its layers' own merges; then a switch, and everything back."""
    shapes = [(4096, 4096), (1024, 4096), (4096, 1024), (576, 1536)] * 2
    net = torch.nn.Sequential(*(torch.nn.Linear(K, N, dtype=BF16, device=device) for N, K in shapes))
    config_ = fused_lora.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    for name in ("default", "other"):
        fused_lora.inject(net, config_, name)
    alone, before = copy.deepcopy(net), [layer.weight.detach().clone() for layer in net]
    for layer in alone:
        layer.merge()
    fused_lora.merge(net)  # compiled and tried
    fused_lora.switch(net, ["other"])
    fused_lora.unmerge(net)

    def counted(call):
        """Launches of the kernel and waits; one more for the sample of what rounding loses."""
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    call()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
        waits = [str(w.message) for w in found if "called a synchronizing CUDA operation" in str(w.message)]
        return sum(e.name.startswith("_merge_kernel") for e in profile.events()), len(waits)

    assert counted(lambda: fused_lora.merge(net)) == (1, 2)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(net, alone, strict=True))
    assert counted(lambda: fused_lora.switch(net, ["other"])) == (1, 2)
    assert counted(lambda: fused_lora.unmerge(net)) == (1, 1)
    assert all(torch.equal(a.weight, b) for a, b in zip(net, before, strict=True))


def test_eager_switch_disables_all_kernels(device, monkeypatch):
    """FUSED_LORA_PLAN=eager: no kernel is launched."""
    case = LayerCase.make(100, 64, 80, [8], [0.1], BF16, device=device)
    monkeypatch.setenv("FUSED_LORA_PLAN", "eager")

    def launched(*_):
        raise AssertionError("a kernel was asked for")

    for name in ("lora_linear", "lora_linear_backward"):
        monkeypatch.setattr(kernel, name, launched)
    exact = case.exact()
    for name, tensor in case.planned().items():
        assert relative(tensor, exact[name]) < 2**-5, name
    W = torch.randn(64, 80, device=device)
    assert merge.merge_(W, [torch.randn(2, 80, device=device)], [torch.randn(64, 2, device=device)], [1.0]).units
