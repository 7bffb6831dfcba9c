"""Programs that share a result: the last to arrive, a checker that knows what it may rely on, and the counters."""

import contextlib
import random
import threading
import weakref

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fused_lora.kernels import lora_backward, lora_grad, lora_linear, sync
from fused_lora.kernels.config import LaunchConfig
from fused_lora.kernels.sync import counters, last_to_arrive
from fused_lora.testing.bounds import AccessError
from fused_lora.testing.interpreter import checked, interpreting
from fused_lora.testing.layers import LayerCase
from helpers.seeds import shifted

in_the_interpreter = pytest.mark.skipif(not interpreting(), reason="the interpreter's own order of programs")


@triton.jit
def _arrive_kernel(
    parts_ptr, out_ptr, sync_ptr, STORE_BARRIER: tl.constexpr, SEM: tl.constexpr, LOAD_BARRIER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """last_to_arrive, piece by piece."""
    offs = tl.arange(0, BLOCK)
    tl.store(parts_ptr + tl.program_id(0) * BLOCK + offs, 2.0 * offs)
    if STORE_BARRIER:
        tl.debug_barrier()
    before = tl.atomic_add(sync_ptr, 1, sem=SEM)
    if LOAD_BARRIER:
        tl.debug_barrier()
    if before == tl.num_programs(0) - 1:
        tl.store(out_ptr + offs, tl.load(parts_ptr + offs))


def _arrive(**change):
    parts, out, counter = torch.empty(48), torch.zeros(16), torch.zeros(1, dtype=torch.int32)
    _arrive_kernel[(3,)](
        parts, out, counter, **dict(STORE_BARRIER=True, SEM="acq_rel", LOAD_BARRIER=True) | change, BLOCK=16
    )
    return out


@in_the_interpreter
def test_the_checker_lets_the_protocol_pass():
    with checked():
        out = _arrive()
    assert torch.equal(out, 2 * torch.arange(16.0))


@in_the_interpreter
@pytest.mark.parametrize(
    "change",
    [
        dict(STORE_BARRIER=False),
        dict(SEM="release"),
        dict(SEM="acquire"),
        dict(SEM="relaxed"),
        dict(LOAD_BARRIER=False),
    ],
    ids=str,
)
def test_the_checker_misses_no_part_of_the_protocol(change):
    with checked(), pytest.raises(AccessError, match="load of an element of parts_ptr .* another program"):
        _arrive(**change)


@triton.jit
def _last_kernel(parts_ptr, out_ptr, sync_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(parts_ptr + tl.program_id(0) * BLOCK + offs, (tl.program_id(0) + 1.0) * offs)
    if last_to_arrive(sync_ptr, tl.num_programs(0)):
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(tl.num_programs(0)):
            total += tl.load(parts_ptr + i * BLOCK + offs)
        tl.store(out_ptr + offs, total)


def test_the_last_program_sees_all_partial_sums_and_resets_the_counter(device):
    parts, out = torch.empty(5, 16, device=device), torch.empty(16, device=device)
    counter = counters(1, device)
    with checked():
        for _ in range(3):
            _last_kernel[(5,)](parts, out.zero_(), counter, BLOCK=16)
            assert torch.equal(out, 15.0 * torch.arange(16.0, device=device))
            assert not counter.any()


@pytest.fixture
def shared_counters(monkeypatch, device):
    """Every launch gets the same counters, as launches of one stream do."""
    held = torch.zeros(4096, dtype=torch.int32, device=device)
    for module in (lora_linear, lora_backward, lora_grad):
        monkeypatch.setattr(module, "counters", lambda count, device: held)
    return held


def forward():
    case = LayerCase.make(70, 40, 90, [5], [0.0])
    config = LaunchConfig("recompute", 16, 32, 32, 16, SPLIT_K=3)
    return lora_linear.lora_linear_forward(case.x, case.weight, case.bias, *case.adapters, config=config)


def passes():
    case = LayerCase.make(70, 40, 90, [5], [0.1])
    config = LaunchConfig("backward", 16, 32, 16, 16, SPLIT_K=3)
    dS, dB = lora_backward.lora_backward_g(case.g, torch.randn(70, 5), case.lora_B[0], 2.0, config)
    return dS, dB, *lora_backward.lora_backward_x(case.x, dS, case.lora_A[0], 0.1, case.seeds, config)


def weight_gradients():
    case = LayerCase.make(70, 40, 90, [5], [0.1])
    config, S = LaunchConfig("weight_grad", 32, 16, 16, 16, SPLIT_K=3), torch.randn(70, 5)
    dA, dB = lora_grad.lora_linear_weight_grad(
        case.g, case.x, S, 2 * S, case.scaling, case.dropout, case.seeds, case.ranks, torch.float32, config
    )
    return *dA, *dB


@in_the_interpreter
@pytest.mark.parametrize("step", [forward, passes, weight_gradients])
def test_the_order_in_which_programs_start_does_not_matter(step, shared_counters):
    torch.manual_seed(shifted(4))
    with checked():
        expected = step()
        assert not shared_counters.any()
        for order in ("reversed", "shuffled"):
            with pytest.MonkeyPatch.context() as patch:
                _scramble(patch, order)
                torch.manual_seed(shifted(4))
                results = step()
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)), order
            assert not shared_counters.any()


