"""torch.compile of models with experts, DoRA layers and embeddings: one graph, and what eager computes."""

import peft
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import TOKENS, Net, wrap
from helpers.experts import BOTH, Block, moe
from helpers.seeds import shifted
from helpers.thorough import sampled
from helpers.versions import before

KINDS = {
    "experts": (Block, {**BOTH}),
    "Llama-4": (lambda: Block("llama4"), {**BOTH}),
    "a whole model": (moe, {**BOTH, "target_modules": ["q_proj"]}),
    "DoRA": (Net, {"target_modules": ["lin0", "conv1d"], "use_dora": True}),
    "embeddings": (Net, {"target_modules": ["lin0", "emb"]}),
}


@pytest.fixture(autouse=True)
def compiles_anew():
    """Code that Dynamo has given up on in another test would run eagerly in this one."""
    torch._dynamo.reset()


def build(kind, name, **fields):
    make, targets = KINDS[name]
    if kind == "inject":
        config = fused_lora.LoraConfig(r=4, **targets, **fields)
        model = fused_lora.inject(make(), config)
    else:
        model = fused_lora.accelerate(wrap(make(), **targets, **fields))
    for path, parameter in model.named_parameters():
        if "lora_" in path and "magnitude" not in path:
            parameter.data.normal_(std=0.2)
    return model


def run(model, call, ids):
    torch.manual_seed(shifted(3))
    y = call(ids)
    y = getattr(y, "logits", y)
    model.zero_grad()
    y.square().sum().backward()
    return {"y": y.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


CASES = [  # each second one in make test
    ("inject", "experts", 0.3, True),
    ("inject", "a whole model", 0.3, True),
    ("accelerate", "experts", 0.0, True),
    ("accelerate", "a whole model", 0.0, True),
    ("inject", "experts", 0.0, False),
    ("accelerate", "experts", 0.0, False),
    ("inject", "DoRA", 0.3, True),
    ("inject", "DoRA", 0.0, True),
    ("accelerate", "DoRA", 0.0, False),
    ("accelerate", "DoRA", 0.3, True),
    ("accelerate", "embeddings", 0.0, True),
    ("inject", "embeddings", 0.0, False),
    ("inject", "Llama-4", 0.3, True),
    ("accelerate", "Llama-4", 0.0, False),
    ("accelerate", "Llama-4", 0.0, True),
]


@pytest.mark.parametrize("kind, name, p, training", sampled(CASES, 2))
def test_one_graph_and_eagers_results(kind, name, p, training, monkeypatch):
    """No graph break, no recompilation, and PEFT's folded forward never runs."""
    if name in ("experts", "a whole model") and before("transformers", "5.23") and before("torch", "2.13"):
        pytest.skip("the backward of transformers' grouped product on a CPU does not compile")
    monkeypatch.setattr(peft.tuners.lora.layer.ParamWrapper, "_activate_lora", nn.Module.forward)  # raises
    if name == "a whole model" and before("torch", "2.9"):
        pytest.skip("Dynamo of torch 2.8 does not trace transformers' cache")
    model = build(kind, name, lora_dropout=p).train(training)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        ids = torch.randint(0, TOKENS, (5, 6))
        ours, eager = run(model, compiled, ids), run(model, model, ids)
        assert ours.keys() == eager.keys() and len(ours) > 2
        for part, tensor in ours.items():
            assert_close(tensor, eager[part], terms=1000)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("name", ["a whole model", "embeddings"])
def test_adapter_batch_without_an_eager_call_before(name):
    """The first call runs as it is written, for its rows are followed; the graph breaks in later ones."""
    model = build("inject", name).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for names in (["default", None], [None, "default"], ["default"] * 2):
        ids = torch.randint(0, TOKENS, (2, 6))
        with fused_lora.adapter_batch(model, names):
            for _ in range(2):
                y, eager = (getattr(y, "logits", y) for y in (compiled(ids), model(ids)))
                assert_close(y, eager, terms=1000)
    torch._dynamo.reset()
    with fused_lora.adapter_batch(model, ["default", None]):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="adapter_batch breaks graphs: compile without full"):
            torch.compile(model, backend="eager", fullgraph=True)(ids)
    torch._dynamo.reset()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("names", [["a", "a", None, "b"], ["a", "b", None, "a"]], ids=["neighbours", "apart"])
@pytest.mark.parametrize("kind", ["inject", "accelerate"])
def test_adapter_names_are_one_graph(kind, names, grad):
    model, fields = nn.Sequential(nn.Linear(8, 6)).eval(), dict(r=2, target_modules=["0"], init_lora_weights=False)
    if kind == "inject":
        for name in ("a", "b"):
            fused_lora.inject(model, fused_lora.LoraConfig(**fields), name)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**fields), "a").eval()
        model.add_adapter("b", peft.LoraConfig(**fields))
        model, names = fused_lora.accelerate(model).base_model.model, [name or "__base__" for name in names]
    x = torch.randn(4, 3, 8)
    with torch.set_grad_enabled(grad):
        y = torch.compile(model[0], backend="aot_eager", fullgraph=True)(x, adapter_names=names)
        assert_close(y, model[0](x, adapter_names=names), terms=16)


def test_dora_of_16_bits_with_dropout_is_one_graph():
    """Its base product is another function than in fp32, and asks whether gradients come in batches."""
    config = fused_lora.LoraConfig(r=4, target_modules=["0"], use_dora=True, lora_dropout=0.5, init_lora_weights=False)
    model = fused_lora.inject(nn.Sequential(nn.Linear(8, 6)).bfloat16(), config)
    torch._dynamo.reset()
    x = torch.randn(5, 8).bfloat16()
    ours, eager = (run(model, call, x) for call in (torch.compile(model, backend="aot_eager", fullgraph=True), model))
    assert ours.keys() == eager.keys() and len(ours) == 4
    for name in ours:
        assert_close(ours[name], eager[name], terms=64, name=name)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["inject", "accelerate"])
def test_llama_4_under_a_default_device_is_one_graph(kind):
    """Dynamo does not trace what torch.Tensor has written in Python there."""
    model, ids = build(kind, "Llama-4").eval(), torch.randint(0, TOKENS, (5, 6))
    torch._dynamo.reset()
    with torch.get_default_device():
        ours = torch.compile(model, backend="eager", fullgraph=True)(ids)
    assert_close(ours, model(ids), terms=1000)
    torch._dynamo.reset()
