"""One request's rows reach no other's: an adapter whose term overflows ends its own requests and changes no other."""

import pytest
import torch

import fused_lora
from fused_lora.serving import NonFiniteOutput
from fused_lora.serving.engine.continuous import continuous_batching, generate_batch
from fused_lora.serving.engine.failures import failure_of
from helpers import serving
from helpers.serving import engine_config as config
from helpers.serving import prompt, results, store_of

serving.need_engine()

# finite in fp32, and so are the sums of the first products; which layer, and whether a term is infinite or not a number
EVIL = ("v_proj", "q_proj", "k_proj", "down_proj", "lm_head")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Adapter evil_x overflows at every x."""
    found = serving.Tiny(tmp_path_factory.mktemp("isolation"), a=8, b=16)
    for layer in EVIL:
        evil = found.root / f"evil_{layer}"
        found.adapters[evil.name] = serving.write_overflowing_adapter(evil, found.plain, layer)
    return found


@pytest.fixture
def served(world):
    """make(attention): (model, a store with all adapters known)."""

    def make(attention="sdpa"):
        model = serving.load_model(world.folder, attn_implementation=attention)
        return model, store_of(model, world.adapters)

    return make


@pytest.fixture(scope="module", params=["sdpa", pytest.param("eager", marks=pytest.mark.thorough)])
def attention(request):
    return request.param


@pytest.fixture(scope="module")
def alone(world, attention):
    """tokens(name, ids, count): what a request gets in an engine that has no other one."""
    model = serving.load_model(world.folder, attn_implementation=attention)
    store = store_of(model, world.adapters)

    def tokens(name, ids, count):
        (output,) = generate_batch(model, store, [ids], [name], count, config(allow_block_sharing=False))
        assert len(output.generated_tokens) == count
        return output.generated_tokens

    return tokens


def test_overflowing_adapters_end_their_own_requests_alone(world, served, alone, attention):
    """Five adapters overflow in the steps of honest requests, whose long prompts are read in chunks."""
    evil, honest = [f"evil_{layer}" for layer in EVIL], [None, "a", "b"]
    prompts = {name: prompt(60, i) for i, name in enumerate(honest)}
    model, store = served(attention)
    with continuous_batching(model, store, config()) as engine:
        with engine.pause():
            good = {name: engine.add_request(prompts[name], adapter=name, max_new_tokens=12) for name in honest}
            bad = {name: engine.add_request(prompt(5), adapter=name, max_new_tokens=12) for name in evil}
        for name in honest:
            (output,) = results(engine, good[name])
            assert failure_of(output) is None and output.generated_tokens == alone(name, prompts[name], 12), name
        for name in evil:
            (output,) = results(engine, bad[name])
            error = failure_of(output)
            assert isinstance(error, NonFiniteOutput) and error.identities == (f"{name}@1",)
            assert output.generated_tokens == [] and f"'{name}@1'" in output.error
        assert (engine.counters.non_finite_requests, engine.counters.failed_steps) == (5, 0)
        # nothing of it is left in the cache: prompts that begin as those did
        for name in honest:
            (output,) = results(engine, engine.add_request([*prompts[name], 7], adapter=name, max_new_tokens=4))
            assert output.generated_tokens == alone(name, [*prompts[name], 7], 4), name
        # the version is refused by name, until it is loaded anew
        name = evil[0]
        (refused,) = results(engine, engine.add_request(prompt(9), adapter=name, max_new_tokens=2))
        assert isinstance(failure_of(refused), NonFiniteOutput) and f"'{name}@1'" in refused.error
        with pytest.raises(NonFiniteOutput, match=f"'{name}@1'"):
            store.lease(name)
        store.load(name, str(world.adapters["a"]))
        (output,) = results(engine, engine.add_request(prompts["a"], adapter=name, max_new_tokens=12))
        assert output.generated_tokens == alone("a", prompts["a"], 12)
    assert store.stats()["in_use"] == 0


def test_a_score_that_lifts_a_masked_key_stays_in_its_request(world, served, alone, attention):
    """Finite keys whose scores undo the mask of -3.4e38: honest rows would read the attacker's values."""
    model, store = served(attention)
    A, B = torch.ones(4, 64), torch.full((32, 4), 1e18)
    store.load("loud", {"model.layers.0.self_attn.k_proj": (A, B, 1e18)})
    with continuous_batching(model, store, config()) as engine:
        with engine.pause():
            good = engine.add_request(prompt(20), adapter=None, max_new_tokens=12)
            loud = engine.add_request(prompt(20, 1), adapter="loud", max_new_tokens=12)
        (output, other) = results(engine, good, loud)
    assert output.generated_tokens == alone(None, prompt(20), 12)
    assert other.is_finished()


