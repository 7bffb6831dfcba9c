"""Transfers to a GPU, with streams and events that are only names: what waits for what, and where buffers lie."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fused_lora.ops import guard
from fused_lora.serving import AdapterStore
from fused_lora.serving.batch.static import RowBuffers
from fused_lora.serving.residency import packing
from fused_lora.serving.residency.arena import Arena
from fused_lora.serving.residency.transfer import CudaTransfer

GPU = torch.device("cuda", 1)  # not the current one


class Stream:
    def __init__(self, device):
        self.device, self.waited_for, self.events, self.streams = torch.device(device), [], 0, []

    def record_event(self):
        self.events += 1
        return self.events

    def wait_event(self, event):
        self.waited_for.append(event)

    def wait_stream(self, other):
        self.streams.append(other)

    def synchronize(self):
        pass


class Unpinned(TorchFunctionMode):
    """Pinned memory is plain memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **{name: value for name, value in (kwargs or {}).items() if name != "pin_memory"})


@pytest.fixture
def current(monkeypatch):
    """The current stream of each of two GPUs, of which number 0 is the current one."""
    streams = {0: Stream("cuda:0"), 1: Stream("cuda:1")}
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: streams[device.index if device else 0])
    with Unpinned():
        yield streams


@pytest.fixture
def sent():
    """An adapter of two layers, and memory for it."""
    sites = {str(i): packing.Site(i, str(i), nn.Linear(16, 24), 16, 24) for i in range(2)}
    packed = packing.from_tensors(
        sites, {path: (torch.randn(4, 16), torch.randn(24, 4), 0.5) for path in sites}, torch.float32
    )
    block = Arena(torch.device("cpu"), 4096).allocate(packed.nbytes)
    return SimpleNamespace(packed=packed, block=block)


def test_a_step_waits_on_the_device_of_the_adapter(current, sent):
    transfer = CudaTransfer(GPU, torch.float32, None)
    arrival = transfer.send(sent.packed.parts, sent.packed, transfer.stage(sent.packed), sent.block, 0)
    arrival.wait(0)
    arrival.wait_for_all()
    assert current[1].waited_for == [2, 3] and not current[0].waited_for


def test_a_layer_without_terms_waits_for_the_tables(current, sent):
    """Until they are written the slot's row there is that of an adapter that was evicted."""
    transfer = CudaTransfer(GPU, torch.float32, None)
    arrival = transfer.send(sent.packed.parts, sent.packed, transfer.stage(sent.packed), sent.block, 0)
    arrival.wait(2)
    assert current[1].waited_for == [1]


def test_the_caller_goes_on_after_its_tensors_are_copied(current, sent):
    """It may train them further, or free them, as soon as the load returns."""
    transfer = CudaTransfer(GPU, torch.float32, None)
    transfer.send(sent.packed.parts, sent.packed, transfer.stage(sent.packed), sent.block, 0)
    assert not current[1].waited_for
    transfer.send(sent.packed.parts, sent.packed, None, sent.block, 0)  # tensors on a GPU are not staged
    assert current[1].waited_for == [transfer._stream.events] == [6]


def test_a_load_in_another_thread_is_on_the_callers_stream(current, monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "stream", lambda s: entered.append(s) or contextlib.nullcontext())
    work = CudaTransfer(GPU, torch.float32, None).on_this_stream(lambda a, b: a + b)
    assert not entered and work(1, b=2) == 3 and entered == [current[1]]


def test_the_end_of_a_batch_is_after_all_streams_that_it_ran_on(monkeypatch):
    store = AdapterStore(nn.Sequential(nn.Linear(16, 24)))
    side, current = Stream("cuda:1"), Stream("cuda:1")
    now = [side]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: now[0])
    with store.batch([None]) as batch:
        monkeypatch.setattr(store, "device", GPU)
        store.model(torch.randn(1, 16))
        [trace] = batch._traces.values()
        before = trace.rows
        store.model(torch.randn(1, 16))
        assert trace.rows is before
        now[0] = current
        store.model(torch.randn(1, 16))
        assert trace.rows is not before  # what a stream has copied another may not have yet
    assert current.streams == [side] and not side.streams and not batch._streams


def test_row_buffers_are_filled_after_the_streams_that_read_them(monkeypatch):
    """Another thread may fill them on a stream of its own, while the last batch's still runs on the device."""
    first, second = Stream("cuda:1"), Stream("cuda:1")
    buffers = RowBuffers(2, 1, 16, 1, SimpleNamespace(device=torch.device("cpu")))
    buffers.tables.device = GPU
    monkeypatch.setattr(guard, "capturing", lambda device: False)
    for stream in (first, second):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None, stream=stream: stream)
        buffers.free.acquire()
        buffers.fill(np.zeros(2, dtype=np.int32), [[(0, 1.0)]])
        buffers.release()
    assert not first.waited_for and second.waited_for == [first.events] and not buffers.free.locked()
    monkeypatch.setattr(guard, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="before the capture"):  # an event of before would break it off
        buffers.fill(np.zeros(2, dtype=np.int32), [[(0, 1.0)]])
    assert len(second.waited_for) == 1


def test_row_buffers_are_free_again_when_the_device_is_not(monkeypatch):
    buffers = RowBuffers(2, 1, 16, 1, SimpleNamespace(device=torch.device("cpu")))
    buffers.tables.device = GPU
    monkeypatch.setattr(guard, "capturing", lambda device: False)
    buffers.free.acquire()
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="launch failed"):
        broken.setattr(torch.cuda, "current_stream", mock.Mock(side_effect=RuntimeError("launch failed")))
        buffers.release()
    assert not buffers.free.locked()


@torch.no_grad()
def test_a_device_has_its_number(monkeypatch):
    """The current device of another thread, which loads, may be another one."""
    store = AdapterStore(nn.Sequential(nn.Linear(16, 24)), device="cpu:0")
    assert store.device == torch.device("cpu")
    store.load("a", {"0": (torch.randn(4, 16), torch.randn(24, 4), 0.5)})
    with store.batch(["a"]):
        store.model(torch.randn(1, 16))


@torch.no_grad()
def test_a_layer_on_another_device_is_refused(monkeypatch):
    """A kernel there would follow addresses of the store's device."""
    store = AdapterStore(nn.Sequential(nn.Linear(16, 24)))
    store.load("a", {"0": (torch.randn(4, 16), torch.randn(24, 4), 0.5)})
    monkeypatch.setattr(store, "device", torch.device("meta"))
    with store.batch(["a", None]), pytest.raises(RuntimeError, match="expected '0' to compute on meta, .* got cpu"):
        store.model(torch.randn(2, 16))
