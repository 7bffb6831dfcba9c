"""What the vLLM plug-in computes and when it registers; without vLLM. tests/integrations/vllm has what needs vLLM."""

import logging
import sys
import types

import numpy as np
import pytest
import torch

from fused_lora.integrations import vllm as plugin
from fused_lora.integrations.vllm.slots import Slots
from fused_lora.integrations.vllm.terms import EagerTerms, KernelTerms
from fused_lora.ops import guard, native
from fused_lora.testing.interpreter import fixed_order_dot
from fused_lora.testing.numeric import assert_close, assert_no_worse
from helpers.seeds import shifted

BF16, FP32 = torch.bfloat16, torch.float32
K, N, MAX_RANK, SLOTS = 40, [48, 16, 16], 16, 5
RANKS = [(8, [8, 8, 8]), (16, [16, 0, 16]), (3, [3, 3, 3]), (0, [0, 0, 0]), (16, [16, 16, 16])]  # by slot


class Layer:
    """Slots of three outputs, and what was loaded into them."""

    def __init__(self, dtype, kept, local_rank=MAX_RANK):
        A = [torch.zeros(SLOTS, 1, local_rank, K, dtype=dtype) for _ in N]
        B = [torch.zeros(SLOTS, 1, n, MAX_RANK, dtype=dtype) for n in N]
        self.slots = Slots(A, B, kept)
        for slot, (_, ranks) in enumerate(RANKS):
            self.load(slot, ranks)

    def load(self, slot, ranks):
        """As vLLM's layers do: all of the slot is zeroed, and A and B are copied into its first ranks."""
        for g, r in enumerate(ranks):
            A, B = self.slots.A[g][slot, 0], self.slots.B[g][slot, 0]
            for matrix in (A, B):
                matrix.zero_()
            A[:r].copy_(torch.randn(len(A[:r]), K) / 8)
            B[:, :r].copy_(torch.randn(N[g], r) / 4)
        self.slots.set_ranks(slot, ranks)

    def terms(self, x, slot_of_row, round_to=None):
        """In float64, or with every product rounded to a dtype: [rows, sum of N]."""
        dtype = round_to or torch.float64
        outputs = []
        for A, B in zip(self.slots.A, self.slots.B, strict=True):
            rows = [(x[i].to(dtype) @ A[s, 0].to(dtype).t()) @ B[s, 0].to(dtype).t() * (s >= 0)
                    for i, s in enumerate(slot_of_row)]  # fmt: skip
            outputs.append(torch.stack(rows))
        return torch.cat(outputs, 1)


def mixed(rows, seed=0):
    return np.random.default_rng(shifted(seed)).integers(-1, SLOTS, rows).astype(np.int32)


@pytest.fixture(params=["loops", "products", "kernels"])
def kind(request, monkeypatch):
    """What computes the terms."""
    if request.param == "products":
        monkeypatch.setattr(native, "usable", lambda: False)
    return request.param


def made(kind, rows, device):
    return KernelTerms(rows, SLOTS, device) if kind == "kernels" else EagerTerms(device)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_every_row_gets_the_term_of_its_slot_and_base_rows_keep_their_bits(kind, dtype, device, kernels_on):
    layer = Layer(dtype, FP32 if kind == "products" else dtype)
    slot_of_row = mixed(21)
    terms = made(kind, 32, device)
    for step in range(2):  # the second after a reload in place, with other ranks
        x, y = torch.randn(24, K).to(dtype), torch.randn(24, sum(N)).to(dtype)  # padded by three base rows
        terms.step(slot_of_row)
        ours = y.clone()
        terms.linear_(ours, x, layer.slots)
        padded = np.pad(slot_of_row, (0, 3), constant_values=-1)
        exact = y.double() + layer.terms(x, padded)
        eager = y + layer.terms(x, padded, FP32).to(dtype)
        assert_no_worse(ours, eager, exact)
        assert list(guard.verdicts().values()) == [True, True] * (kind == "kernels")  # shrink and expand, none dropped
        base = torch.from_numpy(padded < 0)
        assert torch.equal(ours[base], y[base]) and not torch.equal(ours, y)
        if step == 0:
            layer.load(0, [16, 0, 5])
            layer.load(4, [0, 0, 0])


