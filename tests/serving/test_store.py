"""AdapterStore over a small plain model: what is computed, what may be asked, what stays where, what errors leave."""

import asyncio
import contextlib
import contextvars
import copy
import gc
import io
import json
import os
import pickle
import signal
import threading
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.adapters import AdapterError
from fused_lora.modules.inject import AdapterNotFound
from fused_lora.reference import bits
from fused_lora.serving import AdapterStore, StoreFull
from fused_lora.serving.residency import registry, residency
from fused_lora.serving.residency.arena import ALIGNMENT, Arena
from fused_lora.testing.numeric import assert_close
from helpers.interrupts import everywhere
from helpers.seeds import shifted
from helpers.waiting import HANG

K, H, N = 32, 48, 24


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(K, H), nn.Linear(H, N, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Experts(nn.Module):
    """All experts' weights in one parameter, as transformers has them."""

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.ones(4, K, H))


@pytest.fixture
def model():
    return Net().eval()


def adapter(r, seed, layers=("up", "down")):
    draw = torch.Generator().manual_seed(shifted(seed))
    shapes = {"up": (K, H), "down": (H, N)}
    return {
        path: (torch.randn(r, shapes[path][0], generator=draw), torch.randn(shapes[path][1], r, generator=draw), 0.5)
        for path in layers
    }


