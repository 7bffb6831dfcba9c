"""Which tiles a launch uses: one pure function of operation, shape, dtype and chip, and the list of all it can answer.

M rows, N results a row, a contraction over K; the passes over g or x [M, N] have no K. ``r`` is the rank of the largest
adapter. ``capability`` is 10 * major + minor of an NVIDIA chip and 0 for everything else, which gets small tiles that
fit any chip. Tile sizes follow from registers and shared memory (compiled ahead of time for each chip); those of
training on sm_90 from measurements (benchmarks/bench_launches.py).

Rules that correctness rests on, not speed:
    BLOCK_K of an operand with a mask is a multiple of 8, the elements of one mask draw;
    operands converted in registers (``upcast``, ``rounds``, S and dS in the weight gradients) keep BLOCK_R below 64, so
    that no pipelined wgmma reads them (tiles.py says why).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

OPS = ("linear", "shrink", "expand", "weight_grad", "backward_g", "backward_x", "linear_4bit")
_WITHOUT_MASK = ("linear", "backward_g", "linear_4bit")  # launches that never draw one
PASS_RANKS = 32  # ranks up to which one pass over g, or x, forms both of its results
DECODE_ROWS, SHORT_ROWS = 16, 64  # rows up to which a GEMM is decode, and up to which one launch is best
ROUND_ROWS = 2048  # an estimate: above, lora_A in fp32, read for each block of rows, costs more than a 16-bit copy
SCALE_GROUP = 64  # values of a row with one scale in a 4-bit weight of any blocksize from here on, if K is a multiple
_WARPGROUP_MMA = (90, 100, 103)  # accumulators by warp groups and 228 KiB of shared memory: room for wide tiles


@dataclass(frozen=True)
class LaunchConfig:
    """Variant and tile sizes of one launch; ``tma`` asks for tensor descriptors where strides and alignment allow.

    rounds: fp32 adapters stand for ones in the 16 bits of x, as under autocast. They are rounded as they are "loaded",
    or "copied" before; their gradients stay fp32. Without, products with them are in fp32.
    late: "split" adds the term after the K loop: of one adapter whose rank fits BLOCK_R, not in fp16, whose range a
    scaled S can leave.
    """

    variant: str
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    BLOCK_R: int
    GROUP_M: int = 8
    SPLIT_K: int = 1
    num_warps: int = 4
    num_stages: int = 3
    tma: bool = False
    rounds: str = ""
    late: bool = False

    def upcasts(self, adapters: torch.dtype, x: torch.dtype) -> bool:
        """Whether products with adapters of this dtype are in fp32."""
        return adapters != x and not self.rounds

    def copied(self, x: torch.dtype) -> torch.dtype | None:
        """The dtype of the copies of adapters that a kernel reads in their place, if it does."""
        return x if self.rounds == "copied" else None

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def capability(device: torch.device) -> int:
    """10 * major + minor of an NVIDIA GPU, else 0."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors(device: torch.device) -> int:
    """Size of a persistent grid: one program per multiprocessor; 2 in the interpreter, so that they loop."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def precision(dtype: torch.dtype) -> str:
    """input_precision of the 32-bit dots of a kernel over x of ``dtype``; tiles.py says why."""
    return "ieee" if dtype == torch.float32 or torch.version.hip else "tf32x3"


def _rank_block(r: int, *sizes: int) -> int:
    """The least size that holds r, or the largest: few sizes, because each is a compilation in the first step."""
    return next((size for size in sizes if r <= size), sizes[-1])


def _split(programs: int, steps: int, wanted: int = 512, most: int = 16) -> int:
    """How many programs share a contraction of ``steps`` tiles: a power of 2, for ``wanted`` of 4 steps or more."""
    split = 1
    while split < most and programs * split * 2 <= wanted and steps >= split * 8:
        split *= 2
    return split


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _shrink(M: int, K: int, r: int, dtype: torch.dtype, dropout: bool, upcast: bool) -> LaunchConfig:
    if dtype == torch.float32:
        tile = LaunchConfig("shrink", 32, 16, 32, 32)
    else:
        BLOCK_R = 32 if upcast else _rank_block(r, 16, 32, 64, 128)
        wide = 64 if upcast or BLOCK_R > 32 else 128 if dropout or BLOCK_R > 16 else 256
        # narrow row blocks, for enough programs where rows are few and for enough warps to draw a mask
        many = dropout and M >= 8192 and BLOCK_R < 64 and not upcast
        tile = LaunchConfig("shrink", 32 if many else 16, 16, wide, BLOCK_R)
    return replace(tile, SPLIT_K=_split(_cdiv(M, tile.BLOCK_M) * _cdiv(r, tile.BLOCK_R), _cdiv(K, tile.BLOCK_K)))


def _expand(r: int, dtype: torch.dtype, upcast: bool) -> LaunchConfig:
    BLOCK_M, BLOCK_N = (32, 64) if dtype == torch.float32 or upcast else (64, 128)
    BLOCK_R = _rank_block(r, 16, 32)
    if upcast and dtype != torch.float32 and BLOCK_R == 16:
        BLOCK_N = 128  # the narrow tile spills beside a mask
    return LaunchConfig("expand", BLOCK_M, BLOCK_N, 16, BLOCK_R)


def _backward(
    op: str, M: int, C: int, r: int, dtype: torch.dtype, dropout: bool, upcast: bool, capability: int
) -> LaunchConfig:
    """Of the pass over g or x [M, C]; the expand's left operand is in registers, so BLOCK_M is below a wgmma's 64."""
    BLOCK_R = _rank_block(r, 16, 32)
    if dtype == torch.float32 or upcast:
        BLOCK_M = 16 if dtype == torch.float32 or op == "backward_x" else 32
        BLOCK_N = 32 if dtype == torch.float32 and BLOCK_R == 32 and op == "backward_g" else 64
        tile = LaunchConfig(op, BLOCK_M, BLOCK_N, 16, BLOCK_R, num_stages=2)
    elif capability not in _WARPGROUP_MMA:  # less shared memory
        tile = LaunchConfig(op, 32, 64 if dropout else 128, 16, BLOCK_R)
    elif op == "backward_g":
        tile = LaunchConfig(op, 64, 256, 16, BLOCK_R, num_warps=8, num_stages=4)
    else:
        tile = LaunchConfig(op, 32, 64 if dropout else 128, 16, BLOCK_R, num_stages=4)
    wanted = 128 if tile.num_warps == 8 else 512 if dropout else 256
    return replace(tile, SPLIT_K=_split(_cdiv(C, tile.BLOCK_N), _cdiv(M, tile.BLOCK_M), wanted, most=64))


def _weight_grad(
    M: int, N: int, K: int, r: int, dtype: torch.dtype, dropout: bool, upcast: bool, capability: int
) -> LaunchConfig:
    BLOCK_M, BLOCK_K, BLOCK_R, num_stages, wanted = 64, 32, 32, 3, 512
    if dtype != torch.float32 and not upcast and capability in _WARPGROUP_MMA:
        BLOCK_M, BLOCK_K, num_stages, wanted = 64 if dropout else 128, 64, 4, 512 if dropout else 256
    programs = (_cdiv(K, BLOCK_M) + _cdiv(N, BLOCK_M)) * _cdiv(r, BLOCK_R)
    tile = LaunchConfig("weight_grad", BLOCK_M, 16, BLOCK_K, BLOCK_R, num_stages=num_stages)
    return replace(tile, SPLIT_K=_split(programs, _cdiv(M, BLOCK_K), wanted))


def _gemm(variant: str, M: int, r: int, dtype: torch.dtype, capability: int, upcast: bool) -> LaunchConfig:
    """Tiles of "linear", without the split over K."""
    decode = M <= DECODE_ROWS and variant == "recompute"
    if dtype == torch.float32:  # products by fma, operands in registers
        BLOCK_M, BLOCK_N = (16, 32) if decode else (32, 64)
        return LaunchConfig(variant, BLOCK_M, BLOCK_N, 32, 32, num_stages=1 if decode else 2)
    if capability < 80:
        return LaunchConfig(variant, 16 if decode else 64, 64, 32, 32, num_stages=2)
    if decode:
        BLOCK_K, BLOCK_R = (32, 32) if upcast else (128, _rank_block(r, 16, 64))
        num_stages = 4 if capability in _WARPGROUP_MMA else 3
        return LaunchConfig(variant, 16, 64 if BLOCK_R == 16 else 32, BLOCK_K, BLOCK_R, num_stages=num_stages)
    if variant == "recompute":
        BLOCK_R = 32 if capability in (100, 103) else _rank_block(r, 16, 32)  # 16 spill there
        return LaunchConfig(variant, 64, 64, 64, BLOCK_R, num_stages=5 if capability in _WARPGROUP_MMA else 3)
    if capability not in _WARPGROUP_MMA:
        return LaunchConfig(variant, 64 if upcast else 128, 128, 32, 32, num_warps=8, num_stages=4)
    # the widest tile has registers for nothing but its accumulator
    BLOCK_N, num_stages = (128, 3) if upcast else (256, 4)
    return LaunchConfig(variant, 128, BLOCK_N, 64, 32, num_warps=8, num_stages=num_stages, tma=True)


def _gemm_4bit(variant: str, M: int, dtype: torch.dtype, capability: int, upcast: bool) -> LaunchConfig:
    """Tiles of "linear_4bit", without the split over K; BLOCK_K is a multiple of SCALE_GROUP."""
    if dtype == torch.float32:
        return LaunchConfig(variant, 16, 32, 64, 16 if variant == "recompute" else 32, num_stages=1)
    BLOCK_M = 16 if M <= DECODE_ROWS else 64
    if capability < 80:
        return LaunchConfig(variant, BLOCK_M, 64, 64, 32, num_stages=2)
    if upcast:
        BLOCK_R, num_stages = (16, 4) if variant == "recompute" else (32, 3)
        return LaunchConfig(variant, BLOCK_M, 32, 64, BLOCK_R, num_stages=num_stages)
    return LaunchConfig(variant, BLOCK_M, 64, 64, 32, num_stages=4)


def without_tma(config: LaunchConfig) -> LaunchConfig:
    """The same with pointers, whose registers a smaller tile pays for."""
    return replace(config, tma=False, BLOCK_M=64, BLOCK_N=128, num_stages=3)


def rounding(op: str, M: int, config: LaunchConfig) -> LaunchConfig:
    """The same for fp32 adapters that are to be rounded."""
    copied = op == "linear_4bit" or config.variant == "split"
    if op in ("linear", "shrink", "expand"):  # the others load, or store, each part once
        copied |= M > ROUND_ROWS or config.BLOCK_R >= 64
    return replace(config, rounds="copied" if copied else "loaded")


def variants(
    M: int, r: int, dtype: torch.dtype, dropout: bool, upcast: bool = False, adapters: int = 1, four_bit: bool = False
) -> tuple[str, ...]:  # fmt: skip
    """The variants of "linear" worth having at this shape, the preferred one last; "split" always can.

    "recompute" for small M, where launches and occupancy count; not where x has a mask that many programs would draw
    again. An fp32 LoRA product costs several times a 16-bit one: only decode, which waits for the weight, repeats it.
    four_bit: of "linear_4bit": beside a dequantisation there are registers for fewer ranks.
    """
    decode = M <= DECODE_ROWS
    if upcast or dtype == torch.float32:
        recompute = r <= (16 if four_bit else 32) and decode
    else:
        recompute = M <= SHORT_ROWS and r <= (64 if decode and not four_bit else 32)
    return ("split", "recompute") if recompute and adapters == 1 and not dropout else ("split",)


def pick(
    op: str,
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    dropout: bool,
    capability: int,
    upcast: bool = False,
    adapters: int = 1,
    variant: str | None = None,
) -> LaunchConfig:
    """The configuration of one launch of ``op`` (one of OPS); ``variant``: that of "linear", if not the preferred one.

    dropout: whether this launch draws a mask. upcast: the adapters are not of x's dtype.
    """
    if op == "shrink":
        return _shrink(M, K, r, dtype, dropout, upcast)
    if op == "expand":
        return _expand(r, dtype, upcast)
    if op.startswith("backward"):
        return _backward(op, M, N, r, dtype, dropout, upcast, capability)
    if op == "weight_grad":
        return _weight_grad(M, N, K, r, dtype, dropout, upcast, capability)
    variant = variant or variants(M, r, dtype, dropout, upcast, adapters, op == "linear_4bit")[-1]
    if op == "linear_4bit":
        config = _gemm_4bit(variant, M, dtype, capability, upcast)
    else:
        config = _gemm(variant, M, r, dtype, capability, upcast)
    if variant == "recompute":
        config = replace(config, BLOCK_R=max(config.BLOCK_R, 1 << (r - 1).bit_length()))  # forced, too, it holds all
    if M <= SHORT_ROWS and (variant == "recompute" or op == "linear_4bit"):
        programs = _cdiv(M, config.BLOCK_M) * _cdiv(N, config.BLOCK_N)
        config = replace(config, SPLIT_K=_split(programs, _cdiv(K, config.BLOCK_K), wanted=256))
    return config


def candidates(op: str, dtype: torch.dtype, capability: int) -> Iterator[tuple[LaunchConfig, bool, bool]]:
    """Every (config, dropout, upcast) that :func:`pick` can answer, each once; "split", because of several adapters.

    A split over K is listed as SPLIT_K = 2: the code is the same for any number. ``tma`` configurations come twice, the
    second time without, for tensors that no descriptor can describe.
    """
    seen = set()
    # one of each kind that the rules above tell apart
    rows = DECODE_ROWS, SHORT_ROWS, SHORT_ROWS + 1, 8192
    grid = product((False, True), (False, True), rows, (16, 32, 64, 128), (16, 65536))
    for dropout, upcast, M, r, K in grid:
        if dropout and op in _WITHOUT_MASK or op.startswith("backward") and r > PASS_RANKS:
            continue
        for variant in {"split", variants(M, r, dtype, dropout, upcast, four_bit=op == "linear_4bit")[-1]}:
            config = pick(op, M, 16, K, r, dtype, dropout, capability, upcast, 1, variant)
            config = replace(config, SPLIT_K=min(config.SPLIT_K, 2))
            seen |= {(config, dropout, upcast)} | ({(without_tma(config), dropout, upcast)} if config.tma else set())
            if dtype.itemsize == 2 and not upcast and (found := rounding(op, M, config)).rounds == "loaded":
                seen.add((found, dropout, upcast))
    yield from sorted(seen, key=repr)


def traffic(
    op: str,
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    dropout: bool,
    capability: int,
    upcast: bool = False,
    adapters: int = 1,
    variant: str | None = None,
    weight: int | None = None,
) -> dict[str, int]:
    """What one call of ``op`` costs with the configuration that :func:`pick` gives; ``r`` is the sum of equal ranks.

    weight: bytes that are held of W, if it is not dense; "linear_4bit" reads them once for each block of rows.

    Returns:
        bytes: to and from device memory, every operand once a launch (tiles that neighbours read come from L2);
        flops; launches of kernels; mask_elements: how many times the generator yields an element;
        floor_bytes: operands and results once each; floor_flops: every product once.
    """
    config = pick(op, M, N, K, r // adapters, dtype, dropout, capability, upcast, adapters, variant)
    e, e_adapter = dtype.itemsize, 4 if upcast or dtype == torch.float32 else dtype.itemsize
    S = 4 * M * r
    planes = 8 * config.SPLIT_K if config.SPLIT_K > 1 else 0  # written once, read once, fp32
    rank_blocks = adapters * _cdiv(r // adapters, config.BLOCK_R)
    cost = dict(launches=1, mask_elements=0)
    if op == "shrink":
        floor = e * M * K + e_adapter * r * K + S, 2 * M * K * r
        cost.update(bytes=floor[0] + planes * M * r, flops=floor[1], mask_elements=M * K * rank_blocks)
    elif op == "expand":
        cost.update(bytes=e * M * N + e_adapter * r * N + S, flops=2 * M * N * r, mask_elements=M * N * adapters)
        floor = cost["bytes"], cost["flops"]
    elif op.startswith("backward"):
        floor = e * M * N * (2 if op == "backward_x" else 1) + e_adapter * 2 * r * N + S, 4 * M * r * N
        moved = 8 * config.SPLIT_K * r * N + (2 * S * _cdiv(N, config.BLOCK_N) if op == "backward_g" else 0)
        cost.update(bytes=floor[0] + moved, flops=floor[1], mask_elements=M * N)
        cost["launches"] += op == "backward_g" and N > config.BLOCK_N  # the planes of dS
    elif op == "weight_grad":
        floor = e * M * (K + N) + 2 * S + e_adapter * r * (K + N), 2 * M * r * (K + N)
        cost.update(bytes=floor[0] + planes * r * (K + N), flops=floor[1], mask_elements=M * K * rank_blocks)
    else:
        W = e * K * N if weight is None else weight
        floor = e * (M * K + M * N) + W + e_adapter * r * (K + N) + S, 2 * M * (K * N + r * (K + N))
        cost.update(bytes=floor[0] + planes * M * (N + r), flops=floor[1])
        if op == "linear_4bit":
            cost["bytes"] += W * (_cdiv(M, config.BLOCK_M) - 1)
        cost["mask_elements"] = M * K * adapters
        if config.variant == "recompute":
            cost["flops"] += 2 * M * K * r * (_cdiv(N, config.BLOCK_N) - 1)
        elif config.variant == "split":
            cost["bytes"] += e * M * K + S
            cost["launches"] += 1
    cost["mask_elements"] *= int(dropout)
    return {**cost, "floor_bytes": floor[0], "floor_flops": floor[1]}