def test_a_row_has_the_same_bits_alone_in_any_step(kind, device, kernels_on):
    layer, slot_of_row = Layer(BF16, FP32 if kind == "products" else BF16), mixed(30)
    x, y = torch.randn(30, K).to(BF16), torch.randn(30, sum(N)).to(BF16)
    terms = made(kind, 256, device)

    def run(rows):
        terms.step(slot_of_row[rows])
        found = y[rows].clone()
        with fixed_order_dot():
            terms.linear_(found, x[rows], layer.slots)
        return found

    together = run(np.arange(30))
    for i in range(0, 30, 7):
        assert torch.equal(run(np.array([i]))[0], together[i])
    everywhere = np.tile(np.arange(30), 6)  # a prefill: tiles of other heights
    assert torch.equal(run(everywhere), together[np.tile(np.arange(30), 6)])


@pytest.mark.parametrize("broken", [float("nan"), 3e38], ids=["nan", "overflow"])
def test_an_adapter_that_is_not_finite_reaches_its_own_rows_alone(kind, broken, device, kernels_on):
    layer, slot_of_row = Layer(FP32, FP32), mixed(21)
    slot_of_row[5] = 4  # whatever was drawn
    x, y, terms = torch.randn(21, K), torch.randn(21, sum(N)), made(kind, 32, device)
    terms.step(slot_of_row)
    found = []
    for _ in range(2):
        found.append(y.clone())
        terms.linear_(found[-1], x, layer.slots)
        for A, B in zip(layer.slots.A, layer.slots.B, strict=True):
            A[4] = B[4] = broken
    own = torch.from_numpy(slot_of_row == 4)
    assert not found[1][own].isfinite().any()
    assert torch.equal(found[0][~own], found[1][~own])