def nbytes(r):
    """What an adapter of rank r on both layers takes in the arena."""
    return -(-4 * r * (K + H + H + N) // ALIGNMENT) * ALIGNMENT


def folder(path, rank, seed, **config):
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (A, B, _) in adapter(rank, seed).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    save_file(tensors, path / "adapter_model.safetensors")
    entries = dict(peft_type="LORA", r=rank, lora_alpha=rank / 2, target_modules=["up", "down"]) | config
    (path / "adapter_config.json").write_text(json.dumps(entries))
    return path


def exact(model, x, members):
    """The model in float64 with weighted adapters added to its weights."""
    h = x.double()
    for path, relu in (("up", True), ("down", False)):
        layer = model.get_submodule(path)
        W = layer.weight.double()
        for tensors, weight in members:
            if path in tensors:
                A, B, scale = tensors[path]
                W = W + weight * scale * B.double() @ A.double()
        h = h @ W.T + (0 if layer.bias is None else layer.bias.double())
        h = h.relu() if relu else h
    return h


@torch.no_grad()
def assert_serves(model, x, out, members):
    """``out`` is within a few roundings of the float64 answer."""
    want = exact(model, x, members)
    assert (out - want).abs().max() <= 64 * torch.finfo(torch.float32).eps * want.abs().max()


def holding(model, capacity_bytes=None, **adapters):
    """A store that has loaded these."""
    store = AdapterStore(model, capacity_bytes=capacity_bytes)
    for name, tensors in adapters.items():
        store.load(name, tensors)
    return store


def answers(store, model, x, names):
    with store.batch(names):
        return model(x)


def test_each_sequence_runs_under_its_own_adapter(model):
    sql, poet = adapter(4, 1), adapter(64, 2, ["down"])
    store = holding(model, sql=sql, poet=poet)
    x = torch.randn(5, 7, K)
    with torch.no_grad():
        base = model(x)
    out = answers(store, model, x, ["sql", None, "poet", {"sql": 0.5, "poet": -2}, {}])
    for i, members in enumerate([[(sql, 1)], [], [(poet, 1)], [(sql, 0.5), (poet, -2)], []]):
        assert_serves(model, x[i], out[i], members)
    assert torch.equal(bits(out[[1, 4]]), bits(base[[1, 4]]))
    assert not out.requires_grad


def test_an_adapter_alone_gives_the_bits_it_gives_in_a_batch(model):
    store = holding(model, **{f"a{i}": adapter(r, i) for i, r in enumerate((1, 4, 7, 16, 16, 16, 64))})
    names = [f"a{i % 7}" for i in range(21)]
    # one call of the base layer for both: its own bits depend on the height of its input
    x = torch.randn(21, 3, K)
    together = answers(store, model.up, x, names)
    with torch.no_grad():
        base = model.up(x)
    for i in (0, 5, 20):
        mixed = [None] * 21
        mixed[i] = names[i]
        out = answers(store, model.up, x, mixed)
        assert torch.equal(out[i], together[i])
        rest = [j for j in range(21) if j != i]
        assert torch.equal(out[rest], base[rest])


def test_the_order_of_a_combination_does_not_matter(model):
    store = holding(model, a=adapter(4, 1), b=adapter(9, 2))
    x = torch.randn(2, 3, K)
    # at the same place: with several threads the base layer's own rows differ by theirs
    mixes = {"a": 0.3, "b": 0.7}, {"b": 0.7, "a": 0.3}
    one, other = (answers(store, model, x, [mix, None]) for mix in mixes)
    assert torch.equal(one, other)


def test_entries_repeat_for_beams_and_flattened_rows(model):
    tensors = adapter(4, 1)
    store, x = holding(model, a=tensors), torch.randn(6, 2, K)
    out = answers(store, model, x, ["a", None])
    assert_serves(model, x[:3], out[:3], [(tensors, 1)])
    assert_serves(model, x[3:], out[3:], [])
    flat = answers(store, model, x[:, 0], ["a", None])  # [sequences, K]: one token each
    assert_serves(model, x[:3, 0], flat[:3], [(tensors, 1)])
    with pytest.raises(ValueError, match="4 entries for a model batch of 6"):
        answers(store, model, x, ["a"] * 4)


def test_rows_that_are_not_the_batch_are_refused():
    class Picks(nn.Module):
        """Sends some tokens through a layer, as an expert does."""

        def __init__(self):
            super().__init__()
            self.up = nn.Linear(K, H)

        def forward(self, x):
            return self.up(x.reshape(-1, K)[:4])

    model = Picks().eval()
    store = holding(model, a=adapter(4, 1, ["up"]))
    with pytest.raises(ValueError, match="'up' got an input of shape"):
        answers(store, model, torch.randn(2, 5, K), ["a", None])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_token_rows_of_packed_requests(model, as_tensor):
    a, b = adapter(4, 1), adapter(9, 2)
    store, x = holding(model, a=a, b=b), torch.randn(1, 10, K)
    names, counts = ["b", None, "a", "a"], [3, 2, 0, 5]
    rows = torch.tensor(np.repeat(range(4), counts)) if as_tensor else counts
    with store.batch_rows(names, rows) as batch:
        out = model(x)[0]
    assert batch.identities == ["b@1", None, "a@1", "a@1"]
    assert_serves(model, x[0, :3], out[:3], [(b, 1)])
    assert_serves(model, x[0, 3:5], out[3:5], [])
    assert_serves(model, x[0, 5:], out[5:], [(a, 1)])
    with pytest.raises(ValueError, match="expected 10 rows"), store.batch_rows(names, rows):
        model(x[:, :9])


def test_gradients_are_refused_inside_a_batch(model):
    store = holding(model, a=adapter(4, 1))
    with store.batch(["a"]), torch.enable_grad(), pytest.raises(RuntimeError, match="does not train"):
        model(torch.randn(1, K))


def test_sources_give_the_same_adapter(model, tmp_path):
    plain = Net().eval()
    plain.load_state_dict(model.state_dict())
    live = fused_lora.inject(plain, fused_lora.LoraConfig(r=4, lora_alpha=2, target_modules=["up", "down"]))
    tensors = adapter(4, 1)
    with torch.no_grad():
        for path, (A, B, _) in tensors.items():
            layer = live.get_submodule(path)
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
    fused_lora.save_adapter(live, tmp_path / "saved")
    store = holding(model, tensors=tensors, live=live, files=tmp_path / "saved")
    store.register("cold", str(tmp_path / "saved"))
    store.load_async("async", tensors).result(30)
    x = torch.randn(1, 3, K).expand(5, 3, K)
    out = answers(store, model, x, ["tensors", "live", "files", "cold", "async"])
    assert all(torch.equal(out[0], out[i]) for i in range(5))
    with torch.no_grad():  # a copy: what the model learns later is not served
        live.up.lora_B["default"].weight.zero_()
    assert torch.equal(answers(store, model, x, ["live"] * 5)[0], out[0])


def test_a_peft_model_is_a_source(model):
    peft = pytest.importorskip("peft")
    plain = Net().eval()
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["up", "down"], init_lora_weights=False)
    live = peft.get_peft_model(plain, config, adapter_name="one").eval()
    live.add_adapter("two", config)
    store = AdapterStore(model)
    with pytest.raises(ValueError, match="several adapters"):
        store.load("x", live)
    assert store.load("two", live) == 1
    x = torch.randn(1, K)
    plain_state = {k.replace("base_layer.", ""): v for k, v in plain.state_dict().items() if "lora" not in k}
    model.load_state_dict(plain_state)
    live.set_adapter("two")
    with torch.no_grad():
        assert_close(answers(store, model, x, ["two"]), live(x), terms=200)


