"""aLoRA in accelerated PEFT models: rows from the invocation on under the adapter, rows before it the base model's."""

import copy

import peft
import pytest
import torch

import fused_lora
from fused_lora.integrations import peft_linear
from fused_lora.integrations.peft import layer_report
from fused_lora.integrations.peft_linear import AROUND, CALLS, FUSED
from fused_lora.modules.activated import BEFORE, changed_rows
from fused_lora.reference import bits
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import LENGTH, ROWS, Net, SideBySide, layers, pair, quiet, wrap
from helpers.invocation import INVOCATION, prompts
from helpers.seeds import shifted
from helpers.thorough import pairwise
from helpers.versions import since

ALORA = {"alora_invocation_tokens": INVOCATION}
OFFSETS = [[2, None, LENGTH, 0], [1, 1, 1, 1], [None] * ROWS, [LENGTH, 99, LENGTH, LENGTH + 1], [-2, 3, 2, None]]
assert all(len(offsets) == ROWS for offsets in OFFSETS)


def model(adapters=None, dtype=torch.float32, training=False, **fields):
    return SideBySide(wrap(Net(dtype), adapters or {"a": ALORA}, **fields).train(training))


@pairwise(offsets=[*OFFSETS, None], dtype=[torch.float32, torch.bfloat16], training=[False, True])
def test_outputs_and_gradients(offsets, dtype, training):
    model(dtype=dtype, training=training).assert_same_results(alora_offsets=offsets)


@pytest.mark.parametrize(
    "adapters",
    [
        {"a": {**ALORA, "lora_bias": True, "target_modules": ["lin0", "conv1d", "head"]}},
        {"a": {**ALORA, "use_rslora": True, "lora_dropout": 1.0}},
        {"a": ALORA, "b": {"r": 3, "lora_alpha": 5}},
        pytest.param(
            {"b": {"r": 3}, "a": {**ALORA, "target_modules": ["lin0", "head"]}, "c": ALORA}, marks=since("peft", "0.19")
        ),
        {"a": ALORA, "dora": {"use_dora": True}},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_further_settings_and_adapters_beside_it(adapters, dtype):
    both = model(adapters, dtype, training=True)
    both.do(lambda m: m.base_model.set_adapter(list(adapters)))
    before = CALLS[AROUND + BEFORE]
    both.assert_same_results(alora_offsets=OFFSETS[0])
    assert (CALLS[AROUND + BEFORE] > before) == ("dora" not in adapters)
    both.assert_same_results(alora_offsets=OFFSETS[3])


def test_calls_and_report_say_what_runs():
    both = model()
    assert {str(row) for row in layer_report(both.ours)} == {AROUND + BEFORE}
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long)
    for offsets, reason in ((OFFSETS[0], AROUND + BEFORE), (OFFSETS[3], FUSED), (OFFSETS[2], AROUND + BEFORE)):
        before = CALLS[reason]
        both.ours(ids, alora_offsets=offsets)
        assert CALLS[reason] == before + 4


@torch.no_grad()
def test_a_decode_step_is_remembered(monkeypatch):
    """The second call asks nothing, whichever rows it changes, and is counted; other calls are asked about anew."""
    [ours, *_] = layers(pair(torch.float32, {"a": ALORA}))
    x, found, asked = torch.randn(ROWS, 1, 24), {}, []
    steps = {(1, None, 1, 1): AROUND + BEFORE, (1, 1, 1, 1): FUSED, (None,) * ROWS: AROUND + BEFORE}
    for offsets in steps:
        found[offsets] = ours(x, alora_offsets=list(offsets))
    ask = peft_linear.why_not_fused
    monkeypatch.setattr(peft_linear, "why_not_fused", lambda *given: asked.append(given) or ask(*given))
    for offsets, reason in steps.items():
        before = CALLS[reason]
        assert torch.equal(bits(ours(x, alora_offsets=list(offsets))), bits(found[offsets]))
        assert CALLS[reason] == before + 1 and not asked
    assert torch.equal(bits(found[(None,) * ROWS]), bits(ours.base_layer(x)))
    with pytest.raises(IndexError):  # too few
        ours(x, alora_offsets=[1, 1])
    ours(x)  # none
    assert len(asked) == 2
    handle = ours.base_layer.register_forward_hook(lambda m, args, y: y * 2)
    doubled = ours(x, alora_offsets=[1, None, 1, 1])
    assert len(asked) == 3 and torch.equal(doubled[1], 2 * found[1, None, 1, 1][1])
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 5, 24), (4, 24)], ids=["tokens", "one token each"])
def test_base_rows_are_the_bits_of_the_base(dtype, shape):
    [ours, *_] = layers(pair(dtype, {"a": ALORA}))
    x, offsets = torch.randn(shape).to(dtype), [1, None, 3, 0]
    y, base = ours(x, alora_offsets=offsets), ours.base_layer(x)
    rows = changed_rows(x, offsets)
    changed = torch.zeros(x.shape[:-1].numel(), dtype=torch.bool).index_fill_(0, rows, True).reshape(x.shape[:-1])
    assert torch.equal(bits(y[~changed]), bits(base[~changed])) and (y[changed] != base[changed]).any(-1).all()
    with torch.no_grad():
        assert torch.equal(bits(ours(x)), bits(base)) and torch.equal(bits(y), bits(ours(x, alora_offsets=offsets)))


