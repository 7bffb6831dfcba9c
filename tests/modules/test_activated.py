"""aLoRA in a model's own layers, beside the same adapter in PEFT's hands."""

import copy
import pickle

import peft
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.modules.activated import starts_of
from fused_lora.modules.config import LoraConfig
from fused_lora.reference import bits
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import ROWS, Net
from helpers.invocation import INVOCATION, prompts
from helpers.seeds import shifted


@pytest.fixture(scope="module")
def base():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, vocab_size=40, max_position_embeddings=32)
    torch.manual_seed(shifted(1))
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)).eval()


def config(**fields):
    given = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.LoraConfig(**{**given, "alora_invocation_tokens": INVOCATION, **fields})


@pytest.fixture
def both(base, tmp_path):
    """(ours, PEFT's in float64) with one adapter, through PEFT's files."""
    theirs = peft.get_peft_model(copy.deepcopy(base), config()).eval()
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    fused_lora.load_adapter(ours, tmp_path, is_trainable=True)
    return ours.eval(), theirs.double()


@pytest.fixture
def ids():
    return prompts()


STARTS = [3, 7, 0, None, 5]


def test_the_last_invocation_counts(ids):
    assert starts_of(ids, INVOCATION) == STARTS == starts_of(ids.int(), INVOCATION)
    assert starts_of(ids[:, :1], INVOCATION) == [None] * 5 and starts_of(ids[:0], INVOCATION) == []
    offsets = peft.tuners.lora.variants.calculate_alora_offsets({"a": config()}, "a", ids)
    assert offsets == [None if start is None else 9 - start for start in STARTS]


@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_a_training_step_is_pefts(both, ids, checkpointed):
    found = []
    for model in both:
        model.train()
        if checkpointed is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointed})
        for _ in range(2):
            model.zero_grad()
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
        grads = [p.grad for n, p in model.named_parameters() if "lora_" in n]
        found.append([out.logits.detach(), out.loss.detach(), *grads])
    assert len(found[0]) == len(found[1])
    for mine, exact in zip(*found, strict=True):
        assert_close(mine, exact, terms=2000)


def test_rows_before_the_invocation_are_the_bits_of_the_base(both, base, ids):
    ours, _ = both
    with torch.no_grad():
        found, plain = ours(ids).logits, base(ids).logits
    for row, start in enumerate(STARTS):
        assert torch.equal(bits(found[row, :start]), bits(plain[row, :start]))
        assert start is None or (found[row, start:] != plain[row, start:]).any(-1).all()


def test_generate_is_pefts(both, ids):
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(*[model.generate(ids, **kwargs) for model in both])