def test_hostile_files_leave_the_store_as_it_was(model, tmp_path):
    store = AdapterStore(model)
    good = folder(tmp_path / "good", 4, 1)
    store.load("a", good)
    broken = folder(tmp_path / "broken", 4, 2)
    raw = (broken / "adapter_model.safetensors").read_bytes()
    (broken / "adapter_model.safetensors").write_bytes(raw[:-8])
    rank = folder(tmp_path / "rank", 4, 2, r=5)
    bias = folder(tmp_path / "bias", 4, 2, lora_bias=True)
    stats = store.stats()
    for path in (broken, rank, bias, tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError):
            store.load("a", path)
        number = store.register("cold", path)
        with pytest.raises(AdapterError), store.batch(["a", "cold"]):
            pass
        assert store.versions()["cold"] == number
        store.unload("cold")
    assert store.identity("a") == "a@1"
    assert store.stats() == stats | {"hits": store.stats()["hits"]}
    x = torch.randn(1, K)
    assert_serves(model, x, answers(store, model, x, ["a"]), [(adapter(4, 1), 1)])
    with pytest.raises(TypeError, match="expected a folder, a mapping or a model"):
        store.load("a", 3)


def test_versions_and_identities(model, tmp_path):
    store = AdapterStore(model)
    assert store.load("a", adapter(4, 1)) == 1
    assert store.load("a", adapter(4, 2)) == 2
    assert store.register("a", folder(tmp_path, 4, 3)) == 3
    assert store.register("b", tmp_path) == 1
    store.unload("a")
    assert store.names() == ["b"]
    for call in (store.identity, store.unload, store.pin, store.unpin, store.lease):
        with pytest.raises(AdapterNotFound, match="'a' not found.*'b'"):
            call("a")
    assert store.load("a", adapter(4, 4)) == 4
    assert (store.identity("a"), store.versions()) == ("a@4", {"a": 4, "b": 1})


def test_names_that_were_unloaded_are_not_remembered_for_ever(model, monkeypatch):
    monkeypatch.setattr(registry, "_REMEMBERED", 2)
    store, tensors = AdapterStore(model), adapter(4, 1)
    assert [store.load("a", tensors) for _ in range(5)] == [1, 2, 3, 4, 5]
    seen = set()
    for name in "abcabcdea":
        seen.add(store.identity(name) if name in store else name)
        store.load(name, tensors)
        assert store.identity(name) not in seen
        seen.add(store.identity(name))
        store.unload(name)
    tracemalloc.start()
    try:
        for i in range(600):
            if i == 300:
                gc.collect()
                before = tracemalloc.get_traced_memory()[0]
            store.load(f"{i:064}", tensors)
            store.unload(f"{i:064}")
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 300 * 64  # not even the names
    finally:
        tracemalloc.stop()


def test_a_running_batch_keeps_its_version(model):
    old, new = adapter(4, 1), adapter(6, 2)
    store, x = holding(model, a=old), torch.randn(1, 3, K)
    with store.batch(["a"]) as outer:
        before = model(x)
        store.load("a", new)
        assert store.stats()["bytes_used"] == nbytes(4) + nbytes(6)
        assert torch.equal(model(x), before)
        with store.batch(["a"]) as inner:
            assert_serves(model, x, model(x), [(new, 1)])
        assert (outer.identities, inner.identities) == (["a@1"], ["a@2"])
        assert torch.equal(model(x), before)
        store.unload("a")
        assert torch.equal(model(x), before)
    assert store.stats()["bytes_used"] == 0


def test_a_lease_keeps_its_version_across_batches(model):
    old, new = adapter(4, 1), adapter(4, 2)
    store, x = holding(model, 2 * nbytes(4), a=old), torch.randn(2, 3, K)
    with store.lease("a") as lease:
        store.load("a", new)
        out = answers(store, model, x, [lease, "a"])
        assert_serves(model, x[0], out[0], [(old, 1)])
        assert_serves(model, x[1], out[1], [(new, 1)])
        out = answers(store, model, x, [{lease: 0.5}, None])
        assert_serves(model, x[0], out[0], [(old, 0.5)])
        with store.lease("a"), pytest.raises(StoreFull):
            store.load("b", adapter(4, 3))
        assert lease.identity == "a@1"
    assert store.stats()["bytes_used"] == nbytes(4)
    lease.release()
    with pytest.raises(RuntimeError, match="has been released"):
        answers(store, model, x, [lease, None])


