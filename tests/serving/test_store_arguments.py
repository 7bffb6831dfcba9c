"""The store's public calls under the worst arguments: an error that names the argument, and nothing has changed."""

import contextvars
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from fused_lora import AdapterStore
from fused_lora.modules.inject import AdapterNotFound
from helpers.seeds import shifted
from helpers.waiting import HANG

K, N = 16, 8


def factors(r=2, seed=0):
    draw = torch.Generator().manual_seed(shifted(seed))
    return torch.randn(r, K, generator=draw), torch.randn(N, r, generator=draw)


@pytest.fixture
def store():
    found = AdapterStore(nn.Sequential(nn.Linear(K, N)).eval(), capacity_bytes=1 << 16)
    found.load("good", {"0": (*factors(), 0.5)})
    return found


@pytest.fixture
def unchanged(store):
    """Fails unless the store is after the test what it was before."""
    x = torch.randn(1, 3, K)

    def state():
        stats = {key: value for key, value in store.stats().items() if key not in ("hits", "misses")}
        with store.batch(["good"]):
            return stats, store.versions(), store.identity("good"), store.model(x).tolist()

    before = state()
    yield
    assert state() == before


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda A, B, s: (A[:, :-1], B, s), ValueError, r"source\['0'\].*A \[r, 16\]"),
        (lambda A, B, s: (B, A, s), ValueError, r"source\['0'\].*A \[r, 16\]"),
        (lambda A, B, s: (A[0], B, s), ValueError, r"source\['0'\].*A \[r, 16\]"),
        (lambda A, B, s: (A[:1], B, s), ValueError, r"source\['0'\].*one rank"),
        (lambda A, B, s: (A[:0], B[:, :0], s), ValueError, r"source\['0'\].*rank of 1 to"),
        (lambda A, B, s: (A.int(), B, s), TypeError, r"source\['0'\].*floating"),
        (lambda A, B, s: (A.to(torch.complex64), B, s), TypeError, r"source\['0'\].*floating"),
        (lambda A, B, s: (A.numpy(), B, s), TypeError, r"source\['0'\].*floating"),
        (lambda A, B, s: (A.to("meta"), B, s), TypeError, r"source\['0'\].*sparse or meta"),
        (lambda A, B, s: (A, B.to_sparse(), s), TypeError, r"source\['0'\].*sparse or meta"),
        (lambda A, B, s: (A / 0, B, s), ValueError, r"source\['0'\].*A has values that are not finite"),
        (lambda A, B, s: (A, B * float("nan"), s), ValueError, r"source\['0'\].*B has values that are not finite"),
        (lambda A, B, s: (A.double() * 1e300, B, s), ValueError, r"source\['0'\].*not finite in torch.float32"),
        (lambda A, B, s: (A, B, float("inf")), ValueError, r"source\['0'\].*finite scaling"),
        (lambda A, B, s: (A, B, 1e300), ValueError, r"source\['0'\].*finite scaling"),
        (lambda A, B, s: (A, B, 10**400), ValueError, r"source\['0'\].*finite scaling"),
        (lambda A, B, s: (A, B, "1"), TypeError, r"source\['0'\].*number as scaling"),
        (lambda A, B, s: (A, B, torch.tensor(1.0)), TypeError, r"source\['0'\].*number as scaling"),
        (lambda A, B, s: (A, B), TypeError, r"source\['0'\].*\(A, B, scaling\)"),
    ],
)
def test_tensors(store, unchanged, change, error, message):
    for name in ("new", "good"):
        with pytest.raises(error, match=message):
            store.load(name, {"0": change(*factors(), 0.5)})


@pytest.mark.parametrize(
    "source, error",
    [
        (None, TypeError),
        (b"folder", TypeError),
        ([1], TypeError),
        ({}, ValueError),
        ({"1": 0}, ValueError),
        ({("0",): 0}, ValueError),
        ("", ValueError),
        ("a\0b", ValueError),
        ("/nonexistent/adapter", ValueError),
        (nn.Linear(K, N), ValueError),
    ],
)
def test_sources(store, unchanged, source, error):
    with pytest.raises(error, match="source|folder"):
        store.load("new", source)
    with pytest.raises(error, match="source|folder"):
        store.load_async("new", source).result(30)
    if source in (None, "", "a\0b"):
        with pytest.raises(error, match="source"):
            store.register("new", source)


