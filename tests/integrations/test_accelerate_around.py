"""Accelerated layers over base layers that run as they are: hooks, offloading, other classes, other arithmetic.

Everything is done to PEFT's own layer and to ours, side by side.
"""

import copy
import gc

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fused_lora
from fused_lora.integrations import peft as integration
from fused_lora.reference import bits
from fused_lora.testing.numeric import DRAWS, assert_close, assert_no_worse
from helpers.accelerated import K, N, layers, pair, wrap
from helpers.seeds import shifted
from helpers.twins import share_dropout
from helpers.versions import since
from helpers.wrapped import INDUCTOR

M = 9
TERMS = 2 * K + N + M  # of the sums of a layer and its backward


class Scaled(nn.Linear):
    """A subclass of nn.Linear with arithmetic and an argument of its own."""

    def forward(self, x, scale=2.0):
        return super().forward(x) * scale


class Packed(nn.Linear):
    """Stands for a quantised linear: int8 weight, its own arithmetic, the input's dtype out."""

    def __init__(self):
        super().__init__(K, N)
        self.weight = nn.Parameter(torch.randint(-9, 9, (N, K), dtype=torch.int8), requires_grad=False)

    def _apply(self, fn, recurse=True):
        packed = self.weight
        super()._apply(fn, recurse)
        self._parameters["weight"] = packed
        return self

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 50, self.bias.to(x.dtype))


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def replaced_forward(layer):
    base = layer.base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight) * 3


def other_dtype(layer):
    """A base layer that casts its input: fp32 in, the output in its own dtype."""
    base = layer.base_layer
    base.register_forward_pre_hook(lambda m, args: (args[0].to(m.weight.dtype),))


CHANGES = {
    "hook": ("a hook on the base layer", lambda m: m.base_layer.register_forward_hook(lambda m, args, y: y + 1)),
    "pre-hook": (
        "a hook on the base layer",
        lambda m: m.base_layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    ),
    "backward hook": (
        "a hook on the base layer",
        lambda m: m.base_layer.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 2,)),
    ),
    "backward pre-hook": (
        "a hook on the base layer",
        lambda m: m.base_layer.register_full_backward_pre_hook(lambda m, dy: (dy[0] * 2,)),
    ),
    "weight norm": ("a hook on the base layer", lambda m: nn.utils.weight_norm(m.base_layer)),
    "replaced forward": ("the base layer has its forward replaced", replaced_forward),
    "parametrization": (
        "the base layer is a ParametrizedLinear",
        lambda m: parametrize.register_parametrization(m.base_layer, "weight", Doubled()),
    ),
}


def results(layer, x, g, *args, **kwargs):
    """Output, and gradients of x and of every trainable parameter."""
    data = x.to(torch.float64 if layer.lora_A["a"].weight.dtype == torch.float64 else x.dtype).requires_grad_()
    y = layer(data, *args, **kwargs)
    wanted = {"x": data} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), g.to(y.dtype))
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def assert_as_exact_as_peft(both, *args, dtype=None, draws=DRAWS, before=None, **kwargs):
    found = ([], [], [])
    for i in range(draws):
        x, g = torch.randn(M, K).to(dtype or torch.float32), torch.randn(M, N)
        for draw, layer in zip(found, layers(both), strict=True):
            if before is not None:
                before(i)
            draw.append(results(layer, x, g, *args, **kwargs))
    for name in found[0][0]:
        ours, theirs, exact = (torch.stack([draw[name] for draw in part]) for part in found)
        assert ours.dtype == theirs.dtype, name
        assert_no_worse(ours, theirs, exact, name=name, draws=True)


TWO = {"a": {}, "b": {"r": 2, "lora_alpha": 3}}


