"""A step that raises ends its own requests, frees what they held, and leaves the others as if it had not been."""

import functools
import gc
import itertools
import logging
import random
import weakref

import pytest
import torch

from fused_lora.serving.engine.continuous import continuous_batching, generate_batch
from fused_lora.serving.engine.failures import MAX_FAILED_STEPS, StepFailed, failure_of
from helpers import serving
from helpers.seeds import shifted
from helpers.serving import prompt, results, stopped, store_of
from helpers.thorough import sampled
from helpers.waiting import wait_for

serving.need_engine()

MARK = 256  # the end of sequence: no greedy answer of the tiny model holds it
config = functools.partial(serving.engine_config, max_requests_per_batch=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    found = serving.Tiny(tmp_path_factory.mktemp("failures"), a=8, b=16)
    assert found.plain.config.eos_token_id == MARK
    return found


@pytest.fixture
def served(world):
    """make(times): (model that fails on the mark, a store with both adapters known)."""

    def make(times=None):
        model = serving.fail_on(serving.load_model(world.folder), MARK, times)
        return model, store_of(model, world.adapters)

    return make


def read(store, *names):
    """Read these adapters now: the engine has files read beside its steps, however many that are."""
    for name in names:
        store.lease(name).release()


def held(engine, store):
    """What requests hold: (blocks of the cache, adapters in use, leases)."""
    cache = engine.batch_processor.cache
    tables = sum(len(table) for a in cache.cache_allocators.values() for table in a.block_table.values())
    shared = sum(len(a.ledger.shared_ref_counts) for a in cache.cache_allocators.values())
    return tables + shared, store.stats()["in_use"], len(engine.admission.leases)


def all_blocks_free(engine):
    cache = engine.batch_processor.cache
    cache.evict_cached_blocks()
    cache.pool.try_to_free_sectors()
    return cache.compute_free_capacity() == 1


@pytest.mark.parametrize("name", ["a", None])
def test_marked_prompt_fails_alone(world, served, name):
    model, store = served()
    with continuous_batching(model, store, config()) as engine:
        bad = engine.add_request([*prompt(5), MARK], adapter=name, max_new_tokens=4)
        (failed,) = results(engine, bad)
        wait_for(lambda: held(engine, store) == (0, 0, 0))
        good = engine.add_request(prompt(9), adapter="a", max_new_tokens=6)
        assert results(engine, good)[0].generated_tokens == world.tokens("a", prompt(9), 6)
        assert engine.is_running() and all_blocks_free(engine)
        assert (engine.counters.failed_steps, engine.counters.failed_requests) == (1, 1)
    assert failed.generated_tokens == [] and failed.is_finished()
    error = failure_of(failed)
    assert isinstance(error, StepFailed) and error.kind == "RuntimeError" and "met its mark" in str(error)
    assert failed.error == str(error)


@pytest.mark.parametrize("output", [None, "error", {"error": "x"}])
def test_failure_of_refuses_other_objects(output):
    with pytest.raises(TypeError, match="output: expected a GenerationOutput"):
        failure_of(output)


def test_requests_of_the_step_fail_and_the_others_go_on(world, served):
    """Eight requests fit into a step; the marked one joins seven that are half done, more wait behind it."""
    model, store = served()
    before = store.stats()["bytes_used"]
    names = ["a", "b", None, "a", "b", None, "a"]
    read(store, "a", "b")
    with continuous_batching(model, store, config()) as engine:

        def start():
            with engine.pause():
                return [engine.add_request(prompt(9, i), adapter=n, max_new_tokens=30) for i, n in enumerate(names)]

        def half_done():
            active = engine.batch_processor.scheduler.active_requests
            return len(active) == 7 and all(len(state.generated_tokens) > 4 for state in active.values())

        with stopped(engine, half_done, start) as running:
            bad = engine.add_request([MARK], adapter="b", max_new_tokens=4)
            later = [engine.add_request(prompt(9, i), adapter=name, max_new_tokens=6) for i, name in enumerate(names)]
        failed, finished = results(engine, *running, bad), results(engine, *later)
        wait_for(lambda: held(engine, store) == (0, 0, 0))
        assert all_blocks_free(engine)
        assert (engine.counters.failed_steps, engine.counters.failed_requests) == (1, 8)
    assert all(isinstance(failure_of(output), StepFailed) for output in failed)
    for i, (name, output) in enumerate(zip(names, failed, strict=False)):
        got = output.generated_tokens
        assert 4 < len(got) < 30 and got == world.tokens(name, prompt(9, i), len(got))
    for i, (name, output) in enumerate(zip(names, finished, strict=True)):
        assert failure_of(output) is None and output.generated_tokens == world.tokens(name, prompt(9, i), 6)
    store.unload("a"), store.unload("b")
    assert store.stats()["bytes_used"] == before == 0


def test_request_outside_the_step_is_not_ended(world, served):
    """A long prompt takes the whole step, so a request that is prefilled too waits for the next one."""
    model, store = served()
    read(store, "a", "b")
    with continuous_batching(model, store, config()) as engine:
        with engine.pause():
            bad = engine.add_request([*prompt(100), MARK], adapter="a", max_new_tokens=4)
            other = engine.add_request(prompt(60), adapter="b", max_new_tokens=6)
        failed, good = results(engine, bad, other)
        # the mark comes in the third chunk, beside the first of the other prompt: that request was in the step
        assert isinstance(failure_of(failed), StepFailed) and isinstance(failure_of(good), StepFailed)
        with engine.pause():
            bad = engine.add_request([MARK, *prompt(100)], adapter="a", max_new_tokens=4)
            other = engine.add_request(prompt(60), adapter="b", max_new_tokens=6)
        failed, good = results(engine, bad, other)
    assert isinstance(failure_of(failed), StepFailed)
    assert failure_of(good) is None and good.generated_tokens == world.tokens("b", prompt(60), 6)


def test_failed_step_leaves_nothing_in_the_prefix_cache(world, served):
    """The first layer had written its keys when the last one raised; the same prompt must not find them."""
    model, store = served(times=1)
    ids = [*prompt(40), MARK, *prompt(30, 1)]
    with continuous_batching(model, store, config(max_batch_tokens=128)) as engine:
        (failed,) = results(engine, engine.add_request(ids, adapter="a", max_new_tokens=6))
        rows = engine.counters.adapter_rows
        again, once_more = (results(engine, engine.add_request(ids, adapter="a", max_new_tokens=6)) for _ in range(2))
        rows = engine.counters.adapter_rows - rows
    assert isinstance(failure_of(failed), StepFailed) and rows < 2 * (71 + 5)  # the third shared with the second
    wanted = world.tokens("a", ids, 6)
    assert again[0].generated_tokens == once_more[0].generated_tokens == wanted


def test_engine_stops_when_no_step_succeeds(world, served):
    model, store = served()
    with continuous_batching(model, store, config()) as engine:
        for i in range(MAX_FAILED_STEPS - 1):
            results(engine, engine.add_request([MARK], adapter="a", max_new_tokens=2))
            assert engine.is_running(), i
        # one that succeeds starts the count anew
        good = engine.add_request(prompt(9), adapter="b", max_new_tokens=1)
        assert results(engine, good)[0].generated_tokens == world.tokens("b", prompt(9), 1)
        for _ in range(MAX_FAILED_STEPS - 1):
            results(engine, engine.add_request([MARK], adapter="a", max_new_tokens=2))
        with engine.pause():
            last = engine.add_request([MARK] * 49, adapter="a", max_new_tokens=2)
            waiting = engine.add_request(prompt(9), adapter="b", max_new_tokens=2)
        last, waiting = results(engine, last, waiting)
        wait_for(lambda: not engine.is_running())
        assert isinstance(failure_of(last), StepFailed)
        assert type(failure_of(waiting)) is RuntimeError and "met its mark" in waiting.error
        assert store.stats()["in_use"] == 0 and not engine.admission.leases
        with pytest.raises(RuntimeError, match="no new requests"):
            engine.add_request([1])
    assert engine.counters.failed_steps == 2 * MAX_FAILED_STEPS - 1


def test_generate_batch_returns_what_failed_and_what_did_not(world, served):
    prompts = [prompt(9, i) for i in range(4)]
    prompts[1] = [MARK]
    names = ["a", "b", None, "b"]
    small = config(max_requests_per_batch=1)
    outputs = generate_batch(*served(), prompts, names, 6, small)
    assert [type(failure_of(output)) for output in outputs] == [type(None), StepFailed, type(None), type(None)]
    for i in (0, 2, 3):
        assert outputs[i].generated_tokens == world.tokens(names[i], prompts[i], 6)


def test_failure_while_a_batch_is_prepared(world, served, monkeypatch):
    """Active requests are ended, for what was begun for them is lost; one that comes later is not."""
    model, store = served()
    with continuous_batching(model, store, config()) as engine:
        with engine.pause():  # its thread has begun, and made what it works with
            processor = engine.batch_processor
        inputs, active = processor.inputs_and_outputs, processor.scheduler.active_requests
        real, fails = inputs.prepare_batch_tensors, [True]

        def prepare(*args, **kwargs):
            if fails and any(len(state.generated_tokens) > 3 for state in active.values()) and not fails.clear():
                raise MemoryError("no room for the inputs")
            return real(*args, **kwargs)

        monkeypatch.setattr(inputs, "prepare_batch_tensors", prepare)
        (failed,) = results(engine, engine.add_request(prompt(9), adapter="a", max_new_tokens=20))
        wait_for(lambda: held(engine, store) == (0, 0, 0))
        (good,) = results(engine, engine.add_request(prompt(9), adapter="a", max_new_tokens=6))
        assert all_blocks_free(engine)
    assert failure_of(failed).kind == "MemoryError" and len(failed.generated_tokens) > 3
    assert good.generated_tokens == world.tokens("a", prompt(9), 6)


def test_activations_of_the_failed_step_are_freed(served, caplog):
    """An exception keeps its frames, and they keep the tensors of the forward."""
    model, store = served()
    kept = []
    model.model.layers[0].register_forward_hook(lambda m, a, out: kept.append(weakref.ref(out)))
    caplog.set_level(logging.CRITICAL, logger="fused_lora.serving")  # pytest would keep the exception with the record
    with continuous_batching(model, store, config()) as engine:
        (failed,) = results(engine, engine.add_request([MARK], adapter="a", max_new_tokens=4))
        assert isinstance(failure_of(failed), StepFailed) and len(kept) == 1
        wait_for(lambda: held(engine, store) == (0, 0, 0))
        gc.collect()
        assert kept[0]() is None


@pytest.mark.parametrize("seed", sampled(range(3), 3))
def test_steps_that_fail_at_random_leave_every_answer_right(world, seed):
    """Clients ask again until they are served: shared prefixes, a cache that is too small, cancelled requests."""
    draw, trouble = random.Random(shifted(seed)), random.Random(shifted(seed))  # one per thread
    model = serving.load_model(world.folder)
    calls, kinds_of_trouble = [20], itertools.cycle((RuntimeError, MemoryError, torch.OutOfMemoryError))

    def fail(module, args, out):
        calls[0] -= 1
        if calls[0] == 0:
            calls[0] = trouble.randint(20, 80)
            raise next(kinds_of_trouble)("at random")

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(fail)  # the keys of the step have been written
        layer.mlp.register_forward_hook(fail)
    store = store_of(model, world.adapters)
    jobs = [(draw.choice(["a", "b", None]), prompt(24) + prompt(1 + i % 9, i), 4 + i % 12) for i in range(30)]
    with continuous_batching(model, store, config(num_blocks=24, safety_margin=0.0)) as engine:

        def ask(i):
            name, ids, count = jobs[i]
            return engine.add_request(ids, adapter=name, max_new_tokens=count)

        asked = {ask(i): i for i in range(len(jobs))}
        answers, kinds = {}, set()

        def served_all():
            output = engine.get_result(timeout=0.05)
            if output is not None and output.request_id in asked:
                i = asked.pop(output.request_id)
                if failure_of(output) is None:
                    answers[i] = output.generated_tokens
                else:
                    kinds.add(failure_of(output).kind)
                    asked[ask(i)] = i
            elif output is not None:
                assert failure_of(output) is None or isinstance(failure_of(output), StepFailed)
            if asked and draw.random() < 0.1:
                gone = draw.choice(list(asked))
                engine.cancel_request(gone)
                i = asked.pop(gone)
                asked[ask(i)] = i
            return len(answers) == len(jobs)

        wait_for(served_all)
        wait_for(lambda: held(engine, store) == (0, 0, 0))
        assert all_blocks_free(engine) and engine.counters.failed_steps >= 3 and len(kinds) >= 2
    for i, (name, ids, count) in enumerate(jobs):
        assert answers[i] == world.tokens(name, ids, count), i


def test_failure_is_logged_with_its_traceback(served, caplog):
    outputs = generate_batch(*served(times=1), [[MARK]], ["a"], 2, config())
    assert isinstance(failure_of(outputs[0]), StepFailed)
    (record,) = [r for r in caplog.records if r.name == "fused_lora.serving" and r.levelno >= logging.ERROR]
    assert record.exc_info[1].args == ("the layer met its mark",) and record.exc_info[2] is not None


def test_idle_engine_lets_adapters_make_room(world):
    model = serving.load_model(world.folder)
    store = store_of(model, world.adapters, capacity_bytes=int(serving.adapter_bytes(8) * 2.2))
    with continuous_batching(model, store, config()) as engine:
        results(engine, engine.add_request(prompt(9), adapter="a", max_new_tokens=2))
        wait_for(lambda: store.stats()["in_use"] == 0)
        store.load("c", str(world.adapters["b"]))
        assert store.stats()["evictions"] == 1