def _scramble(patch, order):
    builder, places = interpreter.InterpreterBuilder, []
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx

    def numbers(n):
        return list(range(n))[::-1] if order == "reversed" else random.sample(range(n), n)

    def dim(self, x, y, z):
        places[:] = numbers(x), numbers(y)
        return set_grid_dim(self, x, y, z)

    patch.setattr(builder, "set_grid_dim", dim)
    patch.setattr(builder, "set_grid_idx", lambda self, x, y, z: set_grid_idx(self, places[0][x], places[1][y], z))


def test_counters_on_a_cpu_are_fresh_zeros():
    first = counters(7, torch.device("cpu"))
    assert first.tolist() == [0] * 7 and first.dtype == torch.int32
    first += 1
    assert not counters(7, torch.device("cpu")).any()


class _Stream:
    def synchronize(self):
        pass


@pytest.fixture
def streams(monkeypatch):
    """A CUDA device whose streams are only numbers: what is current, whether it captures, who allocates counters."""
    now = {"stream": 1, "capturing": False, "threads": []}
    zeros = torch.zeros

    def recorded(count, *, dtype, device):
        now["threads"].append(threading.current_thread())
        return zeros(count, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", recorded)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(sync, "_stream", lambda index: now["stream"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: _Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(sync, "_BLOCK", 4000)
    monkeypatch.setattr(sync, "_blocks", [])
    monkeypatch.setattr(sync, "_free", {})
    monkeypatch.setattr(sync, "_of_stream", {})
    return now


def test_a_block_of_counters_is_allocated_by_a_thread_that_has_ended(streams):
    """inductor's CUDA graphs warm up with a memory pool for all that their thread allocates, on any stream."""
    counters(10, torch.device("cuda"))
    (thread,) = streams["threads"]
    assert thread is not threading.current_thread() and not thread.is_alive()


def test_a_block_that_cannot_be_allocated_raises_in_the_caller(streams, monkeypatch):
    def full(device):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch.cuda, "Stream", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        counters(10, torch.device("cuda"))
    assert not sync._free and not sync._of_stream


def test_the_counters_of_a_captured_launch_outlive_their_block(streams):
    """A graph holds addresses: nothing else keeps its counters from being given back."""
    cuda = torch.device("cuda")
    counters(10, cuda)
    streams["capturing"] = True
    block = weakref.ref(counters(10, cuda)._base)
    streams["capturing"] = False
    counters(5000, cuda)  # a new block; the stream's old counters are too few
    assert block() is not None


def test_counters_belong_to_a_stream_or_to_one_captured_launch(streams):
    """The rules of who shares."""
    now, cuda = streams, torch.device("cuda")

    def span(count):
        t = counters(count, cuda)
        assert t.numel() >= count and not t.any()
        assert t.data_ptr() % 16 == 0  # else Triton would compile the launch anew, in the middle of a capture
        return t.data_ptr(), t.data_ptr() + 4 * t.numel()

    def apart(a, b):
        return a[1] <= b[0] or b[1] <= a[0]

    held = [span(10)]
    assert span(1000) == held[0]  # the same stream
    now["stream"] = 2
    held.append(span(10))
    now["capturing"] = True
    held += [span(10), span(10), span(10)]  # every captured launch has its own
    now["capturing"] = False
    assert span(10) == held[1]
    held.append(span(3000))  # a larger launch: a new block, and what is too small is given up
    now["capturing"] = True
    held.append(span(5000))  # nothing left: the graph zeroes its own
    assert all(apart(a, b) for i, a in enumerate(held) for b in held[:i])
