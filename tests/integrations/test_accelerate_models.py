"""Accelerated transformers models: PEFT's ways of loading, tying, swapping and generating, beside PEFT."""

import copy

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

import fused_lora
from fused_lora.integrations import peft as integration
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import TOKENS, SideBySide, wrap
from helpers.hooks import hooks
from helpers.seeds import shifted
from helpers.versions import since

pytestmark = pytest.mark.numeric

STOCK = peft.tuners.lora.Linear


def llama(**fields):
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, **fields
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_embd=32, n_layer=2, n_head=2, n_positions=16)).eval()


LINEAR = ["q_proj", "v_proj", "down_proj"]
MODELS = {"llama": (llama, LINEAR), "gpt2": (gpt2, ["c_attn", "c_proj"])}
BATCH = torch.arange(1, 13).reshape(3, 4)


def pair(kind="llama", adapters=None, **fields):
    make, targets = MODELS[kind]
    return SideBySide(wrap(make(), adapters, **{"target_modules": targets, **fields}).eval())


@pytest.fixture
def saved(tmp_path):
    """Folders of two adapters of the tiny Llama, "one" (r=4) and "two" (r=4, other alpha)."""
    for name, alpha in (("one", 6), ("two", 3)):
        wrap(llama(), target_modules=LINEAR, lora_alpha=alpha, task_type="CAUSAL_LM").save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_model(kind):
    both = pair(kind, {"a": {}, "b": {"r": 2, "use_rslora": True}}, lora_dropout=0.1)
    for names in (["a"], ["b"], ["a", "b"]):
        both.do(lambda m, names=names: m.base_model.set_adapter(names))
        both.assert_same_results()
    both.do(lambda m: m.merge_adapter())
    both.assert_same_results(ulps=2)
    both.do(lambda m: m.unmerge_adapter())
    assert all(row.fused for row in integration.layer_report(both.ours))
    assert peft.get_layer_status(both.ours) == peft.get_layer_status(both.theirs)
    assert peft.get_model_status(both.ours) == peft.get_model_status(both.theirs)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading(low_cpu_mem_usage, saved):
    torch.manual_seed(shifted(0))
    model = peft.PeftModel.from_pretrained(llama(), saved / "one", low_cpu_mem_usage=low_cpu_mem_usage)
    both = SideBySide(model)
    both.do(lambda m: m.load_adapter(saved / "two", "two", low_cpu_mem_usage=low_cpu_mem_usage) and None)
    both.do(lambda m: m.set_adapter("two"))
    both.assert_same_results()
    assert all(row.fused for row in integration.layer_report(both.ours))


def test_loading_while_installed(saved):
    integration.install()
    try:
        model = peft.PeftModel.from_pretrained(llama(), saved / "one")
        bare = llama()
        bare.load_adapter(saved / "two", "two")  # transformers' own way to PEFT
    finally:
        integration.uninstall()
    for loaded in (model, bare):
        rows = integration.layer_report(loaded)
        assert len(rows) == 6 and all(row.fused for row in rows)


@since("peft", MIN_PEFT_VERSION)
def test_transformers_own_adapters(saved):
    net = llama()
    net.load_adapter(saved / "one", "one")
    both = SideBySide(net)
    both.do(lambda m: m.add_adapter(peft.LoraConfig(target_modules=LINEAR, init_lora_weights=False), "new"))
    both.do(lambda m: m.set_adapter(["one", "new"]))
    both.assert_same_results()
    both.do(lambda m: m.disable_adapters())
    both.assert_same_results()
    both.do(lambda m: m.enable_adapters())
    both.do(lambda m: m.delete_adapter("new"))
    both.assert_same_results()


@since("peft", "0.21")
def test_hotswap(saved):
    both = SideBySide(peft.PeftModel.from_pretrained(llama(), saved / "one"))
    both.do(lambda m: hotswap_adapter(m, saved / "two", "default"))
    both.assert_same_results()
    both.do(lambda m: m.merge_adapter())
    both.do(lambda m: hotswap_adapter(m, saved / "one", "default"), raises=ValueError)


def test_hotswap_prepared_for_compilation(saved):
    both = SideBySide(peft.PeftModel.from_pretrained(llama(), saved / "one"))
    both.do(lambda m: prepare_model_for_compiled_hotswap(m, target_rank=8))
    layer = both.ours.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == 8 and isinstance(layer.scaling["default"], torch.Tensor)
    both.assert_same_results()
    both.do(lambda m: hotswap_adapter(m, saved / "two", "default"))
    both.assert_same_results()
    assert all(row.fused for row in integration.layer_report(both.ours))