@pytest.mark.parametrize("cut", [2, 4, 8])
def test_a_cache_knows_which_sequences_have_begun(both, base, ids, cut):
    """Also one that the base model has filled, which is what aLoRA is for."""
    ours, theirs = both
    ids[:, 3:] = torch.where(ids[:, 3:] == INVOCATION[0], 11, ids[:, 3:])
    ids[4, 1] = 11  # an invocation across the cut is not found
    ids[0, cut : cut + 2] = torch.tensor(INVOCATION[: 9 - cut])
    with torch.no_grad():
        whole, exact = ours(ids).logits, theirs(ids).logits
        cache = ours(ids[:, :cut], use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        rest = ours(ids[:, cut:], past_key_values=cache).logits
        one_by_one = [ours(ids[1:4, i : i + 1], past_key_values=_of(again, i == cut)).logits for i in range(cut, 9)]
    assert_close(whole, exact, terms=500)
    assert_close(rest, whole[:, cut:], terms=500)
    assert_close(torch.cat(one_by_one, 1)[1:], whole[2:4, cut:], terms=500)


def _of(cache, first):
    if first:
        cache.batch_select_indices(torch.tensor([1, 2, 3]))
        held = cache._fused_lora_started
        cache._fused_lora_started = {name: flags[1:4] for name, flags in held.items()}
    return cache


def test_offsets_may_be_given(both, ids):
    ours, _ = both
    given = [None if start is None else 9 - start for start in STARTS]
    with torch.no_grad():
        embeds = ours.get_input_embeddings()(ids)
        found, wanted = ours(inputs_embeds=embeds, alora_offsets=given).logits, ours(ids).logits
        assert torch.equal(found, wanted)
        with pytest.raises(ValueError, match="expected token ids .* or alora_offsets="):
            ours(inputs_embeds=embeds)
        for wrong in ("ab", 3, [1.5]):
            with pytest.raises(TypeError, match="alora_offsets: expected an int or None for each sequence"):
                ours(inputs_embeds=embeds, alora_offsets=wrong)
        with fused_lora.disable_adapters(ours):
            ours(inputs_embeds=embeds)


def test_mixed_batches(both, base, ids):
    ours, theirs = both
    for model in both:
        torch.manual_seed(shifted(4))
        if model is ours:
            fused_lora.inject(ours, config(alora_invocation_tokens=None), "plain")
            fused_lora.inject(ours, config(alora_invocation_tokens=[11]), "b")
        else:
            theirs.add_adapter("plain", config(alora_invocation_tokens=None))
            theirs.add_adapter("b", config(alora_invocation_tokens=[11]))
    mine, other = (dict(model.named_parameters()) for model in both)
    for name, parameter in mine.items():
        if "lora_" in name:
            parameter.data.copy_(other[f"base_model.model.{name}"].data)
    ids[1, 4] = 11
    names = ["default", "b", None, "plain", "default"]
    kwargs = dict(attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    with torch.no_grad(), fused_lora.adapter_batch(ours, names):
        logits, text = ours(ids).logits, ours.generate(ids, **kwargs)
    theirs_names = [name or "__base__" for name in names]
    assert_close(logits, theirs(ids, adapter_names=theirs_names).logits.detach(), terms=500)
    assert torch.equal(text, theirs.generate(ids, adapter_names=theirs_names, **kwargs))
    assert torch.equal(bits(logits[2]), bits(base(ids).logits[2].detach()))
    # several active ones, each from its own place on
    fused_lora.set_adapter(ours, ["default", "b", "plain"])
    alone = {}
    for name in ("default", "b"):
        fused_lora.set_adapter(ours, name)
        alone[name] = ours(ids).logits.detach()
    fused_lora.set_adapter(ours, ["default", "b"])
    found = ours(ids).logits.detach()
    assert torch.equal(bits(found[1, :4]), bits(base(ids).logits[1, :4].detach()))
    assert_close(found[1, 4:7], alone["b"][1, 4:7], terms=500)
    assert_close(found[0], alone["default"][0], terms=500)


def test_files_are_pefts(both, base, ids, tmp_path):
    ours, theirs = both
    fused_lora.save_adapter(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").double()
    assert again.peft_config["default"].alora_invocation_tokens == INVOCATION
    assert torch.equal(again(ids).logits, theirs(ids).logits)
    assert fused_lora.adapter_configs(ours)["default"].alora_invocation_tokens == INVOCATION


def test_merges_are_refused_and_change_nothing(both, ids):
    ours, _ = both
    fused_lora.inject(ours, config(alora_invocation_tokens=None), "plain")
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    for call in (
        lambda: fused_lora.merge(ours),
        lambda: fused_lora.merge(ours, ["plain", "default"]),
        lambda: fused_lora.unload(ours, merge_adapters=True),
    ):
        with pytest.raises(RuntimeError, match=r"\['default'\] are aLoRA"):
            call()
        assert all(torch.equal(parameter, before[name]) for name, parameter in ours.named_parameters())
        assert not any(layer.merged for layer in fused_lora.lora_layers(ours).values())
    with pytest.raises(RuntimeError, match="'default' are another variant"):
        fused_lora.verify(ours, ids)
    fused_lora.unload(ours)
    assert ours(ids).logits.shape == (5, 9, 40) and not any(map(_is_ours, ours._forward_pre_hooks.values()))


def _is_ours(hook):
    return "activated" in type(getattr(hook, "__self__", None)).__module__


def test_copies_and_pickles_find_their_own_rows(both, ids):
    ours, _ = both
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(ids).logits, ours(ids).logits)
        hooks = [hook for hook in other._forward_pre_hooks.values() if _is_ours(hook)]
        layer = next(iter(fused_lora.lora_layers(other).values()))
        assert len(hooks) == 1 and layer.activated["default"] is hooks[0].__self__
    fused_lora.delete_adapter(ours, "default")
    assert not any(layer.activated for layer in fused_lora.lora_layers(ours).values())


def test_a_layer_without_its_model_is_refused(both, ids):
    ours, _ = both
    layer = next(iter(fused_lora.lora_layers(ours).values()))
    ours(ids)
    for call in (lambda: layer(torch.ones(5, 9, 32)), lambda: ours.model(ids)):
        with pytest.raises(RuntimeError, match="call the model itself"):
            call()


def test_two_forwards_before_a_checkpointed_backward_are_refused(both, ids):
    ours, _ = both
    ours.train().enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    loss = ours(ids, labels=ids).loss + ours(ids.flip(0), labels=ids).loss
    with pytest.raises(RuntimeError, match="call backward after each forward"):
        loss.backward()
    ours(ids, labels=ids).loss.backward()


class Flat(nn.Module):
    """A layer that gets the rows of all sequences one after another, and one that gets other rows."""

    def __init__(self, other=False):
        super().__init__()
        self.emb, self.lin, self.other = nn.Embedding(20, 8), nn.Linear(8, 8), other

    def forward(self, ids):
        hidden = self.emb(ids)
        return self.lin(hidden.flatten(0, 1)[int(self.other) :]).view(*ids.shape[: 2 - self.other], -1)


def test_flattened_rows():
    fields = dict(target_modules=["lin"], alora_invocation_tokens=[3], init_lora_weights=False)
    ids = torch.tensor([[1, 3, 2], [1, 1, 1]])
    model = fused_lora.inject(Flat(), LoraConfig(**fields))
    y, plain = model(ids), model.lin.base_layer(model.emb(ids))
    assert (y != plain).any(-1).tolist() == [[False, True, True], [False] * 3]
    with pytest.raises(ValueError, match=r"expected an input of shape \[2, tokens, features\], got \(5, 8\)"):
        fused_lora.inject(Flat(True), LoraConfig(**fields))(ids)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"alora_invocation_tokens": "x"}, TypeError, "alora_invocation_tokens must be a list of token ids or None"),
        ({"alora_invocation_tokens": [1.5]}, TypeError, "alora_invocation_tokens must be made of int"),
        ({"alora_invocation_tokens": [-1]}, ValueError, "alora_invocation_tokens must be made of numbers that"),
        ({"use_dora": True}, ValueError, "use_dora must be False with alora_invocation_tokens"),
        ({"task_type": "SEQ_CLS"}, ValueError, "task_type must be CAUSAL_LM or None with alora_invocation_tokens"),
        ({"target_parameters": ["w"]}, ValueError, "alora_invocation_tokens must be None with target_parameters"),
        ({"target_modules": ["emb"]}, ValueError, "alora_invocation_tokens: expected None for an embedding"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_what_does_not_go_with_it_is_refused_by_name(fields, error, message):
    with pytest.raises(error, match=message):
        fused_lora.inject(
            Net(), LoraConfig(**{"target_modules": ["lin0"], "alora_invocation_tokens": INVOCATION, **fields})
        )


def test_an_empty_list_is_plain_lora():
    model = fused_lora.inject(Net().eval(), LoraConfig(target_modules=["lin0"], alora_invocation_tokens=[]))
    assert model(torch.ones(ROWS, 3, dtype=torch.long)).shape == (ROWS, 3, 12)
    assert not fused_lora.lora_layers(model)["lin0"].activated
