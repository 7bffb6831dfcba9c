"""The access checker behind ``interpreter.checked``: which argument each pointer may access, and who accessed it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from .ordering import SEVERAL, HappensBefore


class AccessError(RuntimeError):
    """A kernel touched memory outside its argument, or two programs of one launch are in conflict."""


@dataclass
class AccessReport:
    """What ``checked`` has counted so far. ``active`` is False if kernels run natively and nothing is checked."""

    active: bool = True
    launches: int = 0
    programs: int = 0
    loaded: int = 0
    stored: int = 0
    updated: int = 0  # lanes of atomics

    @property
    def lanes(self) -> int:
        return self.loaded + self.stored + self.updated


class _Extent:
    """The elements of one tensor, as addresses."""

    def __init__(self, name: str, tensor: torch.Tensor):
        self.name = name
        self.base = tensor.data_ptr()
        self.itemsize = tensor.element_size()
        self.storage = tensor.untyped_storage().data_ptr()
        self.storage_bytes = tensor.untyped_storage().nbytes()
        dims = sorted((st, size) for size, st in zip(tensor.shape, tensor.stride(), strict=True) if size > 1 and st)
        self.empty = tensor.numel() == 0
        self.end = self.base + (sum((size - 1) * st for st, size in dims) + 1) * self.itemsize
        self.dense, reach = True, 1
        for stride, size in dims:
            self.dense &= stride <= reach
            reach = (size - 1) * stride + reach
        self.dims = dims[::-1]

    def contains(self, address: np.ndarray, width: int) -> np.ndarray:
        inside = (address >= np.uint64(self.base)) & (address <= np.uint64(max(self.end - width, 0)))
        if self.empty:
            return np.zeros_like(inside)
        if self.dense or width != self.itemsize:
            return inside
        left, remainder = np.divmod(address - np.uint64(self.base), np.uint64(self.itemsize))
        inside &= remainder == 0
        for stride, size in self.dims:
            index = np.minimum(left // np.uint64(stride), np.uint64(size - 1))
            left = left - index * np.uint64(stride)
        return inside & (left == 0)


class _OwnedPointer(tl.pointer_type):
    """A pointer type that remembers its argument. The interpreter keeps the type through arithmetic."""

    def __init__(self, plain: tl.pointer_type, extent: _Extent):
        super().__init__(plain.element_ty, plain.address_space, plain.const)
        self.extent = extent


def _tensors_in(argument, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    argument = interpreter._unwrap_tensor(argument)
    if isinstance(argument, tuple):
        for i, part in enumerate(argument):
            yield from _tensors_in(part, f"{name}[{i}]")
    elif isinstance(argument, interpreter.TensorDescriptor):
        yield from _tensors_in(argument.base, name)
    elif isinstance(argument, torch.Tensor):
        yield name, argument


def _active(pointers, mask: np.ndarray | None) -> np.ndarray:
    """The addresses of the active lanes of an access."""
    address = np.asarray(pointers.data).astype(np.uint64, copy=False).ravel()
    if mask is None:
        return address
    return address[np.broadcast_to(mask, pointers.data.shape).ravel().astype(bool, copy=False)]


class AccessChecker:
    """Replaces the interpreter's memory operations inside ``installed()``. See ``interpreter.checked``."""

    def __init__(self, races: bool, extra: Sequence[torch.Tensor]):
        self.report = AccessReport()
        self.races = races
        self.extra = [_Extent(f"extra[{i}]", t) for i, t in enumerate(extra)]
        self.extents: list[_Extent] = []
        self.writer: dict[int, np.ndarray] = {}
        self.reader: dict[int, np.ndarray] = {}
        self.order = HappensBefore()
        self.position = (0, 0, 0)
        self.violation: AccessError | None = None
        self.in_atomic = False

    def start_launch(self, names: Sequence[str], args, kwargs) -> None:
        named = [*zip(names, args, strict=False), *kwargs.items()]
        self.extents = [_Extent(n, t) for name, a in named for n, t in _tensors_in(a, name)] + self.extra
        self.writer, self.reader, self.order, self.violation = {}, {}, HappensBefore(), None
        self.report.launches += 1

    def start_program(self, *position: int) -> None:
        self.order.start_program()
        self.position = position
        self.report.programs += 1

    def own(self, tensor: torch.Tensor, handle) -> None:
        """Attach to a freshly made pointer the extent of the argument it stands for."""
        tensor = interpreter._unwrap_tensor(tensor)
        layout = (tensor.data_ptr(), tensor.shape, tensor.stride())
        name = next((e.name for e in self.extents if e.base == layout[0]), "argument")
        handle.dtype = _OwnedPointer(handle.dtype, _Extent(name, tensor))

    def fail(self, message: str) -> None:
        self.violation = AccessError(f"program {self.position}: {message}")
        raise self.violation

    def check(self, kind: str, pointers, mask: np.ndarray | None) -> int:
        """Check the active lanes of one access and return their number."""
        address = _active(pointers, mask)
        if address.size == 0:
            return 0
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        extent = getattr(pointers.dtype, "extent", None)
        candidates = self.extents if extent is None else [extent]
        homes = [e.contains(address, width) for e in candidates]
        inside = np.logical_or.reduce(homes) if homes else np.zeros(address.shape, bool)
        if not inside.all():
            bad = address[~inside]
            where = "of every tensor argument"
            if extent is not None:
                offset = (int(bad[0]) - extent.base) / extent.itemsize
                where = f"{extent.name} (first bad lane at element offset {offset:g} from its start)"
            self.fail(f"{kind} outside {where}: {bad.size} of {address.size} active lanes")
        if self.races and not self.in_atomic:
            for home, owner in zip(homes, candidates, strict=True):
                # every lane once, also where two arguments overlap
                self.track(kind, owner, address[home & inside])
                inside &= ~home
        return address.size

    def synchronise(self, pointers, mask: np.ndarray | None, semantic) -> None:
        """An atomic on these addresses: what the program learns from it and tells by it."""
        if semantic == interpreter._ir.MEM_SEMANTIC.ACQUIRE_RELEASE:
            self.order.atomic(_active(pointers, mask))

    def track(self, kind: str, extent: _Extent, address: np.ndarray) -> None:
        if address.size == 0:
            return
        index = (address - np.uint64(extent.storage)).astype(np.int64)
        writer, reader = self._map(self.writer, extent), self._map(self.reader, extent)
        if self.order.conflicts(writer[index]):
            self.fail(f"{kind} of an element of {extent.name} that another program of the launch has stored")
        if kind == "load":
            before = reader[index]
            reader[index] = np.where((before == 0) | self.order.own(before), self.order.interval, SEVERAL)
        elif kind == "store":
            if self.order.conflicts(reader[index]):
                self.fail(f"store to an element of {extent.name} that another program of the launch has loaded")
            lanes = np.arange(1, index.size + 1, dtype=np.int32)
            writer[index] = lanes
            if (writer[index] != lanes).any():
                self.fail(f"two lanes of one store on the same element of {extent.name}")
            writer[index] = self.order.interval

    def _map(self, maps: dict[int, np.ndarray], extent: _Extent) -> np.ndarray:
        if extent.storage not in maps:
            maps[extent.storage] = np.zeros(extent.storage_bytes, np.int32)
        return maps[extent.storage]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        replaced = [(builder, n, m) for n, m in _builder_methods(self).items() if hasattr(builder, n)]
        replaced += [(executor, n, m) for n, m in _executor_methods(self).items()]
        replaced += [(interpreter, "_implicit_cvt", _owning_convert(self))]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        for owner, name, method in replaced:
            setattr(owner, name, method)
        try:
            yield
        finally:
            for owner, name, method in before:
                setattr(owner, name, method)


