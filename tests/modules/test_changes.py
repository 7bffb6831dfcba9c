"""Threads that merge, switch and call one model: one change at a time; a forward sees all of it or nothing."""

import copy
import gc
import itertools
import linecache
import os
import pickle
import sys
import threading
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import LoraConfig, LoraLinear
from fused_lora.modules import changes
from fused_lora.modules.changes import changing, undone_on_error
from fused_lora.reference import bits
from helpers.seeds import shifted
from helpers.waiting import HANG, wait_for

FORWARDS = 10_000
NAMES = ("a", "b")


class Stack(nn.Module):
    """A few linears one after another: what one of them does differently reaches the output."""

    def __init__(self, layers=4, size=48):
        super().__init__()
        self.fc = nn.ModuleList([nn.Linear(size, size) for _ in range(layers)])

    def forward(self, x):
        for layer in self.fc:
            x = torch.tanh(layer(x))
        return x


def ours(layers=4):
    model = Stack(layers).eval()
    for name in NAMES:
        fused_lora.inject(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), name)
    return model


def accelerated():
    config = peft.LoraConfig(r=4, target_modules=[f"fc.{i}" for i in range(4)], init_lora_weights=False)
    model = peft.get_peft_model(Stack(), config, "a").eval()
    model.add_adapter("b", config)
    return fused_lora.accelerate(model)


def weights(model):
    return [bits(m.base_layer.weight.detach()).clone() for m in model.modules() if hasattr(m, "base_layer")]


def run_all(*jobs):
    """Each in a thread of its own; raises what one of them raises."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(job) for job in jobs]:
            done.result(HANG)


@pytest.fixture(autouse=True)
def nothing_is_left():
    torch.manual_seed(shifted(0))
    changes.FORWARDS.clear()  # of forwards that other tests have interrupted: torch tells no hook of that
    yield
    assert not changes.CHANGING and not changes._waiting and not changes._admitted and not changes.FORWARDS


def test_threads_that_merge_and_unmerge_one_model_keep_its_base():
    model = ours()
    before = weights(model)

    def cycles():
        for _ in range(60):
            fused_lora.merge(model)
            fused_lora.unmerge(model)

    def switches():
        for i in range(60):
            fused_lora.set_adapter(model, NAMES[i % 2])

    run_all(cycles, cycles, switches)
    fused_lora.unmerge(model)
    assert all(map(torch.equal, weights(model), before))


def states(model, x, changes_of):
    """The outputs that a model can have: in its state now, and after each change."""
    found = []
    for change in (lambda: None, *changes_of):
        change()
        found.append(model(x))
    return found


def test_a_forward_sees_all_of_a_change_or_nothing():
    """Two threads forward while a third merges one adapter and unmerges another; every output is of one state."""
    model, x = ours(), torch.randn(3, 48)
    steps = [
        lambda: fused_lora.merge(model, ["b"]),
        lambda: fused_lora.merge(model, ["a"]),
        lambda: fused_lora.set_adapter(model, "b"),
        lambda: fused_lora.set_adapter(model, "a"),
    ]
    with torch.no_grad():
        allowed = states(model, x, steps)
    seen, stop = Counter(), threading.Event()

    @torch.no_grad()
    def forwards():
        try:
            for _ in range(FORWARDS // 2):
                y = model(x)
                seen[next((i for i, state in enumerate(allowed) if torch.equal(y, state)), "mixed")] += 1
        finally:
            if sum(seen.values()) >= FORWARDS:
                stop.set()

    def change():
        for i, step in enumerate(itertools.cycle(steps), 1):
            wait_for(lambda i=i: sum(seen.values()) >= 20 * i or stop.is_set(), 0.0005)
            if stop.is_set():
                return
            step()

    run_all(forwards, forwards, change)
    assert sum(seen.values()) == FORWARDS and not seen["mixed"], seen
    assert len(seen) > 2, seen  # the states did change meanwhile


class Gate(nn.Module):
    """Stops a forward in the middle until ``go`` is set."""

    def __init__(self):
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def forward(self, x):
        self.reached.set()
        assert self.go.wait(HANG)
        return x


def stopped(model):
    """The model with a gate behind its second layer."""
    gate = Gate()
    handle = model.fc[1].register_forward_hook(lambda module, args, y: gate(y))
    return gate, handle


@pytest.mark.parametrize("build", [ours, accelerated])
def test_a_change_waits_for_the_forward_that_is_under_way_and_later_forwards_for_the_change(build):
    model, x = build(), torch.randn(3, 48)
    net = model if build is ours else model.base_model.model
    merge = fused_lora.merge if build is ours else lambda m: changed_by_peft(m)
    with torch.no_grad():
        unmerged = model(x)
        gate, handle = stopped(net)
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(torch.no_grad()(lambda: model(x)))
            assert gate.reached.wait(HANG)
            change = pool.submit(merge, model)
            wait_for(lambda: bool(changes.CHANGING))
            second = pool.submit(torch.no_grad()(lambda: model(x)))
            held = next(iter(changes.CHANGING.values()))
            wait_for(lambda: bool(held.waiters))
            assert not change.done() and not any(layer.merged for layer in net.fc)
            gate.go.set()
            change.result(HANG)
            handle.remove()
            assert torch.equal(first.result(HANG), unmerged)
            assert torch.equal(second.result(HANG), model(x)) and all(layer.merged for layer in net.fc)


def changed_by_peft(model):
    with changing(model):
        model.merge_adapter()


def test_a_change_in_the_middle_of_a_forward_does_not_wait_for_itself():
    """Two threads merge and unmerge from hooks of two models that call each other's changes: nobody hangs."""
    models = [ours(), ours()]
    x = torch.randn(3, 48)
    barrier = threading.Barrier(2, timeout=HANG)

    def job(mine, other):
        def hook(module, args):
            barrier.wait()
            fused_lora.merge(other)
            fused_lora.merge(mine)
            fused_lora.unmerge(mine)

        handle = mine.fc[2].register_forward_pre_hook(hook)
        mine(x)
        handle.remove()

    run_all(lambda: job(*models), lambda: job(*reversed(models)))
    for model in models:
        fused_lora.unmerge(model)


