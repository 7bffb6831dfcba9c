"""What the grouped kernels are told: adapters by address, rows by group, tiles by shape.

A *site* is one linear, or several that read the same input (q, k and v; gate and up): G outputs. A *slot* is a place
for one adapter. A *group* is a list of (slot, weight), and the rows that have it. All tables lie at fixed addresses on
the device and are read when a kernel runs, so a captured graph follows whatever they say at its replay.

``B_ptr`` names B^T: a row of B is r elements long, and where r is 3 or 20 no load from it is aligned to more than an
element; a row of B^T is as long as the layer is wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .config import _WARPGROUP_MMA, LaunchConfig

COLUMNS = 16  # the ranks of an adapter start at a multiple of this in a row of S, and tl.dot takes no fewer
_CHUNK = 512  # least part of K that has a sum of its own
_MAX_CHUNKS = 16
_PROGRAMS = 256  # a chip's worth: with fewer over whole rows of x, each chunk of K gets a program
_RANK_BLOCKS = (1, 2, 4)


@dataclass(frozen=True)
class AdapterTables:
    """The adapters of one site.

    A_ptr, B_ptr: int64 [G, slots], addresses of A [r, K] and of B^T [r, N_g], both contiguous, in ``dtype``, starting
    at a multiple of 16 bytes. rank: int32 [G, slots], 0 where a slot is empty or its adapter leaves the output alone.
    scaling: float32 [G, slots]. max_rank: no smaller than any rank that will ever be written to ``rank``.
    """

    A_ptr: torch.Tensor
    B_ptr: torch.Tensor
    rank: torch.Tensor
    scaling: torch.Tensor
    dtype: torch.dtype
    max_rank: int

    @cached_property
    def form(self) -> tuple[int, int, torch.dtype, int]:
        """What a launch depends on: outputs, slots, dtype and largest rank."""
        return *self.rank.shape, self.dtype, self.max_rank


@dataclass(frozen=True)
class RowGroups:
    """Which rows of a batch have which adapters: no row in two tiles, rows of the base model in none.

    num_tiles: int32 [1]. tiles: int32 [capacity, 4]: index of the first row in ``order``, number of rows (1 to
    ``block_m``), first and end index of the group's members. order: int32 [rows], row numbers of x. member_slot: int32,
    member_weight: float32, one for each member. group_size: most members of a group. grid_tiles: how many tiles a
    launch provides for, at least num_tiles.
    """

    num_tiles: torch.Tensor
    tiles: torch.Tensor
    order: torch.Tensor
    member_slot: torch.Tensor
    member_weight: torch.Tensor
    block_m: int
    group_size: int
    grid_tiles: int

    @cached_property
    def form(self) -> tuple[int, int, int, int]:
        """What a launch depends on: rows, rows of a tile, adapters of a group and tiles."""
        return len(self.order), self.block_m, self.group_size, self.grid_tiles


@dataclass(frozen=True)
class ExpandConfig(LaunchConfig):
    """STEPS: blocks of columns that one program forms. RANK_BLOCKS: how many times COLUMNS ranks a group has at most,
    1, 2 or 4, of one adapter; 0: any number of any rank."""

    STEPS: int = 1
    RANK_BLOCKS: int = 0


def rows_per_tile(max_rows: int, max_groups: int) -> int:
    """16, or 32 where the groups of a full batch have that many rows. A row has the same bits in either.

    No more: the kernels' products keep below the 64 rows at which sm_90 and sm_100 change to another instruction, so
    that a decode step and a prefill of thousands of rows round alike.
    """
    return 32 if max_rows >= 32 * max_groups else 16


def chunks(K: int) -> tuple[int, int]:
    """(number, length) of the parts of K that are summed each for itself, then one after the other.

    A function of K alone: it decides how a row of S is rounded, whoever shares the batch with the row.
    """
    number = min(_MAX_CHUNKS, max(1, -(-K // _CHUNK)))
    length = -(-max(K, 1) // (number * 128)) * 128
    return max(1, -(-K // length)), length


def _warps(capability: int) -> int:
    return 4 if capability else 2  # 128 threads either way: a warp of AMD has 64


def pick_shrink(
    tiles: int, block_m: int, K: int, max_rank: int, dtype: torch.dtype, adapter_dtype: torch.dtype, capability: int
) -> LaunchConfig:
    """Configuration of the shrink; tiles: of rows, times outputs. ``capability`` as in config.py.

    What depends on more than K and the dtypes, here and in :func:`pick_expand`, decides no bit of a result: BLOCK_M,
    BLOCK_N and the shrink's BLOCK_R are not summed over, SPLIT_K says how many programs share the chunks, not how long
    they are, and the expand takes COLUMNS ranks at a time in each of its forms.
    """
    wide = dtype == torch.float32 or adapter_dtype != dtype  # products of 32-bit operands
    BLOCK_R = COLUMNS if wide or max_rank <= COLUMNS else 32
    split = chunks(K)[0] if tiles * -(-max_rank // BLOCK_R) < _PROGRAMS else 1
    stages = 2 if not capability else 4 if capability in _WARPGROUP_MMA and not wide else 3
    return LaunchConfig(
        "shrink",
        block_m,
        16,
        32 if wide else 128,
        BLOCK_R,
        SPLIT_K=split,
        num_warps=_warps(capability),
        num_stages=stages,
    )


def pick_expand(
    tiles: int, block_m: int, N: Sequence[int], max_rank: int, group_size: int, dtype: torch.dtype, capability: int
) -> ExpandConfig:
    """Configuration of the expand: blocks as wide as a 128-byte line of y; where there are more programs than run at
    once, each takes four such blocks, and B of all four is under way from the start."""
    BLOCK_N = 128 // dtype.itemsize
    largest = min((b for b in _RANK_BLOCKS if b * COLUMNS >= max_rank), default=0) if group_size == 1 else 0
    steps = 4 if tiles * sum(-(-n // BLOCK_N) for n in N) >= 4 * _PROGRAMS else 1
    stages = 4 if capability and largest else 2
    # the S of four blocks of ranks in 16 planes, or of any number, is more than the registers of 128 threads hold
    warps = _warps(capability) * (2 if block_m > 16 and largest in (0, 4) else 1)
    return ExpandConfig(
        "expand", block_m, BLOCK_N, COLUMNS, COLUMNS, num_warps=warps, num_stages=stages,
        RANK_BLOCKS=largest, STEPS=steps,
    )  # fmt: skip


def launch_options(config: LaunchConfig, nvidia: bool) -> dict[str, int]:
    """NVIDIA: as many registers as a thread can have, but for the shrink's light form, which keeps ptxas from spilling
    for the sake of one more program. AMD: the 16x16 product for every tile, since the 32x32 one sums in another order.
    """
    if not nvidia:
        return config.options() | dict(matrix_instr_nonkdim=16)
    light = config.variant == "shrink" and config.BLOCK_M == config.BLOCK_R == 16 and config.BLOCK_K == 128
    return config.options() | ({} if light else dict(maxnreg=255))


def grouped_traffic(
    rows: Sequence[int], ranks: Sequence[int], N: Sequence[int], K: int, dtype: torch.dtype, capability: int = 90
) -> dict[str, int]:
    """What one site costs when group i has ``rows[i]`` rows under one adapter of rank ``ranks[i]``, in x's dtype.

    Returns:
        bytes: to and from device memory, each operand once a launch (tiles that share one find it in L2): A, B, x, y
        twice, and S once written, once read, for each part of a split; flops; launches;
        l2_bytes: what the programs ask for in all, tables apart;
        floor_bytes: A and B once each, x and y moved for the base product already; floor_flops: 2 T r (K + sum N).
    """
    e, T, block_m = dtype.itemsize, sum(rows), rows_per_tile(sum(rows), len(rows))
    tiles = [-(-m // block_m) for m in rows]
    shrink = pick_shrink(sum(tiles) * len(N), block_m, K, max(ranks), dtype, dtype, capability)
    expand = pick_expand(sum(tiles), block_m, N, max(ranks), 1, dtype, capability)
    G, planes, S_readers = len(N), shrink.SPLIT_K, sum(-(-n // (expand.BLOCK_N * expand.STEPS)) for n in N)
    width = G * K + sum(N)
    moved, adapters, S, flops, asked = 2 * e * T * sum(N), 0, 0, 0, 0
    for t, m, r in zip(tiles, rows, ranks, strict=True):
        adapters += e * r * width
        S += 4 * planes * m * r * G
        flops += 2 * m * r * width
        asked += t * e * r * width + e * m * K * G * -(-r // shrink.BLOCK_R) + 4 * planes * m * r * (G + S_readers)
    return dict(
        bytes=adapters + e * T * K + moved + 2 * S, flops=flops, launches=2,
        l2_bytes=asked + moved, floor_bytes=adapters, floor_flops=flops,
    )  # fmt: skip