def _owning_convert(checker: AccessChecker):
    original = interpreter._implicit_cvt

    def convert(argument):
        value = original(argument)
        if hasattr(argument, "data_ptr"):
            checker.own(argument, value.handle)
        return value

    return convert


def _executor_methods(checker: AccessChecker) -> dict:
    init_args, call = interpreter.GridExecutor._init_args_hst, interpreter.GridExecutor.__call__

    def _init_args_hst(executor, args, kwargs):
        host_args, host_kwargs = init_args(executor, args, kwargs)
        checker.start_launch(executor.arg_names, host_args, host_kwargs)
        return host_args, host_kwargs

    def __call__(executor, *args, **kwargs):
        try:
            return call(executor, *args, **kwargs)
        except interpreter.InterpreterError:
            if checker.violation is not None:
                violation, checker.violation = checker.violation, None
                raise violation from None
            raise

    return {"_init_args_hst": _init_args_hst, "__call__": __call__}


def _builder_methods(checker: AccessChecker) -> dict:
    builder, report = interpreter.InterpreterBuilder, checker.report
    original = {name: getattr(builder, name) for name in dir(builder)}

    def create_masked_load(self, ptrs, mask, *rest, **named):
        report.loaded += checker.check("load", ptrs, mask.data)
        return original["create_masked_load"](self, ptrs, mask, *rest, **named)

    def create_masked_store(self, ptrs, value, mask, *rest, **named):
        report.stored += checker.check("store", ptrs, mask.data)
        return original["create_masked_store"](self, ptrs, value, mask, *rest, **named)

    def create_atomic_rmw(self, op, ptr, value, mask, sem, *rest, **named):
        report.updated += checker.check("atomic", ptr, mask.data)
        checker.synchronise(ptr, mask.data, sem)
        return original["create_atomic_rmw"](self, op, ptr, value, mask, sem, *rest, **named)

    def create_atomic_cas(self, ptr, cmp, value, sem, *rest, **named):
        report.updated += checker.check("atomic", ptr, None)
        checker.synchronise(ptr, None, sem)
        return original["create_atomic_cas"](self, ptr, cmp, value, sem, *rest, **named)

    def create_barrier(self, *rest, **named):
        checker.order.barrier()
        return original["create_barrier"](self, *rest, **named)

    def without_races(name):
        def method(self, *args, **named):
            before, checker.in_atomic = checker.in_atomic, True
            try:
                return original[name](self, *args, **named)
            finally:
                checker.in_atomic = before

        return method

    def create_select(self, condition, lhs, rhs):
        out = original["create_select"](self, condition, lhs, rhs)
        if isinstance(out.dtype, _OwnedPointer) and getattr(lhs.dtype, "extent", None) is not out.dtype.extent:
            out.dtype = tl.pointer_type(out.dtype.element_ty, out.dtype.address_space, out.dtype.const)
        return out

    def set_grid_idx(self, x, y, z):
        checker.start_program(x, y, z)
        return original["set_grid_idx"](self, x, y, z)

    methods = {m.__name__: m for m in (
        create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas, create_barrier, create_select,
        set_grid_idx,
    )}  # fmt: skip
    atomics = ("create_atomic_load", "create_atomic_store", "create_atomic_poll")
    return methods | {name: without_races(name) for name in atomics if name in original}