def test_a_change_of_a_part_waits_for_forwards_of_the_whole_and_they_for_it():
    model, x = ours(), torch.randn(3, 48)
    with torch.no_grad():
        allowed = states(model, x, [lambda: model.fc[2].merge(adapter_names=["b"])])
        model.fc[2].unmerge()
    seen = Counter()

    @torch.no_grad()
    def forwards():
        for _ in range(1000):
            y = model(x)
            seen[next((i for i, state in enumerate(allowed) if torch.equal(y, state)), "mixed")] += 1

    def change():
        for i in range(30):
            wait_for(lambda i=i: sum(seen.values()) >= 50 * i, 0.0005)
            model.fc[2].merge(adapter_names=["b"])
            model.fc[2].unmerge()

    run_all(forwards, forwards, change)
    assert not seen["mixed"], seen


def test_who_reads_keeps_changes_away_but_not_forwards():
    model, x = ours(), torch.randn(3, 48)
    with ThreadPoolExecutor(2) as pool, changing(model, forwards=False):
        change = pool.submit(fused_lora.merge, model)
        pool.submit(model, x).result(HANG)
        wait_for(lambda: bool(changes._waiting))
        assert not change.done() and not model.fc[0].merged
    assert model.fc[0].merged


def test_a_thread_may_change_what_it_has():
    model = ours()
    with changing(model.fc[0]), changing(model), changing(model):
        fused_lora.merge(model)
        model.fc[0].unmerge()
        model(torch.randn(3, 48))


def test_models_without_a_common_module_do_not_wait_for_each_other():
    one, other = ours(), ours()
    with changing(one), ThreadPoolExecutor(1) as pool:
        pool.submit(fused_lora.merge, other).result(HANG)
    assert other.fc[0].merged and not one.fc[0].merged


def test_a_look_at_a_model_that_another_thread_gives_a_layer():
    """Whoever waits for a change looks at modules that the change may add to meanwhile."""

    class Added(torch.nn.Module):
        @property
        def _modules(self):
            model.register_module(str(len(model)), torch.nn.Identity())
            return {}

        @_modules.setter
        def _modules(self, value):
            pass

    model = torch.nn.Sequential(torch.nn.Identity())
    model.register_module("1", Added())
    model.register_module("2", torch.nn.Identity())
    with changing(model):
        assert len(model) > 3


def test_a_part_of_a_model_and_the_model_wait_for_each_other():
    model = ours()
    with ThreadPoolExecutor(1) as pool:
        with changing(model):
            change = pool.submit(model.fc[3].merge)
            wait_for(lambda: bool(changes._waiting))
            assert not model.fc[3].merged
        change.result(HANG)
    assert model.fc[3].merged


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_anywhere_lets_the_others_go_on(error):
    """The error comes at the n-th step of a merge, for every n; then another thread unmerges.

    Python looks for signals where a function begins, and where one of C has ended. No code can take an error between a
    lock's ``__enter__`` and the body of its ``with``, a place that only Python 3.14 shows.
    """
    model, step = ours(layers=2), 0  # one to be taken back when the other fails
    before = weights(model)
    with ThreadPoolExecutor(1) as pool:
        while True:
            left = [step]

            def profile(frame, event, argument, left=left):
                if event == "call" or event == "c_return" and argument.__name__ not in ("setprofile", "__enter__"):
                    left[0] -= 1
                    if left[0] < 0:
                        sys.setprofile(None)
                        raise error("from the test")

            try:
                sys.setprofile(profile)
                fused_lora.merge(model, ["a"])
            except error:
                pass
            finally:
                sys.setprofile(None)
            assert not changes.CHANGING and not changes._waiting, step
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing may be merged
                pool.submit(fused_lora.unmerge, model).result(HANG)
            assert all(map(torch.equal, weights(model), before)), step
            if left[0] >= 0:
                break
            step += 1
    assert step > 300


