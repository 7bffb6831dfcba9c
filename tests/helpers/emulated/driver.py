"""A driver of Triton whose device is this process: kernels compile for a chip as ever, up to PTX, which is emulated."""

from __future__ import annotations

import gc
import struct

import numpy as np
import torch

from stub_driver import take_cpu_tensors

from ..seeds import shifted
from .machine import Machine
from .program import Program, translate

_LANES = 1 << 13  # threads that advance together
_FLOATS = {"fp16": "e", "fp32": "f", "f32": "f", "fp64": "d"}


class Spans:
    """The memory of a launch's tensors. An address that is none of an argument's may come out of a table in memory:
    it has to belong to some tensor that lives."""

    def __init__(self, tensors):
        self.storages = {}
        for tensor in tensors:
            self._add(tensor)
        self._sort()
        self.searched = False

    def _add(self, tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self.storages[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()

    def _sort(self) -> None:
        self.starts = np.array(sorted(self.storages), np.int64)
        self.ends = np.array([self.storages[s] for s in sorted(self.storages)], np.int64)

    def outside(self, at: np.ndarray, size: int) -> int | None:
        """The first address that belongs to no tensor."""
        bad = self._outside(at, size)
        if bad is not None and not self.searched:
            self.searched = True
            for found in gc.get_objects():
                if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
                    if found.layout == torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(found):
                        self._add(found)
            self._sort()
            bad = self._outside(at, size)
        return bad

    def _outside(self, at, size):
        if not len(self.starts):
            return 0
        i = np.searchsorted(self.starts, at, "right") - 1
        inside = (i >= 0) & (at + size <= self.ends[np.maximum(i, 0)])
        return None if inside.all() else int(inside.argmin())


def _pack(kind: str, value) -> bytes:
    if kind.startswith("*"):
        return (0 if value is None else value if isinstance(value, int) else value.data_ptr()).to_bytes(8, "little")
    if kind in _FLOATS:
        return struct.pack(_FLOATS[kind], value) + bytes(8)
    return (int(value) & (1 << 64) - 1).to_bytes(8, "little")


def _flat(kinds, values):
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


class _Launcher:
    def __init__(self, source, metadata):
        self.kinds = list(source.signature.values())
        self.shared, self.scratch = metadata.shared, metadata.global_scratch_size

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *values):
        program: Program = EmulatedDriver.programs[function]
        arguments = list(_flat(self.kinds, values))
        tensors = [value for _, value in arguments if isinstance(value, torch.Tensor)]
        held = [torch.full((max(1, x * y * z * self.scratch),), 0x5A, dtype=torch.uint8)]
        spans = Spans([*tensors, *held])
        parameters = [_pack(kind, value) for kind, value in arguments] + [_pack("*", held[0]), bytes(8)]
        grid = np.stack(np.unravel_index(np.arange(x * y * z), (z, y, x))[::-1], 1)
        together = max(1, _LANES // program.threads)
        rng = EmulatedDriver.active.rng
        for start in range(0, len(grid), together):
            blocks = grid[start : start + together]
            Machine(program, parameters, blocks, (x, y, z), self.shared, spans, rng).run()


class _Utils:
    def load_binary(self, name, kernel, shared, device):
        function = len(EmulatedDriver.programs) + 1
        EmulatedDriver.programs[function] = translate(kernel.decode() if isinstance(kernel, bytes) else kernel)
        return function, function, 0, 0, 1024

    def unload_module(self, module) -> None:
        EmulatedDriver.programs.pop(module)

    def get_device_properties(self, device) -> dict:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class EmulatedDriver:
    """What triton.runtime.driver asks of a driver; ``rng`` draws the order of the warps, None lets all go together."""

    programs: dict[int, Program] = {}
    active: EmulatedDriver

    def __init__(self, capability: int, rng=None):
        from triton.backends.compiler import GPUTarget

        self.utils, self.launcher_cls, self.rng = _Utils(), _Launcher, rng
        self.target, self.capability = GPUTarget("cuda", capability, 32), divmod(capability, 10)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device) -> None:
        pass

    def get_current_stream(self, device) -> int:
        return 0

    def get_device_capability(self, device=0):
        return self.capability

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        raise NotImplementedError("an emulated device has no clock")


def emulate(capability: int, order: int = -1) -> EmulatedDriver:
    """For the rest of the process kernels compile for ``capability`` and run here, on tensors of the CPU.

    It has to come as early as ``take_cpu_tensors``.
    """
    from triton.backends import backends

    class Backend(backends["nvidia"].compiler):
        """Up to PTX: what comes after it needs a chip."""

        def __init__(self, target):
            super().__init__(target)
            self.binary_ext = "ptx"

        def add_stages(self, stages, options, *language):
            super().add_stages(stages, options, *language)
            del stages["cubin"]

        def hash(self):
            return f"{super().hash()} emulated"

    backends["nvidia"] = type(backends["nvidia"])(Backend, backends["nvidia"].driver)
    EmulatedDriver.active = EmulatedDriver(capability, None if order < 0 else np.random.default_rng(shifted(order)))
    take_cpu_tensors(EmulatedDriver.active, capability)

    from fused_lora.kernels import launch

    launch._KNOWN = False  # a kept launch passes addresses, of which nobody knows how far they go
    return EmulatedDriver.active
