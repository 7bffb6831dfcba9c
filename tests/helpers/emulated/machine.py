"""The threads, memories and tensor cores that a translated kernel runs on.

All threads of some blocks of a grid advance together. Where they part, those that are furthest behind go first, so that
they meet again. With ``warps`` each warp runs on its own to the next barrier, in an order drawn anew: what two warps
exchange without a barrier goes wrong then. Memory is the process's own; each access has to be aligned and inside of a
tensor of the launch. A copy into shared memory arrives when it is waited for, not before.
"""

from __future__ import annotations

import numpy as np

from fused_lora.testing.interpreter import _fma_float32, bf16_to_float32, float32_to_bf16

SHARED_BASE = 1024  # no address that is 0 by mistake; a multiple of what a swizzle repeats after
_FIRST = 1 << 12  # of the addresses that the view of the process's memory has


class EmulationError(Exception):
    """What a GPU would answer with a fault or with wrong numbers; the text names the kernel, thread and address."""


class _Everywhere:
    def __init__(self, dtype: str):
        shape = (((1 << 47) - _FIRST) // np.dtype(dtype).itemsize,)
        self.__array_interface__ = dict(data=(_FIRST, False), shape=shape, typestr=np.dtype(dtype).str, version=3)


_MEMORY = {size: np.asarray(_Everywhere(f"u{size}")) for size in (1, 2, 4, 8)}


# ---- what translated code calls


def bits(x, width: str):
    """x as unsigned integers of a register's width."""
    size = int(width[1])
    if x.dtype == np.bool_:
        return x.astype(width)
    x = x.view(f"u{x.dtype.itemsize}")
    return x if x.dtype.itemsize == size else x.astype(width)


def choose(p, a, b):
    if np.ndim(p) == 0:
        return a if p else b
    return np.where(p, a, b)


def both(t, p):
    if np.ndim(p) == 0:
        return t if p else np.False_
    return p if t is None else t & p


def part(x, shift: int, dtype: str):
    return (x >> x.dtype.type(shift)).astype(dtype)


def join(size: int, *items):
    wide = np.dtype(f"u{size * len(items)}")
    out = items[0].astype(wide)
    for i, item in enumerate(items[1:], 1):
        out = out | (item.astype(wide) << wide.type(8 * size * i))
    return out


def from_bf16(x):
    return bf16_to_float32(np.asarray(x))


def to_bf16(x):
    return float32_to_bf16(np.asarray(x))


def to_tf32(x):
    """Rounded to 10 bits of fraction, halves away from zero."""
    raw = x.view("u4")
    finite = (raw & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, (raw + np.uint32(0x1000)) & np.uint32(0xFFFFE000), raw)


def fma(x, y, z):
    if x.dtype == np.float32:
        return _fma_float32(x, y, z)
    raise NotImplementedError(f"fma of {x.dtype}")


def divide(a, b):
    if a.dtype.kind != "i":
        return a // b
    quotient = abs(a.astype("i8")) // abs(b.astype("i8"))
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def remainder(a, b):
    return (a - divide(a, b) * b).astype(a.dtype)


def high(a, b):
    """The upper half of a product of 32-bit numbers."""
    wide = np.dtype({"i4": "i8", "u4": "u8"}[a.dtype.str[1:]])
    return ((a.astype(wide) * b.astype(wide)) >> wide.type(32)).astype(a.dtype)


def left(x, n):
    width = 8 * x.dtype.itemsize
    return np.where(n < width, x << np.minimum(n, width - 1).astype(x.dtype), x.dtype.type(0))


def right(x, n):
    width = 8 * x.dtype.itemsize
    moved = x >> np.minimum(n, width - 1).astype(x.dtype)
    return moved if x.dtype.kind == "i" else np.where(n < width, moved, x.dtype.type(0))


def field(a, position, length):
    """bfe: a field of bits, of a signed number with its sign."""
    width = 8 * a.dtype.itemsize
    position = np.minimum(position & np.uint32(255), width - 1)
    length = np.minimum(length & np.uint32(255), width - position)
    moved = left(a, (width - position - length).astype("u4"))
    return np.where(length == 0, a.dtype.type(0), right(moved.astype(a.dtype), (width - length).astype("u4")))


def permute(a, b, select):
    out = np.uint32(0)
    both_words = (b.astype("u8") << np.uint64(32)) | a.astype("u8")
    for i in range(4):
        nibble = (select >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both_words >> ((nibble & np.uint32(7)) * np.uint32(8)).astype("u8")) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint32(8), sign, byte).astype("u4")
        out = out | (byte << np.uint32(8 * i))
    return out


