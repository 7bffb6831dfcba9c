"""The C loops: the bits of torch and of the reference, and what happens where they cannot be had."""

import itertools
import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import fused_lora
from fused_lora import reference
from fused_lora.ops import native
from fused_lora.ops.grouped import loops, tiles
from fused_lora.ops.grouped.op import RowLayout, Terms, lora_grouped_
from fused_lora.ops.merge import blocks
from fused_lora.ops.merge import op as merging
from fused_lora.ops.merge.blocks import Factors
from fused_lora.ops.merge.delta import chain
from fused_lora.reference import bits
from helpers.merges import unit_by_unit
from helpers.seeds import shifted
from helpers.thorough import pairwise

DTYPES = list(native.TYPES)
SHAPES = [(1, 1), (7, 9), (64, 64), (130, 1021), (33, 2048), (2, 5000), (40, 4097), (9000, 1)]
ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(not native.usable(), reason=native.describe())
VARIANTS = [1, 2] if platform.machine() == "x86_64" else [0]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(shifted(5))


def weight(shape, dtype):
    """Normal numbers, and every awkward one that a merge keeps finite or leaves alone."""
    W = torch.randn(shape, dtype=torch.float64) * 0.02
    awkward = [0.0, -0.0, 1e-40, -1e-40, 6e-8, -6e-8, 3e-5, 3e4, float("inf"), -float("inf"), float("nan")]
    W.view(-1)[: len(awkward)] = torch.tensor(awkward, dtype=W.dtype)[: W.numel()]
    return W.to(dtype)


def factors(shape, r, scale, dtype=torch.float32):
    left, right = torch.randn(shape[0], r).to(dtype), torch.randn(r, shape[1]).to(dtype)
    return Factors(left * scale, right)


def exact_chain(left, right):
    """left @ right in the order of k by fused multiply-adds, in integers of any size."""
    from fractions import Fraction

    total = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for i, j in np.ndindex(total.shape):
        for k in range(left.shape[1]):
            whole = Fraction(float(left[i, k])) * Fraction(float(right[k, j])) + Fraction(float(total[i, j]))
            total[i, j] = nearest(whole)
    return total


def nearest(value):
    """The fp32 number that is nearest, ties to even; near it because a float64 is."""
    guess = np.float32(float(value))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda x: (abs(type(value)(float(x)) - value), int(x.view(np.int32)) & 1))


def test_the_delta_is_a_chain_of_fused_multiply_adds():
    left, right = torch.randn(12, 20), torch.randn(20, 13)
    right[:, 3] *= 2.0**-140  # subnormal sums
    left[5, 1:] = 2.0**-30 * (1 + torch.arange(19) * 2.0**-20)  # sums beside a tie: rounded twice, they go wrong
    left[5, 0], right[0] = 1.0, 1 + 2.0**-23
    assert np.array_equal(chain(left, right).numpy(), exact_chain(left.numpy(), right.numpy()))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sum_that_fp64_rounds_to_a_tie(sign):
    """1 + 2^-24 is the middle between two fp32 numbers; a bit of 2^-60 more or less decides, and fp64 has no room."""
    left = torch.tensor([[1.0, 1.0, sign * 2.0**-30]])
    right = torch.tensor([[1 + 2.0**-23], [2.0**-24], [2.0**-30]])
    tie = (
        torch.tensor([[1.0, 2.0**-12 * (1 + sign * 2.0**-23)]]),
        torch.tensor([[1 + 2.0**-23], [2.0**-12 * (1 + 2.0**-23)]]),
    )
    for a, b in ((left, right), tie):
        assert np.array_equal(chain(a, b).numpy(), exact_chain(a.numpy(), b.numpy()))