def test_a_hold_ends_once_and_a_batch_is_entered_once(model):
    """A copy of a lease would give the hold of another one back. A batch inside itself never came to its end."""
    store = holding(model, a=adapter(4, 1))
    with store.lease("a") as lease:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="the lease of 'a@1' cannot be copied"):
                copied(lease)
        assert store.stats()["in_use"] == 1
    with store.batch(["a"]) as batch, pytest.raises(RuntimeError, match="batch: it was entered already"), batch:
        raise AssertionError
    with pytest.raises(RuntimeError, match="batch: it was entered already"), batch:
        raise AssertionError
    assert store.stats()["in_use"] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_loads_in_a_forked_child(model):
    """It has none of the threads in which the parent has loaded."""
    store, tensors, x = AdapterStore(model), adapter(4, 1), torch.randn(2, 3, K)
    for _ in range(20):
        store.load_async("a", tensors).result(HANG)
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            store.load_async("b", tensors).result(60)
            with store.lease_async("b").result(60) as lease:
                assert_serves(model, x, answers(store, model, x, [lease, "b"]), [(tensors, 1)])
            store.detach()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.load_async("b", tensors).result(HANG) == 1


def test_the_least_recently_used_makes_room(model, tmp_path):
    store = holding(model, 3 * nbytes(4), **{f"a{i}": folder(tmp_path / str(i), 4, i) for i in range(3)})
    answers(store, model, torch.randn(1, K), ["a0"])
    store.load("a3", folder(tmp_path / "3", 4, 3))
    stats = store.stats()
    assert (stats["resident"], stats["evictions"], stats["adapters"]) == (3, 1, 4)
    x = torch.randn(4, 2, K)
    out = answers(store, model, x[:3], ["a0", "a2", "a3"])
    assert (store.stats()["misses"], store.stats()["hits"]) == (0, 4)
    for row, i in enumerate((0, 2, 3)):
        assert_serves(model, x[row], out[row], [(adapter(4, i), 1)])
    assert_serves(model, x[3], answers(store, model, x[3:], ["a1"])[0], [(adapter(4, 1), 1)])
    assert (store.stats()["misses"], store.stats()["evictions"]) == (1, 2)
    with pytest.raises(StoreFull, match="needs"), store.batch(["a0", "a1", "a2", "a3"]):
        pass
    assert store.stats()["in_use"] == 0


def test_adapters_in_use_or_pinned_are_never_evicted(model):
    store = holding(model, 2 * nbytes(4), used=adapter(4, 1), pinned=adapter(4, 2))
    store.pin("pinned")
    x = torch.randn(1, K)
    with store.batch(["used"]):
        before, stats = model(x), store.stats()
        with pytest.raises(StoreFull, match=r"pinned or in use: \['pinned', 'used'\]") as full:
            store.load("other", adapter(4, 3))
        assert full.value.in_use and store.stats() == stats
        with pytest.raises(StoreFull) as full:
            store.load("big", adapter(12, 3))
        assert not full.value.in_use  # not even in the empty store
        assert torch.equal(model(x), before)
    assert store.load("other", adapter(4, 3)) == 1
    store.pin("other")
    with pytest.raises(StoreFull) as full:
        store.load("third", adapter(4, 4))
    assert not full.value.in_use  # only an unpin helps
    store.unpin("other")
    assert store.stats()["host_bytes_used"] > 0  # "used" came from tensors: nowhere else to go
    store.unpin("pinned")
    assert_serves(model, x, answers(store, model, x, ["used"]), [(adapter(4, 1), 1)])


def test_room_that_a_load_has_taken_is_in_use(model, monkeypatch):
    store = AdapterStore(model, capacity_bytes=nbytes(4))
    taken, go, send = threading.Event(), threading.Event(), store._transfer.send

    def slow(*arguments):
        taken.set()
        assert go.wait(HANG)
        return send(*arguments)

    monkeypatch.setattr(store._transfer, "send", slow)
    loading = store.load_async("a", adapter(4, 1))
    assert taken.wait(HANG)
    try:
        with pytest.raises(StoreFull) as full:
            store.load("b", adapter(4, 2))
        assert full.value.in_use
    finally:
        go.set()
    assert loading.result(HANG) == 1


def test_an_adapter_without_files_is_not_lost(model):
    store = AdapterStore(model, capacity_bytes=nbytes(4), host_bytes=0)
    store.load("a", adapter(4, 1))
    with pytest.raises(StoreFull, match=r"no room in host memory \(host_bytes\): \['a'\]"):
        store.load("b", adapter(4, 2))
    x = torch.randn(1, K)
    assert_serves(model, x, answers(store, model, x, ["a"]), [(adapter(4, 1), 1)])
    with pytest.raises(StoreFull):
        store.load("big", adapter(400, 2))


