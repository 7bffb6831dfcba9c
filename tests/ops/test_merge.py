"""Merge with one rounding and unmerge to the same bits: on the operator, on layers, on whole models."""

import copy
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig, LoraLinear, reference
from fused_lora.ops import native
from fused_lora.ops.merge import blocks
from fused_lora.ops.merge import op as merging
from fused_lora.reference import bits
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted
from helpers.waiting import HANG

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("loops")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (17, 129), (64, 64), (1000, 33), (300, 256)]
RANKS = [1, 3, 24, 100]


def case(N, K, r, dtype, relative=0.01, special=True):
    """A weight with awkward values in it and an adapter whose delta is ``relative`` times as large."""
    W = torch.randn(N, K) * 0.02
    A, B = torch.randn(r, K) * 0.05, torch.randn(N, r)
    B *= relative * W.norm() / ((B @ A).norm() + 1e-12)
    if special:
        values = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 6e-8, 3e4, -3e4])
        flat = W.view(-1)
        flat[: min(7, flat.numel())] = values[: flat.numel()]
    return W.to(dtype), A, B


def same_bits(a, b):
    return torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_rounds_once_and_unmerge_restores_every_bit(shape, r, dtype):
    W, A, B = case(*shape, r, dtype)
    before, pointer = W.clone(), W.data_ptr()
    record = merging.merge_(W, [A], [B], [0.5])
    delta = reference.delta_weight([A], [B], [0.5])
    exact = before.double() + delta
    best = exact.to(dtype)
    # sums in fp32, of the delta and with W, may round the other way where the exact sum lies close to a tie
    slack = 2.0**-22 * (r + 2) / 2 * (B.abs().double() @ A.abs().double()) + 2.0**-23 * exact.abs()
    assert ((W.double() - exact).abs() <= (best.double() - exact).abs() + slack).all()
    if W.numel() > 1000 and dtype != torch.float32:
        assert (W != best).float().mean() <= 1e-3
    assert W.data_ptr() == pointer
    merging.unmerge_(W, record)
    assert same_bits(W, before) and W.data_ptr() == pointer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "strided", "fan_in_fan_out"])
def test_any_layout_of_the_weight(layout, dtype):
    W, A, B = case(40, 70, 5, dtype)
    before = W.clone()
    if layout == "transposed":
        stored = W.t().contiguous().t()
    elif layout == "strided":
        stored = torch.zeros(40, 140, dtype=dtype)[:, ::2]
        stored.copy_(W)
    else:
        stored = W.t().contiguous()
    expected = W.clone()
    merging.merge_(expected, [A], [B], [2.0])
    record = merging.merge_(stored, [A], [B], [2.0], fan_in_fan_out=layout == "fan_in_fan_out")
    view = stored.t() if layout == "fan_in_fan_out" else stored
    assert same_bits(view.contiguous(), expected)
    again = merging.factors(record, layout == "fan_in_fan_out")
    assert torch.equal(again[0][0], A) and torch.equal(again[1][0], B * 2.0)
    merging.unmerge_(stored, record)
    assert same_bits(view.contiguous(), before)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("relative", [0.01, 100.0])
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 6, 8, 12])
def test_a_weight_may_begin_anywhere_in_memory(offset, relative, dtype):
    """Also in the middle of a word: files that are mapped and slices of larger storages do."""
    values, A, B = case(16, 24, 3, dtype, relative)
    values = values.clamp(-1, 1)
    memory = memoryview(bytearray(values.nbytes + offset))
    W = torch.frombuffer(memory[offset:], dtype=dtype).view(16, 24).copy_(values)
    record = merging.merge_(W, [A], [B], [1.0])
    expected = values.clone()
    merging.merge_(expected, [A], [B], [1.0])
    assert same_bits(W, expected)
    merging.unmerge_(W, record)
    assert same_bits(W, values)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [33, 35, 62])
