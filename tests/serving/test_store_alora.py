"""aLoRA adapters in a store and in the engine: rows before the invocation are the base's, and so are their blocks."""

import copy
import json

import peft
import pytest
import torch

import fused_lora
from fused_lora.reference import bits
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import quiet
from helpers.invocation import INVOCATION, prompts
from helpers.seeds import shifted
from helpers.serving import need_engine

need_engine()

ADAPTERS = {"a": INVOCATION, "b": [11], "plain": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(base, PEFT's model with all adapters in float64, folder of their files)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("alora")
    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, vocab_size=40, max_position_embeddings=512)
    torch.manual_seed(shifted(1))
    base = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)).eval()
    theirs = None
    for name, tokens in ADAPTERS.items():
        config = peft.LoraConfig(
            r=4,
            target_modules="all-linear",
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            alora_invocation_tokens=tokens,
        )
        with quiet():
            if theirs is None:
                theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
            else:
                theirs.add_adapter(name, config)
    theirs.save_pretrained(folder)
    return base, theirs.eval().double(), folder


@pytest.fixture
def served(world):
    base, theirs, folder = world
    store = fused_lora.AdapterStore(base, capacity_bytes=1 << 20)
    for name in ADAPTERS:
        store.register(name, folder / name)
    yield store, base, theirs
    store.detach()


@pytest.fixture
def ids():
    found = prompts(12, 6)
    found[3, 4] = 11
    return found


NAMES = ["a", "a", None, "b", "a", "plain"]
STARTS = [3, 7, 9, 4, 5, 0]
PEFTS = [name or "__base__" for name in NAMES]


def test_a_mixed_batch_is_pefts_and_base_rows_are_the_bases(served, ids):
    store, base, theirs = served
    with torch.no_grad():
        for _ in range(3):  # followed, followed again, known
            plain = base(ids).logits
            with store.batch(NAMES):
                found = base(ids).logits
            assert_close(found, theirs(ids, adapter_names=PEFTS).logits, terms=500)
            for row, start in enumerate(STARTS):
                assert torch.equal(bits(found[row, :start]), bits(plain[row, :start]))
                assert (found[row, start:] != plain[row, start:]).any(-1).all()
            ids = ids.flip(0).clone()  # other places in the next one
            NAMES.reverse(), PEFTS.reverse(), STARTS.reverse()
    NAMES.reverse(), PEFTS.reverse(), STARTS.reverse()


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_adapter_for_all_and_the_last_logits_alone(served, ids, name):
    store, base, theirs = served
    with torch.no_grad(), store.batch([name] * 6):
        found, last = base(ids).logits, base(ids, logits_to_keep=1).logits
    exact = theirs(ids, adapter_names=[name] * 6).logits
    assert_close(found, exact, terms=500)
    assert_close(last, exact[:, -1:], terms=500)


def test_generate(served, ids):
    store, base, theirs = served
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    kwargs = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    with store.batch(NAMES):
        found = base.generate(ids, **kwargs)
    assert torch.equal(found, theirs.generate(ids, adapter_names=PEFTS, **kwargs))
    with store.batch(NAMES):  # beams, which PEFT refuses
        assert base.generate(ids, num_beams=2, **kwargs).shape == (6, 15)


def test_a_cache_of_the_base_goes_on(served, ids):
    store, base, theirs = served
    with torch.no_grad():
        cache = base(ids[:, :3], use_cache=True).past_key_values
        with store.batch(["a"] * 6):
            found = base(ids[:, 3:], past_key_values=cache).logits
            whole = base(ids).logits
    rows = [0, 1, 5]
    assert_close(found[rows], whole[rows, 3:], terms=500)


@pytest.mark.parametrize("live", ["peft", "ours"])
def test_adapters_of_a_live_model(world, served, ids, live):
    store, base, theirs = served
    if live == "peft":
        source = copy.deepcopy(theirs).float()
    else:
        source = copy.deepcopy(base)
        store.detach()
        source = copy.deepcopy(world[0])
        fused_lora.load_adapter(source, world[2] / "a", "a")
        store = fused_lora.AdapterStore(base, capacity_bytes=1 << 20)
    store.load("a", source.requires_grad_(False))
    with torch.no_grad(), store.batch(["a"] * 6):
        assert_close(base(ids).logits, theirs(ids, adapter_names=["a"] * 6).logits, terms=500)
    store.detach()