def test_the_budget_can_be_raised_while_adapters_are_in_use(model):
    store = AdapterStore(model, capacity_bytes=nbytes(4), host_bytes=0)
    store.load("a", adapter(4, 1))
    x = torch.randn(1, K)
    with store.batch(["a"]):
        before = model(x)
        with pytest.raises(StoreFull):
            store.load("b", adapter(4, 2))
        store.grow(nbytes(4))
        store.load("b", adapter(4, 2))
        assert torch.equal(model(x), before)
    assert_serves(model, x, answers(store, model, x, ["b"]), [(adapter(4, 2), 1)])
    assert store.stats()["bytes_used"] == store.stats()["capacity"] == 2 * nbytes(4)
    for nothing, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error):
            store.grow(nothing)
    with pytest.raises(RuntimeError, match="no limit"):
        AdapterStore(Net()).grow(1)


def test_files_that_changed_since_are_the_next_version(model, tmp_path):
    """An evicted adapter that is read again from other bytes must not come back under its old identity."""
    store = holding(model, nbytes(4), a=folder(tmp_path / "a", 4, 1), b=folder(tmp_path / "b", 4, 2))
    x = torch.randn(1, K)
    assert_serves(model, x, answers(store, model, x, ["a"]), [(adapter(4, 1), 1)])
    assert store.identity("a") == "a@1"
    answers(store, model, x, ["b"])
    folder(tmp_path / "a", 4, 3)
    with store.batch(["a"]) as batch:
        assert_serves(model, x, model(x), [(adapter(4, 3), 1)])
    assert (batch.identities, store.identity("a")) == (["a@2"], "a@2")


def test_an_adapter_that_is_unloaded_while_its_new_files_are_read_stays_unloaded(model, tmp_path, monkeypatch):
    store = holding(model, nbytes(4), a=folder(tmp_path / "a", 4, 1), b=folder(tmp_path / "b", 4, 2))
    folder(tmp_path / "a", 4, 3)
    read = registry.from_folder

    def unloaded_meanwhile(*args):
        found = read(*args)
        store.unload("a")
        return found

    monkeypatch.setattr(registry, "from_folder", unloaded_meanwhile)
    with pytest.raises(AdapterNotFound), store.batch(["a"]):
        pass
    assert store.names() == ["b"]
    assert store.stats()["bytes_used"] == store.stats()["in_use"] == 0


def test_threads_hold_different_batches_at_once(model):
    store, x = holding(model, **{f"a{i}": adapter(4, i) for i in range(4)}), torch.randn(1, 3, K)
    barrier = threading.Barrier(4)

    def work(i):
        with store.batch([f"a{i}"]):
            barrier.wait(HANG)
            outs = [model(x) for _ in range(5)]
            barrier.wait(HANG)
        for out in outs:
            assert_serves(model, x, out, [(adapter(4, i), 1)])

    with ThreadPoolExecutor(4) as threads:
        working = [threads.submit(work, i) for i in range(4)]
        with torch.no_grad():
            assert_serves(model, x, model(x), [])
        for done in working:
            done.result(HANG)