def test_layouts_of_tensors_make_no_difference(store):
    A, B = factors(3, 1)
    x = torch.randn(2, 3, K)
    with store.batch([None]), torch.inference_mode():
        inference = A.clone()
    answers = []
    for ours in (A, A.t().contiguous().t(), A.clone().requires_grad_(), nn.Parameter(A), inference, A.double()):
        store.load("new", {"0": [ours, B.t().contiguous().t(), 2]})
        with store.batch(["new", None]):
            answers.append(store.model(x))
    assert all(torch.equal(answers[0], other) for other in answers)


MALFORMED = ["", "a b", "../up", "a/b/c", "a/..", "x" * 257, "a\n"]


@pytest.mark.parametrize("name", [None, 1, b"good", ["good"], {}, 1.5, *MALFORMED])
def test_names(store, unchanged, name):
    text = isinstance(name, str)
    for call in (store.unload, store.pin, store.unpin, store.identity, store.lease):
        with pytest.raises(AdapterNotFound if text else TypeError, match="name: expected a str|' not found"):
            call(name)
    for call, source in ((store.load, {"0": (*factors(), 1.0)}), (store.register, "somewhere")):
        with pytest.raises(ValueError if text else TypeError, match="adapter_name"):
            call(name, source)


@pytest.mark.parametrize(
    "names, error, message",
    [
        (iter(["good"]), TypeError, "names: expected a list"),
        (np.array(["good"]), TypeError, "names: expected a list"),
        ("good", TypeError, "names: expected a list"),
        ([], ValueError, "names: expected one entry"),
        (["nope"], AdapterNotFound, "'nope' not found"),
        ([{"good": 1, "nope": 1}], AdapterNotFound, "'nope' not found"),
        ([True], TypeError, r"names\[0\]"),
        ([{3: 1}], TypeError, r"names\[0\].*names as keys"),
        ([{"good": float("nan")}], ValueError, r"names\[0\].*finite weight"),
        ([None, {"good": 10**400}], ValueError, r"names\[1\].*finite weight"),
        ([{"good": np.float32(1)}], TypeError, r"names\[0\].*number"),
        ([None, {"good": 1e300}], ValueError, r"names\[1\].*times the scaling"),
    ],
)
def test_entries(store, unchanged, names, error, message):
    with pytest.raises(error, match=message), store.batch(names):
        raise AssertionError("the batch was entered")


@pytest.mark.parametrize(
    "rows, error",
    [
        *((rows, TypeError) for rows in (None, 3, "3", {0: 3}, [1.5], torch.tensor([0.0]))),
        *((rows, ValueError) for rows in ([10**30], [1, 2], [-1], torch.tensor([0, 1]), np.uint64([2**64 - 1]))),
    ],
)
def test_rows(store, unchanged, rows, error):
    with pytest.raises(error, match="rows: "), store.batch_rows(["good"], rows):
        raise AssertionError("the batch was entered")


def test_buffers(store, unchanged):
    with pytest.raises(TypeError, match="buffers: "), store.batch_rows(["good"], [1], "buffers"):
        raise AssertionError("the batch was entered")
    for sizes, error in (((0, 1, 1), ValueError), ((1, 1.0, 1), TypeError), ((1, 1, "2"), TypeError)):
        with pytest.raises(error, match="max_"):
            store.row_buffers(*sizes)


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(device="nonsense"), ValueError),
        (dict(device="meta"), ValueError),
        (dict(device=3), TypeError),
        *((dict(max_resident=value), ValueError) for value in (0, 10**12)),
        *((dict(capacity_bytes=value), ValueError) for value in (0, 10**30)),
        *((dict(host_bytes=value), ValueError) for value in (-1, 1 << 63)),
        *((dict(grow=value), ValueError) for value in (0, 1 << 63)),
        *((dict(capacity_bytes=value), TypeError) for value in ("1", 1.5)),
        (dict(max_resident=None), TypeError),
        (dict(grow=True), TypeError),
        *((dict(dtype=value), TypeError) for value in ("float32", torch.int8)),
    ],
)
def test_options(options, error):
    model = nn.Sequential(nn.Linear(K, N))
    with pytest.raises(error, match=next(iter(options))):
        AdapterStore(model, **options)
    assert not model._forward_pre_hooks and not model[0]._forward_hooks


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there():
    with pytest.raises(RuntimeError, match="device: cuda was asked for"):
        AdapterStore(nn.Sequential(nn.Linear(K, N)), device="cuda")