@pytest.mark.parametrize("adapters", [["a"], ["b", "a"]], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_results_are_as_exact_as_those_of_peft(change, dtype, adapters, report):
    reason, apply = CHANGES[change]
    both = pair(dtype, TWO, lora_bias=True)
    both.do(lambda m: m.base_model.set_adapter(adapters))
    for layer in layers(both):
        apply(layer)
    [row] = integration.layer_report(both.ours)
    assert not row.fused and row.why_not is None and row.around == reason
    assert str(row) == f"fused around the base: {reason}" in str(fused_lora.explain(both.ours))
    assert_as_exact_as_peft(both, dtype=dtype)
    assert report() == {"fused": 0, "around": {reason: DRAWS}, "fallback": {}}


@pytest.mark.parametrize("base", [Scaled, Packed], ids=lambda b: b.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classes_that_nobody_knows(base, dtype, report):
    both = pair(dtype, {"a": {}}, base=base(K, N) if base is Scaled else base())
    assert_as_exact_as_peft(both, dtype=dtype)
    assert report() == {"fused": 0, "around": {f"the base layer is a {base.__name__}": DRAWS}, "fallback": {}}


@pytest.mark.parametrize("arguments", [((3.0,), {}), ((), {"scale": 3.0})], ids=str)
def test_further_arguments_reach_the_base_layer_alone(arguments, report):
    args, kwargs = arguments
    both = pair(adapters={"a": {}}, base=Scaled(K, N))
    assert_as_exact_as_peft(both, *args, **kwargs)
    assert report() == {"fused": 0, "around": {"further arguments": DRAWS}, "fallback": {}}
    x = torch.randn(M, K)
    assert not torch.allclose(layers(both)[0](x, *args, **kwargs), layers(both)[0](x))
    layers(both)[0](x, adapter_names=None, alora_offsets=None)
    layers(both)[0](x, 3.0, adapter_names=["a"] * M)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", ["hook", "parametrization"])
def test_autocast(change, autocast, report):
    both = pair(adapters={"a": {}})
    for layer in layers(both):
        CHANGES[change][1](layer)
    found = ([], [], [])
    for _ in range(DRAWS):
        x, g = torch.randn(M, K), torch.randn(M, N)
        for draw, layer in zip(found, layers(both), strict=True):
            exact = layer is layers(both)[2]
            with torch.autocast("cpu", autocast, enabled=not exact):
                draw.append(results(layer, x, g))
    for name in found[0][0]:
        ours, theirs, exact = (torch.stack([draw[name] for draw in part]) for part in found)
        assert ours.dtype == theirs.dtype and (name != "y" or ours.dtype == autocast)
        assert_no_worse(ours, theirs, exact, name=name, draws=True)
    assert report() == {"fused": 0, "around": {CHANGES[change][0]: DRAWS}, "fallback": {}}


def test_a_base_layer_that_casts(report):
    """fp32 in, the 16-bit output of the base: PEFT sums in fp32 and rounds to the base's dtype."""
    both = pair(torch.bfloat16, {"a": {}})
    for layer in layers(both):
        other_dtype(layer)
    assert_as_exact_as_peft(both, dtype=torch.float32)
    assert layers(both)[0](torch.randn(M, K)).dtype == torch.bfloat16


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_acts_on_the_adapters_alone(dtype, p, report):
    both = pair(dtype, TWO, lora_dropout=p)
    both.do(lambda m: m.base_model.set_adapter(["a", "b"]))
    both.do(lambda m: m.train())
    for layer in layers(both):
        CHANGES["hook"][1](layer)

    def same_masks(i):
        for layer in layers(both)[1:]:
            share_dropout(layer, ["a", "b"], p, i)
        torch.manual_seed(shifted(i))

    assert_as_exact_as_peft(both, dtype=dtype, before=same_masks)
    assert report()["around"] == {"a hook on the base layer": DRAWS}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_draws_the_same_masks(use_reentrant):
    both = pair(adapters={"a": {}}, lora_dropout=0.5)
    layer = layers(both)[0].train()
    calls = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    x, found = torch.randn(M, K, requires_grad=True), []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(shifted(1))
        layer.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        found.append([x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(calls) == 3 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- hooks


def watch(layer, log):
    """Every kind of hook on the base layer and on the layer itself."""
    for name, module in (("layer", layer), ("base", layer.base_layer)):
        module.register_forward_pre_hook(
            lambda m, args, kwargs, name=name: log.append((name, "before", *args, kwargs)), with_kwargs=True
        )
        module.register_forward_hook(lambda m, args, y, name=name: log.append((name, "after", *args, y)))
        module.register_full_backward_pre_hook(lambda m, dy, name=name: log.append((name, "backward", dy[0])))
        module.register_full_backward_hook(lambda m, dx, dy, name=name: log.append((name, "backward after", dy[0])))


def test_hooks_see_the_same_calls_in_the_same_order(report):
    both = pair(adapters=TWO, base=Scaled(K, N))
    both.do(lambda m: m.base_model.set_adapter(["a", "b"]))
    logs, x, g = [], torch.randn(M, K), torch.randn(M, N)
    for layer in layers(both)[:2]:
        logs.append([])
        watch(layer, logs[-1])
        layer(x.requires_grad_(), 3.0).backward(g)
        with torch.no_grad():
            layer.train()(x)
    assert [entry[:2] for entry in logs[0]] == [entry[:2] for entry in logs[1]] and len(logs[0]) == 12
    for ours, theirs in zip(*logs, strict=True):
        for mine, other in zip(ours[2:], theirs[2:], strict=True):
            if ours[:2] == ("layer", "after") and isinstance(mine, torch.Tensor) and mine.shape == (M, N):
                assert_close(mine, other, terms=TERMS)
            else:
                assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other
    assert report()["around"] == {"further arguments": 1, "the base layer is a Scaled": 1}


def test_a_hook_that_changes_its_output_in_place_later(report):
    """What the hook has kept of the base's output stays what it was."""
    both, kept = pair(adapters={"a": {}}), []
    for layer in layers(both)[:2]:
        layer.base_layer.register_forward_hook(lambda m, args, y: kept.append(y))
        layer(torch.ones(2, K))
    assert torch.equal(*kept)


def test_hooks_of_accelerate_on_the_base_layer(report):
    hooks = pytest.importorskip("accelerate.hooks")

    class Counts(hooks.ModelHook):
        def __init__(self):
            self.seen = []

        def pre_forward(self, module, *args, **kwargs):
            self.seen.append("pre")
            return args, kwargs

        def post_forward(self, module, output):
            self.seen.append("post")
            return output * 2

    both, counts = pair(adapters={"a": {}}), []
    for layer in layers(both):
        counts.append(Counts())
        hooks.add_hook_to_module(layer.base_layer, counts[-1])
    assert_as_exact_as_peft(both)
    assert counts[0].seen == counts[1].seen == ["pre", "post"] * DRAWS
    assert report()["around"] == {"the base layer has its forward replaced": DRAWS}
    hooks.remove_hook_from_module(layers(both)[0].base_layer)
    layers(both)[0](torch.randn(M, K))
    assert report()["fused"] == 1


def test_an_offloaded_base_layer(report):
    """Its weight is on the meta device except while the base layer runs."""
    accelerate = pytest.importorskip("accelerate")
    both = pair(adapters={"a": {}})
    for layer in layers(both):
        accelerate.cpu_offload(layer.base_layer, execution_device=torch.device("cpu"))
        assert layer.base_layer.weight.is_meta
    assert_as_exact_as_peft(both)
    assert all(layer.base_layer.weight.is_meta for layer in layers(both))
    assert report() == {"fused": 0, "around": {"the base layer has its forward replaced": DRAWS}, "fallback": {}}


def test_nothing_of_the_base_is_kept_for_the_backward(report):
    """An offloaded weight must be free to go after the forward: the term saves x, A, B and S alone."""
    both, saved = pair(adapters={"a": {}}), []
    layer = layers(both)[0]
    layer.base_layer.register_forward_hook(lambda m, args, y: y.detach())  # the base itself saves nothing
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(torch.randn(64, K, requires_grad=True))
    gc.collect()
    shapes = sorted(tuple(t.shape) for t in saved)
    assert (64, N) not in shapes and (N, K) not in shapes and (64, K) in shapes, shapes
    y.sum().backward()


# ---- states


@pytest.mark.parametrize("change", ["hook", "pre-hook", "replaced forward"])
def test_merge_and_unmerge_over_a_watched_base(change, report):
    both = pair(torch.bfloat16, TWO)
    before = layers(both)[0].base_layer.weight.detach().clone()
    for layer in layers(both):
        CHANGES[change][1](layer)
    both.do(lambda m: m.merge_adapter(["b"]))
    x = torch.randn(M, K, dtype=torch.bfloat16)
    ours, theirs, _ = (layer(x.to(layer.base_layer.weight.dtype)).detach() for layer in layers(both))
    assert_close(ours, theirs, terms=TERMS)
    assert report() == {"fused": 0, "around": {}, "fallback": {"merged: the base layer alone": 1}}
    both.do(lambda m: m.unmerge_adapter())
    assert torch.equal(bits(layers(both)[0].base_layer.weight), bits(before))
    assert_as_exact_as_peft(both, dtype=torch.bfloat16)


def test_merge_into_a_class_that_nobody_knows_is_pefts():
    both = pair(adapters=TWO, base=Scaled(K, N))
    both.do(lambda m: m.merge_adapter())
    ours, theirs = (layer(torch.ones(M, K)).detach() for layer in layers(both)[:2])
    assert_close(ours, theirs, terms=TERMS)
    both.do(lambda m: m.unmerge_adapter())
    both = pair(adapters=TWO, base=Packed())
    with pytest.raises(RuntimeError) as ours:
        layers(both)[0].merge()
    with pytest.raises(RuntimeError) as theirs:
        layers(both)[1].merge()
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("names", [["a", "b", "__base__"], ["a"] * 3, ["__base__"] * 3], ids="-".join)
@pytest.mark.parametrize("kind", [Scaled, nn.Linear])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(3, K), (3, 0, K)], ids=str)
def test_mixed_batches(shape, grad, kind, names, report):
    both = pair(adapters=TWO, base=kind(K, N))
    if not grad:
        both.do(lambda m: m.eval())
    x = torch.randn(shape)
    with torch.set_grad_enabled(grad):
        ours, theirs = (layer(x, adapter_names=names) for layer in layers(both)[:2])
    assert_close(ours, theirs, terms=TERMS)
    one = len(set(names)) == 1 and "__base__" not in names
    why = "a batch of several adapters" if not one else "the base layer is a Scaled" if kind is Scaled else None
    assert report() == {"fused": int(why is None), "around": {why: 1} if why else {}, "fallback": {}}


@pytest.mark.parametrize("scaling", [float("nan"), 1e39, torch.tensor(float("nan"))], ids=str)
def test_a_mixed_batch_with_a_scaling_that_is_no_number_is_pefts(scaling, report):
    both, x = pair(adapters=TWO), torch.randn(3, K)
    for layer in layers(both)[:2]:
        layer.eval().scaling["a"] = scaling
    with torch.no_grad():
        ours, theirs = (layer(x, adapter_names=["a", "b", "a"]) for layer in layers(both)[:2])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert report()["fallback"] == {"a batch of several adapters": 1}


def test_names_for_the_numbers_of_a_single_row_are_an_error_as_in_peft():
    both = pair(adapters=TWO)
    both.do(
        lambda m: m.eval()(torch.ones(K, dtype=next(m.parameters()).dtype), adapter_names=["a", "b"] * (K // 2)),
        RuntimeError,
    )


def test_disabled_and_absent_adapters(report):
    both = pair(adapters=TWO, base=Scaled(K, N))
    x = torch.randn(M, K)
    for step in (lambda layer: layer.enable_adapters(False), lambda layer: layer.set_adapter("nobody")):
        for layer in layers(both):
            layer.enable_adapters(True)
            step(layer)
        assert torch.equal(layers(both)[0](x), layers(both)[1](x))
    assert report()["fallback"] == {"adapters are disabled": 1, "no active adapter in this layer": 1}


@since("peft", "0.20")
def test_variants_fall_back_whole(report):
    both = pair(adapters={"a": {"init_lora_weights": "mica"}, "b": {}}, base=Scaled(K, N))
    x = torch.randn(M, K)
    assert torch.equal(layers(both)[0](x), layers(both)[1](x))
    assert not report()["around"] and len(report()["fallback"]) == 1
    both.do(lambda m: m.base_model.set_adapter("b"))
    layers(both)[0](x)
    assert report()["around"] == {"the base layer is a Scaled": 1}


class Wrapped(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda y: y.as_subclass(Wrapped), "the base layer's output is a Wrapped"),
        (lambda y: y[:, :1], "shapes differ"),  # PEFT broadcasts
        (lambda y: y.double().float().requires_grad_(False)[None], "shapes differ"),
    ],
)
def test_outputs_that_the_operator_cannot_take(change, reason, report):
    """The base is called once, and the adapters' own modules do the rest, to the same bits."""
    both, x = pair(adapters=TWO, lora_bias=True), torch.randn(M, K)
    both.do(lambda m: m.base_model.set_adapter(["a", "b"]))
    calls = []
    for layer in layers(both)[:2]:
        layer.base_layer.register_forward_hook(lambda m, args, y: calls.append(1) or change(y))
    ours, theirs = (layer(x) for layer in layers(both)[:2])
    assert len(calls) == 2 and type(ours) is type(theirs) and torch.equal(ours, theirs)
    assert report() == {"fused": 0, "around": {}, "fallback": {reason: 1}}


def test_the_flag_of_a_transposed_weight_is_for_merges_alone(report):
    both = pair(adapters={"a": {}})
    for layer in layers(both):
        layer.fan_in_fan_out = True
    assert_as_exact_as_peft(both)
    assert report() == {"fused": DRAWS, "around": {}, "fallback": {}}


def test_torch_compile(report):
    both = pair(adapters={"a": {}}, base=Scaled(K, N))
    layer, x = layers(both)[0].train(), torch.randn(M, K)
    assert_close(torch.compile(layer, fullgraph=True, backend=INDUCTOR)(x), layer(x), terms=TERMS)


def test_copies_and_restored_models():
    model = wrap(nn.Sequential(Scaled(K, N)), target_modules=["0"])
    fused_lora.accelerate(model)
    x = torch.randn(M, K)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert_close(fused_lora.restore(model)(x), y, terms=TERMS)
    assert type(model.base_model.model[0]) is peft.tuners.lora.Linear
