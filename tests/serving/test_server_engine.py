"""The engine behind the server: what a load waits for, step by step and without a clock."""

import asyncio
import math
from types import SimpleNamespace

import pytest

for needed in ("fastapi", "transformers", "prometheus_client"):
    pytest.importorskip(needed)

from fused_lora.serving.http import engine as engines  # noqa: E402
from fused_lora.serving.http.metrics import Metrics  # noqa: E402


class Store(dict):
    """Versions by name."""

    def identity(self, name):
        return f"{name}@{self[name]}"

    def load(self, name, path):
        self[name] = self.get(name, 0) + 1

    def unload(self, name):
        del self[name]


class Engine(engines.AsyncEngine):
    """With one job that runs under "x@1", and no model."""

    def __init__(self, drain_seconds):
        self.store, self.limits, self._loading = Store(x=1), SimpleNamespace(drain_seconds=drain_seconds), []
        self.running = engines._Running("1", "x")
        self._jobs = {"1": self.running}
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
