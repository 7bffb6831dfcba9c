"""On a GPU: whole models beside PEFT and float64: training, compiled, DoRA, experts, stores, merges, files."""

import copy
import warnings

import pytest
import torch

import fused_lora
from fused_lora import reference
from fused_lora.integrations.peft import layer_report
from fused_lora.integrations.peft_linear import AcceleratedLinear
from fused_lora.ops import guard
from fused_lora.testing.numeric import DRAWS, assert_no_worse
from helpers.accelerated import copy_into
from helpers.seeds import shifted

peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
pytestmark = pytest.mark.gpu
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKENS = 64
SIZES = dict(
    vocab_size=TOKENS, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, pad_token_id=0,
)  # fmt: skip
MOE = SIZES | dict(moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2, decoder_sparse_step=1)
EXPERTS = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])


@pytest.fixture(autouse=True)
def nothing_is_dropped():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(is dropped|no kernel runs).*")
        yield


def llama(dtype=FP32):
    return on_gpu(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), dtype)


def moe(dtype=FP32):
    model = on_gpu(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MOE)), dtype)
    model.config._experts_implementation = "eager"
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.mul_(30)  # a choice that rounding turns changes little then
    return model


def on_gpu(model, dtype):
    return model.to("cuda", dtype).eval()


def adapted(model, adapters=("default",), autocast_adapter_dtype=False, **fields):
    """PEFT's model with random adapters."""
    config = peft.LoraConfig(**dict(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False) | fields)
    found = peft.get_peft_model(model, config, adapters[0], autocast_adapter_dtype=autocast_adapter_dtype)
    for name in adapters[1:]:
        found.add_adapter(name, config, autocast_adapter_dtype=autocast_adapter_dtype)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.05)
    return found.eval()


def results(model, ids, autocast=None, call=None):
    """Logits, and all gradients in one vector."""
    model.zero_grad()
    with torch.autocast("cuda", autocast or BF16, enabled=autocast is not None):
        logits = (call or model)(input_ids=ids).logits
    logits.float().square().mean().backward()
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return [logits.detach().clone(), torch.cat(gradients)]  # a later replay of a CUDA graph writes over its own


def assert_as_exact(ours, theirs, length, autocast=None, call=None):
    """Outputs and gradients of random batches, over embeddings drawn anew, as close to float64 as PEFT's."""
    models = ours, theirs, copy.deepcopy(theirs).double()
    embeddings = [model.get_input_embeddings() for model in models]
    weights = [getattr(layer, "base_layer", layer).weight for layer in embeddings]
    before, found = weights[1].detach().clone(), [[] for _ in models]
    for _ in range(DRAWS):
        batch, drawn = ids(2, length), torch.randn_like(before) * before.std()
        copy_into(weights, [drawn] * 3)
        for kept, model in zip(found, models, strict=True):
            as_trained = dict(autocast=autocast, call=call if model is ours else None)
            kept.append(results(model, batch, **({} if model is models[2] else as_trained)))
    copy_into(weights, [before] * 3)
    for name, *each in zip(("logits", "gradients"), *(zip(*kept, strict=True) for kept in found), strict=True):
        assert_no_worse(*map(torch.stack, each), name=name, draws=True)


def ids(rows=4, length=40):
    return torch.randint(1, TOKENS, (rows, length), device="cuda")


