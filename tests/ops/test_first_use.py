"""What the plan launches: how often, how many bytes, and that the trial before first use is of exactly that."""

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora.kernels import lora_backward, lora_expand, lora_grad, lora_linear, lora_shrink
from fused_lora.kernels.grouped_tables import AdapterTables
from fused_lora.kernels.launch import Launch
from fused_lora.ops import guard
from fused_lora.ops.dequant import dequantise_4bit, small_case
from fused_lora.ops.dora.op import row_norms
from fused_lora.ops.grouped import launch as grouped_kernel
from fused_lora.ops.grouped.metadata import GroupLayout, build_metadata
from fused_lora.ops.linear import launch as kernel
from fused_lora.ops.linear import plan
from fused_lora.ops.masks import times_mask
from fused_lora.testing.layers import LayerCase
from helpers.waiting import HANG

BF16 = torch.bfloat16


@pytest.fixture
def launched(kernels_on, monkeypatch):
    """Every launch as it happens: kernel, split of the grid, classes of the integers, dtypes, what is fixed."""
    seen = []
    for module, name in (
        (lora_linear, "_lora_linear_kernel"),
        (lora_shrink, "_lora_shrink_kernel"),
        (lora_expand, "_lora_expand_kernel"),
        (lora_backward, "_lora_backward_kernel"),
        (lora_grad, "_lora_weight_grad_kernel"),
    ):
        original = getattr(module, name)

        class Recorded:
            def __init__(self, original, name):
                self.original, self.name = original, name

            def __getitem__(self, grid):
                def launch(*args, **fixed):
                    tensors = [a for a in args if isinstance(a, torch.Tensor)]
                    classes = [1 if a == 1 else a % 16 == 0 for a in args if isinstance(a, int)]
                    seen.append((self.name, grid[1:], classes, [t.dtype for t in tensors], fixed))
                    return self.original[grid](*args, **fixed)

                return launch

        monkeypatch.setattr(module, name, Recorded(original, name))
    return seen


