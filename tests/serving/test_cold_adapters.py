"""Adapters are read outside the engine's thread, and one that cannot be read is not read again and again."""

import threading
import time
from concurrent import futures
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

import fused_lora
from fused_lora.adapters.errors import AdapterError
from fused_lora.serving import StoreFull
from fused_lora.serving.engine.continuous import continuous_batching
from fused_lora.serving.engine.failures import failure_of
from fused_lora.serving.residency import refusal, registry
from helpers import serving
from helpers.serving import engine_config, prompt, results
from helpers.waiting import HANG, wait_for

serving.need_engine()

from fused_lora.serving.engine import admission  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return serving.load_model(serving.write_tiny_llama(tmp_path_factory.mktemp("cold") / "model"))


@pytest.fixture
def store(model, tmp_path):
    """A store with the adapters hot (loaded) and cold (registered) of rank 4; room for both and half of another."""
    for i, name in enumerate(("hot", "cold", "other")):
        serving.write_adapter(tmp_path / name, model, 4, seed=i)
    found = fused_lora.AdapterStore(model, capacity_bytes=int(2.5 * serving.adapter_bytes(4)))
    found.load("hot", str(tmp_path / "hot"))
    for name in ("cold", "other"):
        found.register(name, str(tmp_path / name))
    yield found
    found.detach()


@pytest.fixture
def reads(monkeypatch):
    """(names of the folders that were read, an event that lets reads go on: set at first)."""
    read, go, real = [], threading.Event(), registry.from_folder

    def from_folder(model, sites, folder, *more):
        read.append(folder.rpartition("/")[2])
        assert go.wait(HANG)
        return real(model, sites, folder, *more)

    monkeypatch.setattr(registry, "from_folder", from_folder)
    go.set()
    yield read, go
    go.set()


def test_steps_go_on_while_an_adapter_is_read(model, store, reads):
    read, go = reads
    go.clear()
    with continuous_batching(model, store, engine_config()) as engine:
        cold = [engine.add_request(prompt(9), adapter="cold", max_new_tokens=4) for _ in range(3)]
        wait_for(lambda: read == ["cold"])
        for name in (None, "hot"):  # younger ones, and their adapters are there
            (output,) = results(engine, engine.add_request(prompt(9), adapter=name, max_new_tokens=20))
            assert failure_of(output) is None and len(output.generated_tokens) == 20
        assert not any(i in engine.__dict__["seen_by_test"] for i in cold)
        go.set()
        for output in results(engine, *cold):
            assert failure_of(output) is None and len(output.generated_tokens) == 4
    assert read == ["cold"] and store.stats()["in_use"] == 0


def test_what_nobody_waits_for_any_more_is_given_back(model, store, reads):
    read, go = reads
    go.clear()
    with continuous_batching(model, store, engine_config()) as engine:
        gone = engine.add_request(prompt(9), adapter="cold", max_new_tokens=4)
        wait_for(lambda: read == ["cold"])
        engine.cancel_request(gone)
        wait_for(lambda: not engine.admission.loading)
        go.set()
        wait_for(lambda: store.stats()["resident"] == 2)
        wait_for(lambda: store.stats()["in_use"] == 0)


def test_an_adapter_that_has_no_room_is_read_once(model, store, reads, monkeypatch):
    """While two others are leased, by somebody else; when they are released there is room."""
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 1000.0)
    read, _ = reads
    with continuous_batching(model, store, engine_config()) as engine:
        with store.lease("hot"), store.lease("cold"):
            asked = engine.add_request(prompt(9), adapter="other", max_new_tokens=4)
            wait_for(lambda: read == ["cold", "other"])
            for _ in range(2):
                results(engine, engine.add_request(prompt(9), max_new_tokens=20))
            assert read == ["cold", "other"]
        (output,) = results(engine, asked)
    assert failure_of(output) is None and read == ["cold", "other", "other"]


def test_a_failed_read_is_remembered_until_the_files_change(model, store, reads, tmp_path, monkeypatch):
    read, _ = reads
    weights = tmp_path / "cold" / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-64])
    with continuous_batching(model, store, engine_config()) as engine:
        asked = [engine.add_request(prompt(9), adapter="cold", max_new_tokens=4) for _ in range(3)]
        errors = [failure_of(output) for output in results(engine, *asked)]
        with pytest.raises(AdapterError) as caught:
            store.lease("cold")
        errors.append(caught.value)
        assert read == ["cold"] and len(set(map(str, errors))) == 1
        assert all(isinstance(error, AdapterError) and error.file == str(weights) for error in errors)
        assert isinstance(store.refusal("cold"), AdapterError) and store.refusal("hot") is None
        # after a while it is tried again
        now = time.monotonic()
        monkeypatch.setattr(refusal.time, "monotonic", lambda: now + refusal.FAILED_LOAD_SECONDS + 1)
        assert store.refusal("cold") is None and list(store.refusals()) == ["cold"]  # it is still not offered
        with pytest.raises(AdapterError):
            store.lease("cold")
        assert read == ["cold"] * 2
        # and at once when a file changes
        weights.write_bytes(good)
        (output,) = results(engine, engine.add_request(prompt(9), adapter="cold", max_new_tokens=4))
        assert failure_of(output) is None and read == ["cold"] * 3 and store.refusals() == {}