def test_packed_rows_say_where_it_begins(served, ids):
    store, base, theirs = served
    rows = torch.full((9,), -1)
    rows[3:] = 0
    with torch.no_grad():
        plain = base(ids[:1]).logits
        with store.batch_rows(["a"], rows):
            found = base(ids[:1]).logits
    assert_close(found, theirs(ids[:1], adapter_names=["a"]).logits, terms=500)
    assert torch.equal(bits(found[0, :3]), bits(plain[0, :3]))
    with (
        pytest.raises(ValueError, match="rows: expected a tensor .* 'a', an aLoRA adapter"),
        store.batch_rows(["a"], [9]),
    ):
        base(ids[:1])


def test_what_is_not_known_is_refused_by_name(served, ids):
    store, base, _ = served
    with pytest.raises(ValueError, match=r"names\[1\]: 'a' is an aLoRA adapter, which is not added to others"):
        store.batch(["a", {"a": 0.5, "plain": 0.5}]).__enter__()
    wanted = "aLoRA, expected .sequences, tokens, features. in a call of the model with token ids"
    with torch.no_grad(), store.batch(["a"] * 6):
        for call in (
            lambda: base(inputs_embeds=torch.ones(6, 9, 32)),
            lambda: base.model.layers[0].mlp.up_proj(torch.ones(6, 9, 32)),
        ):
            with pytest.raises(ValueError, match=wanted):
                call()
        base(ids)


def test_an_embedding_cannot_begin_later(world, tmp_path):
    base, *_ = world  # PEFT refuses to train such an adapter
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained(
        tmp_path, save_embedding_layers=False
    )
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**entries, "alora_invocation_tokens": [7]}))
    store = fused_lora.AdapterStore(base, capacity_bytes=1 << 20)
    with pytest.raises(ValueError, match="alora_invocation_tokens and adapts the embedding 'model.embed_tokens'"):
        store.load("e", tmp_path)
    store.detach()
    with pytest.raises(ValueError, match="alora_invocation_tokens: expected None for an embedding"):
        fused_lora.load_adapter(copy.deepcopy(base), tmp_path)


# ---- continuous batching


def expected(theirs, prompt, name, count):
    kwargs = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False)
    ids = torch.tensor([prompt])
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), adapter_names=[name], **kwargs)[0, len(prompt) :]


def test_the_engine_shares_the_prompt_before_the_invocation_with_the_base(served):
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    from fused_lora.serving.engine.continuous import continuous_batching

    store, base, theirs = served
    prompt = torch.randint(12, 40, (70,)).tolist()
    config = ContinuousBatchingConfig(page_size=16, num_blocks=64, max_batch_tokens=32, auto_switch_to_flash=False)
    asked = [
        (None, prompt, 0),
        ("a", [*prompt, *INVOCATION, 15], 64),  # four blocks of 16 before it
        ("b", [*prompt, 11, 20], 64),
        ("plain", [*prompt, 20], 0),
        ("a", [*prompt[:20], *INVOCATION, *prompt[20:]], 16),  # from there on other keys
        ("a", prompt, 64),  # none: the base
        (None, [*prompt[:20], *INVOCATION, *prompt[20:]], 16),
        ("b", [*prompt[:40], 11, *prompt[40:50], 11, *prompt[50:]], 32),
    ]
    with continuous_batching(base, store, config) as engine:
        for name, ids, shared in asked:
            before = engine.counters.cached_tokens
            engine.add_request(ids, adapter=name, max_new_tokens=5, eos_token_id=-1)
            output = engine.get_result(timeout=600)
            assert output.error is None
            wanted = expected(theirs, ids, name or "__base__", 5)
            assert torch.tensor(output.generated_tokens).equal(wanted), (name, len(ids))
            assert engine.counters.cached_tokens - before == shared, (name, len(ids))


def test_requests_in_one_step_keep_their_own_rows(served):
    from fused_lora.serving.engine.continuous import generate_batch

    store, base, theirs = served
    prompts = [torch.randint(12, 40, (n,)).tolist() for n in (9, 30, 14, 5, 21)]
    for row, at in ((0, 4), (1, 1), (1, 20), (4, 18)):
        prompts[row][at : at + 2] = INVOCATION
    names = ["a", "a", None, "plain", "a"]
    outputs = generate_batch(base, store, prompts, names, max_new_tokens=5, eos_token_id=-1)
    for output, prompt, name in zip(outputs, prompts, names, strict=True):
        wanted = expected(theirs, prompt, name or "__base__", 5)
        assert torch.tensor(output.generated_tokens).equal(wanted), name
