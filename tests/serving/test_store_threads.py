"""Random loads, reloads, unloads and batches from many threads: no wrong answer, no leak, no deadlock."""

import json
import random
import threading
import time

import torch
from torch import nn

from fused_lora.modules.inject import AdapterNotFound
from fused_lora.serving import AdapterStore, StoreFull
from helpers.seeds import shifted
from helpers.waiting import HANG

K, N, THREADS, NAMES = 16, 24, 8, 12


def tensors(seed):
    """Adapter number ``seed``: its rank and its values follow from the number."""
    draw = torch.Generator().manual_seed(shifted(seed))
    r = (1, 3, 4, 8, 16)[seed % 5]
    return {"0": (torch.randn(r, K, generator=draw), torch.randn(N, r, generator=draw), 0.5)}


def folder(path, seed):
    from safetensors.torch import save_file

    path.mkdir()
    A, B, _ = tensors(seed)["0"]
    key = "base_model.model.0.lora_"
    save_file({f"{key}A.weight": A, f"{key}B.weight": B}, path / "adapter_model.safetensors")
    entries = dict(peft_type="LORA", r=len(A), lora_alpha=len(A) / 2, target_modules=["0"])
    (path / "adapter_config.json").write_text(json.dumps(entries))
    return path


class Trial:
    """A store that 8 threads work on, and what each version of each adapter really is."""

    def __init__(self, tmp_path):
        self.model = nn.Sequential(nn.Linear(K, N)).eval()
        self.x = torch.randn(1, 2, K)
        # room for some of the adapters, and never for all
        self.store = AdapterStore(self.model, capacity_bytes=2 * 4096, host_bytes=8 * 4096, grow=4096)
        self.folders = [folder(tmp_path / str(i), i) for i in range(5)]
        self.wanted = [self.answer(i) for i in range(5)]
        self.content: dict[str, int] = {}  # identity -> number of the adapter
        self.naming = [threading.Lock() for _ in range(NAMES)]
        self.failures: list[BaseException] = []
        self.outcomes = dict.fromkeys(("served", "loaded", "unloaded", "full", "unknown"), 0)

    def answer(self, number):
        A, B, scale = tensors(number)["0"]
        layer, x = self.model[0], self.x.double()
        return x @ layer.weight.double().T + layer.bias.double() + scale * (x @ A.double().T) @ B.double().T

    def work(self, seed, operations):
        draw = random.Random(shifted(seed))
        try:
            for _ in range(operations):
                try:
                    self.operate(draw)
                except StoreFull:
                    self.outcomes["full"] += 1
                except AdapterNotFound:
                    self.outcomes["unknown"] += 1
        except BaseException as error:  # noqa: BLE001 - reported by the test
            self.failures.append(error)

    def operate(self, draw):
        index, number = draw.randrange(NAMES), draw.randrange(5)
        name = f"n{index}"
        kind = draw.random()
        if kind < 0.02:
            self.serve(self.store.names() or [None])
        elif kind < 0.55:
            self.serve(
                [f"n{draw.randrange(NAMES)}" if draw.random() < 0.8 else None for _ in range(draw.randint(1, 3))]
            )
        elif kind < 0.85:
            with self.naming[index]:  # so that it is known which content a version has
                source = tensors(number) if draw.random() < 0.3 else self.folders[number]
                how = self.store.register if draw.random() < 0.3 and not isinstance(source, dict) else self.store.load
                self.content[f"{name}@{self.next_version(name)}"] = number
                how(name, source)
                self.outcomes["loaded"] += 1
        elif kind < 0.95:
            with self.naming[index]:
                self.store.unload(name)
                self.outcomes["unloaded"] += 1
        else:
            with self.store.lease(name) as lease:
                self.serve([lease])
                self.store.pin(name)
                self.store.unpin(name)

    def next_version(self, name):
        with self.store._lock:
            return self.store._counts.get(name, 0) + 1

    def serve(self, names):
        with self.store.batch(names) as batch:
            out = self.model(self.x.expand(len(names), 2, K))
            time.sleep(0)
            again = self.model(self.x.expand(len(names), 2, K))
        # the base layer's own product may differ in the last bit from call to call; another adapter differs by far more
        assert (out - again).abs().max() < 1e-5, "the answer changed within a batch"
        for row, identity in zip(out, batch.identities, strict=True):
            if identity is not None:
                number = self.content[identity]
                error = (row - self.wanted[number][0]).abs().max()
                assert error < 1e-4, f"{identity} is adapter {number} and is off by {error}"
        self.outcomes["served"] += 1


def test_10_000_random_operations_from_8_threads(tmp_path):
    trial = Trial(tmp_path)
    threads = [threading.Thread(target=trial.work, args=(i, 10_000 // THREADS), daemon=True) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + HANG
    for thread in threads:
        thread.join(max(0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if trial.failures:
        raise trial.failures[0]
    assert min(trial.outcomes.values()) > 0, trial.outcomes
    stats = trial.store.stats()
    assert stats["in_use"] == stats["pinned"] == 0 and stats["evictions"] > 0 and stats["misses"] > 0
    for name in trial.store.names():
        trial.store.unload(name)
    stats = trial.store.stats()
    assert stats["bytes_used"] == stats["host_bytes_used"] == stats["resident"] == stats["adapters"] == 0
    arena = trial.store._residency.arena
    assert [free for free in arena._free if len(free) != 1] == [] and arena.largest_hole == 4096
    trial.store.detach()