def test_a_batch_may_be_handed_on_to_threads(model):
    """asyncio.to_thread runs a function in the caller's context: the batch, but not its buffers, is then shared."""
    contents = {f"a{i}": adapter(4, i) for i in range(3)}
    store = holding(model, **contents)  # a thread starts with gradients on
    inputs = [torch.randn(3 * (1 + i % 2), 2, K) for i in range(40)]

    async def main():
        with store.batch(list(contents)):
            return await asyncio.gather(*(asyncio.to_thread(model, x) for x in inputs))

    for x, out in zip(inputs, asyncio.run(main()), strict=True):
        for i, tensors in enumerate(contents.values()):
            rows = slice(i * len(x) // 3, (i + 1) * len(x) // 3)
            assert_serves(model, x[rows], out[rows], [(tensors, 1)])


def test_a_batch_that_ends_before_the_thread_that_it_was_handed_to(model):
    store = holding(model, a=adapter(4, 1))
    began, go, x = threading.Event(), threading.Event(), torch.randn(2, K)
    handle = model.down.register_forward_pre_hook(lambda *_: (began.set(), go.wait(HANG)) and None)
    with ThreadPoolExecutor(1) as thread:
        with pytest.raises(RuntimeError, match="another thread runs the model"), store.batch(["a"]):
            handed = contextvars.copy_context()
            running = thread.submit(handed.run, model, x)
            assert began.wait(HANG)
        go.set()
        running.result(HANG)
        handle.remove()
        out = thread.submit(handed.run, model, x).result(HANG)  # the batch has ended: it is the base's
    assert torch.equal(out, model(x)) and store.stats()["in_use"] == 0


def streams(store, kind, x, count):
    """``count`` generators of answers; each computes in a batch of its own."""

    def plain(name):
        with store.batch([name]):
            while True:
                yield store.model(x)

    @contextlib.contextmanager
    def under(name):
        with store.batch([name]):
            yield

    def helped(name):
        with under(name):
            while True:
                with under(name):
                    yield store.model(x)

    def stacked(name):
        with contextlib.ExitStack() as stack:
            stack.enter_context(store.batch([name]))
            while True:
                yield store.model(x)

    kinds = {"with": plain, "contextmanager": helped, "ExitStack": stacked}
    return [kinds[kind](f"a{i}") for i in range(count)]


@pytest.mark.parametrize("kind", ["with", "contextmanager", "ExitStack"])
def test_generators_may_take_turns(model, kind):
    """Each goes on in the batch that it entered, whichever was entered last, and they end in any order."""
    contents, x = [adapter(4, i) for i in range(3)], torch.randn(2, K)
    store = holding(model, **{f"a{i}": tensors for i, tensors in enumerate(contents)})
    running = streams(store, kind, x, 3)
    for _ in range(2):
        for stream, tensors in zip(running, contents, strict=True):
            assert_serves(model, x, next(stream), [(tensors, 1)])
    for i in (1, 0, 2):
        running[i].close()
    out = model(x)
    assert_serves(model, x, out, [])
    assert out.requires_grad and store.stats()["in_use"] == 0


def test_asynchronous_batches_may_overlap(model):
    contents, x = [adapter(4, i) for i in range(3)], torch.randn(2, K)
    store = holding(model, **{f"a{i}": tensors for i, tensors in enumerate(contents)})

    async def stream(i, turns):
        with store.batch([f"a{i}"]):
            for _ in range(turns):
                await asyncio.sleep(0)
                yield model(x)

    async def task(i):
        async for out in stream(i, i + 1):  # the first that began ends first
            assert_serves(model, x, out, [(contents[i], 1)])

    async def main():
        await asyncio.gather(*map(task, range(3)))
        first, second = stream(0, 3), stream(1, 3)  # in one task
        for _ in range(2):
            assert_serves(model, x, await anext(first), [(contents[0], 1)])
            assert_serves(model, x, await anext(second), [(contents[1], 1)])
        await first.aclose()
        await second.aclose()

    asyncio.run(main())
    assert model(x).requires_grad


def test_an_adapter_in_the_middle_makes_room_for_one_of_its_batch(model, tmp_path):
    """Both fit, but not beside the place that one of them has: it moves."""
    ranks = dict(first=9, middle=8, large=16)
    store = AdapterStore(model, capacity_bytes=sum(map(nbytes, ranks.values())) - nbytes(9))
    contents = {name: adapter(r, r) for name, r in ranks.items()}
    for name, r in ranks.items():
        store.register(name, folder(tmp_path / name, r, r))
    x = torch.randn(2, 3, K)
    answers(store, model, x, ["first", "middle"])
    assert store.stats()["resident"] == 2
    out = answers(store, model, x, ["middle", "large"])
    assert_serves(model, x[0], out[0], [(contents["middle"], 1)])
    assert_serves(model, x[1], out[1], [(contents["large"], 1)])
    with pytest.raises(StoreFull, match="in one piece"), store.batch(list(ranks)):
        pass
    assert store.stats()["in_use"] == 0


def test_a_call_without_rows(model):
    store = holding(model, a=adapter(4, 1))
    assert answers(store, model.up, torch.zeros(0, 3, K), ["a"]).shape == (0, 3, H)


def test_an_interrupt_of_a_store_that_is_made_leaves_its_model_free(model):
    made, places = [], 0

    def begin():
        for store in made:
            store.detach()
        made.clear()

    for place in everywhere(begin, lambda: made.append(AdapterStore(model)), step=3):
        if not made:
            AdapterStore(model).detach()  # none is attached
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), place
            places += 1
    assert places > 50


@pytest.mark.parametrize("names", [[None], ["a", "a"], ["a", "b"]])
def test_an_interrupt_leaves_no_batch_open(model, names):
    """Wherever Python handles signals: gradients are on again, the model computes for itself, nothing is in use."""
    store = AdapterStore(model, capacity_bytes=2 * nbytes(4))
    for i, name in enumerate("ab"):
        store.load(name, adapter(4, i))
    x = torch.randn(2, 3, K)
    plain, places = model(x).detach(), 0

    def enter():
        with store.batch(names):
            pass

    for place in everywhere(lambda: None, enter):
        assert torch.is_grad_enabled(), place
        assert torch.equal(model(x).detach(), plain), place
        assert store.stats()["in_use"] == 0, place
        places += 1
    assert places > 50
    store.detach()