def test_a_lease_of_another_store(store, unchanged):
    other = AdapterStore(nn.Sequential(nn.Linear(K, N)))
    other.load("good", {"0": (*factors(seed=1), 0.5)})
    with other.lease("good") as lease:
        with pytest.raises(ValueError, match="names: the lease of 'good@1' is one of another store"):
            with store.batch([None, lease]):
                raise AssertionError("the batch was entered")
        assert other.stats()["in_use"] == 1
    assert other.stats()["in_use"] == 0


def test_memory_that_is_not_there():
    """An allocator that gives nothing leaves the store as it was."""
    store = AdapterStore(nn.Sequential(nn.Linear(K, N)), capacity_bytes=1 << 60)
    with pytest.raises(RuntimeError, match="memory"):
        store.load("a", {"0": (*factors(), 0.5)})
    assert store.names() == [] and store.stats()["bytes_used"] == store.stats()["bytes_reserved"] == 0


def test_a_capacity_beyond_all_sizes_is_refused_when_it_is_asked_for(store):
    """Not by the load that would have to take it."""
    for nbytes in (10**30, (1 << 63) - 1):
        with pytest.raises(ValueError, match="nbytes: expected a capacity of at most"):
            store.grow(nbytes)
    assert store.stats()["capacity"] == 1 << 16


@pytest.mark.parametrize("names", [["good"], [None]])
def test_detach_waits_for_no_batch(store, names):
    """A batch of base rows alone runs through the hooks as well."""
    with store.batch(names):
        with pytest.raises(RuntimeError, match="detach: the store is in use"):
            store.detach()
        store.model(torch.randn(1, 2, K))
    with pytest.raises(ValueError), store.batch([None, None, None]):
        store.model(torch.randn(2, 2, K))  # a batch that ends in an error has ended
    store.detach()
    with pytest.raises(RuntimeError, match="detached"), store.batch(names):
        raise AssertionError("the batch was entered")


def test_a_load_that_outlasts_the_store_leaves_nothing(store, monkeypatch):
    from fused_lora.serving.residency import registry

    started, go, original = threading.Event(), threading.Event(), registry.from_tensors

    def slow(*args):
        packed = original(*args)
        started.set()
        go.wait(HANG)
        return packed

    monkeypatch.setattr(registry, "from_tensors", slow)
    with ThreadPoolExecutor(1) as thread:
        loading = thread.submit(store.load, "late", {"0": (*factors(), 0.5)})
        assert started.wait(HANG)
        store.detach()
        go.set()
    with pytest.raises(RuntimeError, match="^the store has been detached from its model$"):
        loading.result()
    assert store.names() == [] and store.stats()["bytes_used"] == store.stats()["bytes_reserved"] == 0


@torch.no_grad()
def test_a_plain_thread_is_not_in_the_batch(store):
    """Documented: a batch holds for the context that entered it; copy_context hands it on."""
    x = torch.randn(1, 2, K)
    base = store.model(x)
    with store.batch(["good"]), ThreadPoolExecutor(1) as thread:
        served, handed = store.model(x), contextvars.copy_context()
        assert torch.equal(thread.submit(store.model, x).result(HANG), base)
        assert torch.equal(thread.submit(handed.run, store.model, x).result(HANG), served)
    assert not torch.equal(base, served)


@torch.no_grad()
def test_a_batch_that_only_other_threads_ran_in_is_warned_of(store):
    """Its outputs are the base model's, as after generate_batch, which runs the model in a thread of its own."""
    x = torch.randn(1, 2, K)
    with ThreadPoolExecutor(1) as thread:
        with pytest.warns(UserWarning, match="called meanwhile, but not in this batch"), store.batch(["good"]):
            thread.submit(store.model, x).result(HANG)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for inside in (store.model, lambda x: None, store.model[0]):
                with store.batch(["good"]):
                    inside(x)
            with store.batch([None]):
                thread.submit(store.model, x).result(HANG)