def test_a_base_that_overflows_costs_no_adapter_its_place(world, served):
    """One token makes the base infinite: the request fails by itself, and the adapter serves on."""
    model, store = served()
    with torch.no_grad():
        model.model.embed_tokens.weight[250] = float("inf")
    with continuous_batching(model, store, config()) as engine:
        for name in (None, "a"):
            with engine.pause():
                bad = engine.add_request([*prompt(5), 250], adapter=name, max_new_tokens=4)
                good = engine.add_request(prompt(9), adapter="a", max_new_tokens=4)
            (failed, served_on) = results(engine, bad, good)
            assert isinstance(failure_of(failed), NonFiniteOutput) and len(served_on.generated_tokens) == 4
        assert store.refusal("a") is None


def test_no_block_of_a_bad_chunk_is_shared(world, served):
    """The base's own overflow in the first chunk of a long prompt: the request ends there, before its last chunk."""
    model, store = served()
    with torch.no_grad():
        model.model.embed_tokens.weight[250] = float("inf")
    with continuous_batching(model, store, config()) as engine:
        (failed,) = results(engine, engine.add_request([250, *prompt(200)], max_new_tokens=4))
        assert isinstance(failure_of(failed), NonFiniteOutput) and engine.counters.steps == 1
        allocators = engine.batch_processor.cache.cache_allocators.values()
        assert not any(allocator.ledger.hash_to_block for allocator in allocators)


def test_a_quarantined_version_comes_back_when_its_files_change(world, tmp_path):
    model = serving.load_model(world.folder)
    folder = serving.write_overflowing_adapter(tmp_path / "x", model, "v_proj")
    store = fused_lora.AdapterStore(model)
    store.load("x", str(folder))
    with store.lease("x") as lease:
        store.quarantine(lease, NonFiniteOutput("refused", ["x@1"]))
        assert lease.held is not None
    for _ in range(2):
        with pytest.raises(NonFiniteOutput, match="refused"):
            store.lease("x")
    serving.write_adapter(folder, model, 4, seed=3)
    with store.lease("x") as lease:
        assert lease.identity == "x@2"


@pytest.mark.parametrize("layer", EVIL)
def test_a_static_batch_names_the_adapter_whose_rows_are_not_finite(world, served, layer):
    model, store = served()
    ids, mask = torch.tensor([prompt(9), prompt(9, 1)]), torch.ones(2, 9, dtype=torch.int64)
    with torch.no_grad(), store.batch(["a", "b"]):
        model(ids, attention_mask=mask)
    with pytest.raises(NonFiniteOutput, match=f"in the rows of 'evil_{layer}@1': ") as caught, torch.no_grad():
        with store.batch([f"evil_{layer}", "a"]):
            model(ids, attention_mask=mask)
    assert caught.value.identities == (f"evil_{layer}@1",)
    with (
        pytest.raises(NonFiniteOutput, match=f"'evil_{layer}@1'"),
        store.batch(["a", {f"evil_{layer}": 1.0, "b": 1.0}]),
    ):
        model.generate(ids, attention_mask=mask, max_new_tokens=2)
    rows = torch.cat([ids[0], ids[1]])[None]
    with pytest.raises(NonFiniteOutput, match=f"'evil_{layer}@1'"), torch.no_grad():
        with store.batch_rows(["b", f"evil_{layer}"], [9, 9]):
            model(rows)


def test_padding_and_unlikely_tokens_are_no_overflow(world, served):
    """Rows that the mask says are padding may hold anything; tokens that a model rules out have a logit of -inf."""
    model, store = served()
    ids, mask = torch.tensor([prompt(9), prompt(9, 1)]), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0

    def spoil(module, args, output):
        output.logits[0, :4] = float("nan")
        output.logits[:, :, 5] = float("-inf")

    def spoil_the_other(module, args, output):
        output.logits[1, 3] = float("nan")

    handle = model.register_forward_hook(spoil, prepend=True)
    with torch.no_grad(), store.batch(["a", "b"]):
        model(ids, attention_mask=mask)
        handle.remove()
        model.register_forward_hook(spoil_the_other, prepend=True)
        with pytest.raises(NonFiniteOutput, match="'b@1'"):
            model(ids, attention_mask=mask)


def test_nothing_is_read_while_a_graph_is_captured(world, served, monkeypatch):
    """A capture may not wait for the device. What was queued before it is read when it has ended."""
    model, store = served()
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    tokens = torch.tensor([prompt(5)])
    with pytest.raises(NonFiniteOutput, match="evil_q_proj@1"), torch.no_grad(), store.batch(["evil_q_proj"]):
        model(tokens), model(tokens)
        capturing[0] = False