@pytest.mark.parametrize("ensure_weight_tying", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_tied_embeddings(ensure_weight_tying):
    def build():
        torch.manual_seed(shifted(0))
        config = peft.LoraConfig(
            target_modules=[*LINEAR, "embed_tokens", "lm_head"],
            init_lora_weights=False,
            ensure_weight_tying=ensure_weight_tying,
        )
        return peft.get_peft_model(llama(tie_word_embeddings=True), config)

    theirs, ours = build(), fused_lora.accelerate(build())
    head = ours.base_model.model.lm_head
    assert type(head) is not STOCK
    assert all(row.fused for row in integration.layer_report(ours) if row.kind == "peft lora.Linear")
    for step in (lambda m: None, lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()):
        for model in (ours, theirs):
            step(model)
        assert_close(ours(BATCH).logits, theirs(BATCH).logits, terms=1000)
    mine, other = (grads(m) for m in (ours, theirs))
    for a, b in zip(mine, other, strict=True):
        assert_close(a, b, terms=1000)
    assert_close(ours.merge_and_unload()(BATCH).logits, theirs.merge_and_unload()(BATCH).logits, terms=1000)


def grads(model):
    model(BATCH).logits.square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_modules_to_save():
    both = pair(modules_to_save=["lm_head"], adapters={"a": {}, "b": {}})
    both.assert_same_results()
    both.do(lambda m: m.set_adapter("b"))
    both.assert_same_results()
    both.do(lambda m: m.merge_and_unload())
    both.assert_same_results(ulps=2)


def test_layer_replication():
    both = pair(layer_replication=[[0, 2], [1, 2]])
    both.assert_same_results()
    assert len(integration.layer_report(both.ours)) == 9


def test_merges_under_layer_replication():
    """Several deltas in one weight, as by PEFT, and a warning; the way back is PEFT's."""
    theirs = wrap(llama(), target_modules=LINEAR, layer_replication=[[0, 2], [1, 2]])
    ours = fused_lora.accelerate(copy.deepcopy(theirs))
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    with pytest.warns(UserWarning, match="another layer's adapters merged already") as said:
        ours.merge_adapter()
    assert len(said) == 3  # of the replica's layers
    theirs.merge_adapter()
    assert_close(ours(BATCH).logits, theirs(BATCH).logits, terms=1000)
    changed = [key for key, value in ours.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == [key for key, value in theirs.state_dict().items() if not torch.equal(value, before[key])] != []
    with pytest.warns(UserWarning, match="PEFT's unmerge subtracts"):
        ours.unmerge_adapter()
    theirs.unmerge_adapter()
    for key, value in ours.state_dict().items():
        assert_close(value, before[key], terms=4, size=1.0)  # rounded beside a delta, four times
        assert_close(theirs.state_dict()[key], before[key], terms=4, size=1.0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_with_a_mixed_batch(options):
    both = pair(adapters={"a": {"task_type": "CAUSAL_LM"}, "b": {"task_type": "CAUSAL_LM"}}, r=8, lora_alpha=64)
    for names in (["a", "__base__", "b"], ["b"] * 3):
        mine, theirs = (
            m.generate(BATCH, adapter_names=names, max_new_tokens=6, do_sample=False, **options)
            for m in both.models[:2]
        )
        assert torch.equal(mine, theirs)
    assert not any(hooks(m) for m in both.ours.modules())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    both = pair()
    both.do(lambda m: m.train() and None)
    for model in both.models:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    both.assert_same_results()


def test_initialisations_that_read_or_replace_what_is_there():
    theirs = wrap(llama(), target_modules=LINEAR)
    ours = fused_lora.accelerate(copy.deepcopy(theirs))
    for init in ("pissa", "olora", "orthogonal", "gaussian"):
        for model in (ours, theirs):
            torch.manual_seed(shifted(1))
            model.add_adapter(init, peft.LoraConfig(target_modules=LINEAR, r=4, init_lora_weights=init))
            model.base_model.set_adapter([init, "default"])
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(mine, other), name
        assert_close(ours(BATCH).logits, theirs(BATCH).logits, terms=1000)


@pytest.mark.filterwarnings("ignore")
def test_eva_may_initialise_adapters_again():
    config = peft.LoraConfig(
        target_modules=LINEAR, r=2, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0), task_type="CAUSAL_LM"
    )
    model = fused_lora.accelerate(peft.get_peft_model(llama(), config))
    data = [{"input_ids": torch.randint(1, TOKENS, (8, 6))} for _ in range(2)]
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    ranks = {m.r["default"] for m in model.modules() if isinstance(m, STOCK)}
    assert len(ranks) > 1 or ranks == {2}
    model(BATCH)


def test_other_tuners_are_left_alone():
    net = llama()
    model = peft.get_peft_model(net, peft.LoHaConfig(target_modules=LINEAR, r=2))
    with pytest.raises(ValueError, match="found none"):
        fused_lora.accelerate(model)
    ada = peft.get_peft_model(llama(), peft.AdaLoraConfig(target_modules=LINEAR, total_step=5))
    classes = [type(m) for m in ada.modules()]
    assert [type(m) for m in fused_lora.accelerate(ada).modules()] == classes
    assert not any(row.fused for row in integration.layer_report(ada))
    assert fused_lora.explain(ada) is not None


def test_mixed_models():
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(target_modules=LINEAR, init_lora_weights=False), "lora", mixed=True
    )
    theirs.add_adapter("loha", peft.LoHaConfig(target_modules=["q_proj", "o_proj"], r=2, init_weights=False))
    both = SideBySide(theirs)
    for names in ("lora", "loha", ["lora", "loha"]):
        both.do(lambda m, names=names: m.set_adapter(names))
        both.assert_same_results()


def test_a_copy_is_independent():
    model = fused_lora.accelerate(wrap(llama(), target_modules=LINEAR))
    before = model(BATCH).logits
    other = copy.deepcopy(model)
    other.merge_adapter()
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(model(BATCH).logits, before)
