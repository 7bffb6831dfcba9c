"""How programs of one launch that share a result find the last of them: integer counters, zero before and after it.

Nobody waits: of the programs that share a result the last one to arrive learns that the others are done, and may load
what they stored. The barrier of a program comes between its stores and its arrival, and between that and its loads:
one thread does the atomic, all threads move the data.

``counters`` hands out the memory. It is zeroed once in a process and every kernel leaves it zero, so no launch has to
be preceded by a memset and a captured graph can be replayed.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl

_BLOCK = 1 << 18  # counters that are zeroed at a time, 1 MiB
_lock = threading.Lock()
_blocks: list[torch.Tensor] = []  # all of them for good: a captured graph holds addresses, no tensors
_free: dict[torch.device, torch.Tensor] = {}  # what is left of the newest block
_of_stream: dict[tuple, torch.Tensor] = {}


@triton.jit
def last_to_arrive(counter_ptr, expected):
    """Whether this is the last of ``expected`` programs to come here; it may load what the others stored before.

    The counter starts at 0 and is 0 again when the last one has passed.
    """
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    last = before == expected - 1
    if last:
        tl.atomic_xchg(counter_ptr, 0, sem="relaxed")
    return last


def counters(count: int, device: torch.device) -> torch.Tensor:
    """At least ``count`` int32 zeros on ``device`` for the next launch on its current stream, which leaves them zero.

    Launches of one stream follow each other and share theirs. A launch that is captured into a CUDA graph gets its own
    for good: graphs may be replayed beside each other and beside other work.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    index = torch.cuda.current_device() if device.index is None else device.index
    key, capturing = (index, _stream(index)), torch.cuda.is_current_stream_capturing()
    held = _of_stream.get(key)
    if capturing or held is None or held.numel() < count:
        with _lock:
            held = _take(count if capturing else max(count, 1024), torch.device("cuda", index), capturing)
            if not capturing:
                _of_stream[key] = held
    return held


def _stream(index: int) -> int:
    """The device's current stream, as Triton asks for it: torch.cuda.current_stream makes an object of it."""
    return torch._C._cuda_getCurrentRawStream(index)


def _take(count: int, device: torch.device, capturing: bool) -> torch.Tensor:
    count = -(-count // 4) * 4  # whole 16 bytes: what follows is aligned, as the kernels were compiled for
    free = _free.get(device)
    if free is None or free.numel() < count:
        if capturing:
            return torch.zeros(count, dtype=torch.int32, device=device)  # the graph zeroes it at every replay
        # pools of graphs take what a stream (torch.cuda.graph) or a thread (inductor's warm-up) allocates: use neither
        with ThreadPoolExecutor(1) as thread:
            free = thread.submit(_zeros, max(count, _BLOCK), device).result()
        _blocks.append(free)
    _free[device] = free[count:]
    return free[:count]


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        block = torch.zeros(count, dtype=torch.int32, device=device)
    side.synchronize()
    return block