def test_shrink_then_expand_is_linear(kind, device, kernels_on):
    """Fully sharded LoRA: half of each adapter's ranks here, the other half elsewhere, gathered in fp32."""
    whole = Layer(FP32, FP32)
    halves = [Layer(FP32, FP32, local_rank=MAX_RANK // 2) for _ in range(2)]
    for rank, half in enumerate(halves):
        for g in range(len(N)):
            half.slots.A[g].copy_(whole.slots.A[g].unflatten(2, (2, -1))[:, :, rank])
            half.slots.B[g].copy_(whole.slots.B[g])
    slot_of_row, x = mixed(10), torch.randn(10, K)
    terms = made(kind, 16, device)
    terms.step(slot_of_row)
    buffers = [torch.zeros(3, 10, MAX_RANK // 2) for _ in halves]
    for buffer, half in zip(buffers, halves, strict=True):
        terms.shrink_(list(buffer), x, half.slots)
    assert not torch.cat(buffers, 2)[:, slot_of_row < 0].any()
    y = torch.zeros(10, sum(N))
    terms.expand_(y.split(N, 1), torch.cat(buffers, 2).unbind(0), halves[0].slots)
    expected = torch.zeros(10, sum(N))
    terms.linear_(expected, x, whole.slots)
    assert_close(y, expected, terms=1000)


def test_fp32_adapters_of_an_embedding_over_a_16_bit_model(kind, device, kernels_on, monkeypatch):
    """Its rows of A have the dtype of the adapters."""
    slots, slot_of_row = Slots([], [torch.randn(SLOTS, 1, 48, MAX_RANK)], FP32), mixed(10)
    x, y = torch.randn(10, MAX_RANK), torch.randn(10, 48).to(BF16)
    terms = made(kind, 16, device)
    terms.step(slot_of_row)
    exact = y.double()
    for row, slot in enumerate(slot_of_row):
        exact[row] += x[row].double() @ slots.B[0][slot, 0].double().t() * (slot >= 0)
    for capturing in (False, kind == "kernels"):
        monkeypatch.setattr(guard, "capturing", lambda device, capturing=capturing: capturing)
        ours = y.clone()
        terms.linear_(ours, x, slots, "expand")
        assert_no_worse(ours, exact.to(BF16), exact)


@torch.no_grad()
def test_an_adapter_is_loaded_between_steps(device, kernels_on):
    """vLLM's steps run in inference mode, what its API loads does not."""
    layer, terms, slot_of_row, x = Layer(FP32, FP32), KernelTerms(16, SLOTS, device), mixed(10), torch.randn(10, K)
    with torch.inference_mode():
        terms.step(slot_of_row)
        terms.linear_(torch.zeros(10, sum(N)), x, layer.slots)
    layer.load(0, [5, 5, 5])
    with torch.inference_mode():
        terms.linear_((y := torch.zeros(10, sum(N))), x, layer.slots)
    assert_close(y, layer.terms(x, slot_of_row), terms=1000)


def test_what_is_in_the_slots_already_counts_with_its_full_rank():
    A, B = torch.randn(2, 1, 8, 6), torch.randn(2, 1, 5, 8)
    B[1] = 0
    slots = Slots([A], [B], torch.float32)
    assert slots.ranks == [[8, 0]]
    assert torch.equal(slots.A[0], A) and torch.equal(slots.B[0], B)


def test_a_step_beyond_what_was_provided_for_is_refused(device, kernels_on, monkeypatch):
    layer, terms = Layer(FP32, FP32), KernelTerms(8, SLOTS, device)
    with pytest.raises(ValueError, match="slot_of_row: 9 rows, provided for 8"):
        terms.step(mixed(9))
    terms.step(np.zeros(8, np.int32))
    monkeypatch.setattr(guard, "capturing", lambda device: True)
    with pytest.raises(ValueError, match="x: expected the 8 rows of the step or more, got 7"):
        terms.linear_(torch.zeros(7, sum(N)), torch.zeros(7, K), layer.slots)


def test_a_layer_may_see_the_first_rows_alone(kind, device, kernels_on):
    """vLLM's prompt_logprobs calls the head with a prompt's rows, fewer than those that are sampled from."""
    layer, slot_of_row = Layer(FP32, FP32), mixed(10)
    terms = made(kind, 16, device)
    terms.step(slot_of_row)
    for rows in (10, 3, 1):
        x, y = torch.randn(rows, K), torch.zeros(rows, sum(N))
        terms.linear_(y, x, layer.slots)
        assert_close(y, layer.terms(x, slot_of_row[:rows]), terms=1000)


def test_kernels_that_are_dropped_leave_the_step_to_the_eager_path(device, kernels_on, monkeypatch):
    layer, slot_of_row = Layer(FP32, FP32), mixed(10)
    terms = KernelTerms(16, SLOTS, device)
    terms.step(slot_of_row)
    monkeypatch.setattr("fused_lora.ops.grouped.launch._check", lambda *args: "wrong on purpose")
    x, y = torch.randn(10, K), torch.zeros(10, sum(N))
    with pytest.warns(UserWarning, match="wrong on purpose"):
        terms.linear_(y, x, layer.slots)
    assert_close(y, layer.terms(x, slot_of_row), terms=1000)


class Platform:
    device_name = "tpu"

    def __init__(self, kind):
        self.is_cpu, self.is_cuda = (lambda: kind == "cpu"), (lambda: kind == "cuda")

    @classmethod
    def get_punica_wrapper(cls):
        return "vLLM's own"


@pytest.fixture
def fake_vllm(monkeypatch):
    """A vLLM that is no more than a version, a logger and a platform."""

    def make(version, kind):
        vllm, logger, platforms = (types.ModuleType(n) for n in ("vllm", "vllm.logger", "vllm.platforms"))
        vllm.__version__, logger.init_logger = version, logging.getLogger
        platforms.current_platform = type("Platform", (Platform,), {})(kind)
        for module in (vllm, logger, platforms):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        return platforms.current_platform

    return make


@pytest.mark.parametrize(
    "version, kind, found",
    [
        ("0.32.0+cpu", "cpu", "fused_lora.integrations.vllm.cpu.GroupedWrapperCPU"),
        ("0.33.1", "cuda", "fused_lora.integrations.vllm.cuda.grouped_wrapper_gpu"),
        ("0.34.0", "cpu", "vLLM's own"),
        ("0.31.0", "cuda", "vLLM's own"),
        ("0.33.0", "tpu", "vLLM's own"),
    ],
)
def test_register_names_our_wrapper_or_leaves_vllms_with_one_warning(fake_vllm, caplog, version, kind, found):
    platform = fake_vllm(version, kind)
    plugin.register()
    assert platform.get_punica_wrapper() == found
    assert len(caplog.records) == (found == "vLLM's own")
    assert all(version in r.getMessage() or "tpu" in r.getMessage() for r in caplog.records)


def test_the_switch_leaves_vllm_as_it_is(fake_vllm, caplog, monkeypatch):
    platform = fake_vllm("0.33.0", "cpu")
    monkeypatch.setenv("FUSED_LORA_VLLM", "0")
    plugin.register()
    assert platform.get_punica_wrapper() == "vLLM's own" and not caplog.records