class TF32(TorchDispatchMode):
    """Library products of fp32 as torch.set_float32_matmul_precision("high") has them on a GPU."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"):
            *rest, left, right = args
            if left.dtype == torch.float32:
                self.products += 1
                args = *rest, self.rounded(left), self.rounded(right)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(t):
        return ((t.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


@pytest.mark.parametrize(
    "M, ranks, p, forward",
    [
        (1, [8], 0.0, ["linear"]),
        (20, [8], 0.0, ["linear"]),
        (20, [8], 0.1, ["shrink", "expand"]),
        (600, [8], 0.0, ["shrink", "expand"]),
        (2048, [8], 0.1, ["shrink", "linear"]),
        (20, [40], 0.0, ["shrink", "expand"]),
        (20, [8, 8], 0.0, ["shrink", "expand"]),
    ],
    ids=str,
)
def test_launches_of_a_layer(M, ranks, p, forward, device, launched, monkeypatch):
    """Beside those of the library: one GEMM where the forward has an expand, one in every backward."""
    monkeypatch.setenv("FUSED_LORA_CHECK", "0")
    case = LayerCase.make(M, 40, 1100 if M == 1 else 48, ranks, [p] * len(ranks), BF16, device=device)
    case.planned()
    backward = ["backward", "backward"] if ranks == [8] else ["shrink", "expand", "weight_grad"]
    assert [name for name, *_ in launched] == [f"_lora_{name}_kernel" for name in forward + backward]


def test_the_trial_is_of_the_configurations_that_then_run(device, launched):
    for M, N, K, r, p in [
        (600, 48, 64, 8, 0.1), (70, 48, 72, 40, 0.1), (20, 33, 1040, 8, 0.0),
        (1, 64, 40, 8, 0.0), (70, 50, 80, 8, 0.5), (2050, 48, 64, 8, 0.1),
    ]:  # fmt: skip
        guard._state.clear()
        launched.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            LayerCase.make(M, N, K, [r], [p], BF16, device=device).planned()
        trial_and_run = sorted(map(repr, launched))
        assert trial_and_run and trial_and_run[::2] == trial_and_run[1::2], (M, N, K, r, p)


def test_one_trial_for_each_configuration(device, kernels_on, monkeypatch):
    tried = []
    small_case = plan.small_case
    monkeypatch.setattr(plan, "small_case", lambda case: tried.append(case) or small_case(case))

    def forward(M, N, K, r=8, dtype=torch.float32):
        case = LayerCase.make(M, N, K, [r], [0.0], dtype, device=device)
        run = plan.forward(case.x, case.weight, None, case.lora_A, case.lora_B, [1.0], [0.0])
        run(case.x, case.weight, None, case.lora_A, case.lora_B, None)
        return len(tried)

    assert forward(5, 33, 44, dtype=BF16) == 1
    assert forward(7, 35, 42, dtype=BF16) == 1
    assert forward(9, 37, 40, dtype=BF16) == 2  # K is a multiple of 8: rows of whole 16 bytes
    assert forward(9, 37, 48, dtype=BF16) == 3  # of 16: another binary
    assert forward(5, 33, 2000, dtype=BF16) == 4  # K long enough to be split
    assert forward(5, 33, 2000, r=20, dtype=BF16) == 5  # another rank block
    assert forward(5, 33, 2000, r=20, dtype=torch.float16) == 6
    assert forward(5, 33, 2000, r=20, dtype=torch.float16) == 6


def test_no_trial_while_a_graph_is_captured(monkeypatch):
    """Until something has passed outside, the eager path is captured, with one warning; and that is no verdict."""
    monkeypatch.setattr(guard, "_state", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run = guard.guarded(("a",), lambda: "kernel", lambda: "eager", lambda: None)
    guard._warn_of_capture.cache_clear()
    with pytest.warns(UserWarning, match="eager path.*Run a warm-up step before the capture") as caught:
        assert run() == run() == "eager" and not guard._state
    assert len(caught) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert run() == "kernel" and guard._state == {("a",): True}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert run() == "kernel"


def test_a_run_that_fails_after_its_trial_is_dropped(monkeypatch):
    monkeypatch.setattr(guard, "_state", {})

    def fails():
        raise RuntimeError("Triton Error [CUDA]: an illegal configuration")

    run = guard.guarded(("b",), fails, lambda: "eager", lambda: None)
    with pytest.warns(UserWarning, match="is dropped.*illegal configuration"):
        assert run() == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run() == "eager"


@pytest.mark.parametrize("check", ["1", "0"])
def test_one_thread_tries_and_loads_at_a_time(check, monkeypatch):
    """The trial and the first run hold the lock, so that no thread launches what another is loading; later runs not."""
    monkeypatch.setenv("FUSED_LORA_CHECK", check)
    monkeypatch.setattr(guard, "_state", {})
    found = []

    def probe(place):
        with ThreadPoolExecutor(1) as other:
            free = other.submit(guard._first_use.acquire, blocking=False).result()
            if free:
                other.submit(guard._first_use.release).result()
        found.append((place, free))

    run = guard.guarded(("c",), lambda: probe("run"), lambda: "eager", lambda: probe("trial"))
    run(), run(), run()
    assert found == [("trial", False)] * (check == "1") + [("run", False), ("run", True), ("run", True)]


def test_each_device_has_a_trial_of_its_own(monkeypatch):
    """Another GPU may be another chip."""
    keys = []
    monkeypatch.setattr(guard, "guarded", lambda key, *_: keys.append(key) or (lambda *given: [given]))
    for device in map(torch.device, ("cpu", "meta")):
        monkeypatch.setattr(guard, "DEVICE", device.type)
        x = torch.zeros(16, 16, device=device)
        times_mask(torch.zeros(1, dtype=torch.int64, device=device), 0.3, True, x)
        row_norms(x, x, x, 1.0)
        dequantise_4bit(small_case((2, 64), False, torch.float32, device), lambda x=x: x)
    assert len(set(keys)) == len(keys) == 6


def test_one_thread_at_a_time_loads_what_no_trial_has_loaded():
    """Another specialisation of a kernel that has passed, as for a pointer that is not aligned."""
    both, inside, found = threading.Barrier(2), [], []

    class Kernel:
        def __getitem__(self, grid):
            def launch(*_, **options):
                inside.append(1)
                time.sleep(0.05)  # Triton compiles and loads
                found.append(len(inside))
                inside.pop()

            return launch

    def run(launch):
        both.wait(HANG)
        launch(Kernel(), torch.zeros(4))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, [Launch((1,)), Launch((1,))]))
    assert found == [1, 1]


@pytest.mark.parametrize("wrong", [None, "differs"])
@pytest.mark.filterwarnings("ignore:.*is dropped")
def test_a_thread_that_waits_for_a_first_use_takes_its_verdict(wrong, monkeypatch):
    asked, tried = threading.Event(), []

    class Watched(dict):
        def get(self, *key):
            found = super().get(*key)
            if threading.current_thread() is not threading.main_thread():
                asked.set()
            return found

    def check():
        tried.append(threading.current_thread())
        if len(tried) == 1:
            waiting.append(other.submit(run))
            assert asked.wait(HANG)
        return wrong

    monkeypatch.setattr(guard, "_state", Watched())
    run, waiting = guard.guarded(("d",), lambda: "kernel", lambda: "eager", check), []
    with ThreadPoolExecutor(1) as other:
        assert run() == waiting[0].result() == ("eager" if wrong else "kernel")
    assert tried == [threading.main_thread()]


def test_library_products_in_tf32_drop_no_layer(device, kernels_on):
    case = LayerCase.make(600, 48, 64, [8], [0.0], torch.float32, device=device)
    with TF32() as tf32, warnings.catch_warnings():
        warnings.simplefilter("error")
        case.planned()
    assert {key[1].variant for key in guard._state} == {"library", "passes"}
    assert all(guard._state.values()) and tf32.products


def test_gradients_of_16_bit_adapters_over_fp32_drop_no_kernel(device, kernels_on):
    """They are rounded to the adapters' dtype."""
    case = LayerCase.make(40, 48, 64, [4], [0.0], torch.float32, adapter_dtype=torch.bfloat16, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.planned()
    assert any(key[0] == "backward" for key in guard._state) and all(guard._state.values())


@pytest.mark.parametrize("result", [0, 1])
def test_an_fp32_library_plan_that_is_off_by_more_than_tf32_is_dropped(result, device, kernels_on, monkeypatch):
    """And its S, which is ours, by more than fp32."""
    original = kernel.lora_linear

    def off(chosen, *arguments):
        run = original(chosen, *arguments)
        return lambda *args: tuple(t * (1, (1.01, 1.0001)[i])[i == result] for i, t in enumerate(run(*args)))

    monkeypatch.setattr(kernel, "lora_linear", off)
    case = LayerCase.make(600, 48, 64, [8], [0.0], torch.float32, device=device)
    with pytest.warns(UserWarning, match=f"'library'.*is dropped.*result {result} is off"):
        case.planned()


@pytest.mark.parametrize("outputs", [1, 2])
def test_library_products_in_tf32_drop_no_grouped_kernel(outputs, device):
    """What they are tried against is exact, whatever the library multiplies in."""
    tables = AdapterTables(*torch.zeros(4, outputs, 1, device=device), torch.float32, max_rank=20)
    rows = GroupLayout(max_rows=16, max_groups=1, group_size=2)
    rows = rows.views(torch.from_numpy(build_metadata(rows, np.zeros(16, int), [[(0, 1.0)]])).to(device))
    with TF32():
        assert grouped_kernel._check(tables, rows, torch.float32, device) is None


def test_where_triton_cannot_load_its_driver_no_kernel_runs_and_one_warning_says_why(monkeypatch):
    """As in a container with a GPU and without a C compiler."""
    triton_runtime = pytest.importorskip("triton.runtime")

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(triton_runtime, "driver", Driver())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    guard.no_driver.cache_clear()
    try:
        with pytest.warns(UserWarning, match="C compiler.*python3-dev.*Failed to find C compiler") as found:
            assert [guard.usable(torch.device("cuda", i)) for i in (0, 1)] == [False, False]
        assert len(found) == 1 and "C compiler" in guard.why_not(torch.device("cuda"))
    finally:
        guard.no_driver.cache_clear()