def test_numbers_that_are_not_finite_stay_on_their_side():
    both = pair(torch.float32, {"a": ALORA})
    for layer in layers(both):
        layer.lora_B["a"].weight.data[0, 0] = float("inf")
    x = torch.randn(4, 5, 24)
    for layer in layers(both):
        y = layer(x.to(layer.weight.dtype), alora_offsets=[2, None, 5, 0])
        assert torch.isfinite(y[1]).all() and torch.isfinite(y[0, :3]).all() and not torch.isfinite(y[0, 3:]).any(0)[0]


def test_dropout_is_that_of_the_changed_rows_and_drawn_anew():
    both = pair(torch.float32, {"a": {**ALORA, "lora_dropout": 0.5}})
    ours, theirs, _ = layers(both)
    x, offsets = torch.randn(4, 50, 24), [25, None, 50, 3]
    mean = {}
    for layer in (ours.train(), theirs.train()):
        torch.manual_seed(shifted(5))
        y = [layer(x, alora_offsets=offsets).detach() for _ in range(400)]
        assert not torch.equal(y[0], y[1]) and torch.equal(y[0][1], y[1][1])
        torch.manual_seed(shifted(5))
        assert torch.equal(y[0], layer(x, alora_offsets=offsets))
        mean[layer] = torch.stack(y).mean(0)
    exact = ours.eval()(x, alora_offsets=offsets)
    spread = [(found - exact).abs().mean().item() for found in mean.values()]
    assert spread[0] < 1.2 * spread[1]


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda m: m(torch.ones(3, 5, dtype=torch.long), alora_offsets=[1, 2]), IndexError),
        (lambda m: m.merge_adapter(), NotImplementedError),
        (lambda m: m.merge_adapter(safe_merge=True), NotImplementedError),
        (lambda m: m.merge_and_unload(), NotImplementedError),
    ],
)
def test_what_peft_refuses_is_refused_the_same(call, error):
    both = model()
    both.do(call, raises=error)
    both.assert_same_results(alora_offsets=OFFSETS[0])


def test_second_derivatives():
    [*_, exact] = layers(pair(torch.float32, {"a": ALORA}))
    ours = fused_lora.accelerate(torch.nn.Sequential(copy.deepcopy(exact)))[0]
    x, g = (torch.randn(2, 3, n, dtype=torch.float64, requires_grad=True) for n in (24, 17))
    found = []
    for layer in (ours, exact):
        inputs = [x, g, layer.lora_A["a"].weight, layer.lora_B["a"].weight]
        first = torch.autograd.grad(layer(x, alora_offsets=[2, 1]), inputs[:1] + inputs[2:], g, create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), inputs)
        found.append([*first, *second])
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, terms=1000)