KINDS = {
    "LoRA": (llama, {}),
    "DoRA": (llama, {"use_dora": True}),
    "rank 96": (llama, {"r": 96}),
    "lora_bias": (lambda dtype: with_biases(llama(dtype)), {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}),
    "experts": (moe, EXPERTS),
    "embeddings": (llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
}


def with_biases(model):
    for module in list(model.modules()):
        if isinstance(module, torch.nn.Linear):
            module.bias = torch.nn.Parameter(torch.randn(module.out_features, device="cuda", dtype=module.weight.dtype))
    return model


@pytest.mark.parametrize("kind, length", [("LoRA", 3), ("LoRA", 700), *((kind, 40) for kind in KINDS)])
@pytest.mark.parametrize("how", ["fp32", "bf16", "fp16", "autocast bf16", "autocast fp16", "autocast over fp32"])
def test_an_accelerated_model(kind, how, length):
    """Outputs and gradients of every linear layer; then of the merged model, whose unmerge gives every bit back."""
    make, fields = KINDS[kind]
    dtype = FP32 if how.endswith("fp32") else FP16 if how.endswith("fp16") else BF16
    autocast = dtype if how in ("autocast bf16", "autocast fp16") else BF16 if "autocast" in how else None
    theirs = adapted(make(dtype), autocast_adapter_dtype=autocast is not None, **fields)
    ours = fused_lora.accelerate(copy.deepcopy(theirs))
    report = layer_report(ours)
    assert report and all(row.fused for row in report), [str(row) for row in report if not row.fused]
    assert_as_exact(ours, theirs, length, autocast)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    models = ours, theirs, copy.deepcopy(theirs).double()
    for model in models:
        model.merge_adapter()
    for name, *weights in zip(before, *(model.parameters() for model in models), strict=True):
        assert_no_worse(*weights, name=name)
    ours.unmerge_adapter()
    assert all(torch.equal(reference.bits(p), reference.bits(before[n])) for n, p in ours.named_parameters())


@pytest.mark.parametrize("how", ["bf16", "autocast bf16"])
def test_training_with_dropout_follows_pefts_loss(how):
    """Thirty steps of AdamW from the same adapters, each with masks of its own: both learn the batch alike."""
    default = how != "bf16"
    theirs = adapted(llama(BF16), autocast_adapter_dtype=default, lora_dropout=0.1)
    ours, batch, last = fused_lora.accelerate(copy.deepcopy(theirs)), ids(), []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        losses = []
        for _ in range(30):
            with torch.autocast("cuda", BF16, enabled=default):
                loss = model.train()(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        last.append(torch.stack(losses).tolist())
    (first, *_, ours_last), (other, *_, theirs_last) = last
    assert abs(first - other) < 0.05 * other and ours_last < 0.8 * first
    assert abs(ours_last - theirs_last) < 0.15 * (other - theirs_last)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("how", ["bf16", "autocast bf16"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_compiled_model(kind, how, mode):
    """Compiled, every layer is our operator, and no less exact than PEFT's eager model."""
    make, fields = KINDS[kind]
    default = how != "bf16"
    theirs = adapted(make(BF16), autocast_adapter_dtype=default, **fields)
    ours, batch = fused_lora.accelerate(copy.deepcopy(theirs)), ids(2, 40)
    results(ours, batch, BF16 if default else None)  # first uses, outside of graphs
    torch._dynamo.reset()
    compiled = torch.compile(ours, mode=None if mode == "default" else mode)

    def call(**inputs):
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(**inputs)

    assert_as_exact(ours, theirs, 40, BF16 if default else None, call)
    names = launched(lambda: results(ours, batch, BF16 if default else None, call))
    assert sum(name.startswith("_lora") for name in names) >= len(layer_report(ours)), sorted(set(names))


def launched(call):
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_masks(reentrant):
    model = fused_lora.accelerate(adapted(llama(BF16), lora_dropout=0.2)).train()
    model.enable_input_require_grads()
    batch, found = ids(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
        torch.manual_seed(shifted(5))
        found.append(results(model, batch))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_store_serves_what_pefts_adapters_compute(dtype, tmp_path):
    """Rows of several adapters and of none, in a batch; then tokens of generate()."""
    theirs = adapted(llama(dtype), ("a", "b"))
    theirs.save_pretrained(tmp_path)
    exact = copy.deepcopy(theirs).double()
    served = llama(dtype)
    served.load_state_dict(
        {n.replace("base_model.model.", "").replace(".base_layer", ""): t
         for n, t in theirs.state_dict().items() if "lora_" not in n}
    )  # fmt: skip
    store = fused_lora.AdapterStore(served, dtype=dtype)
    for name in ("a", "b"):
        store.load(name, tmp_path / name)
    rows, batch = ["a", None, "b", "a", "b"], ids(5, 17)
    with torch.no_grad(), store.batch(rows):
        y = served(input_ids=batch).logits
    parts = []
    for i, name in enumerate(rows):
        answers = []
        for model in (theirs, exact):
            model.set_adapter(name or "a")
            with torch.no_grad(), model.disable_adapter() if name is None else contextless():
                answers.append(model(input_ids=batch[i : i + 1]).logits[0])
        parts.append(answers)
    for i, (peft_y, exact_y) in enumerate(parts):
        assert_no_worse(y[i], peft_y, exact_y, factor=2.0, name=f"row {i}")
    if dtype is FP32:
        with store.batch(["a", "b"]):
            generated = served.generate(batch[:2], max_new_tokens=12, do_sample=False)
        for i, name in enumerate("ab"):
            theirs.set_adapter(name)
            alone = theirs.generate(input_ids=batch[i : i + 1], max_new_tokens=12, do_sample=False)
            assert torch.equal(generated[i : i + 1, : alone.shape[1]], alone)


def contextless():
    return warnings.catch_warnings()


def test_mixed_batches_of_adapter_names():
    theirs = adapted(llama(BF16), ("a", "b"))
    ours, batch = fused_lora.accelerate(copy.deepcopy(theirs)), ids(4, 30)
    exact, names = copy.deepcopy(theirs).double(), ["a", "__base__", "b", "a"]
    with torch.no_grad():
        found = [model(input_ids=batch, adapter_names=names).logits for model in (ours, theirs, exact)]
    assert_no_worse(*found, factor=1.5)


@pytest.mark.parametrize("names", [None, ["a", "__base__", "b", "a"]], ids=["one adapter", "names"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_waits_for_the_gpu(kind, names):
    """Each adapted layer's forward and backward, from the second call on; torch raises where the host would wait."""
    make, fields = KINDS[kind]
    if names is not None and kind in ("DoRA", "experts"):
        pytest.skip("PEFT refuses names")
    dropout = {} if names is not None or kind == "experts" else {"lora_dropout": 0.1}  # with names only eval is allowed
    model = fused_lora.accelerate(adapted(make(BF16), ("a", "b") if names else ("a",), **fields, **dropout))
    calls = {}

    def note(module, args, kwargs, y):
        calls[module] = args, kwargs

    hooks = [
        module.register_forward_hook(note, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, AcceleratedLinear)
    ]
    with torch.set_grad_enabled(names is None):
        model.train(names is None)(input_ids=ids(), **({} if names is None else dict(adapter_names=names)))
        for hook in hooks:
            hook.remove()
        assert calls
        for module, (args, kwargs) in calls.items():
            args = [t.detach().requires_grad_(names is None and t.is_floating_point()) for t in args]

            def step(module=module, args=args, kwargs=kwargs):
                y = module(*args, **kwargs)
                if names is None:
                    y.float().square().mean().backward()

            step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_inject_train_merge_switch_save(tmp_path):
    """Our own way through a model's life on one GPU; every bit of the base back at the end."""
    net = llama(BF16)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for name in ("one", "two"):
        fused_lora.inject(net, fused_lora.LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.1), name)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3)
    batch, losses = ids(), []
    for _ in range(20):
        loss = net.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    net.eval()
    with torch.no_grad():
        y = net(input_ids=batch).logits
        fused_lora.merge(net, ["one"])
        merged = net(input_ids=batch).logits
        assert (merged - y).float().norm() < 0.1 * y.float().norm()
        fused_lora.unmerge(net)
        assert torch.equal(net(input_ids=batch).logits, y)
    fused_lora.save_adapter(net, tmp_path / "one", "one")
    again = llama(BF16)
    again.load_state_dict(before)
    fused_lora.load_adapter(again, tmp_path / "one")
    with torch.no_grad():
        assert torch.equal(again(input_ids=batch).logits, y)
    held = dict(net.named_parameters())
    for name, tensor in before.items():
        path, _, last = name.rpartition(".")
        mine = held.get(name, held.get(f"{path}.base_layer.{last}"))
        assert torch.equal(reference.bits(mine), reference.bits(tensor)), name


def test_a_training_step_as_a_cuda_graph():
    """Forward and backward of an accelerated model, captured with its masks: replays draw fresh ones."""
    model = fused_lora.accelerate(adapted(llama(BF16), lora_dropout=0.3)).train()
    batch = ids()

    def step():
        return model(input_ids=batch, labels=batch).loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step().backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
        loss.backward()
    losses = []
    for _ in range(4):
        graph.replay()
        losses.append(loss.item())
    assert len(set(losses)) > 1 and max(losses) < 1.5 * min(losses)
    assert all(guard.verdicts().values())