def test_a_forward_that_is_interrupted_while_it_waits_is_forgotten():
    model = ours()
    with pytest.raises(ZeroDivisionError), changing(model):
        change = changes.CHANGING[id(model)]

        class Interrupted:
            def __enter__(self):
                raise ZeroDivisionError

            def __exit__(self, *error):
                return False

        real, change.ended = change.ended, Interrupted()
        try:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(model, torch.randn(3, 48)).result(HANG)
        finally:
            change.ended = real


def test_an_end_that_is_repeated_leaves_a_forward_that_waited_alone():
    """An interrupt may have stopped the first end. Here the forward goes on between the two."""
    model, goes_on, ended = ours(), threading.Event(), threading.Event()

    def stop(frame, event, _):
        if frame.f_code is changes.wait_for_change.__code__ and event == "line":
            if linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip() == "waited = True":
                goes_on.set()
                assert ended.wait(HANG)
        return stop

    def forward():
        sys.settrace(stop)
        try:
            return model(torch.randn(3, 48))
        finally:
            sys.settrace(None)

    with ThreadPoolExecutor(1) as pool, changing(model):
        change = changes.CHANGING[id(model)]
        found = pool.submit(forward)
        wait_for(lambda: change.waiters)
        change.end()
        assert goes_on.wait(HANG)
        change.end()
        ended.set()
        assert found.result(HANG).shape == (3, 48)


def test_copies_and_pickles_of_a_model_that_is_being_changed():
    model, x = ours(), torch.randn(3, 48)
    with changing(model):
        fused_lora.merge(model)
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        with ThreadPoolExecutor(1) as pool:  # they are models of their own
            for other in (copied, loaded):
                pool.submit(fused_lora.unmerge, other).result(HANG)
                assert not other.fc[0].merged
    assert model.fc[0].merged and torch.equal(copied(x), loaded(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_does_not_wait_for_threads_of_its_parent():
    model = ours()
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with changing(model):
            inside.set()
            leave.wait(HANG)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert inside.wait(HANG)
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)
                fused_lora.merge(model)
                fused_lora.unmerge(model)
                os._exit(0)
            except BaseException:
                os._exit(1)
        leave.set()
        assert os.waitpid(child, 0)[1] == 0


def test_verify_while_others_forward_and_merge():
    model, x = ours(), torch.randn(3, 48)
    with torch.no_grad():
        allowed = states(model, x, [lambda: fused_lora.merge(model)])
    fused_lora.unmerge(model)
    stop, wrong = threading.Event(), []

    @torch.no_grad()
    def forwards():
        while not stop.is_set():
            y = model(x)
            if not any(torch.equal(y, state) for state in allowed):
                wrong.append([float((y - s).abs().max()) for s in allowed])

    def verifies():
        try:
            for i in range(6):
                (fused_lora.merge if i % 2 else fused_lora.unmerge)(model)
                assert fused_lora.verify(model, x).ok
        finally:
            stop.set()

    run_all(forwards, verifies)
    assert not wrong


@pytest.mark.parametrize("call", ["set_adapter", "delete_adapter", "merge", "unmerge", "add_adapter"])
def test_changes_of_a_layer_wait_for_the_model(call):
    model = ours()
    layer: LoraLinear = model.fc[0]
    arguments = {"set_adapter": ["b"], "delete_adapter": ["b"], "add_adapter": ["c"]}.get(call, [])
    with ThreadPoolExecutor(1) as pool:
        with changing(model):
            done = pool.submit(getattr(layer, call), *arguments)
            wait_for(lambda: bool(changes._waiting))
            assert not done.done()
        done.result(HANG)


def test_what_an_error_undoes_costs_little_where_there_are_many_adapters():
    """Each adapter brings modules to every layer; a load of one more keeps what all of them have."""
    model = ours(2)
    modules = list(model.modules())
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        with undone_on_error(model):
            kept = len(gc.get_objects()) - before
    finally:
        gc.enable()
    assert 0 < kept < 12 * len(modules)


def test_an_error_gives_containers_their_contents_again():
    module: Any = nn.Linear(2, 2)
    module.names, module.nothing, module.few = ["a", "b"], [], {1}
    hook = module.register_forward_hook(print)
    held = {name: value for name, value in vars(module).items() if isinstance(value, (dict, list, set))}
    with pytest.raises(KeyError), undone_on_error(module):
        hook.remove()
        module.names.clear()
        module.nothing.append("c")
        module.few.add(2)
        module.register_forward_pre_hook(print)
        module.register_buffer("late", torch.ones(1))
        raise KeyError
    assert (module.names, module.nothing, module.few) == (["a", "b"], [], {1})
    assert list(module._forward_hooks.values()) == [print] and not module._forward_pre_hooks and not module._buffers
    assert all(vars(module)[name] is value for name, value in held.items())