def test_an_interrupted_load_leaves_the_arena_as_it_was(model):
    """Room that no adapter has would be lost: both adapters fit afterwards, wherever the load was stopped."""
    store = AdapterStore(model, capacity_bytes=2 * nbytes(4), grow=nbytes(4))
    store.load("a", adapter(4, 0))
    source = adapter(4, 1)

    def begin():
        if "b" in store:
            store.unload("b")

    places = 0
    for place in everywhere(begin, lambda: store.load("b", source)):
        assert store.stats()["in_use"] == 0, place
        assert store.stats()["bytes_used"] == nbytes(4) * (1 + ("b" in store)), place
        places += 1
    assert places > 50
    store.detach()


@pytest.mark.parametrize("what", ["release", "evict", "replace", "unload"])
def test_an_interrupt_loses_no_room(model, what):
    """Whatever was stopped, all of the capacity can be had afterwards, by one adapter that has as much."""
    stores = []

    def begin():
        store = AdapterStore(model, capacity_bytes=2 * nbytes(4))
        for i, name in enumerate("ab"):
            store.load(name, adapter(4, i))
        if what == "release":
            leases[:] = [store.lease("a")]
            store.unload("a")
        stores.append(store)

    leases = []
    acts = {
        "release": lambda: leases[0].release(),
        "evict": lambda: stores[-1].load("c", adapter(4, 2)),
        "replace": lambda: stores[-1].load("a", adapter(4, 2)),
        "unload": lambda: stores[-1].unload("a"),
    }
    places = 0
    for place in everywhere(begin, acts[what]):
        store = stores.pop()
        for lease in leases:
            lease.release()  # a second time, or now: it was stopped before it began
        assert store.stats()["in_use"] == 0, place
        for name in store.names():
            store.load(name, adapter(4, 5))
        store.load("large", adapter(8, 6))
        assert store.stats()["bytes_used"] == nbytes(8), place
        assert "a" in store or store.load("a", adapter(4, 7)) == 2, place
        store.detach()
        places += 1
    assert places > 10
    stores.pop().detach()


def test_an_interrupted_detach_has_detached_or_not(model):
    x, stores = torch.randn(2, 3, K), []
    plain = model(x).detach()

    def begin():
        stores.append(AdapterStore(model, capacity_bytes=nbytes(4)))
        stores[-1].load("a", adapter(4, 0))

    for place in everywhere(begin, lambda: stores[-1].detach()):
        store = stores.pop()
        if store.names():
            with store.batch(["a", None]):
                assert not torch.equal(model(x)[0], plain[0]), place
            store.detach()
        assert store.stats()["bytes_reserved"] == 0, place
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()), place
    AdapterStore(model).detach()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_waits_for_no_thread_of_its_parent(model, tmp_path, monkeypatch):
    store, begun, go_on, parent = AdapterStore(model), threading.Event(), threading.Event(), os.getpid()
    store.register("a", folder(tmp_path / "a", 4, 0))
    stage = store._transfer.stage

    def slow(packed):
        if os.getpid() == parent:
            begun.set()
            assert go_on.wait(HANG)
        return stage(packed)

    monkeypatch.setattr(store._transfer, "stage", slow)
    future = store.lease_async("a")
    assert begun.wait(HANG)
    child = os.fork()
    if not child:
        signal.alarm(int(HANG))
        with store.lease("a"):
            os._exit(0)
    go_on.set()
    assert os.waitpid(child, 0)[1] == 0
    future.result(HANG).release()
    store.detach()


def test_threads_that_fork_at_once_leave_no_lock(model, monkeypatch):
    """What a fork calls before and after, by the second thread as soon as the first lets it."""
    store, begun, go_on = AdapterStore(model), threading.Event(), threading.Event()
    lock = store._residency.changed
    monkeypatch.setattr(residency, "_all", [store._residency])  # not of other tests

    class Handed:
        acquire = lock.acquire

        def release(self):
            lock.release()
            assert begun.wait(HANG)

    def second():
        residency._before_fork()
        begun.set()
        assert go_on.wait(HANG)
        residency._after_fork(False)

    residency._before_fork()
    store._residency.changed = Handed()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(second)
        try:
            residency._after_fork(False)
        finally:
            store._residency.changed = lock
            go_on.set()
        done.result(HANG)
        assert pool.submit(lock.acquire, timeout=HANG).result(HANG)
        pool.submit(lock.release).result(HANG)
    store.detach()


def test_detach_leaves_the_model_as_it_was(model):
    x, keys = torch.randn(2, K), list(model.state_dict())
    with torch.no_grad():
        base = model(x)
    store = holding(model, a=adapter(4, 1))
    assert list(model.state_dict()) == keys
    with store.batch(["a", "a"]), pytest.raises(RuntimeError, match="in use"):
        store.detach()
    store.load_async("b", adapter(4, 2)).result(30)
    store.detach()
    assert not model._forward_pre_hooks and not any(m._forward_hooks for m in model.modules())
    assert store.stats()["bytes_used"] == store.stats()["bytes_reserved"] == 0
    with torch.no_grad():
        assert torch.equal(model(x), base)
    for call in (lambda: store.load("a", adapter(4, 1)), lambda: store.batch(["a"]).__enter__()):
        with pytest.raises(RuntimeError, match="detached"):
            call()
    AdapterStore(model).detach()