def to_integer(x, dtype: str):
    """Towards 0; what is too large is the largest, and what is no number 0."""
    info, whole = np.iinfo(dtype), np.trunc(x.astype("f8"))
    if info.bits > 32:
        raise NotImplementedError(f"a float as {dtype}")
    return np.where(np.isnan(whole), 0, np.clip(whole, info.min, info.max)).astype("i8").astype(dtype)


def parameter(m, number: int, dtype: str, width: str):
    value = np.frombuffer(m.parameters[number][: int(dtype[1])], dtype)[0]
    return value.astype(f"{dtype[0]}{width[1]}") if dtype[0] in "iu" else value


# of a tensor map, which only these instructions read: where each field lies, how wide its elements are
_FIELDS = {
    "global_address": (0, 8),
    "rank": (8, 4),
    "box_dim": (16, 4),
    "global_dim": (36, 4),
    "global_stride": (56, 8),
}
_FIELDS |= {"element_stride": (88, 4), "elemtype": (108, 4), "interleave_layout": (112, 4), "swizzle_mode": (116, 4)}
_FIELDS |= {"fill_mode": (120, 4)}
_ELEMENTS = [1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4]  # bytes by elemtype, PTX ISA 8.8 table 33
COMBINE = {"add": np.add, "max": np.maximum, "exch": lambda old, new: new}