@built
@pairwise(
    shape=SHAPES,
    how=[(0.0, False), (1e-6, False), (1e-4, False), (0.02, False), (1e-4, True)],
    dtype=DTYPES,
    variant=VARIANTS,
)
def test_c_and_torch_make_the_same_record_and_bits(shape, how, dtype, variant, monkeypatch):
    if variant > native.variant():
        pytest.skip("this processor has not these instructions")
    monkeypatch.setattr(native, "variant", lambda: variant)
    scale, scaled = how
    before, ours, rows = weight(shape, dtype), factors(shape, 3, scale), torch.ones(shape[0])
    if scaled:
        rows = torch.rand(shape[0]) * 0.5 + 0.5
        ours = ours._replace(scales=blocks.Scales.of_rows(rows, shape[1]))
    guarded = torch.full((shape[0] + 2, shape[1] + 3), 7.0, dtype=dtype)
    in_c, in_torch = guarded[1:-1, 2:-1].copy_(before), before.clone()
    found, expected = blocks.merge(in_c, ours, blocks._InC), blocks.merge(in_torch, ours, blocks._InTorch)
    delta = chain(ours.left, ours.right)
    exact = (before.float() * rows[:, None] + delta).to(dtype)
    numbers = ~before.isnan()
    assert torch.equal(bits(in_torch)[numbers], bits(exact)[numbers])
    assert torch.equal(bits(in_c.contiguous()), bits(in_torch))
    for units, other in ((found, expected), (expected, found)):
        assert torch.equal(units.notes[::2], other.notes[::2])
    assert torch.equal(unit_by_unit(found), unit_by_unit(expected))
    blocks.restoring(in_c, ours, expected, blocks._InC).alone(native.UNMERGE)
    blocks.restoring(in_torch, ours, found, blocks._InTorch).alone(native.UNMERGE)
    assert torch.equal(bits(in_c.contiguous()), bits(before)) and torch.equal(bits(in_torch), bits(before))
    guarded[1:-1, 2:-1] = 7.0
    assert (guarded == 7).all()


@built
@pytest.mark.parametrize("r", [1, 7, 16, 33, 100])
def test_any_rank(r):
    ours = factors((45, 331), r, 0.01)
    before = weight((45, 331), torch.float32)
    in_c, in_torch = before.clone(), before.clone()
    found, expected = blocks.merge(in_c, ours, blocks._InC), blocks.merge(in_torch, ours, blocks._InTorch)
    assert torch.equal(bits(in_c), bits(in_torch)) and torch.equal(unit_by_unit(found), unit_by_unit(expected))
    blocks.restoring(in_c, ours, found, blocks._InC).alone(native.UNMERGE)
    assert torch.equal(bits(in_c), bits(before))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 64, 129])
def test_a_weight_that_is_not_finite_stays_under_any_delta(columns, dtype):
    """What C notes is undone by torch and the other way round, though NaNs of arithmetic have many bits."""
    W = torch.tensor([float("inf"), -float("inf"), float("nan")]).to(dtype).repeat(4)[:, None].repeat(1, columns)
    bits(W)[2] |= 1
    wrong = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7F800000, -(1 << 23)], dtype=torch.int32)
    left = wrong.view(torch.float32).repeat(2)[:, None]
    W, left = torch.cat([W, torch.full((1, columns), 3.0, dtype=dtype)]), torch.cat([left, torch.zeros(1, 1)])
    ours = Factors(left.contiguous(), torch.ones(1, columns))
    found = []
    for kind, other in ((blocks._InC, blocks._InTorch), (blocks._InTorch, blocks._InC)):
        merged = W.clone()
        found.append(blocks.merge(merged, ours, kind))
        assert torch.equal(bits(merged), bits(W))
        blocks.restoring(merged, ours, found[-1], other).alone(native.UNMERGE)
        assert torch.equal(bits(merged), bits(W))
    assert torch.equal(found[0].notes[::2], found[1].notes[::2])
    with pytest.raises(ValueError, match="NaNs or infinities"):
        blocks.merge(W, ours._replace(left=left.roll(1, 0)))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_16_bits_is_rounded_as_torch_does(dtype):
    """All of them as weights, each moved by a few parts of its spacing."""
    if dtype.itemsize != 2:
        pytest.skip("fp32 is not rounded")
    W = torch.arange(1 << 16).to(torch.uint16).view(dtype).reshape(256, 256)
    W = torch.where(W.isfinite() & (W.abs() < torch.finfo(dtype).max / 2), W, 0.0)
    step = torch.finfo(dtype).eps * W.float().abs() + 2.0**-25
    for part in (0.26, 0.5, 0.74, 1.0, 1.5):
        ours = Factors((step * part).contiguous(), torch.eye(256))  # D is step * part
        in_c, in_torch = W.clone(), W.clone()
        blocks.merge(in_c, ours, blocks._InC)
        blocks.merge(in_torch, ours, blocks._InTorch)
        assert torch.equal(bits(in_c), bits(in_torch))


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merge_is_the_same_in_any_number_of_threads(dtype):
    before, ours, threads, found = (
        weight((301, 1501), dtype),
        factors((301, 1501), 5, 1e-4),
        torch.get_num_threads(),
        [],
    )
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            W = before.clone()
            units = blocks.merge(W, ours)
            found.append((bits(W).clone(), units.notes[2], unit_by_unit(units)))
            torch.set_num_threads(5 - n)
            blocks.restoring(W, ours, units).alone(native.UNMERGE)
            assert torch.equal(bits(W), bits(before))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