def test_a_copy_of_the_model_is_served_by_the_same_store(model):
    store = holding(model, a=adapter(4, 1))
    x = torch.randn(1, 3, K)
    assert torch.equal(answers(store, copy.deepcopy(model), x, ["a"]), answers(store, model, x, ["a"]))


def test_a_copy_may_have_a_store_of_its_own_after_the_detach(model):
    store = holding(model, a=adapter(4, 1))
    x, copied = torch.randn(1, 3, K), copy.deepcopy(model)
    expected = answers(store, model, x, ["a"])
    with pytest.raises(RuntimeError, match="another store"):
        AdapterStore(copied)
    freed = weakref.ref(store)
    store.detach()
    del store
    gc.collect()
    assert freed() is None  # a copy does not keep the store's memory
    with torch.no_grad():
        assert torch.equal(copied(x), model(x))
    own = holding(copied, a=adapter(4, 1))
    assert torch.equal(answers(own, copied, x, ["a"]), expected)
    own.detach()
    assert not copied._forward_pre_hooks and not any(m._forward_hooks for m in copied.modules())


@pytest.mark.parametrize("how", [pickle.dumps, lambda m: torch.save(m, io.BytesIO())], ids=["pickle", "torch.save"])
def test_a_model_with_a_store_cannot_be_pickled_and_says_why(model, how):
    store = AdapterStore(model)
    copied, x = copy.deepcopy(model), torch.randn(1, 3, K)
    for one in (model, copied):
        with pytest.raises(TypeError, match="with an AdapterStore cannot be pickled.*store.detach"):
            how(one)
    store.detach()
    for one in (model, copied):
        with torch.no_grad():
            assert torch.equal(pickle.loads(pickle.dumps(one))(x), model(x))
        how(one)


def test_a_store_wants_a_plain_model(model):
    AdapterStore(model)
    with pytest.raises(RuntimeError, match="another store"):
        AdapterStore(model)
    with pytest.raises(ValueError, match="LoRA layers already"):
        AdapterStore(fused_lora.inject(Net(), fused_lora.LoraConfig(target_modules=["up"])))
    with pytest.raises(ValueError, match="the Sequential has no linear layer"):
        AdapterStore(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="of no layer that is served.*'mlp.experts.down_proj'"):
        AdapterStore(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Experts()})}))
    with pytest.raises(TypeError, match="expected an nn.Module"):
        AdapterStore("model")


def test_16_bit_models_are_served_from_fp32_adapters():
    model = Net().bfloat16().eval()
    store = AdapterStore(model)
    tensors = adapter(4, 1, ["up"])
    store.load("a", tensors)
    x = torch.randn(2, 3, K).bfloat16()
    with store.batch(["a", None]):
        out = model.up(x)
    with torch.no_grad():
        base = model.up(x)
    A, B, scale = tensors["up"]
    want = base[0].double() + scale * (x[0].double() @ A.double().T) @ B.double().T
    assert torch.equal(out[1], base[1])
    assert (out[0] - want).abs().max() <= torch.finfo(torch.bfloat16).eps * want.abs().max() / 2 * 1.01


@pytest.mark.parametrize("grow", [None, 1 << 12])
def test_arena_blocks_never_overlap_and_holes_join(grow):
    arena = Arena(torch.device("cpu"), 1 << 16, grow)
    draw, blocks = np.random.default_rng(shifted(0)), []
    for _ in range(2000):
        if blocks and draw.random() < 0.5:
            block, mark = blocks.pop(draw.integers(len(blocks)))
            assert (block.memory == mark).all()
            continue
        block = arena.allocate(int(draw.integers(1, 3000)), [block for block, _ in blocks])
        if block is not None:
            mark = int(draw.integers(256))
            block.memory.fill_(mark)
            blocks.append((block, mark))
        assert sum(block.size for block, _ in blocks) <= arena.reserved <= arena.capacity
    assert arena.allocate(max(map(len, arena._chunks))) is not None


def test_an_arena_without_a_limit_grows():
    arena = Arena(torch.device("cpu"), None, grow=1 << 12)
    blocks = []
    for size in (100, 5000, 1 << 14):
        blocks.append(arena.allocate(size, blocks))
    assert None not in blocks and arena.reserved >= 1 << 14
    assert arena.allocate(1, blocks) is not None
