"""The harness that proves kernels on the CPU is itself proven: each test here fails if its part did nothing."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
import triton
import triton.language as tl

from fused_lora.testing import interpreter as harness
from fused_lora.testing.bounds import AccessError
from fused_lora.testing.guards import GuardedBuffers, guarded_allocations, poison_bits
from fused_lora.testing.interpreter import checked, fixed_order_dot
from fused_lora.testing.numeric import assert_close

pytestmark = pytest.mark.skipif(not harness.interpreting(), reason="kernels run natively: no interpreter to check")


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    y = tl.load(y_ptr + offs, mask=offs < n, other=0.0)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "neg":
        out = -x
    else:
        out = tl.where(x < y, x, y)
    tl.store(out_ptr + offs, out, mask=offs < n)


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.fma(tl.load(x_ptr + offs), tl.load(y_ptr + offs), tl.load(z_ptr + offs)))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    acc = tl.full((M, N), 1.0, tl.float32)
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, acc, input_precision="ieee"))


@triton.jit
def _copy_kernel(x_ptr, y_ptr, size, shift, LOAD_MASK: tl.constexpr, STORE_MASK: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    x = tl.load(x_ptr + offs + shift, mask=inside) if LOAD_MASK else tl.load(x_ptr + offs + shift)
    if STORE_MASK:
        tl.store(y_ptr + offs, x, mask=inside)
    else:
        tl.store(y_ptr + offs, x)


@triton.jit
def _hint_kernel(x_ptr, y_ptr, places_ptr, first, BLOCK: tl.constexpr):
    place = tl.load(places_ptr + tl.arange(0, BLOCK))
    to = tl.max_contiguous(y_ptr + place, 4)
    tl.store(to, tl.load(x_ptr + tl.multiple_of(first, 8) + tl.arange(0, BLOCK)))


@triton.jit
def _copy_2d_kernel(x_ptr, y_ptr, rows, cols, stride, BLOCK: tl.constexpr):
    r, c = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (r < rows) & (c < cols)
    tl.store(y_ptr + r * cols + c, tl.load(x_ptr + r * stride + c, mask=mask), mask=mask)


@triton.jit
def _descriptor_kernel(x_ptr, y_ptr, rows, cols, stored_rows, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [rows, cols], [cols, 1], [BLOCK, BLOCK])
    y = tl.make_tensor_descriptor(y_ptr, [stored_rows, cols], [cols, 1], [BLOCK, BLOCK])
    y.store([tl.program_id(0) * BLOCK, 0], x.load([tl.program_id(0) * BLOCK, 0]))


@triton.jit
def _conflict_kernel(x_ptr, y_ptr, flag_ptr, HOW: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    if HOW == "stores":
        tl.store(y_ptr + offs, tl.load(x_ptr + offs))
    elif HOW == "lanes":
        tl.store(y_ptr + pid * BLOCK + offs // 2, tl.load(x_ptr + offs))
    elif HOW == "reads":
        tl.store(y_ptr + pid * BLOCK + offs, tl.load(x_ptr + offs))
        tl.store(x_ptr + pid * BLOCK + offs, tl.load(x_ptr + pid * BLOCK + offs))
    elif HOW == "atomics":
        tl.atomic_add(flag_ptr + offs, 1)


@triton.jit
def _atomic_kernel(y_ptr, size, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + offs, 1, mask=offs < size)


@triton.jit
def _sum_and_or(x, y, x2, y2):
    return x + x2, y | y2


@triton.jit
def _reduce_kernel(x_ptr, y_ptr, out_ptr, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    total, either = tl.reduce((tl.load(x_ptr + at), tl.load(y_ptr + at)), AXIS, _sum_and_or)
    if AXIS is None:
        tl.store(out_ptr, total)
        tl.store(out_ptr + 1, either.to(tl.int64))
    else:
        tl.store(out_ptr + tl.arange(0, N if AXIS == 0 else M) * 2, total)
        tl.store(out_ptr + tl.arange(0, N if AXIS == 0 else M) * 2 + 1, either.to(tl.int64))


@triton.jit
def _larger(x, y):
    if x > y:
        y = x
    return y


@triton.jit
def _larger_kernel(x_ptr, out_ptr, AXIS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    found = tl.reduce(x, AXIS, _larger)
    if AXIS is None:
        tl.store(out_ptr, found)
    else:
        tl.store(out_ptr + tl.arange(0, N if AXIS == 0 else M), found)


@triton.jit
def _between_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), ((x > -1.0) & (x <= 1.0)).to(tl.int32))


def _bf16_patterns():
    """Every bf16 value with every kind of tail a rounding can meet, and 2^20 random float32 patterns."""
    high = torch.arange(2**16, dtype=torch.int64) << 16
    tails = torch.cat([high | tail for tail in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    random = torch.randint(0, 2**32, (2**20,))
    bits = torch.cat([tails, random])
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)


def _cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(triton.cdiv(x.numel(), 2**16),)](x, y, x.numel(), BLOCK=2**16)
    return y


def test_casts_are_bit_equal_to_torch():
    x = _bf16_patterns()
    assert x.numel() > 1_000_000
    y, expected = _cast(x, torch.bfloat16), x.to(torch.bfloat16)
    number = ~x.isnan()
    assert torch.equal(y[number].view(torch.int16), expected[number].view(torch.int16))
    assert y[~number].isnan().all() and not y[number].isnan().any()


def test_bf16_to_float32_is_exact():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(_cast(x, torch.float32).view(torch.int32), x.float().view(torch.int32))


def test_bf16_casts_to_and_from_other_dtypes():
    x = torch.randn(1000) * 100
    assert torch.equal(_cast(x.half(), torch.bfloat16), x.half().bfloat16())
    assert torch.equal(_cast(x.bfloat16(), torch.float16), x.bfloat16().half())
    assert torch.equal(_cast(x.int(), torch.bfloat16), x.int().bfloat16())
    assert torch.equal(_cast(x.bfloat16(), torch.int32), x.bfloat16().int())


@pytest.mark.parametrize(
    ("op", "expected"),
    [("add", torch.add), ("mul", torch.mul), ("neg", lambda x, y: -x), ("min", torch.minimum)],
    ids=["add", "mul", "neg", "min"],
)
def test_bf16_arithmetic_rounds_once(op, expected):
    x, y = torch.randn(2, 4096).bfloat16()
    out = torch.empty_like(x)
    _arithmetic_kernel[(1,)](x, y, out, x.numel(), OP=op, BLOCK=4096)
    assert torch.equal(out, expected(x, y))


def test_fma_rounds_once():
    x, y = torch.randn(2, 2048)
    z = -(x * y) * (1 + torch.randint(-2, 3, (2048,)) * 2.0**-20)  # most of the sum cancels
    triples = zip(x.tolist(), y.tolist(), z.tolist(), strict=True)
    expected = [float(Fraction(a) * Fraction(b) + Fraction(c)) for a, b, c in triples]
    for fma in (None, harness._fma_float32):
        out = torch.empty(2048)
        if fma is None:
            _fma_kernel[(1,)](x, y, z, out, BLOCK=2048)
        else:
            out = torch.from_numpy(fma(x.numpy(), y.numpy(), z.numpy()))
        # the double next to the exact value rounds as it does: 29 bits more than float32 has
        assert torch.equal(out, torch.tensor(expected, dtype=torch.float64).float())
        assert not torch.equal(out, x * y + z)


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_several_blocks_are_reduced_together(axis):
    x, y = torch.randint(-(2**40), 2**40, (8, 16)), torch.randint(0, 2, (8, 16), dtype=torch.int32)
    y[:, 3] = 0
    out = torch.zeros(1 if axis is None else x.shape[1 - axis], 2, dtype=torch.int64)
    _reduce_kernel[(1,)](x, y, out, AXIS=axis, M=8, N=16)
    sums, either = (x.sum(), y.amax()) if axis is None else (x.sum(axis), y.amax(axis))
    assert torch.equal(out, torch.stack([sums, either.long()], -1).view_as(out))


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_a_reduction_of_one_block_may_branch(axis):
    x = torch.randint(-1000, 1000, (4, 8))
    out = torch.zeros(1 if axis is None else x.shape[1 - axis], dtype=torch.int64)
    _larger_kernel[(1,)](x, out, AXIS=axis, M=4, N=8)
    assert torch.equal(out, x.amax().view(1) if axis is None else x.amax(axis))


def test_comparisons_of_bf16_are_logical():
    x = torch.linspace(-2, 2, 64).bfloat16()
    out = torch.zeros(64, dtype=torch.int32)
    _between_kernel[(1,)](x, out, BLOCK=64)
    assert torch.equal(out, ((x > -1) & (x <= 1)).int()) and out.any() and not out.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fixed", [False, True], ids=["matmul", "fixed_order"])
def test_dot_is_right(dtype, fixed):
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 16).to(dtype)
    c = torch.empty(32, 16)
    with fixed_order_dot() if fixed else contextlib.nullcontext():
        _dot_kernel[(1,)](a, b, c, M=32, N=16, K=64)
    assert_close(c, 1 + a.double() @ b.double(), terms=64)


def test_fixed_order_dot_is_the_sum_over_k_in_order():
    a, b = torch.randn(16, 256).bfloat16(), torch.randn(256, 32).bfloat16()
    c, expected = torch.empty(16, 32), torch.ones(16, 32)
    for k in range(256):
        expected += a[:, k, None].float() * b[None, k].float()
    with fixed_order_dot():
        _dot_kernel[(1,)](a, b, c, M=16, N=32, K=256)
    assert torch.equal(c, expected)


def test_without_the_shim_bf16_is_wrong():
    """If this fails, triton has repaired its interpreter: see whether the shim is still needed."""
    harness.uninstall_shim()
    try:
        x = torch.tensor([1.01171875])  # between two bf16 values, above the middle
        assert _cast(x, torch.bfloat16) != x.bfloat16()
        a, c = torch.ones(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
        _dot_kernel[(1,)](a, a, c, M=16, N=16, K=16)
        assert not torch.equal(c, torch.full((16, 16), 17.0))
    finally:
        harness.install_shim()


def test_missing_internals_are_an_error(monkeypatch):
    harness.uninstall_shim()
    try:
        with monkeypatch.context() as patch:
            patch.delattr(harness.interpreter.InterpreterBuilder, "create_dot")
            with pytest.raises(RuntimeError, match="InterpreterBuilder.create_dot"):
                harness.install_shim()
    finally:
        harness.install_shim()


def test_launches_from_threads_do_not_disturb_each_other():
    xs = [torch.randn(4096) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        outs = list(threads.map(lambda x: [_cast(x, torch.bfloat16) for _ in range(5)], xs))
    assert all(torch.equal(y, x.bfloat16()) for x, out in zip(xs, outs, strict=True) for y in out)


def _copy(x, y, *, size=None, shift=0, load_mask=True, store_mask=True):
    size = y.numel() if size is None else size
    _copy_kernel[(triton.cdiv(size, 32),)](x, y, size, shift, LOAD_MASK=load_mask, STORE_MASK=store_mask, BLOCK=32)


def test_checked_counts_every_lane():
    x, y = torch.randn(100), torch.empty(100)
    with checked() as report:
        _copy(x, y)
    assert (report.launches, report.programs, report.loaded, report.stored) == (1, 4, 100, 100)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_mask": False}, r"program \(3, 0, 0\): load outside x_ptr .* offset 100 .*: 28 of 32"),
        ({"store_mask": False}, r"program \(3, 0, 0\): store outside y_ptr .* offset 100 .*: 28 of 32"),
        ({"shift": 1}, "load outside x_ptr .* offset 100 .*: 1 of 4"),
        ({"shift": -1}, "load outside x_ptr .* offset -1 .*: 1 of 32"),
    ],
    ids=["load", "store", "past_the_end", "before_the_start"],
)
def test_checked_catches_lanes_outside(arguments, message):
    storage = torch.zeros(3, 256)  # the bad lanes are sound memory, and even other tensors of the launch
    with checked(), pytest.raises(AccessError, match=message):
        _copy(storage[1, :100], storage[2, :100], **arguments)


def test_checked_knows_which_argument_a_pointer_came_from():
    storage = torch.zeros(200)
    with checked(), pytest.raises(AccessError, match="load outside x_ptr"):
        _copy(storage[:100], storage[100:], shift=50)


def test_checked_sees_the_gaps_of_a_view():
    x, y = torch.randn(8, 32)[:, :10], torch.empty(8, 10)
    with checked():
        _copy_2d_kernel[(1,)](x, y, 8, 10, 32, BLOCK=16)
        assert torch.equal(x, y)
        with pytest.raises(AccessError, match="load outside x_ptr"):
            _copy_2d_kernel[(1,)](x, torch.empty(8, 11), 8, 11, 32, BLOCK=16)


def test_checked_covers_descriptors():
    x, y = torch.randn(40, 16), torch.empty(40, 16)
    with checked() as report:
        _descriptor_kernel[(3,)](x, y, 40, 16, 40, BLOCK=16)
        assert torch.equal(x, y) and report.loaded == report.stored == 640
        with pytest.raises(AccessError, match="store outside y_ptr"):
            _descriptor_kernel[(3,)](x, y[:39], 40, 16, 40, BLOCK=16)
        with pytest.raises(AccessError, match="load outside x_ptr"):
            _descriptor_kernel[(3,)](x[:39], y, 40, 16, 40, BLOCK=16)


def test_checked_covers_atomics():
    y = torch.zeros(10, dtype=torch.int32)
    with checked() as report:
        _atomic_kernel[(3,)](y, 10, BLOCK=16)
        assert report.updated == 30 and (y == 3).all()
        with pytest.raises(AccessError, match="atomic outside y_ptr"):
            _atomic_kernel[(3,)](y, 11, BLOCK=16)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("stores", "store of an element of y_ptr that another program of the launch has stored"),
        ("lanes", "two lanes of one store on the same element of y_ptr"),
        ("reads", "load of an element of x_ptr that another program of the launch has stored"),
    ],
)
def test_checked_catches_conflicts(how, message):
    x, y, flag = torch.zeros(64), torch.zeros(64), torch.zeros(16, dtype=torch.int32)
    with checked(races=False):
        _conflict_kernel[(4,)](x, y, flag, HOW=how, BLOCK=16)
    with checked(), pytest.raises(AccessError, match=message):
        _conflict_kernel[(4,)](x, y, flag, HOW=how, BLOCK=16)


def test_checked_catches_a_store_to_what_another_program_has_read():
    x = torch.zeros(101)
    with checked(), pytest.raises(AccessError, match="store to an element of x_ptr .* has loaded"):
        _copy_kernel[(4,)](x, x, 100, 1, LOAD_MASK=True, STORE_MASK=True, BLOCK=32)


def test_checked_lets_sound_sharing_pass():
    x, y, flag = torch.zeros(64), torch.zeros(64), torch.zeros(16, dtype=torch.int32)
    with checked():
        _conflict_kernel[(4,)](x, y, flag, HOW="atomics", BLOCK=16)
    assert (flag == 4).all()


def test_checked_leaves_nothing_behind():
    x, y = torch.zeros(256), torch.empty(256)
    with checked():
        pass
    _copy(x[:100], y[:100], load_mask=False, store_mask=False)


def test_kernel_memory_fixture_is_active(kernel_memory):
    _copy(torch.zeros(100), torch.empty(100))
    assert kernel_memory.active and kernel_memory.lanes == 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8], ids=str)
def test_guard_bands_catch_stores_outside(dtype):
    guards = GuardedBuffers()
    x = guards.copy(torch.ones(200).to(dtype))
    y = guards.empty((100,), dtype)
    assert y.data_ptr() % 16 == 0
    _copy(x, y)
    guards.assert_intact()
    guards.assert_written(y)
    _copy(x, y, store_mask=False)
    with pytest.raises(AssertionError, match="28 elements after it were overwritten, the nearest 1 away"):
        guards.assert_intact()


def test_guard_bands_catch_stores_before_the_start():
    guards = GuardedBuffers()
    y = guards.empty((4, 8), torch.bfloat16, name="y")
    torch.as_strided(y, (1,), (1,), y.storage_offset() - 3).fill_(0)
    with pytest.raises(AssertionError, match=r"y \(4, 8\): 1 elements before it were overwritten, the nearest 3 away"):
        guards.assert_intact()


def test_poison_copied_over_poison_is_seen():
    """An unmasked copy moves one buffer's band over the other's: equal poison would hide it."""
    guards = GuardedBuffers()
    x, y = guards.empty((100,)), guards.empty((100,))
    _copy(x, y, load_mask=False, store_mask=False)
    with pytest.raises(AssertionError, match="28 elements after it"):
        guards.assert_intact()


def test_unwritten_outputs_are_seen():
    guards = GuardedBuffers()
    x, y = guards.copy(torch.zeros(10, 20).t()), guards.empty((100,))
    assert x.stride() == (1, 20) and not x.isnan().any() and y.isnan().all()
    _copy(torch.zeros(100), y, size=99)
    with pytest.raises(AssertionError, match=r"1 elements never written, \[99\]"):
        guards.assert_written(y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_poison_is_nan_and_distinct(dtype):
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[torch.empty((), dtype=dtype).element_size()]
    patterns = {poison_bits(dtype, serial) for serial in range(60)}
    assert len(patterns) == 60
    assert torch.tensor(sorted(patterns), dtype=ints).view(dtype).isnan().all()


def test_allocations_are_guarded_for_the_named_packages_alone():
    with guarded_allocations(packages=(__name__,)) as buffers:
        like = torch.zeros(3, 5, dtype=torch.float16)
        made = [torch.empty(4, 2), torch.empty_like(like.t()), like.new_empty(7), torch.empty_strided((2, 2), (1, 8))]
        assert len(buffers) == 4 and all(t.isnan().all() for t in made)
        assert made[1].shape == (5, 3) and made[1].dtype == torch.float16
    with guarded_allocations() as buffers:
        torch.empty(4)
        assert len(buffers) == 0
    with pytest.raises(AssertionError, match="overwritten"), guarded_allocations(packages=(__name__,)):
        _copy(torch.zeros(200), torch.empty(100), store_mask=False)
    assert torch.empty.__name__ == "empty"


@pytest.mark.parametrize("first, places, message", [
    (8, [4, 5, 6, 7, 0, 1, 2, 3], None),
    (12, [4, 5, 6, 7, 0, 1, 2, 3], "multiple_of: 12 is no multiple of 8"),
    (8, [4, 5, 6, 7, 0, 2, 1, 3], "max_contiguous: dimension 0 has no runs of 4 neighbours"),
])  # fmt: skip
def test_hints_of_a_kernel_have_to_be_so(first, places, message):
    """A compiler believes them, so what the interpreter computes without them proves nothing."""
    x, y = torch.arange(24.0), torch.zeros(8)
    error = harness.interpreter.InterpreterError
    expected = contextlib.nullcontext() if message is None else pytest.raises(error, match=message)
    with checked(), expected:
        _hint_kernel[(1,)](x, y, torch.tensor(places), first, BLOCK=8)
    assert message or torch.equal(y[torch.tensor(places)], x[first : first + 8])