def test_a_store_that_is_full_inside_a_forward_ends_the_requests_of_that_step(model, store):
    """Whatever a layer raises, StoreFull too: the step's requests end, later ones are served."""
    fails = [True]

    def hook(module, args):
        if fails and not fails.clear():
            raise StoreFull("no room for what a layer wants")

    handle = model.model.layers[-1].register_forward_pre_hook(hook)
    try:
        with continuous_batching(model, store, engine_config()) as engine:
            (failed,) = results(engine, engine.add_request(prompt(9), adapter="hot", max_new_tokens=4))
            assert failure_of(failed).kind == "StoreFull"
            (output,) = results(engine, engine.add_request(prompt(9), adapter="hot", max_new_tokens=4))
            assert failure_of(output) is None and len(output.generated_tokens) == 4
    finally:
        handle.remove()


class Steps:
    """An admission of ``store`` step by step; each ends when its loads have ended. No request is patient any more."""

    def __init__(self, store):
        self.failed, counters = [], admission.EngineCounters()
        fail = lambda state, error: self.failed.append((state.request_id, error))  # noqa: E731
        self.admission = admission.Admission(store, fail, lambda: None, counters)

    def request(self, name):
        created = time.perf_counter() - 2 * admission.PATIENCE_SECONDS
        return SimpleNamespace(
            logit_processor_kwargs={admission.ADAPTER: name}, request_id=name, created_time=created, initial_tokens=[1]
        )

    def __call__(self, active, waiting):
        self.admission.update(active, waiting)
        futures.wait(self.admission.loading.values(), HANG)
        return self.admission.admitted


def test_a_load_that_found_no_room_is_tried_again_when_the_room_is_free(store):
    """Both requests that held it have ended before the engine reads that there was none."""
    step = Steps(store)
    *two, other = map(step.request, ("hot", "cold", "other"))
    step([], two)
    assert step([], two) == {"hot", "cold"}
    assert step(two, [other]) == set()
    (load,) = step.admission.loading.values()
    assert isinstance(load.exception(), StoreFull)
    step([], [other])
    step([], [other])
    assert step([], [other]) == {"other"} and not step.failed
    step.admission.release_all()


@pytest.mark.parametrize("patience", [0.0, 1000.0])
def test_room_that_others_hold_is_waited_for_from_when_the_engine_holds_none(store, patience, monkeypatch):
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", patience)
    step = Steps(store)
    hot, other = map(step.request, ("hot", "other"))
    with store.lease("hot"), store.lease("cold"):
        assert step([], [hot]) == {"hot"}
        step([hot], [other])
        for _ in range(4):
            step([], [other] if not step.failed else [])
    assert [name for name, _ in step.failed] == ([] if patience else ["other"])
    step.admission.release_all()


def test_what_can_never_fit_fails_while_others_run(model, store, tmp_path, monkeypatch):
    monkeypatch.setattr(admission, "PATIENCE_SECONDS", 1000.0)
    store.register("big", str(serving.write_adapter(tmp_path / "big", model, 16, seed=3)))
    step = Steps(store)
    hot, big = step.request("hot"), step.request("big")
    assert step([], [hot]) == {"hot"}
    step([hot], [big])
    step([hot], [big])
    ((name, error),) = step.failed
    assert name == "big" and isinstance(error, StoreFull)
    step.admission.release_all()


def test_the_load_of_a_version_that_was_replaced_meanwhile_keeps_no_room(store, reads, tmp_path):
    read, go = reads
    step = Steps(store)
    cold = step.request("cold")
    go.clear()
    step.admission.update([], [cold])
    (old,) = step.admission.loading.values()
    wait_for(lambda: read == ["cold"])
    store.register("cold", str(tmp_path / "cold"))  # a new version, which nobody has read
    go.set()
    old.result(HANG)
    for _ in range(2):
        admitted = step([], [cold])
    assert admitted == {"cold"} and admission.version_of(cold) == "cold@2"
    assert store.stats()["in_use"] == 1 and not step.admission.loading and not step.failed
    step.admission.release_all()
    assert store.stats()["in_use"] == 0


class Loads:
    """A store whose loads end when the test says so."""

    def __init__(self):
        self.futures: dict[str, list[Future]] = {}

    def identity(self, name):
        return f"{name}@1"

    def refusal(self, name):
        return None

    def lease_if_ready(self, name):
        return None

    def lease_async(self, name):
        self.futures.setdefault(name, []).append(Future())
        return self.futures[name][-1]


class Held:
    identity, released, invocation = "young@1", False, ()

    def release(self):
        self.released = True


@pytest.mark.parametrize("patient", [True, False])
def test_a_load_that_came_for_a_younger_request_does_not_keep_an_older_one_waiting(patient):
    """It runs first while the older one is patient, and gives its room back afterwards; neither fails."""
    store, lease, failed = Loads(), Held(), []
    chosen = admission.Admission(store, lambda *reason: failed.append(reason), lambda: None, admission.EngineCounters())
    created = time.perf_counter() - (0 if patient else 2 * admission.PATIENCE_SECONDS)
    states = [
        SimpleNamespace(logit_processor_kwargs={admission.ADAPTER: name}, request_id=name, created_time=created)
        for name in ("old", "young")
    ]
    chosen.update([], states)
    store.futures["old"][0].set_exception(StoreFull("no room"))
    store.futures["young"][0].set_result(lease)
    chosen.update([], states)
    assert not failed and lease.released is not patient
    assert chosen.admitted == ({"young"} if patient else set())
    chosen.update([], states[:1])  # the younger one is over
    assert lease.released and len(store.futures["old"]) == 2 and not failed
