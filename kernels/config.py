"""Which tiles a launch uses: one pure function of operation, shape, dtype and chip, and the list of all it can answer.

M, N, K are the kernel's: Y [M, N] with a contraction over K, so the input gradient of a layer has N = in_features and
K = out_features; ``r`` is the rank of the largest adapter. ``capability`` is 10 * major + minor of an NVIDIA chip and 0
for everything else, which gets small tiles that fit any chip. Tile sizes follow from registers and shared memory
(compiled ahead of time for each chip); no number here was tuned by timing.

Rules that correctness rests on, not speed:
    BLOCK_K of an operand with a mask is a multiple of 16, the elements of one mask draw;
    operands converted in registers (``upcast``, and S and dS in the weight gradients) keep BLOCK_R below 64, so that no
    pipelined wgmma reads them (tiles.py says why).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

OPS = ("linear", "input_grad", "shrink", "weight_grad")
_WARPGROUP_MMA = (90, 100, 103)  # accumulators by warp groups and 228 KiB of shared memory: room for wide tiles


@dataclass(frozen=True)
class LaunchConfig:
    """Variant and tile sizes of one launch; ``tma`` asks for tensor descriptors where strides and alignment allow."""

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


def _rank_block(r: int, largest: int) -> int:
    block = 16  # the least that tl.dot takes
    while block < min(r, largest):
        block *= 2
    return block


def _split(programs: int, steps: int) -> int:
    """How many programs share a contraction of ``steps`` tiles: a power of 2, for 512 programs of 4 steps or more."""
    split = 1
    while split < 16 and programs * split * 2 <= 512 and steps >= split * 8:
        split *= 2
    return split


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _shrink(M: int, r: int, dtype: torch.dtype, upcast: bool) -> LaunchConfig:
    BLOCK_R = _rank_block(r, 32 if upcast or dtype == torch.float32 else 128)
    # few rows: narrow row blocks, for enough programs
    BLOCK_M = 16 if M < 8192 else 64
    if dtype == torch.float32:
        return LaunchConfig("shrink", 32, 16, 32, BLOCK_R)
    return LaunchConfig("shrink", BLOCK_M, 16, 64 if upcast or BLOCK_R >= 64 else 128, BLOCK_R)


def _weight_grad(M: int, N: int, K: int, r: int, dtype: torch.dtype, upcast: bool) -> LaunchConfig:
    BLOCK_R, BLOCK_M = _rank_block(r, 32), 64
    BLOCK_K = 32 if upcast or dtype == torch.float32 or BLOCK_R > 16 else 64
    programs = (_cdiv(K, BLOCK_M) + _cdiv(N, BLOCK_M)) * _cdiv(r, BLOCK_R)
    return LaunchConfig(
        "weight_grad", BLOCK_M, 16, BLOCK_K, BLOCK_R, SPLIT_K=_split(programs, _cdiv(M, BLOCK_K)), num_stages=3
    )


def _linear_tiles(
    M: int, variant: str, dtype: torch.dtype, capability: int, upcast: bool, mask_in: bool, mask_out: bool
) -> LaunchConfig:
    """Tiles of the GEMM, without the rank block and the split."""
    if dtype == torch.float32 or capability < 80:
        return LaunchConfig(variant, 16 if M <= 16 else 64, 64, 32, 16, num_stages=3 if capability >= 80 else 2)
    # recompute and publish split an upcast x into tf32 parts beside the base product: a shorter tile keeps to registers
    short = upcast and variant != "split"
    wide_accumulators = capability in _WARPGROUP_MMA
    BLOCK_K = (32 if short else 64) if wide_accumulators else (16 if short else 32)
    if M <= 16:
        return LaunchConfig(variant, 16, 32, BLOCK_K if short else 32 if mask_in else 128, 16)
    if M <= 64:
        return LaunchConfig(variant, 64, 64, min(BLOCK_K, 32) if mask_in else BLOCK_K, 16)
    if M <= 512:
        return LaunchConfig(variant, 64, 128, BLOCK_K, 16, num_warps=8)
    if not wide_accumulators:
        return without_tma(LaunchConfig(variant, 64 if mask_out else 128, 128, BLOCK_K, 16, num_warps=8, num_stages=4))
    # the wide tile has registers for nothing but its accumulator
    wide = variant == "split" and not mask_out and not upcast
    return LaunchConfig(variant, 128, 256 if wide else 128, BLOCK_K, 16, num_warps=8, tma=True)


def without_tma(config: LaunchConfig) -> LaunchConfig:
    """The same with pointers, whose registers "publish" pays for with a smaller tile: it holds two K loops."""
    return replace(config, tma=False, BLOCK_M=64 if config.variant == "publish" else config.BLOCK_M)


def variants(
    op: str, M: int, r: int, dtype: torch.dtype, dropout: bool, upcast: bool = False, adapters: int = 1
) -> tuple[str, ...]:
    """The variants of "linear" or "input_grad" worth having at this shape, the preferred one last; "split" always can.

    "recompute" for small M, where launches and occupancy count; beyond, "publish" saves a second read of x. Neither
    where x has a mask that many programs would draw again, or only a few would draw while the others wait, nor for
    masks in fp32, whose dots by fma leave no registers to draw them.
    """
    mask_in = dropout and op == "linear" and (M > 64 or upcast)
    mask_fp32 = dropout and dtype == torch.float32
    largest = 16 if dtype == torch.float32 else 32 if upcast or M > 64 else 64
    if mask_in or mask_fp32 or adapters > 1 or r > largest:
        return ("split",)
    return ("split", "recompute") if M <= 512 else ("split", "publish")


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
    """The configuration of one launch of ``op`` (one of OPS).

    dropout: whether any adapter draws a mask. upcast: the adapters are not of x's dtype. variant: instead of the last
    of :func:`variants`.
    """
    if op == "shrink":
        return _shrink(M, r, dtype, upcast)
    if op == "weight_grad":
        return _weight_grad(M, N, K, r, dtype, upcast)
    variant = variant or variants(op, M, r, dtype, dropout, upcast, adapters)[-1]
    forward = op == "linear"
    config = _linear_tiles(M, variant, dtype, capability, upcast, dropout and forward, dropout and not forward)
    BLOCK_R = _rank_block(r, 32 if variant == "split" else 64)
    split = 1
    if variant == "recompute" and M <= 64:
        split = _split(_cdiv(M, config.BLOCK_M) * _cdiv(N, config.BLOCK_N), _cdiv(K, config.BLOCK_K))
    return replace(config, BLOCK_R=BLOCK_R, SPLIT_K=split)


def candidates(op: str, dtype: torch.dtype, capability: int) -> Iterator[tuple[LaunchConfig, bool, bool]]:
    """Every (config, dropout, upcast) that :func:`pick` or a forced variant can lead to, each once.

    A split over K is listed as SPLIT_K = 2: the code is the same for any number. ``tma`` configurations come twice, the
    second time without, for tensors that no descriptor can describe.
    """
    seen = set()
    for upcast in (False, True):
        for dropout in (False, True):
            for M in (1, 17, 65, 513, 8192):
                for r in (16, 32, 64, 128):
                    for variant in variants(op, M, r, dtype, dropout, upcast):
                        for K in (16, 65536):
                            config = pick(op, M, 16, K, r, dtype, dropout, capability, upcast, 1, variant)
                            config = replace(config, SPLIT_K=min(config.SPLIT_K, 2))
                            seen |= {(config, dropout, upcast)}
                            if config.tma:
                                seen |= {(without_tma(config), dropout, upcast)}
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
) -> dict[str, int]:
    """What one call of ``op`` costs with the configuration that :func:`pick` gives; ``r`` is the sum of equal ranks.

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
        cost.update(bytes=e * M * K + e_adapter * r * K + S, flops=2 * M * K * r, mask_elements=M * K * rank_blocks)
        floor = cost["bytes"], cost["flops"]
    elif op == "weight_grad":
        floor = e * M * (K + N) + 2 * S + e_adapter * r * (K + N), 2 * M * r * (K + N)
        cost.update(bytes=floor[0] + planes * r * (K + N), flops=floor[1], mask_elements=M * K * rank_blocks)
    else:
        floor = e * (M * K + K * N + M * N) + e_adapter * r * (K + N) + S, 2 * M * (K * N + r * (K + N))
        cost.update(bytes=floor[0] + planes * M * (N + r), flops=floor[1])
        cost["mask_elements"] = M * (K if op == "linear" else N) * adapters
        if config.variant == "recompute":
            again = _cdiv(N, config.BLOCK_N) - 1
            cost["flops"] += 2 * M * K * r * again
            cost["mask_elements"] += M * K * again if op == "linear" else 0
        elif config.variant == "split":
            cost["bytes"] += e * M * K + S
            cost["launches"] += 1
    cost["mask_elements"] *= int(dropout)
    return {**cost, "floor_bytes": floor[0], "floor_flops": floor[1]}
