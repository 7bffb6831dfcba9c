"""What base layers answer: the registry, features, weights for a merge, and lora_term around any module."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import fused_lora
from fused_lora import reference
from fused_lora.bases import Adapters, Base, base_of, foreign, register
from fused_lora.bases import base as registry
from fused_lora.modules.targets import in_out_features
from fused_lora.ops.linear.op import draw_seeds
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers.seeds import shifted

K, N, M = 24, 17, 9


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Opaque(nn.Module):
    """Keeps its weight packed; nothing but its forward knows how."""

    def __init__(self):
        super().__init__()
        self.packed = nn.Parameter(torch.randint(-9, 9, (N, K), dtype=torch.int8), requires_grad=False)
        self.in_features, self.out_features = K, N

    def forward(self, x, scale=1.0):
        return x @ (self.packed.to(x.dtype) / 9).t() * scale


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))


def test_exact_types_are_dense_and_all_others_foreign():
    assert base_of(nn.Linear(K, N)).why_not_fused(nn.Linear(K, N)) is None
    assert base_of(Conv1D(N, K)).why_not_fused(Conv1D(N, K)) is None
    for module in (
        Doubled(K, N),
        Opaque(),
        nn.Bilinear(2, 2, 2),
        nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2),
    ):
        assert base_of(module).why_not_fused(module) == f"the base layer is a {type(module).__name__}"


@pytest.mark.parametrize(
    "module, expected",
    [(nn.Linear(K, N), (K, N)), (Conv1D(N, K), (K, N)), (Doubled(K, N), (K, N)), (Opaque(), (K, N))],
    ids=lambda v: type(v).__name__,
)
def test_features(module, expected):
    assert base_of(module).features(module) == in_out_features(module) == expected


def test_features_of_a_module_that_has_none():
    with pytest.raises(TypeError, match="base_layer: a Tanh has no in_features"):
        base_of(nn.Tanh()).features(nn.Tanh())


def test_weights_for_a_merge():
    for module in (nn.Linear(K, N), Conv1D(N, K), Doubled(K, N)):
        assert base_of(module).why_not_merged(module) is None and base_of(module).matrix(module) is module.weight
    assert base_of(Opaque()).why_not_merged(Opaque()) == "a weight is not a parameter of its own"
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(K, N))
    assert base_of(linear).why_not_merged(linear) == "a weight is not a parameter of its own"


CHANGES = {
    "a hook on the base layer": lambda m: m.register_forward_hook(lambda *_: None),
    "the base layer has its forward replaced": lambda m: setattr(m, "forward", lambda x: x),
    "a weight is not a parameter of its own": lambda m: m._parameters.update(weight=None),
    "a weight is torch.int8": lambda m: m._parameters.update(weight=torch.zeros(N, K, dtype=torch.int8)),
    "a weight is not a matrix (sharded?)": lambda m: m._parameters.update(weight=torch.zeros(N * K)),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_dense_layers_with_more_to_them(reason):
    module = nn.Linear(K, N)
    CHANGES[reason](module)
    assert base_of(module).why_not_fused(module) == reason


INPUTS = {
    "shapes differ": torch.zeros(3, K + 1),
    "the input has another dtype than the base layer": torch.zeros(3, K, dtype=torch.bfloat16),
    "the base layer is on another device": torch.zeros(3, K, device="meta"),
}


@pytest.mark.parametrize("module", [nn.Linear(K, N), Conv1D(N, K)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("reason", INPUTS)
def test_inputs_that_do_not_fit_a_dense_layer(reason, module):
    kind = base_of(module)
    assert kind.why_not_call(module, INPUTS[reason], N) == reason
    assert kind.why_not_call(module, torch.zeros(3, K), N) is None
    assert kind.why_not_call(module, torch.zeros(3, K), N + 1) == "shapes differ"


def test_autocast_casts_for_a_dense_layer():
    module = nn.Linear(K, N)
    with torch.autocast("cpu", torch.bfloat16):
        assert base_of(module).why_not_call(module, torch.zeros(3, K, dtype=torch.bfloat16), N) is None
        assert base_of(module).why_not_call(module, torch.zeros(3, K).double(), N) == "float64 under autocast"


def adapters(dtype=torch.float32, p=0.0):
    A, B = torch.randn(4, K, dtype=dtype), torch.randn(N, 4, dtype=dtype)
    return Adapters([A.requires_grad_()], [B.requires_grad_()], [0.5], [p])


def test_around_any_module():
    module, given, x = Opaque(), adapters(), torch.randn(2, 5, K)
    y, reason = foreign.forward_around(module, x, given, scale=3.0)
    exact, _ = reference.lora_term(
        module(x, scale=3.0), x, [given.lora_A[0].detach()], [given.lora_B[0].detach()], [0.5], [0]
    )
    assert reason is None
    assert_close(y, exact, terms=2 * K + 4)


class Wrapped(torch.Tensor):
    pass


class Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change, self.linear, self.calls = change, nn.Linear(K, N), 0

    def forward(self, x):
        self.calls += 1
        return self.change(self.linear(x))


OUTPUTS = {
    "the base layer's output is a Wrapped": lambda y: y.as_subclass(Wrapped),
    "the base layer's output is a tuple": lambda y: (y, None),
    "the base layer's output is torch.int32": lambda y: y.int(),
    "the base layer's output is not dense": lambda y: y.to_sparse(),
    "shapes differ": lambda y: y[..., None],
    "device meta": lambda y: y.to("meta"),
}


@pytest.mark.parametrize("reason", OUTPUTS)
def test_outputs_that_nothing_is_added_to(reason):
    module, x = Returns(OUTPUTS[reason]), torch.randn(2, K)
    y, found = foreign.forward_around(module, x, adapters())
    assert found == reason and module.calls == 1 and type(y) is type(OUTPUTS[reason](module.linear(x)))


def test_a_kind_of_base_is_one_class(kinds):
    """A packed layer with an operator of its own, as a quantised base will have."""

    class Packed(Base):
        def why_not_fused(self, module):
            return None

        def why_not_call(self, module, x, outputs):
            return None if x.shape[-1] == K else "shapes differ"

        def forward(self, module, x, given):
            A, B, s, p, bias, _ = given
            assert bias is None
            return fused_lora.functional.lora_linear(x, (module.packed.to(x.dtype) / 9), None, A, B, s, p)

        def features(self, module):
            return K, N

    kind = register(Packed(), f"{Opaque.__module__}.{Opaque.__qualname__}")
    assert base_of(Opaque()) is kind
    layer = fused_lora.LoraLinear(nn.Linear(K, N), r=4, init_lora_weights=False)
    layer.base_layer = module = Opaque()
    module.register_forward_hook(lambda *_: pytest.fail("the module itself was called"))
    x = torch.randn(M, K)
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    exact, _ = reference.lora_linear(x, module.packed.double() / 9, None, [A.detach()], [B.detach()], [2.0], [0.0])
    assert_close(layer(x), exact, terms=2 * K + 4)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_layer_over_a_foreign_base(dtype, p):
    """As exact as PEFT's sequence of calls, and its base is called once."""
    found = [], [], []
    for _ in range(DRAWS):
        layer = fused_lora.LoraLinear(Doubled(K, N).to(dtype), r=4, lora_dropout=p, init_lora_weights=False).train()
        x, calls = torch.randn(M, K).to(dtype).requires_grad_(), []
        layer.base_layer.register_forward_hook(lambda m, args, y, calls=calls: calls.append(args[0]))
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.manual_seed(shifted(3))
        ours = layer(x)
        assert len(calls) == 1 and calls[0] is x
        torch.manual_seed(shifted(3))
        seeds = draw_seeds(1, x.device) if p else None
        g = torch.randn_like(ours)
        keep = reference.dropout_mask(seeds, x.shape, p) * reference.keep_scale(p) if p else 1.0
        y = layer.base_layer(x)
        theirs = (y + ((x.float() * keep) @ A.t()) @ B.t() * 2.0).to(dtype)
        for results, result in zip(found, (ours, theirs), strict=False):
            results.append([result.detach(), *torch.autograd.grad(result, (x, A, B), g, retain_graph=True)])
        W = 2 * layer.base_layer.weight.double()
        data = x.detach(), [A.detach()], [B.detach()], [2.0], [p], seeds
        dx, dA, dB = reference.lora_term_backward(g, *data)
        found[2].append([reference.lora_term(y.detach(), *data)[0], dx + g.double() @ W, *dA, *dB])
    for i, name in enumerate(("y", "dx", "dA", "dB")):
        assert_no_worse(*(torch.stack([draw[i] for draw in results]) for results in found), name=name, draws=True)
