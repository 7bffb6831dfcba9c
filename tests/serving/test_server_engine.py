"""The engine behind the server: what a load waits for, step by step and without a clock."""

import asyncio
import functools
import math
from types import SimpleNamespace

import pytest

import fused_lora
from fused_lora.serving.residency.residency import StoreFull
from helpers import serving

for needed in ("fastapi", "transformers", "prometheus_client"):
    pytest.importorskip(needed)

from fused_lora.serving.http import engine as engines  # noqa: E402
from fused_lora.serving.http.api import ApiError  # noqa: E402
from fused_lora.serving.http.metrics import Metrics  # noqa: E402


class Store(dict):
    """Versions by name."""

    def identity(self, name):
        return f"{name}@{self[name]}"

    def load(self, name, path):
        self[name] = self.get(name, 0) + 1

    def unload(self, name):
        del self[name]


class Manager:
    """Of an engine that runs until it is stopped."""

    def __init__(self):
        self.running, self.batch_processor = True, None
        self.background_thread_status = SimpleNamespace(can_accept_new_requests=lambda: None, fatal_error=None)

    def is_running(self):
        return self.running


class Engine(engines.AsyncEngine):
    """With one job that runs under "x@1", and no model."""

    def __init__(self, drain_seconds):
        self.store, self.limits, self._loading = Store(x=1), SimpleNamespace(drain_seconds=drain_seconds), []
        self.running = engines._Running("1", "x")
        self._jobs = {"1": self.running}
        self.manager = Manager()
        self.metrics = Metrics()
        self.metrics.of("x").sequences += 1

    def _version(self, running):
        return "x@1"


CHANGES = {
    "load": lambda engine: engine.load("x", "folder", replace=True),
    "unload": lambda engine: engine.unload("x"),
}


async def turns(count=50):
    """Let the loop run whatever can run."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(engines, "_POLL_SECONDS", 0)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_waits_for_the_jobs_of_the_old_version(change):
    async def run():
        engine = Engine(math.inf)
        changing = asyncio.ensure_future(CHANGES[change](engine))
        while engine.store.get("x") == 1:  # it counts for new jobs at once
            await asyncio.sleep(0)
        await turns()
        assert not changing.done() and engine.running.outputs.empty()
        engine.running.ended = True
        await changing
        assert engine.metrics.of("x").sequences == (change == "load")  # of an unloaded one nothing is left

    asyncio.run(run())


@pytest.mark.parametrize("change", CHANGES)
def test_after_the_drain_time_it_ends_them(change):
    async def run():
        engine = Engine(-1.0)
        changing = asyncio.ensure_future(CHANGES[change](engine))
        error = await engine.running.outputs.get()
        assert (error.status, error.code) == (409, "adapter_changed") and "'x' was changed" in error.message
        await turns()
        assert not changing.done()  # until the job has let go of the version
        engine.running.ended = True
        await changing

    asyncio.run(run())


def stopped(error):
    return error.value.status == 503 and error.value.code == "engine_stopped"


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_an_engine_that_has_stopped_is_refused(change):
    engine = Engine(drain_seconds=0.0)
    engine.manager.running = False
    with pytest.raises(ApiError) as error:
        asyncio.run(CHANGES[change](engine))
    assert stopped(error) and engine.store == {"x": 1}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_during_which_the_engine_stops(change):
    """Its jobs have no version any more, and end by themselves; what fails, fails for that reason."""
    engine = Engine(drain_seconds=math.inf)
    engine._version = functools.partial(engines.AsyncEngine._version, engine)

    async def run():
        changing = asyncio.ensure_future(CHANGES[change](engine))
        while not changing.done() and engine.store == {"x": 1}:
            await asyncio.sleep(0)
        engine.manager.running, engine.running.ended = False, True
        await changing

    asyncio.run(run())

    def fail(name, *path):
        engine.manager.running = False
        raise RuntimeError("the store has been detached")

    engine.manager.running, engine.store.load, engine.store.unload = True, fail, fail
    engine.store["x"] = 5
    with pytest.raises(ApiError) as error:
        asyncio.run(CHANGES[change](engine))
    assert stopped(error)


@pytest.fixture
def full(tmp_path):
    """An engine without jobs over a store with room for one adapter of rank 4, its lease, and a folder of files."""
    model = serving.load_model(serving.write_tiny_llama(tmp_path / "tiny"))
    for i, (name, r) in enumerate(dict(a=4, b=4, big=16, torn=4).items()):
        serving.write_adapter(tmp_path / name, model, r, seed=i)
    weights = tmp_path / "torn" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    measure = fused_lora.AdapterStore(model)
    measure.load("a", str(tmp_path / "a"))
    size = measure.stats()["bytes_used"]
    measure.detach()
    engine = Engine(math.inf)
    engine.store, engine._jobs = fused_lora.AdapterStore(model, capacity_bytes=size), {}
    engine.store.load("a", str(tmp_path / "a"))
    with engine.store.lease("a") as lease:
        yield engine, lease, tmp_path
    engine.store.detach()


@pytest.mark.parametrize("name", ["a", "new"])
def test_a_load_while_all_room_is_in_use_counts_at_once(full, name):
    """The adapter comes to the device when there is room."""
    engine, lease, root = full
    before = engine.store.versions().get(name, 0)
    asyncio.run(engine.load(name, root / "b", replace=name == "a"))
    assert engine.store.versions()[name] == before + 1 and engine.store.folder(name) == str(root / "b")
    lease.release()
    with engine.store.lease(name) as now:
        assert now.identity == f"{name}@{before + 1}"


@pytest.mark.parametrize("path, code", [("big", "store_full"), ("torn", "invalid_adapter")])
def test_a_load_that_cannot_be_served_changes_nothing_while_all_room_is_in_use(full, path, code):
    engine, _, root = full
    with pytest.raises(ApiError) as caught:
        asyncio.run(engine.load("a", root / path, replace=True))
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "lora_path", code)
    assert engine.store.versions() == {"a": 1} and engine._loading == []


def test_what_a_generation_cannot_have_is_named():
    gone = engines.as_api_error(fused_lora.AdapterNotFound("adapter not found"), "poet")
    assert (gone.status, gone.code) == (404, "model_not_found") and "'poet'" in gone.message
    never = engines.as_api_error(StoreFull("adapter 'poet' needs 5 bytes", in_use=False), "poet")
    assert (never.status, never.param, never.code) == (422, "model", "store_full")