def test_units_may_begin_between_two_words(rows, dtype):
    W, A, B = case(rows, 4097, 2, dtype)
    before = W.clone()
    record = merging.merge_(W, [A], [B], [1.0])
    assert record.units.notes.shape[1] == -(-4097 // record.units.width) * -(-rows // record.units.height) > 34
    merging.unmerge_(W, record)
    assert same_bits(W, before)


@pytest.mark.experiment("A1", full=10_000, quick=150)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cycles(dtype, count):
    """Merge and unmerge of 100 adapters in turn, delta of 0.01 to 100 % of a 128x128 weight: every bit is back."""
    W, *_ = case(128, 128, 1, dtype)
    before = W.clone()
    pairs = [case(128, 128, 1 + i % 16, dtype, 10.0 ** (i % 5 - 4))[1:] for i in range(100)]
    for cycle in range(count):
        A, B = pairs[cycle % len(pairs)]
        record = merging.merge_(W, [A], [B], [1.0])
        if cycle < len(pairs):
            assert not same_bits(W, before)
        merging.unmerge_(W, record)
        assert same_bits(W, before), f"cycle {cycle}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relative, bound", [(0.01, 0.03), (0.1, 0.13), (100.0, None)])
def test_the_record_is_small_and_never_more_than_a_copy(dtype, relative, bound):
    W, A, B = case(512, 512, 8, dtype, relative)
    record = merging.merge_(W, [A], [B], [1.0])
    size = W.element_size()
    adapter = 4 * (A.numel() + B.numel())
    assert (record.nbytes - adapter) / W.numel() <= size * 1.02
    if bound is not None:
        assert (record.nbytes - adapter) / W.numel() <= bound * (size + 2)
    merging.unmerge_(W, record)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_in_the_base_survive(dtype):
    W, A, B = case(30, 40, 3, dtype)
    W[3, 4], W[5, 6], W[7, 8] = float("nan"), float("inf"), -float("inf")
    bits(W)[9, 9] = bits(W)[3, 4] ^ 1  # another NaN payload
    before = W.clone()
    record = merging.merge_(W, [A * 1e6], [B], [1.0]) if dtype == torch.float32 else merging.merge_(W, [A], [B], [1.0])
    merging.unmerge_(W, record)
    assert same_bits(W, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", ["nan A", "inf B", "nan scaling", "overflow"])
@pytest.mark.parametrize("shape", [(20, 30), (900, 700)], ids=str)
def test_a_broken_adapter_is_refused_and_nothing_is_written(shape, bad, dtype):
    W, A, B = case(*shape, 4, dtype, special=False)
    s = 1.0
    if bad == "nan A":
        A[2, 7] = float("nan")
    elif bad == "inf B":
        B[shape[0] - 1, 1] = float("inf")
    elif bad == "nan scaling":
        s = float("nan")
    else:
        W[shape[0] - 1, 3] = torch.finfo(dtype).max
        A[:, 3], B[shape[0] - 1] = 1.0, torch.finfo(dtype).max
    before = W.clone()
    with pytest.raises(ValueError, match="merged weights"):
        merging.merge_(W, [A], [B], [s])
    assert same_bits(W, before)


@pytest.mark.experiment("A7", full=2_000, quick=100)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_flips(dtype, count):
    """A bit of a merged weight is flipped: unmerge refuses and writes nothing, or the old bits come back."""
    tampered(dtype, count, flip=True)


@pytest.mark.experiment("A7", full=1_000, quick=50)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swaps(dtype, count):
    """Two elements of a merged weight change places: unmerge refuses and writes nothing, or the old bits come back."""
    tampered(dtype, count, flip=False)


def tampered(dtype, count, flip):
    W, A, B = case(64, 96, 4, dtype)
    before = W.clone()
    record = merging.merge_(W, [A], [B], [1.0])
    merged, flat = W.clone(), bits(W).view(-1)
    draw, width = torch.Generator().manual_seed(shifted(1)), W.element_size() * 8
    refused = tried = 0
    while tried < count:
        i, j = torch.randint(W.numel(), (2,), generator=draw).tolist()
        if flip:
            bit = int(torch.randint(width, (1,), generator=draw))
            flat[i] ^= 1 << bit if bit < width - 1 else -(1 << bit)
        else:
            flat[[i, j]] = flat[[j, i]]
        if same_bits(W, merged):
            continue  # two equal elements
        tried += 1
        held = W.clone()
        try:
            merging.unmerge_(W, record)
        except RuntimeError:
            refused += 1
            assert same_bits(W, held)
        else:
            assert same_bits(W, before)  # the change was below what the merge had rounded away
        W.copy_(merged)
    assert refused > 0.5 * count
    merging.unmerge_(W, record)
    assert same_bits(W, before)


def test_many_cycles_in_two_threads(loops):
    old = torch.get_num_threads()
    W, A, B = case(576, 1536, 16, torch.float32, 0.1)
    before = W.clone()
    try:
        torch.set_num_threads(2)
        for _ in range(300 if loops == "C" else 5):
            record = merging.merge_(W, [A], [B], [2.0])
            merging.unmerge_(W, record)
    finally:
        torch.set_num_threads(old)
    assert same_bits(W, before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_at_unmerge_does_not_matter(threads):
    old = torch.get_num_threads()
    W, A, B = case(900, 1000, 16, torch.float32)
    before = W.clone()
    try:
        torch.set_num_threads(2)
        record = merging.merge_(W, [A], [B], [1.0])
        assert torch.get_num_threads() == 2
        torch.set_num_threads(threads)
        merging.unmerge_(W, record)
    finally:
        torch.set_num_threads(old)
    assert same_bits(W, before)


@pytest.fixture
def small_pieces(monkeypatch):
    """Units of 512 elements, one after the other."""
    monkeypatch.setattr(blocks, "AREA", 512)
    monkeypatch.setattr(blocks, "_BAND", 512)


def acting(action, W, before, merged, A, B, record):
    """What changes W, W before it, and W after it."""
    if action != "switch":
        act = {"merge": lambda: merging.merge_(W, [A], [B], [1.0]), "unmerge": lambda: merging.unmerge_(W, record)}
        return act[action], *((before, merged) if action == "merge" else (merged, before))
    other, switched = ([A * 0.9], [B], [-0.5]), before.clone()
    merging.merge_(switched, *other)
    return lambda: merging.switch_(W, record, *other), merged, switched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("action", ["merge", "unmerge", "switch"])
def test_a_fault_in_any_block_leaves_the_old_or_the_new_state(action, dtype, monkeypatch, small_pieces, loops):
    W, A, B = case(64, 64, 4, dtype)
    before = W.clone()
    record = merging.merge_(W, [A], [B], [1.0])
    merged = W.clone()
    act, old, _ = acting(action, W, before, merged, A, B, record)
    ran = []
    in_torch = [(blocks, "chain"), (blocks._InTorch, "_checksums"), (blocks._InTorch, "_encode")]
    in_c = [(native, "run"), (blocks._InC, "kept")]
    for owner, name in in_c if loops == "C" else in_torch:
        step, calls = getattr(owner, name), {"left": -1}

        def failing(*args, step=step, calls=calls, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise OSError("injected")
            return step(*args, **kwargs)

        for k in range(1, 9):
            W.copy_(old)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, failing)
                calls["left"] = k
                try:
                    act()
                except OSError as e:
                    assert str(e) == "injected"
                    ran.append(name)
                else:
                    assert calls["left"] > 0  # there are fewer such steps
                    break
            assert same_bits(W, old)
    runs = 2 if action == "switch" else 1
    assert ran.count("run" if loops == "C" else "chain") == (runs if loops == "C" else 8)
    assert len(ran) >= (1 if loops == "C" else 16)
    W.copy_(merged)
    merging.unmerge_(W, record)
    assert same_bits(W, before)


def elsewhere(patch):
    """Weights are merged as those of a device that is neither a CPU nor CUDA's."""
    best, own = blocks._best, blocks._OnHost.__init__.__code__
    patch.setattr(blocks, "_best", lambda W: best(W) if sys._getframe(1).f_code is own else blocks._OnHost)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("relative", [0.01, 100.0], ids=["corrections", "copy"])
def test_a_weight_of_another_device_is_merged_on_the_cpu(relative, dtype, monkeypatch):
    W, A, B = case(70, 333, 5, dtype, relative)
    before, expected, back = W.clone(), W.clone(), W.clone()
    reference = merging.merge_(expected, [A], [B], [0.5])
    huge = {torch.float64: 1e200, torch.float16: 6e4}.get(dtype, 1e20)
    with monkeypatch.context() as patch:
        elsewhere(patch)
        record = merging.merge_(W, [A], [B], [0.5])
        assert same_bits(W, expected) and record.nbytes == reference.nbytes
        assert all(map(torch.equal, record.units.tensors, reference.units.tensors))
        assert merging.delta_fidelity(W, record) == merging.delta_fidelity(expected, reference)
        record = merging.switch_(W, record, [A], [B], [-0.25])
        merging.merge_(back, [A], [B], [-0.25])
        assert same_bits(W, back)
        W[3, 3] += 1
        with pytest.raises(RuntimeError, match="changed"):
            merging.unmerge_(W, record)
        W.copy_(back)
        merging.unmerge_(W, record)
        assert same_bits(W, before)
        with pytest.raises(ValueError, match="NaNs or infinities"):
            merging.merge_(W, [torch.full_like(A, huge, dtype=dtype)], [torch.full_like(B, huge, dtype=dtype)], [1.0])
        assert same_bits(W, before)
    for kind in ("mps", "xpu", "npu"):
        assert blocks._best(SimpleNamespace(device=SimpleNamespace(type=kind))) is blocks._OnHost


@pytest.mark.parametrize("device", ["cpu", "another"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("action", ["merge", "unmerge", "switch"])
@pytest.mark.parametrize("relative", [0.01, 100.0], ids=["corrections", "copy"])
def test_an_interrupt_at_any_line_leaves_the_old_or_the_new_state(
    relative, action, dtype, device, small_pieces, loops, monkeypatch
):
    """Between the write of a block and the note of it, too."""
    if device != "cpu":
        elsewhere(monkeypatch)
    W, A, B = case(24, 64, 4, dtype, relative)  # three blocks
    before = W.clone()
    record = merging.merge_(W, [A], [B], [1.0])
    merged = W.clone()
    act, old, new = acting(action, W, before, merged, A, B, record)
    names = "merge", "restoring", "alone", "_put_back", "run", "undo", "_do", "kept"
    lines = {"seen": 0, "stop": 0}

    def trace(frame, event, argument):
        if frame.f_code.co_filename != blocks.__file__ or frame.f_code.co_name not in names:
            return None
        if event == "line":
            lines["seen"] += 1
            if lines["seen"] == lines["stop"]:
                lines["at"] = frame.f_code.co_name, frame.f_lineno, event
                raise KeyboardInterrupt
        return trace

    whole = 0
    while lines["seen"] >= lines["stop"]:
        W.copy_(old)
        lines["seen"], lines["stop"] = 0, lines["stop"] + 1
        outer = sys.gettrace()
        sys.settrace(trace)
        try:
            act()
        except KeyboardInterrupt:
            assert same_bits(W, old), f"after {lines['seen']} lines, at {lines['at']}"
        else:
            whole += 1
            assert same_bits(W, new)
        finally:
            sys.settrace(outer)
    assert lines["stop"] > (8 if loops == "C" else 20) and whole == 1


@pytest.mark.parametrize("action", ["unmerge", "switch"])
def test_an_interrupt_while_a_copy_is_put_back(action, loops):
    """Python raises it behind the call that it came in."""
    W, A, B = case(24, 64, 4, torch.bfloat16, 100.0)
    before = W.clone()
    record = merging.merge_(W, [A], [B], [1.0])
    merged = W.clone()
    assert record.units.copy is not None

    def behind(frame, event, function):
        if event == "c_return" and frame.f_code.co_name == "_put_back" and function.__name__ == "copy_":
            raise KeyboardInterrupt

    act, *_ = acting(action, W, before, merged, A, B, record)
    outer = sys.getprofile()
    sys.setprofile(behind)
    try:
        with pytest.raises(KeyboardInterrupt):
            act()
    finally:
        sys.setprofile(outer)
    assert same_bits(W, merged)
    merging.unmerge_(W, record)
    assert same_bits(W, before)


def test_arguments_are_checked():
    W, A, B = case(8, 9, 2, torch.float32)
    with pytest.raises(ValueError, match="adapter 0"):
        merging.merge_(W, [A.t()], [B], [1.0])
    with pytest.raises(ValueError, match="lora_A, lora_B, scaling"):
        merging.merge_(W, [A], [B], [])
    with pytest.raises(ValueError, match="^scaling: expected numbers"):
        merging.merge_(W, [A], [B], [10**400])
    with pytest.raises(ValueError, match="two dimensions"):
        merging.merge_(W[0], [A], [B], [1.0])
    with pytest.raises(TypeError, match="weight"):
        merging.merge_(W.to(torch.int32), [A], [B], [1.0])
    with pytest.raises(RuntimeError, match="weight: .*expanded"):
        merging.merge_(torch.zeros(1, 9).expand(8, 9), [A], [B], [1.0])
    windows = torch.randn(17)
    with pytest.raises(RuntimeError, match="weight: .*memory of its own"):
        merging.merge_(windows.unfold(0, 9, 1)[:8], [A], [B], [1.0])
    for apart in (torch.zeros(17, 9)[::2][:8], torch.zeros(9, 16)[:, ::2].t()):
        merging.merge_(apart, [A], [B], [1.0])
    before = W.clone()
    for dtype in (torch.complex64, torch.int32, torch.bool):
        for factors in (([A.to(dtype)], [B]), ([A], [B.to(dtype)])):
            with pytest.raises(TypeError, match=f"adapter 0: expected floating lora_A and lora_B.*{dtype}"):
                merging.merge_(W, *factors, [1.0])
    for name, arguments in {
        "weight": ([[1.0]], [A], [B], [1.0]),
        "lora_A": (W, None, [B], [1.0]),
        "lora_B": (W, [A], [[1.0]], [1.0]),
        "scaling": (W, [A], [B], ["1"]),
        "row_scale": (W, [A], [B], [1.0], 1.0),
        "lora_A\\[0\\]": (W, [A.to_sparse()], [B], [1.0]),
        "lora_B\\[0\\]": (W, [A], [B.to("meta")], [1.0]),
    }.items():
        with pytest.raises(TypeError, match=f"{name}: expected"):
            merging.merge_(*arguments)
    assert torch.equal(W, before)
    record = merging.merge_(W, [A], [B], [1.0])
    for wrong in (W[:4], W.to(torch.bfloat16), W.to_sparse_csr(), torch._neg_view(W)):
        with pytest.raises(RuntimeError, match="weight: expected"):
            merging.unmerge_(wrong, record)
    for wrong in (W.to_sparse_csr(), torch._neg_view(W)):
        with pytest.raises(RuntimeError, match="weight: expected"):
            merging.merge_(wrong, [A], [B], [1.0])
    with pytest.raises(TypeError, match="weight: expected a tensor"):
        merging.unmerge_(None, record)


def layer_with(dtype=torch.float32, bias=True, lora_bias=False):
    base = nn.Linear(24, 40, bias=bias).to(dtype)
    layer = LoraLinear(base, r=4, lora_alpha=8, init_lora_weights=False, lora_bias=lora_bias)
    layer.add_adapter("b", 3, 6, init_lora_weights=False, lora_bias=lora_bias)
    layer.add_adapter("c", 2, 2, init_lora_weights=False)
    return layer


MISUSES = {
    "edit A": lambda layer: layer.lora_A["default"].weight.data.mul_(3),
    "change the scale": lambda layer: layer.set_scale("default", 7.0),
    "scale_layer": lambda layer: layer.scale_layer(0.1),
    "load other adapter values": lambda layer: layer.lora_B["default"].weight.data.normal_(),
    "adapter to bf16": lambda layer: layer.lora_A.to(torch.bfloat16),
    "train mode": lambda layer: layer.train().eval(),
    "merge again": lambda layer: layer.merge(),
    "switch adapter": lambda layer: layer.set_adapter("c"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("misuse", MISUSES)
def test_what_happens_to_the_adapter_while_merged_does_not_matter(misuse, dtype):
    layer = layer_with(dtype)
    before = layer.weight.detach().clone()
    layer.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MISUSES[misuse](layer)
    layer.unmerge()
    assert same_bits(layer.weight.data, before) and not layer.merged


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.data.add_(1e-2),
        lambda layer: layer.base_layer.to(torch.float64),
        lambda layer: layer.base_layer.weight.data.zero_(),
        lambda layer: layer.base_layer.load_state_dict(
            {**layer.base_layer.state_dict(), "weight": torch.zeros(40, 24)}
        ),
    ],
    ids=["add", "cast", "zero", "load_state_dict"],
)
def test_a_changed_base_weight_is_refused(change):
    layer = layer_with()
    layer.merge()
    change(layer)
    now = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="weight"):
        layer.unmerge()
    assert same_bits(layer.weight.data, now) and layer.merged_adapters == ["default"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_more_adapters_is_one_rounding_whatever_the_order(dtype):
    one = layer_with(dtype)
    two = copy.deepcopy(one)
    before = one.weight.detach().clone()
    one.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging b,c"):
        one.merge(adapter_names=["default", "b", "c"])
    two.merge(adapter_names=["default", "b", "c"])
    assert same_bits(one.weight.data, two.weight.data)
    assert one.merged_adapters == ["default", "b", "c"]
    for layer in (one, two):
        layer.unmerge()
        assert same_bits(layer.weight.data, before)


def test_a_further_merge_that_fails_leaves_the_first_in_force():
    layer = layer_with()
    before = layer.weight.detach().clone()
    layer.merge()
    merged = layer.weight.detach().clone()
    layer.lora_A["b"].weight.data[0, 0] = float("nan")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="broken.*b.*nothing was merged"):
        layer.merge(adapter_names=["b"])
    assert same_bits(layer.weight.data, merged) and layer.merged_adapters == ["default"]
    layer.unmerge()
    assert same_bits(layer.weight.data, before)


def test_lora_bias_is_scaled_into_the_base_bias_and_out_again():
    layer = layer_with(lora_bias=True)
    bias, x = layer.bias.detach().clone(), torch.randn(5, 24)
    expected = layer(x)
    layer.merge()
    assert_close(layer(x), expected, terms=100)
    assert not torch.equal(layer.bias.data, bias)
    layer.unmerge()
    assert same_bits(layer.bias.data, bias)
    bare = layer_with(bias=False, lora_bias=True)
    weight = bare.weight.detach().clone()
    with pytest.raises(RuntimeError, match="base layer has no bias"):
        bare.merge()
    assert same_bits(bare.weight.data, weight) and not bare.merged


def model(dtype=torch.float32, depth=5):
    net = nn.Sequential(*[nn.Linear(16, 16) for _ in range(depth)]).to(dtype)
    return fused_lora.inject(net, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", range(5))
def test_a_model_is_merged_whole_or_not_at_all(k, dtype):
    net = model(dtype)
    before = copy.deepcopy(net.state_dict())
    layers = list(fused_lora.lora_layers(net).values())
    broken = layers[k].lora_A["default"].weight.data
    value = broken[0, 0].clone()
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"^{k}: "):
        fused_lora.merge(net)
    broken[0, 0] = value
    assert all(same_bits(t, before[name]) for name, t in net.state_dict().items())
    assert not any(layer.merged for layer in layers)
    fused_lora.merge(net)
    merged = copy.deepcopy(net.state_dict())
    layers[k].weight.data[0] += 1
    with pytest.raises(RuntimeError, match=f"^{k}: "):
        fused_lora.unmerge(net)
    assert all(layer.merged_adapters == ["default"] for layer in layers)
    layers[k].weight.data.copy_(merged[f"{k}.base_layer.weight"])
    assert all(same_bits(t, merged[name]) for name, t in net.state_dict().items())
    fused_lora.unmerge(net)
    assert all(same_bits(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("relative, least, most", [(0.001, 0.6, 0.95), (0.01, 0.1, 0.3), (0.1, 0.01, 0.04)])
def test_fidelity_tells_what_bf16_rounding_loses(relative, least, most):
    W, A, B = case(256, 256, 8, torch.bfloat16, relative, special=False)
    record = merging.merge_(W, [A], [B], [1.0])
    assert least < merging.delta_fidelity(W, record) < most


def test_delta_fidelity_of_a_model():
    net = model()
    with pytest.raises(RuntimeError, match="merge"):
        fused_lora.delta_fidelity(net)
    fused_lora.merge(net)
    report = fused_lora.delta_fidelity(net)
    assert sorted(report) == [str(i) for i in range(5)] and all(v < 1e-4 for v in report.values())


def test_unload_gives_the_plain_model_back():
    net = model()
    x = torch.randn(3, 16)
    adapted, plain = net(x), copy.deepcopy(net)
    merged = fused_lora.unload(copy.deepcopy(net), merge_adapters=True)
    assert_close(merged(x), adapted, terms=100)
    with fused_lora.disable_adapters(plain):
        base = plain(x)
    assert torch.equal(fused_lora.unload(plain)(x), base)
    assert all(type(m) is nn.Linear for m in plain) and not fused_lora.adapter_configs(plain)
    with pytest.raises(RuntimeError, match="LoRA layers"):
        fused_lora.merge(plain)


def test_merges_of_several_threads(loops):
    """Each finds torch with the threads that it had, whoever else merged meanwhile, and every bit comes back."""
    threads, failures = torch.get_num_threads(), []
    cases = [case(700, 800, 4, torch.float32) for _ in range(3)]

    def work(W, A, B):
        try:
            before = W.clone()
            for _ in range(15 if loops == "C" else 5):
                merging.unmerge_(W, merging.merge_(W, [A], [B], [1.0]))
                assert same_bits(W, before)
            with pytest.raises(ValueError, match="NaNs or infinities"):
                merging.merge_(W, [A * float("inf")], [B], [1.0])
            assert same_bits(W, before)
        except BaseException as e:
            failures.append(e)

    torch.set_num_threads(2)
    try:
        workers = [threading.Thread(target=work, args=one) for one in cases]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(HANG)
        assert not failures and not any(worker.is_alive() for worker in workers)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def enter_disabled(model):
    with fused_lora.disable_adapters(model):
        pass


UNMERGING = {
    "disable_adapters": enter_disabled,
    "set_adapter": lambda model: fused_lora.set_adapter(model, "default"),
    "unload, merged": lambda model: fused_lora.unload(model, merge_adapters=True),
}


@pytest.mark.filterwarnings("ignore:Adapter cannot be set")
@pytest.mark.parametrize(
    "trouble, name", [*(("changed weight", name) for name in UNMERGING), ("broken adapter", "unload, merged")]
)
def test_a_model_is_unmerged_whole_or_not_at_all(trouble, name):
    net = model()
    fused_lora.inject(net, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False), "other")
    fused_lora.merge(net, ["other"])
    last = list(fused_lora.lora_layers(net).values())[-1]
    if trouble == "changed weight":
        last.weight.data[0, 0] += 1
    else:
        last.lora_A["default"].weight.data[0, 0] = float("nan")
    layers = fused_lora.lora_layers(net)
    before = [layer.weight.clone() for layer in layers.values()]
    with pytest.raises((ValueError, RuntimeError)):
        UNMERGING[name](net)
    assert fused_lora.lora_layers(net) == layers
    for layer, bits_before in zip(layers.values(), before, strict=True):
        assert same_bits(layer.weight, bits_before)
        assert layer.merged_adapters == ["other"] and not layer.disable_adapters
        assert layer.active_adapters == ["default"]