OTHER = "-O1 -ffp-contract=off -mfma"  # the code of other processors that have a fused multiply-add
OPTIONS = ["-O0", OTHER, "-O2 -ffp-contract=off", "-O3 -ffp-contract=off -march=native"]


@built
@pytest.mark.parametrize("options", [*OPTIONS[:2], *(pytest.param(o, marks=pytest.mark.thorough) for o in OPTIONS[2:])])
def test_any_options_of_the_compiler_give_the_same_bits(options, fresh, tmp_path, monkeypatch):
    compiler, source = shutil.which("cc") or shutil.which("gcc"), (ROOT / "csrc/cpu_loops.c").read_text()
    if compiler is None or (options == OTHER and platform.machine() != "x86_64"):
        pytest.skip("needs a C compiler, and x86-64 to stand for what is not")
    if options == OTHER:
        source = source.replace("__x86_64__", "NOT_HERE")
    command = [
        compiler,
        *options.split(),
        *"-std=gnu11 -fPIC -shared -x c - -lm -o".split(),
        str(tmp_path / "loops.so"),
    ]
    subprocess.run(command, input=source, text=True, check=True)
    library = native.ctypes.CDLL(str(tmp_path / "loops.so"))
    monkeypatch.setattr(native, "_loaded", lambda: (library, "built here"))
    monkeypatch.setattr(native, "variant", library.fused_lora_variant)
    assert (native.variant() == 0) == (options == OTHER)
    assert native.usable() and blocks._agree() and loops._agree()
    for dtype in DTYPES:
        before, ours = weight((70, 333), dtype), factors((70, 333), 3, 1e-3)
        in_c, in_torch = before.clone(), before.clone()
        found, _ = blocks.merge(in_c, ours, blocks._InC), blocks.merge(in_torch, ours, blocks._InTorch)
        assert torch.equal(bits(in_c), bits(in_torch))
        blocks.restoring(in_c, ours, found, blocks._InC).alone(native.UNMERGE)
        assert torch.equal(bits(in_c), bits(before))


DAMAGES = {
    "counts": lambda units: units.notes[0].fill_(1 << 50),
    "negative counts": lambda units: units.notes[0].fill_(-1),
    "fewer counts": lambda units: units.notes[0].sub_(1),
    "starts": lambda units: units.notes[1].fill_(1 << 50),
    "starts that overflow": lambda units: (units.notes[1].fill_(2**63 - 1), units.notes[0].fill_(1)),
    "advances": lambda units: units.corrections[:, 0].fill_(255),
    "no advances": lambda units: units.corrections[:, 0].fill_(0),
    "other values": lambda units: units.corrections[:, 1].bitwise_xor_(1),
    "no corrections": lambda units: setattr(units, "corrections", units.corrections[:0]),
    "other corrections": lambda units: setattr(units, "corrections", units.corrections.to(torch.int16)),
    "no height": lambda units: setattr(units, "height", 0),
    "negative sizes": lambda units: (setattr(units, "height", -40), setattr(units, "width", -300)),
    "narrow": lambda units: setattr(units, "width", 150),
    "too wide": lambda units: setattr(units, "width", 5000),
    "too high": lambda units: setattr(units, "height", 1000),
    "checksums": lambda units: setattr(units, "notes", units.notes[:, :-1]),
    "other checksums": lambda units: units.notes[2].add_(1),
}


