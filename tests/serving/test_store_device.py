"""Transfers to a GPU, with streams and events that are only names: what waits for what, and where buffers lie."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fused_lora.serving.residency import packing
from fused_lora.serving.residency.arena import Arena
from fused_lora.serving.residency.transfer import CudaTransfer

GPU = torch.device("cuda", 1)  # not the current one


class Stream:
    def __init__(self, device):
        self.device, self.waited_for, self.events = torch.device(device), [], 0

    def record_event(self):
        self.events += 1
        return self.events

    def wait_event(self, event):
        self.waited_for.append(event)

    def wait_stream(self, other):
        pass

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
    assert current[1].waited_for == [1, 2] and not current[0].waited_for


def test_buffers_of_the_host_are_there_whatever_the_default_device(current, sent):
    transfer = CudaTransfer(GPU, torch.float32, None)
    with torch.device("meta"):
        staged = transfer.stage(sent.packed)
        transfer.send(sent.packed.parts, sent.packed, staged, sent.block, 0)
        fetched = transfer.fetch(sent.block, sent.packed.nbytes, ())
    assert staged.device.type == fetched.device.type == "cpu" and torch.equal(staged, fetched)
    A, B_t = sent.packed.parts[1].views(fetched, torch.float32)
    assert torch.equal(A, sent.packed.tensors[1][0]) and torch.equal(B_t.t(), sent.packed.tensors[1][1])