class Machine:
    """Some blocks of a grid.

    parameters: each argument's bytes; blocks: the (x, y, z) of the program ids, an array [blocks, 3]; spans: finds out
    whether an address belongs to a tensor.
    """

    def __init__(self, program, parameters: list[bytes], blocks: np.ndarray, grid, shared: int, spans, rng=None):
        self.program, self.parameters, self.spans, self.rng = program, parameters, spans, rng
        self.threads, count = program.threads, len(blocks)
        self.lanes = count * self.threads
        self.all = np.ones(self.lanes, bool)
        self.block = np.repeat(np.arange(count), self.threads)
        self.shared_bytes = -(-shared // 1024) * 1024
        # what was never written is no number
        self.shared = np.full(count * max(self.shared_bytes, 1024), 0xFF, np.uint8)
        tid = np.tile(np.arange(self.threads, dtype=np.uint32), count)
        self.special = {"%tid.x": tid, "%laneid": tid % np.uint32(32)}
        for axis, name in enumerate("xyz"):
            self.special[f"%ctaid.{name}"] = blocks[self.block, axis].astype(np.uint32)
            self.special[f"%nctaid.{name}"] = np.uint32(grid[axis])
        self.tensor = np.full((count, 128, 512), 0xFFFFFFFF, np.uint32)  # memory of sm_100's tensor cores
        self.copies, self.committed, self.barriers = [], np.zeros(self.lanes, int), {}

    def fail(self, what: str, lane: int | None = None):
        where = self.program.name
        if lane is not None:
            at = [int(self.special[f"%ctaid.{name}"][lane]) for name in "xyz"]
            where += f", program {at}, thread {int(self.special['%tid.x'][lane])}"
        raise EmulationError(f"{where}: {what}")

    # ---- running

    def run(self) -> None:
        program = self.program
        # a register that was never written may be moved, but not end in a result: it is no number
        registers = [np.bool_(True) if w == "?" else np.dtype(w).type(np.iinfo(w).max) for w in program.registers]
        waiting: dict[int, np.ndarray] = {}
        ready = {0: self.all}
        with np.errstate(all="ignore"):
            while ready:
                for unit in self._units():
                    self._to_the_barrier({pc: t & unit for pc, t in ready.items()}, registers, waiting)
                ready, waiting = waiting, {}
                self._check_barrier(ready)
        if self.copies:
            self.fail("a copy into shared memory was never waited for")

    def _units(self):
        """Sets of threads that run one after the other: all, or each warp (each four, where they multiply together)."""
        if self.rng is None or "m.barrier_wait" in self.program.source:  # a warp alone could wait for ever
            return [self.all]
        size = 128 if "multiply_group" in self.program.source else 32
        number = self.special["%tid.x"] // size
        return [number == n for n in self.rng.permutation(int(number.max()) + 1)]

    def _to_the_barrier(self, groups, registers, waiting) -> None:
        blocks = self.program.blocks
        groups = {pc: t for pc, t in groups.items() if t.any()}
        while groups:
            pc = min(groups)
            t = groups.pop(pc)
            block = blocks[pc]
            if t.all():
                taken = block.run(registers, None, self)
            else:
                mine = list(registers)
                taken = block.run(mine, t, self)
                for i in block.written:
                    registers[i] = choose(t, mine[i], registers[i])
            if taken is not None:
                taken = t & taken
                self._join(groups, block.target, taken)
                t = t & ~taken
            if not block.ends:
                self._join(waiting if block.waits else groups, pc + 1, t)

    @staticmethod
    def _join(groups, pc, t) -> None:
        if t.any():
            groups[pc] = groups[pc] | t if pc in groups else t

    def _check_barrier(self, ready) -> None:
        for t in ready.values():
            of_block = t.reshape(-1, self.threads)
            if (of_block.any(1) != of_block.all(1)).any():
                self.fail("a barrier that only some threads of a program reach")

    # ---- memory

    def _active(self, at, t):
        """(indices of the threads that take part, their addresses as int64)."""
        at = np.broadcast_to(at, self.lanes)
        index = np.arange(self.lanes) if t is None else np.flatnonzero(np.broadcast_to(t, self.lanes))
        return index, at[index].astype(np.int64)

    def _places(self, space: str, index, at, size: int, count: int):
        """(array of the memory, first element of each thread), checked."""
        wrong = at % (size * count) != 0
        if wrong.any():
            i = int(wrong.argmax())
            self.fail(f"{space} address {int(at[i]):#x} is not a multiple of {size * count}", int(index[i]))
        if space == "shared":
            inside = (at >= SHARED_BASE) & (at + size * count <= SHARED_BASE + self.shared_bytes)
            if not inside.all():
                i = int(inside.argmin())
                self.fail(f"shared address {int(at[i]) - SHARED_BASE} of {self.shared_bytes} bytes", int(index[i]))
            at = at - SHARED_BASE + self.block[index] * self.shared_bytes
            return self.shared.view(f"u{size}"), at // size
        if space != "global":
            self.fail(f"memory {space!r}")
        if len(at):
            bad = self.spans.outside(at, size * count)
            if bad is not None:
                self.fail(f"address {int(at[bad]):#x} belongs to no tensor of the launch", int(index[bad]))
        return _MEMORY[size], (at - _FIRST) // size

    def load(self, space: str, at, size: int, count: int, t):
        index, at = self._active(at, t)
        memory, first = self._places(space, index, at, size, count)
        found = []
        for i in range(count):
            column = np.zeros(self.lanes, f"u{size}")
            column[index] = memory[first + i]
            found.append(column)
        return found

    def store(self, space: str, at, size: int, values, t) -> None:
        index, at = self._active(at, t)
        memory, first = self._places(space, index, at, size, len(values))
        for i, value in enumerate(values):
            value = np.broadcast_to(value, self.lanes)[index].astype(f"u{size}")
            memory[first + i] = value
            other = memory[first + i] != value
            if other.any():
                self.fail(
                    f"{space} address {int(at[other.argmax()]):#x}: two threads store two values",
                    int(index[other.argmax()]),
                )

    def copy(self, to, of, size: int, count, t) -> None:
        """cp.async: ``count`` bytes, and zeros up to ``size``; done at the wait."""
        index, source = self._active(of, t)
        count = np.broadcast_to(count, self.lanes)[index]
        to = np.broadcast_to(to, self.lanes)[index].astype(np.int64)
        self._places("shared", index, to, 4, size // 4)
        reads = count > 0
        self._places("global", index[reads], source[reads], 4, size // 4)
        self.copies.append((to, source, size, count, index, self.committed[index].copy()))

    def copies_commit_group(self, t) -> None:
        self.committed[slice(None) if t is None else t] += 1

    def copies_wait_group(self, left_over: int, t) -> None:
        kept = []
        for to, source, size, count, index, group in self.copies:
            done = self.committed[index] - left_over > group
            if t is not None:
                done &= t[index]
            for i in range(0, size, 4):
                reads = done & (count > i)
                _, first = self._places("shared", index[done], to[done] + i, 4, 1)
                words = np.zeros(len(index), "u4")
                words[reads] = _MEMORY[4][(source[reads] + i - _FIRST) // 4]
                self.shared.view("u4")[first] = words[done]
            if not done.all():
                kept.append(
                    tuple(x if isinstance(x, int) else x[~done] for x in (to, source, size, count, index, group))
                )
        self.copies = kept

    def atomic(self, what: str, at, t, dtype: str, value):
        index, at = self._active(at, t)
        size = int(dtype[1])
        memory, first = self._places("global", index, at, size, 1)
        old = np.zeros(self.lanes, f"u{size}")
        value = np.broadcast_to(value, self.lanes)[index]
        order = range(len(index)) if self.rng is None else self.rng.permutation(len(index))
        for i in order:
            before = memory[first[i]]
            old[index[i]] = before
            memory[first[i]] = COMBINE[what](before.view(dtype), value[i]).view(f"u{size}")
        return old

    # ---- boxes of tensors, by the tensor memory accelerator

    def replace(self, at, name: str, number: int, value, t) -> None:
        offset, size = _FIELDS[name]
        self.store("shared", at + at.dtype.type(offset + size * number), size, [value.astype(f"u{size}")], t)

    def copy_map(self, to, of, t) -> None:
        """128 bytes, from shared to global memory; a warp does it together."""
        t = both(t, self.special["%laneid"] == 0)
        for i in range(0, 128, 8):
            found = self.load("shared", of + of.dtype.type(i), 8, 1, t)
            self.store("global", to + to.dtype.type(i), 8, found, t)

    def _map(self, address, lane: int):
        """(address, rows and columns of a box, rows and columns of the tensor, stride, bytes an element, swizzle)."""
        raw = np.array([_MEMORY[1][address - _FIRST + i] for i in range(128)], "u1")

        def get(name, number=0):
            offset, size = _FIELDS[name]
            return int(raw[offset + size * number : offset + size * (number + 1)].view(f"u{size}")[0])

        if get("rank") != 1 or get("interleave_layout") or get("element_stride") != 1 or get("element_stride", 1) != 1:
            self.fail("a tensor map that is no matrix of neighbouring elements", lane)
        size = _ELEMENTS[get("elemtype")]
        start, stride = get("global_address"), get("global_stride")
        if start % 16 or stride % 16:
            self.fail(f"a tensor map at {start:#x} with rows of {stride} bytes: no multiples of 16", lane)
        swizzle = [0, 32, 64, 128][get("swizzle_mode")]
        return start, get("box_dim", 1), get("box_dim"), get("global_dim", 1), get("global_dim"), stride, size, swizzle

    def _box(self, at: int, where: int, corner, lane: int):
        """(places in shared memory, places in global memory, which of them are inside) of the bytes of a box."""
        start, rows, columns, height, width, stride, size, swizzle = self._map(where, lane)
        n, k = np.arange(rows)[:, None], np.arange(columns * size)[None]
        inner = n * columns * size + k + at
        if swizzle:
            inner = inner ^ ((inner >> 7) & (swizzle // 16 - 1)) << 4
        row, byte = n + corner[1], k + corner[0] * size
        inside = (row >= 0) & (row < height) & (byte >= 0) & (byte < width * size)
        index = np.full(inner.size, lane)
        _, places = self._places("shared", index, inner.reshape(-1), 1, 1)
        return places, (start + row * stride + byte).reshape(-1), inside.reshape(-1)

    def _each(self, t, *values):
        index = np.arange(self.lanes) if t is None else np.flatnonzero(np.broadcast_to(t, self.lanes))
        values = [np.broadcast_to(v, self.lanes) for v in values]
        return [(int(lane), *[int(v[lane]) for v in values]) for lane in index]

    def load_box(self, to, where, corner, barrier, t) -> None:
        for lane, at, tensor_map, bar, *first in self._each(t, to, where, barrier, *corner):
            state = self._barrier(lane, bar)
            state["copies"].append((lane, at, tensor_map, first))

    def _barrier(self, lane: int, at: int) -> dict:
        found = self.barriers.get((int(self.block[lane]), at))
        if found is None:
            self.fail(f"no mbarrier at {at}", lane)
        return found

    def barrier_init(self, at, count, t) -> None:
        for lane, where, expected in self._each(t, at, count):
            self.barriers[int(self.block[lane]), where] = dict(
                expected=expected, left=expected, bytes=0, phase=0, copies=[]
            )

    def barrier_inval(self, at, _, t) -> None:
        for lane, where in self._each(t, at):
            if self._barrier(lane, where)["copies"]:
                self.fail("an mbarrier ends before its copies", lane)
            del self.barriers[int(self.block[lane]), where]

    def barrier_arrive(self, at, count, t) -> None:
        for lane, where, size in self._each(t, at, count):
            state = self._barrier(lane, where)
            state["left"] -= 1
            state["bytes"] += size
            self._complete(state)

    @staticmethod
    def _complete(state) -> None:
        if state["left"] == 0 and state["bytes"] == 0 and not state["copies"]:
            state["left"], state["phase"] = state["expected"], state["phase"] ^ 1

    def barrier_wait(self, at, parity, t):
        """Whether the phase is over. What was to be copied arrives now, if all have said that they wait for it."""
        done = np.zeros(self.lanes, bool)
        for lane, where, old in self._each(t, at, parity):
            state = self._barrier(lane, where)
            if state["phase"] == old and state["left"] == 0:
                for copy in state["copies"]:
                    state["bytes"] -= self._arrive(*copy)
                state["copies"] = []
                self._complete(state)
            done[lane] = state["phase"] != old
            if not done[lane]:
                self.fail(f"a wait for an mbarrier that nobody ends: {state}", lane)
        return done

    def _arrive(self, lane: int, at: int, tensor_map: int, corner) -> int:
        places, addresses, inside = self._box(at, tensor_map, corner, lane)
        _, outer = self._places("global", np.full(inside.sum(), lane), addresses[inside], 1, 1)
        found = np.zeros(len(places), "u1")
        found[inside] = _MEMORY[1][outer]
        self.shared[places] = found
        return len(places)

    # ---- threads together

    def _warps(self, x):
        return np.broadcast_to(x, self.lanes).reshape(-1, 32)

    def _whole_warps(self, t, what: str) -> None:
        if t is not None:
            of_warp = t.reshape(-1, 32)
            if (of_warp.any(1) != of_warp.all(1)).any():
                self.fail(f"{what} without all threads of a warp")

    def shuffle(self, how: str, a, b, t):
        self._whole_warps(t, "shfl")
        lane, b = np.arange(32), self._warps(b).astype(int)
        source = {"bfly": lane ^ b, "up": np.where(lane - b < 0, lane, lane - b), "idx": b & 31}.get(how)
        if source is None:
            source = np.where(lane + b > 31, lane, lane + b)
        return np.take_along_axis(self._warps(a), source, 1).reshape(-1)

    def reduce(self, how: str, a, t):
        self._whole_warps(t, "redux")
        return np.repeat(COMBINE[how].reduce(self._warps(a), 1), 32).astype(a.dtype)

    def load_matrices(self, at, count: int, trans: bool, t):
        """ldmatrix: thread 8 i + j has the address of row j of matrix i."""
        self._whole_warps(t, "ldmatrix")
        rows = self._rows(at, count, t)
        found = []
        lane = np.arange(32)
        for i in range(count):
            matrix = rows[:, i]  # [warps, 8 rows, 8 halves]
            if trans:
                low, high_ = matrix[:, (lane % 4) * 2, lane // 4], matrix[:, (lane % 4) * 2 + 1, lane // 4]
            else:
                low, high_ = matrix[:, lane // 4, (lane % 4) * 2], matrix[:, lane // 4, (lane % 4) * 2 + 1]
            found.append(join(2, low, high_).reshape(-1))
        return found

    def _row_places(self, at, count: int, t):
        at = self._warps(at)[:, : 8 * count].astype(np.int64)
        warps = np.arange(len(at)) if t is None else np.flatnonzero(t.reshape(-1, 32).any(1))
        index = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
        memory, first = self._places("shared", index, at[warps].reshape(-1), 2, 8)
        return warps, memory, first.reshape(len(warps), count, 8, 1) + np.arange(8)

    def _rows(self, at, count: int, t):
        warps, memory, places = self._row_places(at, count, t)
        rows = np.zeros((self.lanes // 32, count, 8, 8), "u2")
        rows[warps] = memory[places]
        return rows

    def store_matrices(self, at, values, trans: bool, t) -> None:
        self._whole_warps(t, "stmatrix")
        warps, memory, places = self._row_places(at, len(values), t)
        for i, value in enumerate(values):
            halves = np.ascontiguousarray(self._warps(value)[warps]).view("u2").reshape(-1, 8, 4, 2)  # row, pair, half
            matrix = halves.reshape(-1, 8, 8)
            memory[places[:, i]] = matrix.transpose(0, 2, 1) if trans else matrix

    # ---- tensor cores

    @staticmethod
    def _numbers(words, kind: str, size: int = 4):
        """[..., n] words as fp32: [..., n, 2] of 16 bits, [..., n, 1] of tf32, whose last 13 bits are not read."""
        words = np.ascontiguousarray(words)
        if size == 2:
            return bf16_to_float32(words) if kind == "bf16" else words.view("f2").astype("f4")
        if kind == "tf32":
            return (words & np.uint32(0xFFFFE000)).view("f4")[..., None]
        halves = words.view("u2").reshape(*words.shape, 2)
        return bf16_to_float32(halves) if kind == "bf16" else halves.view("f2").astype("f4")

    def _left(self, registers, kind: str):
        """[warps, 16, K] from the four registers of each thread: row and column of 8 x 4 threads, rows, columns."""
        a = self._numbers(np.stack([self._warps(x) for x in registers], 2), kind)
        a = a.reshape(-1, 8, 4, 2, 2, a.shape[-1])  # warp, row, pair, half of K, half of the rows, half of the pair
        return a.transpose(0, 4, 1, 3, 2, 5).reshape(a.shape[0], 16, -1)

    def multiply(self, kind: str, left_, right_, held, t):
        """mma.sync of m16n8: layouts of PTX ISA 8.8, 9.7.14.5."""
        self._whole_warps(t, "mma")
        if len(left_) != 4:
            self.fail(f"mma with {len(left_)} registers of its left matrix")
        a = self._left(left_, kind)
        b = self._numbers(np.stack([self._warps(x) for x in right_], 2), kind)
        b = b.reshape(-1, 8, 4, 2, b.shape[-1]).transpose(0, 3, 2, 4, 1).reshape(len(a), -1, 8)
        return self._accumulate(np.matmul(a, b), held, 1, None)

    def _accumulate(self, product, held, warps: int, keep):
        """product [groups, 16 * warps, N] onto the accumulators of the threads, four for each eight columns."""
        columns = len(held) // 4
        out = product.reshape(-1, warps, 2, 8, columns, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6).reshape(self.lanes, -1)
        found = []
        for i, value in enumerate(held):
            before = np.broadcast_to(value, self.lanes).view("f4")
            if keep is not None:
                before = np.where(keep, before, np.float32(0))
            found.append((before + out[:, i]).view("u4"))
        return found

    def multiply_group(self, kind: str, shape, held, left_, right_, keep, transposed, t):
        """wgmma: four warps, matrices in shared memory by descriptors; PTX ISA 8.8, 9.7.15.5."""
        if t is not None and (t.reshape(-1, 128).any(1) != t.reshape(-1, 128).all(1)).any():
            self.fail("wgmma without all threads of four warps")
        _, N, K = shape
        b = self._described(right_, kind, N, K, transposed[1], t)
        if isinstance(left_, list):
            a = self._left(left_, kind).reshape(len(b), 64, K)
        else:
            a = self._described(left_, kind, 64, K, transposed[0], t)
        return self._accumulate(np.matmul(a, b.transpose(0, 2, 1)), held, 4, keep)

    def _described(self, descriptor, kind: str, rows: int, K: int, transposed: int, t):
        """[groups, rows, K] of a matrix in shared memory."""
        groups = self.lanes // 128
        d = np.broadcast_to(descriptor, self.lanes).reshape(groups, 128)
        active = np.arange(groups) if t is None else np.flatnonzero(t.reshape(groups, 128).any(1))
        d = d[active]
        if (d != d[:, :1]).any():
            self.fail("wgmma: threads with different descriptors")
        d = d[:, 0].astype(np.int64)
        swizzle = {0: 0, 1: 128, 2: 64, 3: 32}[int(d[0] >> 62 & 3)]
        out = np.zeros((groups, rows, K), "f4")
        out[active] = self._matrices(d, active * 128, kind, rows, K, transposed, swizzle)
        return out

    def _matrices(self, d, lanes, kind: str, rows: int, K: int, transposed: int, swizzle: int):
        """[len(d), rows, K] of matrices in the shared memory of some threads' blocks."""
        start, leading, stride = (((d >> s & 0x3FFF) << 4)[:, None, None] for s in (0, 16, 32))
        if ((d >> 49) & 7).any():
            self.fail("a descriptor of a matrix with a base offset")
        size = 4 if kind == "tf32" else 2
        n, k = np.arange(rows)[:, None], np.arange(K)[None]
        if not swizzle:
            if transposed:
                raise NotImplementedError("a transposed matrix without swizzle")
            offset = n // 8 * stride + n % 8 * 16 + k * size // 16 * leading + k * size % 16
        elif transposed:
            wide = swizzle // size
            offset = n // wide * leading + k // 8 * stride + k % 8 * swizzle + n % wide * size
        else:
            offset = n // 8 * stride + n % 8 * swizzle + k * size
        at = start + offset
        if swizzle:
            at = at ^ ((at >> 7) & (swizzle // 16 - 1)) << 4
        index = np.broadcast_to(lanes[:, None, None], at.shape).reshape(-1)
        memory, first = self._places("shared", index, at.reshape(-1), size, 1)
        return self._numbers(memory[first].astype("u4" if size == 4 else "u2"), kind, size).reshape(len(d), rows, K)

    # ---- sm_100: products in a memory of their own, PTX ISA 8.8, 9.7.16

    def _tensor_places(self, at, half: int, count: int, t):
        """(block, row, columns) of each active thread; the upper half of a warp reads ``half`` columns further."""
        self._whole_warps(t, "tcgen05")
        index, at = self._active(at, t)
        lane = self.special["%laneid"][index].astype(int)
        column = (at & 0xFFFF) + (lane >= 16) * half
        row = (at >> 16) + (lane % 16 if half else lane)
        if (row > 127).any() or (column + count > 512).any():
            self.fail("an address outside of the tensor memory")
        return index, self.block[index][:, None], row[:, None], column[:, None] + np.arange(count)

    def load_tensor(self, at, half: int, count: int, t):
        index, block, row, columns = self._tensor_places(at, half, count, t)
        found = np.zeros((count, self.lanes), "u4")
        found[:, index] = self.tensor[block, row, columns].T
        return list(found)

    def store_tensor(self, at, half: int, values, t) -> None:
        index, block, row, columns = self._tensor_places(at, half, len(values), t)
        self.tensor[block, row, columns] = np.stack([np.broadcast_to(v, self.lanes)[index] for v in values], 1)

    def multiply_tensor(self, to, left_, held: bool, right_, how, keep, t) -> None:
        """tcgen05.mma by one thread of a block. Row i of 64 is in lane i + i // 16 * 16, of 128 in lane i."""
        for lane, d, a, b, bits_, kept in self._each(t, to, left_, right_, how, keep):
            N, M = (bits_ >> 17 & 63) << 3, (bits_ >> 24 & 31) << 4
            kind = {0: "f16", 1: "bf16", 2: "tf32"}[bits_ >> 7 & 7]
            if bits_ >> 13 & 3 or bits_ >> 4 & 3 != 1 or M not in (64, 128):
                self.fail(f"tcgen05.mma: an instruction descriptor {bits_:#x}", lane)
            K, block = 8 if kind == "tf32" else 16, self.block[lane]
            rows = np.arange(M) + (np.arange(M) // 16 * 16 if M == 64 else 0)
            if held:
                words = self.tensor[
                    block, (a >> 16) + rows[:, None], (a & 0xFFFF) + np.arange(K // (1 if K == 8 else 2))
                ]
                left_matrix = self._numbers(words, kind).reshape(M, K)
            else:
                left_matrix = self._of_descriptor(a, lane, kind, M, K, bits_ >> 15 & 1)
            product = left_matrix @ self._of_descriptor(b, lane, kind, N, K, bits_ >> 16 & 1).T
            place = block, (d >> 16) + rows[:, None], (d & 0xFFFF) + np.arange(N)
            before = self.tensor[place].view("f4") if kept else np.float32(0)
            self.tensor[place] = (before + product).view("u4")

    def _of_descriptor(self, d: int, lane: int, kind: str, rows: int, K: int, transposed: int):
        swizzle = {0: 0, 2: 128, 4: 64, 6: 32}[d >> 61 & 7]
        d_ = np.array([d & (1 << 49) - 1], np.int64)
        return self._matrices(d_, np.array([lane]), kind, rows, K, transposed, swizzle)[0]