@pytest.mark.parametrize("with_loops", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_refused(damage, with_loops, monkeypatch):
    W, ours = torch.randn(40, 300), factors((40, 300), 3, 0.001)
    units = blocks.merge(W, ours)
    merged = W.clone()
    assert len(units.corrections)
    DAMAGES[damage](units)
    if not with_loops:
        monkeypatch.setattr(native, "usable", lambda: False)
    with pytest.raises(RuntimeError, match="not what the merge left"):
        blocks.restoring(W, ours, units).alone(native.UNMERGE)
    assert torch.equal(bits(W), bits(merged))


@pytest.mark.parametrize("dense", [False, True])
def test_a_failure_among_many_units(dense):
    W, ours, threads = torch.randn(600, 1024), factors((600, 1024), 2, 0.001), torch.get_num_threads()
    before = W.clone()
    torch.set_num_threads(8)
    try:
        for _ in range(3):
            units = blocks.merge(W, ours._replace(left=ours.left * 1e9) if dense else ours)
            assert (units.copy is not None) == dense
            kept, changed = W.clone(), W
            changed[-1, -1] += 1
            with pytest.raises(RuntimeError, match="not what the merge left"):
                blocks.restoring(changed, ours, units).alone(native.UNMERGE)
            assert torch.equal(changed[:-1], kept[:-1])
            changed[-1, -1] = kept[-1, -1]
            blocks.restoring(W, ours._replace(left=ours.left * 1e9) if dense else ours, units).alone(native.UNMERGE)
            assert torch.equal(bits(W), bits(before))
    finally:
        torch.set_num_threads(threads)


@built
@pytest.mark.parametrize("mode", [native.MERGE, native.UNMERGE])
def test_a_weight_that_changes_meanwhile_is_said_to_be_torn(mode, monkeypatch):
    W, ours, run = torch.randn(600, 700), factors((600, 700), 3, 0.001), native.run
    units = blocks.merge(W, ours) if mode == native.UNMERGE else None
    monkeypatch.setattr(native, "run", lambda works, what: run(works, what) and 0 or native.TORN)
    with pytest.raises(RuntimeError, match="weight.*partly merged"):
        blocks.merge(W, ours) if units is None else blocks.restoring(W, ours, units).alone(native.UNMERGE)


def test_a_record_survives_a_file_and_a_layout():
    W, A, B = torch.randn(70, 333), torch.randn(3, 333), torch.randn(70, 3) * 0.01
    before = W.clone()
    record = pickle.loads(pickle.dumps(merging.merge_(W, [A], [B], [1.0])))
    assert record.nbytes < 0.5 * W.nbytes and len(pickle.dumps(record)) < 0.6 * W.nbytes
    W = W.t().contiguous().t()
    merging.unmerge_(W, record)
    assert torch.equal(bits(W.contiguous()), bits(before))


@pytest.mark.parametrize("variant", ["plain_avx2", "plain_avx512", "scaled_avx2", "scaled_avx512"])
def test_the_sums_are_vectorised(variant):
    """Where the compiler no longer does it, a merge takes several times as long and no number changes."""
    if not native.LIBRARY.exists() or platform.machine() != "x86_64" or not shutil.which("objdump"):
        pytest.skip("needs the loops of x86-64 and objdump")
    command = ["objdump", "-d", "--no-show-raw-insn", f"--disassemble={variant}", str(native.LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\bvfn?m(?:add|sub)\d+([ps])s\b", text)) == {"p"}


def test_no_rank_at_all():
    W = torch.randn(30, 40)
    before = W.clone()
    record = merging.merge_(W, [torch.empty(0, 40)], [torch.empty(30, 0)], [1.0])
    assert torch.equal(W, before)
    merging.unmerge_(W, record)
    assert torch.equal(W, before)


@built
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize(
    "dtype, shape, rank",
    [(torch.float32, (512, 520), 16), (torch.bfloat16, (1000, 777), 16), (torch.bfloat16, (725, 725), 8)],
    ids=str,
)
def test_a_merge_takes_a_tenth_of_the_weight(dtype, shape, rank):
    """From 1 MiB on: what the process holds at most during a merge and its record, beyond before."""
    code = (
        "import ctypes, torch\n"
        "from fused_lora.ops.merge.op import merge_, unmerge_\n"
        f"(N, K), dtype, r = {shape}, {dtype}, {rank}\n"
        "W, A, B = torch.randn(N, K).to(dtype), torch.randn(r, K), torch.randn(N, r) * 0.01 / r**0.5\n"
        "def status(name):\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024\n"
        "def extra():\n"
        "    ctypes.CDLL(None).malloc_trim(0)\n"
        "    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    before = status('VmRSS')\n"
        "    record = merge_(W, [A], [B], [1.0])\n"
        "    found = status('VmHWM') - before\n"
        "    unmerge_(W, record)\n"
        "    return found\n"
        # the least: on a busy machine a thread may get its first unit, and touch its stack, in any of them
        "extra = min(extra() for _ in range(8))\n"
        # whole pages are counted, and each of the arrays of a record ends inside of one
        "assert extra <= 0.1 * W.nbytes + 4 * 4096, extra / W.nbytes\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_threads_that_flush_subnormal_numbers_change_nothing():
    """torch.set_flush_denormal is a setting of one thread, which those that it starts inherit."""
    code = (
        "import torch\n"
        "from fused_lora.ops import native\n"
        "from fused_lora.ops.merge import blocks\n"
        "from fused_lora.reference import bits\n"
        "torch.manual_seed(0)\n"
        "torch.set_num_threads(3)\n"
        "left, right = torch.rand(600, 1) * 1e-39, torch.ones(1, 700)\n"
        "ours = blocks.Factors(left, right)\n"
        "W, merged, masked = torch.rand(600, 700) * 1e-38, set(), set()\n"
        "assert native.usable() and torch.set_flush_denormal(True)\n"
        "torch.rand(1000, 1000) + 1\n"
        "for mine in (False, True):\n"
        "    torch.set_flush_denormal(mine)\n"
        "    for _ in range(5):\n"
        "        now = W.clone()\n"
        "        units = blocks.merge(now, ours)\n"
        "        merged.add(now.numpy().tobytes())\n"
        "        blocks.restoring(now, ours, units).alone(native.UNMERGE)\n"
        "        assert torch.equal(bits(now), bits(W))\n"
        "        masked.add(native.products(1, 0, W, right, left, (False, True, False))[1].numpy().tobytes())\n"
        "assert len(masked) == len(merged) == 1\n"
    )
    if not native.usable():
        pytest.skip(native.describe())
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("setting", ["torch.set_default_device('meta')", "torch.set_default_dtype(torch.float64)"])
def test_defaults_of_torch_change_nothing(setting):
    code = (
        f"import torch, fused_lora; {setting}\n"
        "from fused_lora.ops.merge import op\n"
        "for N, K in (80, 900), (1100, 1000):  # the corrections of large weights have other memory\n"
        "    shapes = (N, K), (2, K), (N, 2)\n"
        "    W, A, B = (torch.ones(s, device='cpu', dtype=torch.float32) / 3 for s in shapes)\n"
        "    before = W.clone()\n"
        "    record = op.merge_(W, [A], [B], [0.1])\n"
        "    assert not torch.equal(W, before)\n"
        "    op.unmerge_(W, record)\n"
        "    assert torch.equal(W, before)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300)


def exit_code_of(child):
    """Of a forked process that runs ``child``; None where that does not end."""
    process = torch.multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    return code


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("size", [300, 3000])
def test_a_forked_child_merges(size):
    """OpenMP would wait for the parent's threads."""
    W, A, B = torch.randn(size, size), torch.randn(20, size), torch.randn(size, 20) * 0.01
    before, threads = W.numpy().copy(), torch.get_num_threads()

    def child():
        record = merging.merge_(W, [A], [B], [1.0])
        changed = not np.array_equal(W.numpy(), before)
        merging.unmerge_(W, record)
        same = np.array_equal(masked(11).numpy(), lanes) if native.usable() else True
        os._exit(0 if changed and same and np.array_equal(W.numpy(), before) and torch.get_num_threads() == 2 else 1)

    lanes = (reference.dropout_lanes(11, 0, 60, 1003)[:, :1003] >= -20000).float().numpy()
    torch.set_num_threads(2)
    try:
        merging.unmerge_(W, merging.merge_(W, [A], [B], [1.0]))
        assert exit_code_of(child) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_forked_child_goes_back_from_a_refused_switch(dtype):
    """Torch writes a weight back that C did not take, or that a merge kept as a copy."""
    A, B = torch.randn(2, 300), torch.randn(1000, 2) * 100
    W, threads = torch.randn(1000, 300).to(dtype), torch.get_num_threads()
    record = merging.merge_(W, [A], [B], [1.0])
    merged, broken, rows = W.view(torch.uint8).numpy().copy(), B.clone(), np.ones(1000, np.float32)
    broken[-1] = float("inf")

    def child():
        try:
            merging.switch_(W, record, [A], [broken], [1.0], torch.from_numpy(rows))
        except ValueError:
            os._exit(not np.array_equal(W.view(torch.uint8).numpy(), merged))
        os._exit(1)

    torch.set_num_threads(2)
    try:
        W.clone()  # starts torch's threads
        assert exit_code_of(child) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_switches_rows_that_take_threads_to_look_at():
    W, A, B = torch.randn(100_000, 2), torch.randn(1, 2), torch.randn(100_000, 1)
    rows, threads = torch.rand(100_000) + 0.5, torch.get_num_threads()
    record = merging.merge_(W, [A], [B], [1.0])

    def child():
        merging.switch_(W, record, [A], [B], [1.0], rows)
        os._exit(0)

    torch.set_num_threads(2)
    try:
        W.clone()
        assert exit_code_of(child) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_forked_child_is_the_first_to_add_terms(dtype):
    """By C, which is tried with torch before, and by torch."""
    x, y, threads = torch.ones(600, 256, dtype=dtype), torch.zeros(600, 512, dtype=dtype), torch.get_num_threads()
    terms = Terms({0: [(torch.ones(8, 256).t(), torch.ones(8, 512), 1.0)]})

    def child():
        lora_grouped_(y, x, RowLayout(np.zeros(600, np.int64), torch.device("cpu")), terms)
        os._exit(not (y.numpy() == 8 * 256).all())

    torch.set_num_threads(2)
    loops._agree.cache_clear()
    tiles.height_of.cache_clear()
    try:
        torch.mm(y.t(), x)  # starts torch's threads
        assert exit_code_of(child) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_merges_a_model():
    """Rows that are sampled, and a fidelity, are large enough for threads of torch."""
    net, threads = torch.nn.Sequential(torch.nn.Linear(8192, 16, dtype=torch.bfloat16)), torch.get_num_threads()
    fused_lora.inject(net, fused_lora.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))

    def merges():
        fused_lora.merge(net)
        fused_lora.delta_fidelity(net)
        fused_lora.unmerge(net)

    def child():
        merges()
        os._exit(0)

    torch.set_num_threads(2)
    try:
        merges()
        assert exit_code_of(child) == 0
    finally:
        torch.set_num_threads(threads)


def small(*shape):
    """Integers whose sums of products are exact."""
    return np.random.default_rng(shifted(sum(shape))).integers(-3, 4, shape).astype(np.float32)


@built
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("p", [0.1, 0.9])
@pytest.mark.parametrize(
    "M, K, r", [(1, 1, 1), (3, 16, 2), (7, 33, 5), (147, 1001, 3), (2, 3000, 40), (300, 1030, 33), (3, 0, 2), (0, 9, 2)]
)
def test_products_are_those_with_the_mask_of_the_reference(M, K, r, p, variant, monkeypatch):
    if variant > native.variant():
        pytest.skip("this processor has not these instructions")
    monkeypatch.setattr(native, "variant", lambda: variant)
    seed, cut = -(2**63) + 12345, reference.dropout_threshold(p) - 32768
    x, A, dS = small(M, K), small(r, K), small(M, r)
    x.reshape(-1)[:1] = -np.inf  # dropped, it is a NaN, as with F.dropout
    keep = (reference.dropout_lanes(seed, 0, M, K)[:, :K] >= cut).numpy()
    with np.errstate(invalid="ignore"):
        kept = x * keep
        expected = kept @ A.T, keep * (dS @ A), dS.T @ kept
    tensors = [torch.from_numpy(array) for array in (x, A, dS)]
    for wanted in itertools.product((False, True), repeat=3):
        for ours, theirs, needed in zip(native.products(seed, cut, *tensors, wanted), expected, wanted, strict=True):
            assert np.array_equal(ours, theirs, equal_nan=True) if needed else ours is None
    assert np.array_equal(
        native.products(seed, cut, tensors[0], None, None, (False, True, False))[1], kept, equal_nan=True
    )


def masked(seed):
    """ones * mask of enough elements for all threads."""
    # numpy fills them: torch would in threads that a forked child has not
    x, A, dS = (torch.from_numpy(np.ones(size, np.float32)) for size in [(60, 1003), (1, 1003), (60, 1)])
    return native.products(seed, -20000, x, A, dS, (False, True, False))[1]


@built
def test_masks_are_drawn_beside_each_other_and_in_any_number_of_threads():
    expected = (reference.dropout_lanes(11, 0, 60, 1003)[:, :1003] >= -20000).float()
    x, A, dS = (torch.from_numpy(small(*shape)) / 3 for shape in [(300, 2050), (5, 2050), (300, 5)])
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            assert torch.equal(masked(11), expected)
            products = native.products(5, -20000, x, A, dS, (True, True, True))
            found.add(tuple(t.numpy().tobytes() for t in products))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
    fewer = native.products(5, -20000, x[:33], A, dS[:33], (True, True, False))
    assert torch.equal(fewer[0], products[0][:33]) and torch.equal(fewer[1], products[1][:33])
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(masked, [11] * 40))


@built
def test_what_is_not_fp32_is_left_to_torch():
    x, A, dS = (torch.from_numpy(small(*shape)) for shape in [(40, 20), (3, 40), (20, 3)])
    expected = native.products(1, 0, x.t().contiguous(), A, dS, (True, True, True))
    found = native.products(1, 0, x.t(), A, dS, (True, True, True))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert native.products(1, 0, x.t().bfloat16(), A, dS, (True, False, False)) is None
    assert native.products(1, 0, x.t(), A.double(), dS, (True, False, False)) is None


@pytest.fixture
def fresh(monkeypatch):
    """Nothing loaded, compared or rejected yet."""
    caches = native._loaded, native._products_agree, blocks._agree, loops._agree
    monkeypatch.setattr(native, "_rejected", [])
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@built
@pytest.mark.parametrize("name", ["_run_products", "run"])
def test_loops_that_compute_something_else_are_not_used(name, fresh, monkeypatch):
    right = getattr(native, name)

    def wrong(*arguments):
        result = right(*arguments)
        if name == "_run_products":
            result[1][3, 5] += 1
        else:
            native.ctypes.c_int64.from_address(arguments[0][0].checksums).value += 1
        return result

    W, A, B = torch.randn(40, 50), torch.randn(2, 50), torch.randn(40, 2)
    with monkeypatch.context() as patch:
        patch.setattr(native, name, wrong)
        with pytest.warns(UserWarning, match="C loops are not used.*differ|C loops are not used.*not what"):
            record = merging.merge_(W.clone(), [A], [B], [0.01])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.usable() and native.describe().startswith("plain torch: ")
        changed = W.clone()
        assert torch.equal(merging.merge_(changed, [A], [B], [0.01]).units.corrections, record.units.corrections)


@pytest.mark.parametrize("content", [None, b"not a library"], ids=["missing", "broken"])
def test_a_library_that_cannot_be_had(content, fresh, monkeypatch, tmp_path):
    library = tmp_path / "_cpu_loops.so"
    if content:
        library.write_bytes(content)
    monkeypatch.setattr(native, "LIBRARY", library)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not native.usable()
    assert native.describe().startswith(
        "plain torch: " + ("_cpu_loops.so cannot" if content else "the package was built")
    )
    W, A, B = torch.randn(40, 50), torch.randn(2, 50), torch.randn(40, 2)
    before = W.clone()
    merging.unmerge_(W, merging.merge_(W, [A], [B], [0.01]))
    assert torch.equal(W, before)


@pytest.mark.skipif(not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler here")
def test_this_checkout_is_built():
    assert native.LIBRARY.exists(), "as make test does: python setup.py build_ext --inplace"


@pytest.mark.parametrize("compiler", ["false", None], ids=["without a compiler", "with one"])
def test_the_package_is_built(compiler, tmp_path):
    """A build without a compiler succeeds, and lacks the library."""
    if compiler is None and not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("no C compiler here")
    for folder in ("fused_lora/ops", "kernels", "csrc"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "csrc/cpu_loops.c").write_text("int anything;")  # the loops themselves take half a minute
    for name in ("setup.py", "README.md", "fused_lora/_version.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    environment = os.environ | ({"CC": compiler} if compiler else {})
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "fused_lora/ops/_cpu_loops.so").exists() == (compiler is None)
    assert ("built without its C loops" in done.stderr) == (compiler is not None)