def test_a_batch_of_gradients():
    [ours, theirs, _] = layers(pair(torch.float32, {"a": ALORA}))
    x, g = torch.randn(2, 3, 24), torch.randn(5, 2, 3, 17)
    found = [
        torch.autograd.grad(layer(x, alora_offsets=[2, 1]), layer.lora_B["a"].weight, g, is_grads_batched=True)[0]
        for layer in (ours, theirs)
    ]
    assert_close(*found, terms=100)


def test_compiled():
    torch.compiler.reset()
    [ours, *_] = layers(pair(torch.float32, {"a": ALORA}))
    x, offsets = torch.randn(3, 4, 24), [2, None, 4]
    y, expected = torch.compile(ours, backend="aot_eager")(x, alora_offsets=offsets), ours(x, alora_offsets=offsets)
    assert_close(y, expected, terms=100)
    y.sum().backward()
    found = ours.lora_B["a"].weight.grad.clone()
    ours.zero_grad()
    expected.sum().backward()
    assert_close(found, ours.lora_B["a"].weight.grad, terms=100)


# ---- a language model: offsets found by PEFT


@pytest.fixture(scope="module")
def base():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, vocab_size=40, max_position_embeddings=32)
    torch.manual_seed(shifted(1))
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)).eval()


def llama(base, **adapters):
    theirs = None
    for name, fields in adapters.items():
        config = peft.LoraConfig(
            r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **fields
        )
        with quiet():
            if theirs is None:
                theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
            else:
                theirs.add_adapter(name, config)
    return SideBySide(theirs.eval())


@pytest.fixture
def ids():
    return prompts()


def step(model, ids, **kwargs):
    """(logits, loss, gradients of the adapters by name)."""
    model.zero_grad()
    out = model(ids, labels=ids, **kwargs)
    out.loss.backward()
    return out.logits.detach(), out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("checkpointed", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_a_training_step(base, ids, checkpointed):
    both, found = llama(base, a=ALORA), []
    for model in (both.ours.train(), both.exact.train()):
        if checkpointed is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointed})
        found.append(step(model, ids))
        with model.disable_adapter():
            base_logits = model(ids).logits
        assert torch.equal(bits(found[-1][0][3]), bits(base_logits[3].detach()))
    (logits, loss, grads), (exact_logits, exact_loss, exact_grads) = found
    assert_close(logits, exact_logits, terms=500)
    assert_close(loss, exact_loss, terms=500)
    for name in exact_grads:
        assert_close(grads[name], exact_grads[name], terms=2000, name=name)


def test_generate(base, ids):
    both = llama(base, a=ALORA, plain={})
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    kwargs = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    texts = [m.generate(ids, **kwargs) for m in (both.ours, both.exact)]
    assert torch.equal(*texts)
    with both.ours.disable_adapter():
        plain = both.ours.generate(ids, **kwargs)
    assert torch.equal(plain[3], texts[0][3]) and not torch.equal(plain, texts[0])
    both.do(lambda m: m.generate(ids, num_beams=2, **kwargs), raises=ValueError)


def test_mixed_batches(base, ids):
    both = llama(base, a=ALORA, plain={}, b={"alora_invocation_tokens": [11]})
    ids[1, 4] = 11
    for names in (["a", "b", "__base__", "plain", "a"], ["a"] * 5, ["b"] * 5):
        logits = [m(ids, adapter_names=names).logits for m in (both.ours, both.exact)]
        assert_close(*logits, terms=500)
        kwargs = dict(adapter_names=names, max_new_tokens=4, do_sample=False)
        assert torch.equal(*[m.generate(ids, **kwargs) for m in (both.ours, both.exact)])


def test_files_are_pefts(base, ids, tmp_path):
    both = llama(base, a=ALORA)
    both.ours.save_pretrained(tmp_path)
    again = fused_lora.accelerate(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "a"))
    assert again.peft_config["default"].alora_invocation_tokens == INVOCATION
    assert torch.equal(again(ids).logits, both.ours(ids).logits)
