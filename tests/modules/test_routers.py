"""LoRA on the weight of a router, or of any module that multiplies with its own, next to PEFT's ParamWrapper."""

import contextlib
import copy
import functools

import peft
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.integrations.peft import layer_report
from fused_lora.reference import bits
from fused_lora.testing.numeric import assert_close, assert_no_worse
from helpers.accelerated import TOKENS, quiet, wrap
from helpers.experts import ROUTERS, routed, router_config
from helpers.seeds import shifted
from helpers.thorough import sampled
from helpers.unchanged import assert_bits, parameter_bits

IDS = torch.arange(12).reshape(2, 6)
PREFIX = "base_model.model."


def of_peft(name):
    return PREFIX + name.replace(".weight.lora_", ".lora_")


def twins(name, dtype=torch.float32, adapters=None):
    """Ours and PEFT's around the same weights, with the same random adapters."""
    base, adapters = routed(name, dtype), adapters or {"default": {}}
    ours = copy.deepcopy(base)
    theirs = wrap(base, adapters, **router_config(name)).eval()
    for adapter, own in adapters.items():
        fused_lora.inject(ours, fused_lora.LoraConfig(**router_config(name, **own)), adapter)
    held = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        if "lora_" in key:
            assert held[of_peft(key)].dtype == parameter.dtype
            parameter.data.copy_(held[of_peft(key)].data)
    return ours.eval(), theirs


def logits_of(model, name, x):
    """What the router of the first layer gives for x [tokens, K] before it chooses."""
    router = next(m for path, m in model.named_modules() if path.endswith(f"layers.0.{ROUTERS[name][0]}"))
    further = [torch.zeros(4)] if name == "minimax_m2" else []
    outputs = router(x, *further)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return next(t for t in reversed(outputs) if t.is_floating_point() and t.shape == (len(x), 4))


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sampled(ROUTERS, 3))
def test_logits_and_gradients_are_no_worse_than_pefts(name, dtype):
    found = {"ours": {}, "theirs": {}, "exact": {}}
    torch.manual_seed(shifted(1))
    ours, theirs = twins(name, dtype, {"a": {}, "b": {"r": 2, "use_rslora": True}})
    fused_lora.set_adapter(ours, ["a", "b"])
    theirs.base_model.set_adapter(["a", "b"])
    exact = copy.deepcopy(theirs).double()
    for _ in range(30):
        for key, parameter in ours.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.2)
                for model in (theirs, exact):
                    model.get_parameter(of_peft(key)).data.copy_(parameter.data)
        x, g = torch.randn(5, 16, dtype=dtype), torch.randn(5, 4)
        for which, model in (("ours", ours), ("theirs", theirs), ("exact", exact)):
            model.zero_grad()
            y = logits_of(model, name, x.double() if which == "exact" else x)
            y.backward(g.to(y.dtype))
            kept = {"y": y.detach()}
            for key, parameter in ours.named_parameters():
                if "lora_" in key and ".layers.0." in key:
                    own = parameter if which == "ours" else model.get_parameter(of_peft(key))
                    kept[key] = own.grad.clone()
            assert len(kept) == 5
            for key, tensor in kept.items():
                found[which].setdefault(key, []).append(tensor)
    for key in found["ours"]:
        assert_no_worse(*(torch.stack(kept[key]) for kept in found.values()), name=key, draws=True)


@torch.no_grad()
def test_explain_describes_a_router():
    """Its adapters' module has the name of the weight, which the router's attribute of that name is not."""
    ours, _ = twins(next(iter(ROUTERS)))
    assert len(rows := layer_report(ours)) == len(fused_lora.lora_layers(ours)) and all(row.fused for row in rows)


@pytest.mark.parametrize("name", sampled(ROUTERS, 2))
def test_a_batch_under_adapters_and_merges(name):
    torch.manual_seed(shifted(2))
    ours, theirs = twins(name, adapters={"a": {}, "b": {"r": 2}})
    expected = {}
    for adapter in ("a", "b"):
        theirs.set_adapter(adapter)
        fused_lora.set_adapter(ours, adapter)
        expected[adapter] = theirs(IDS).logits
        assert_close(ours(IDS).logits, expected[adapter], terms=3000)
    with fused_lora.disable_adapters(ours):
        expected[None] = ours(IDS).logits
    assert (expected["a"] - expected[None]).abs().max() > 1e-3
    names = ["b", None, "a"]
    with fused_lora.adapter_batch(ours, [n for n in names for _ in IDS]):
        mixed = ours(torch.cat([IDS] * 3)).logits
    assert_close(mixed, torch.cat([expected[n] for n in names]), terms=3000)
    before = parameter_bits(ours)
    fused_lora.merge(ours, ["a"])
    assert_close(ours(IDS).logits, expected["a"], terms=3000)
    fused_lora.unmerge(ours)
    assert_bits(ours, before)
    fused_lora.unload(ours, merge_adapters=True)
    assert_close(ours(IDS).logits, expected["b"], terms=3000)


@torch.no_grad()
def test_rows_are_replaced_in_all_outputs_and_recorded():
    """Base rows keep their bits; what transformers records of the router has the rows of adapters, too."""
    torch.manual_seed(shifted(3))
    ours, _ = twins("qwen3_moe", adapters={"a": {}, "b": {}})
    ids, seen = IDS[:1].repeat(3, 1), []
    ours.model.layers[0].mlp.gate.register_forward_hook(lambda m, args, y: seen.append([t.clone() for t in y]))
    with fused_lora.disable_adapters(ours):
        ours(ids)
    recorded = []
    for adapter in ("a", "b"):
        fused_lora.set_adapter(ours, adapter)
        recorded.append(ours(ids, output_router_logits=True).router_logits)
    with fused_lora.adapter_batch(ours, ["a", None, "b"]):
        logits = ours(ids, output_router_logits=True).router_logits
    base, a, b, mixed = seen
    for y, *each in zip(mixed, base, a, b, strict=True):
        y, plain, of_a, of_b = (t.unflatten(0, (3, 6)).double() for t in (y, *each))
        assert torch.equal(y[1], plain[1])
        assert_close(y[0].float(), of_a[0].float(), terms=100)
        assert_close(y[2].float(), of_b[2].float(), terms=100)
    for layer, of_a, of_b in zip(logits, *recorded, strict=True):
        layer, of_a, of_b = (t.reshape(3, 6, 4) for t in (layer, of_a, of_b))
        assert_close(layer[0], of_a[0], terms=1000)
        assert_close(layer[2], of_b[2], terms=1000)


def test_a_batch_has_gradients():
    torch.manual_seed(shifted(4))
    ours, _ = twins("mixtral", adapters={"a": {}, "b": {}})
    fused_lora.set_adapter(ours, ["a", "b"])
    with fused_lora.adapter_batch(ours, ["a", None]):
        ours(IDS).logits.square().sum().backward()
    grads = {key: p.grad for key, p in ours.named_parameters() if "lora_B" in key}
    assert all(g.abs().max() > 0 for key, g in grads.items() if ".a." in key)
    assert all(g is None or not g.any() for key, g in grads.items() if ".b." in key)


def test_all_linear_draws_what_peft_draws():
    base = routed("qwen3_moe", torch.bfloat16)
    theirs, config = copy.deepcopy(base), dict(r=3, target_modules="all-linear")
    torch.manual_seed(shifted(5))
    fused_lora.inject(base, peft.LoraConfig(**config))
    torch.manual_seed(shifted(5))
    with quiet():
        held = dict(peft.get_peft_model(theirs, peft.LoraConfig(**config)).named_parameters())
    names = {"experts.down_proj.": "experts.", "experts.gate_up_proj.": "experts.base_layer."}
    count = 0
    for key, parameter in base.named_parameters():
        if "lora_" in key:
            for ours, other in names.items():
                key = key.replace(ours, other)
            other, count = held[of_peft(key)], count + 1
            assert parameter.dtype == other.dtype and torch.equal(bits(parameter.detach()), bits(other.detach())), key
    assert count == sum("lora_" in key for key in held) == 28


def test_all_linear_leaves_out_what_cannot_be():
    """PEFT refuses dropout there; experts have it here, routers cannot."""
    model = routed("qwen3_moe")
    with pytest.warns(UserWarning, match=r"2 weights .* get no adapter: 'model\.layers\.\*\.mlp\.gate\.weight'"):
        fused_lora.inject(model, fused_lora.LoraConfig(target_modules="all-linear", lora_dropout=0.1))
    kinds = {path.rpartition(".")[2] for path in fused_lora.lora_layers(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"}
    model = routed("qwen3_moe")
    with pytest.warns(UserWarning, match="6 weights"):
        fused_lora.inject(model, fused_lora.LoraConfig(target_modules="all-linear", use_dora=True))


@pytest.mark.filterwarnings("error:target_modules='all-linear'")
def test_all_linear_heeds_what_is_excluded(tmp_path):
    """By full paths, which PEFT reads; it does not ask itself."""
    for fields, routers, others in (
        ({"exclude_modules": ["gate"]}, [], 12),
        ({"exclude_modules": ["0.mlp.gate"]}, [1], 12),
        ({"modules_to_save": ["mlp.gate"]}, [], 12),
    ):
        model = routed("qwen3_moe")
        config = fused_lora.LoraConfig(target_modules="all-linear", init_lora_weights=False, **fields)
        layers = fused_lora.lora_layers(fused_lora.inject(model, config))
        assert [p for p in layers if "gate." in p] == [f"model.layers.{i}.mlp.gate.weight" for i in routers], fields
        assert len(layers) == others + len(routers)
    fields = dict(target_modules="all-linear", exclude_modules=["0.mlp.gate"])
    fused_lora.inject(model := routed("qwen3_moe"), fused_lora.LoraConfig(**fields))
    fused_lora.save_adapter(model, tmp_path / "a")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(routed("qwen3_moe"), tmp_path / "a")
    assert sum(hasattr(m, "get_base_layer") for m in theirs.modules()) == 13


class Scores(nn.Module):
    """A module that multiplies with a matrix of its own, in a way that ``how`` says."""

    def __init__(self, how):
        super().__init__()
        self.how, self.last = how, None
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        y = x @ self.weight.t()
        if self.how == "counts":
            self.calls.add_(1)
        return {"mean": lambda: (y, y.mean()), "dict": lambda: {"y": y}}.get(self.how, lambda: y)()


class Keeps(Scores):
    def forward(self, x):
        self.last = x @ self.weight.t()
        return self.last


class Named(Scores):
    def forward(self, x, *, scale=1.0):
        return x @ self.weight.t() * scale


class Slotted(Scores):
    __slots__ = ("own",)


class Unread(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        return x


ON_LAYER = {"target_modules": [], "target_parameters": ["layer.weight"], "init_lora_weights": False}


def inject(module, **fields):
    config = {"target_modules": [], "target_parameters": ["0.weight"], "init_lora_weights": False, **fields}
    return fused_lora.inject(nn.Sequential(module), fused_lora.LoraConfig(**config)).eval()


def test_what_is_refused_before_anything_changes():
    parametrised = nn.utils.parametrize.register_parametrization(Scores(""), "weight", nn.Identity())
    compiled = Scores("")
    compiled.compile()
    for module, fields, text in (
        (Named(""), {}, "the forward of Named takes arguments by name alone"),
        (Slotted(""), {}, "Slotted has __slots__"),
        (Unread(), {}, "no method of Unread reads its weight"),
        (nn.Embedding(4, 8), {}, "Embedding is an embedding: name it in target_modules"),
        (nn.LayerNorm(8), {}, "weight is torch.float32 of 1 dimensions"),
        (Scores("").half().to(torch.float8_e4m3fn), {}, "weight is torch.float8_e4m3fn of 2 dimensions"),
        (parametrised, {}, "no parameter of the model is named '0.weight'"),
        (Scores(""), {"lora_dropout": 0.1}, r"lora_dropout: expected 0.0 for '0.weight'.* got 0.1"),
        (Scores(""), {"target_modules": ["0"]}, "matches '0', a .*Scores, which is not supported"),
        (nn.Linear(8, 4), {"target_modules": ["0"]}, "'0.weight' is of the layer '0', which has LoRA itself"),
    ):
        with pytest.raises(ValueError, match=text):
            inject(module, **fields)
        assert not any("lora_" in key for key, _ in module.named_parameters())
    with pytest.raises(RuntimeError, match="compiled by itself.*nothing was computed"):
        inject(compiled)(torch.randn(3, 8))
    linear = inject(nn.Linear(8, 4))
    with pytest.raises(ValueError, match="'0' has LoRA on a parameter of its own"):
        fused_lora.inject(linear, fused_lora.LoraConfig(target_modules=["0"]), "b")


@torch.no_grad()
def test_what_a_call_shows():
    """A call of rows of several adapters that changes state, or returns what has no row a token, is an error."""
    for how, text in (
        ("mean", r"expected a row for each of 4 tokens in all that it returns, got \[\(4, 4\), \(\)\]; nothing"),
        ("dict", "returns a dict; expected tensors with a row a token"),
        ("counts", "keeps state that its call changes, 'calls'"),
    ):
        model = inject(Scores(how))
        if how != "counts":
            model(torch.randn(4, 8))
        with fused_lora.adapter_batch(model, ["default", None]), pytest.raises(RuntimeError, match=text):
            model(torch.randn(4, 8))
    for model in (inject(Kept()), fused_lora.accelerate(peft_twin(Kept())[1])):
        with pytest.raises(RuntimeError, match="a call of Kept has not read the weight"):
            model(torch.randn(4, 8))
    model = inject(Keeps(""))
    with fused_lora.adapter_batch(model, ["default", None]), pytest.raises(RuntimeError, match="keeps state.*'last'"):
        model(torch.randn(4, 8))
    model = inject(Scores(""))
    with fused_lora.adapter_batch(model, ["default", None]):
        with pytest.raises(ValueError, match=r"Scores: expected a tensor \[\.\.\., 8\] as its first argument"):
            model(torch.randn(2, 5))


class Bound(Scores):
    """Its forward calls a method by an attribute."""

    def __init__(self, how=""):
        super().__init__(how)
        self.score = self._score

    def _score(self, x):
        return x @ self.weight.t()

    def forward(self, x):
        return self.score(x)


class Kept(Bound):
    """It keeps the method where a call cannot know that it is one of the module."""

    def __init__(self, how=""):
        super().__init__(how)
        self.score = functools.partial(self._score)


class Transposed(Scores):
    def forward(self, x):
        return x @ self.weight


class Scaled(Scores):
    def forward(self, x, scale):
        return super().forward(x) * scale


class Calls(nn.Module):
    """A model that names an argument of its layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, scale=2.0)


class Gathers(Scores):
    def forward(self, ids):
        return self.weight[ids]


class Along(Scores):
    """Its rows are not independent of each other."""

    def forward(self, x):
        return super().forward(x).softmax(-2)


def peft_twin(module):
    """Ours and PEFT's around copies of a module, with the same adapter."""
    ours = inject(copy.deepcopy(module))
    config = dict(target_modules=[], target_parameters=["0.weight"], r=8, lora_alpha=8)
    theirs = wrap(nn.Sequential(module), {"default": {}}, **config).eval()
    layer = fused_lora.lora_layers(ours)["0.weight"]
    for part in ("lora_A", "lora_B"):
        found = theirs.get_parameter(f"{PREFIX}0.{part}.default.weight")
        found.data.copy_(getattr(layer, part)["default"].weight)
    assert theirs.get_submodule(f"{PREFIX}0").scaling == layer.scaling
    return ours, theirs


@torch.no_grad()
def test_any_module_computes_as_in_peft():
    """Whatever it gets and keeps, and however its forward comes to the weight; accelerated, too."""
    torch.manual_seed(shifted(9))
    replaced = Scores("")
    replaced.forward = replaced.forward  # as accelerate leaves it when it takes a hook away
    for module, x in (
        (Bound(), torch.randn(3, 8)),
        (replaced, torch.randn(3, 8)),
        (Transposed(""), torch.randn(3, 4)),
        (Gathers(""), torch.tensor([[0, 3, 1]])),
        (Scores(""), torch.randn(8)),
        (Scores("counts"), torch.randn(3, 8)),
        (Keeps(""), torch.randn(3, 8)),
    ):
        module.register_forward_hook(lambda m, args, y: setattr(m, "seen", y))
        ours, theirs = peft_twin(module)
        expected = theirs(x)
        assert torch.equal(ours(x), expected) and (ours[0].base_layer(x) - expected).abs().max() > 1e-3
        assert torch.equal(fused_lora.accelerate(theirs)(x), expected)
        for layer in (ours[0], theirs.get_submodule(f"{PREFIX}0")):
            ours(x)
            assert torch.equal(layer.base_layer.seen, expected)
            assert layer.base_layer.last is None or torch.equal(layer.base_layer.last, expected)
    assert inject(Scores("counts"))(torch.randn(3, 8)).shape == (3, 4)


@torch.no_grad()
def test_a_module_may_look_along_its_sequences(tmp_path):
    torch.manual_seed(shifted(10))
    plain = nn.Sequential(Along(""))
    model = inject(copy.deepcopy(plain[0]))
    x, names = torch.randn(4, 3, 8), ["default", None, "default", "default"]
    expected = torch.where(torch.tensor([[[n is not None]] for n in names]), model(x), plain(x))
    with fused_lora.adapter_batch(model, names):
        assert_close(model(x), expected, terms=100)
    fused_lora.save_adapter(model, tmp_path / "a")
    store = fused_lora.AdapterStore(plain)
    store.load("default", tmp_path / "a")
    with store.batch(names):
        assert_close(plain(x), expected, terms=100)


class Capacity(Scores):
    """An expert takes one token, its first. ``how``: what becomes of others."""

    def forward(self, x):
        y = super().forward(x.flatten(0, -2))
        chosen = (y.argmax(-1)[:, None] == torch.arange(4)).long()
        late = (chosen.cumsum(0) * chosen).amax(-1) > 1
        if self.how == "masked":
            y = y.masked_fill(late[:, None], 0)
        elif self.how == "written":
            y[late.nonzero()[:, 0]] = 0
        elif self.how == "asked" and chosen.sum(0).amax() > 1:
            y = y / 2
        elif self.how == "listed":
            y = y / max(chosen.sum(0).tolist())
        elif self.how == "counted":
            y = y / (1 + len(late.nonzero()))
        elif self.how == "turned":
            y = y.flip(0)
        elif self.how == "one_hot":
            y = y * nn.functional.one_hot(y.argmax(-1), 4)
            y = y - y.mean(0) if self.last else y
        return y.view(*x.shape[:-1], 4)


@torch.no_grad()
@pytest.mark.parametrize("how", ["masked", "written", "asked", "listed", "counted", "turned"])
def test_rows_that_depend_on_others_have_one_adapter(tmp_path, how):
    """As in routers that drop tokens: the rows of an adapter alone would not be dropped."""
    torch.manual_seed(shifted(13))
    plain = nn.Sequential(Capacity(how))
    model, x = inject(copy.deepcopy(plain[0])), torch.randn(4, 8)
    fused_lora.save_adapter(model, tmp_path / "a")
    store, before = fused_lora.AdapterStore(plain), plain(x)
    store.load("default", tmp_path / "a")
    expected = model(x)
    for names, one in ((["default"], True), (["default", None], False)):
        for inputs in (x, x.view(2, 2, 8)):
            for batch, run in ((fused_lora.adapter_batch(model, names), model), (store.batch(names), plain)):
                refused = pytest.raises(RuntimeError, match="a row that Capacity returns may depend on other rows")
                with batch, contextlib.nullcontext() if one else refused:
                    assert_close(run(inputs).view(4, 4), expected, terms=20)
    assert torch.equal(plain(x), before)


@torch.no_grad()
@pytest.mark.parametrize("before, after", [(False, True), (0, 1), (0.0, 0.5)])
def test_what_was_found_of_rows_holds_until_a_flag_or_number_changes(before, after):
    """one_hot asks for the largest number that it gets, which does not make rows depend on each other."""
    torch.manual_seed(shifted(15))
    model, x = inject(Capacity("one_hot")), torch.randn(4, 8)
    expected, model[0].base_layer.last = model(x), before
    with fused_lora.adapter_batch(model, ["default", "default", None, None]):
        assert_close(model(x)[:2], expected[:2], terms=20)
        model[0].base_layer.last = after
        with pytest.raises(RuntimeError, match="a row that Capacity returns may depend on other rows"):
            model(x)


def test_hooks_get_the_rows_of_a_batch(tmp_path):
    """What they change is changed for all rows, and what they record has gradients."""
    torch.manual_seed(shifted(11))
    module, seen = Scores(""), []
    module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    module.register_forward_hook(lambda m, args, y: seen.append(y) or y + 1)
    plain = nn.Sequential(module)
    model = inject(copy.deepcopy(module))
    x = torch.randn(2, 8)
    expected = torch.stack([model(x)[0], plain(x)[1]])
    with fused_lora.adapter_batch(model, ["default", None]):
        assert_close(model(x).detach(), expected.detach(), terms=100)
    assert seen[-1].requires_grad
    assert_close(seen[-1].detach() + 1, expected.detach(), terms=100)
    fused_lora.save_adapter(model, tmp_path / "a")
    store = fused_lora.AdapterStore(plain)
    store.load("default", tmp_path / "a")
    with torch.no_grad(), store.batch(["default", None]):
        assert_close(plain(x), expected.detach(), terms=100)


def test_the_auxiliary_loss_of_a_batch():
    torch.manual_seed(shifted(12))
    ours, _ = twins("qwen3_moe")
    expected = ours(IDS, output_router_logits=True).aux_loss
    with fused_lora.adapter_batch(ours, ["default", "default"]):
        found = ours(IDS, output_router_logits=True).aux_loss
    assert_close(found.detach(), expected.detach(), terms=1000)
    key = "model.layers.0.mlp.gate.weight.lora_B.default.weight"
    B = dict(ours.named_parameters())[key].requires_grad_(True)
    grads = [torch.autograd.grad(loss, B)[0] for loss in (found, expected)]
    assert_close(*grads, terms=1000)


@torch.no_grad()
def test_hooks_get_arguments_as_they_were_given():
    """By name or by position, as in PEFT; and what a hook makes of them goes to the forward."""
    seen = []

    def hook(module, args, kwargs, *output):
        seen.append((len(args), [*kwargs]))
        return None if output else (args, {name: 2 * value for name, value in kwargs.items()})

    module = Scaled("")
    module.register_forward_pre_hook(hook, with_kwargs=True)
    module.register_forward_hook(hook, with_kwargs=True)
    theirs, x = peft_twin(module)[1], torch.randn(3, 8)
    ours = fused_lora.inject(Calls(copy.deepcopy(module)), fused_lora.LoraConfig(**ON_LAYER)).eval()
    for key, parameter in fused_lora.lora_layers(ours)["layer.weight"].named_parameters():
        parameter.copy_(theirs.get_parameter(f"{PREFIX}0.{key}"))
    expected = theirs.get_submodule(f"{PREFIX}0")(x, scale=2.0)
    assert_close(ours(x), expected, terms=20)
    for names in (["default"], ["default", None, "default"], [None]):
        with fused_lora.adapter_batch(ours, names):
            found = ours(x)
            assert names[0] is None or torch.equal(found[0], expected[0])
    with fused_lora.disable_adapters(ours):
        ours(x)
    assert seen == [(1, ["scale"])] * 12


@torch.no_grad()
def test_rows_of_any_shape_and_keywords():
    """x and outputs may have several dimensions before the last; a call may name its arguments."""
    torch.manual_seed(shifted(6))
    model, plain = inject(Scores("")), nn.Sequential(Scores(""))
    plain[0].weight.copy_(model[0].weight)
    layer, x = fused_lora.lora_layers(model)["0.weight"], torch.randn(4, 3, 8)
    assert model[0].weight is layer.weight and type(model[0].how) is str
    folded = x @ (layer.weight + layer.get_delta_weight("default")).t()
    assert_close(model[0](x=x), folded, terms=20)
    with fused_lora.adapter_batch(model, ["default", None]):
        mixed = model(x)
    assert torch.equal(mixed[2:], plain(x)[2:])
    assert_close(mixed[:2], folded[:2], terms=20)


def test_a_call_does_not_change_the_module():
    """Its hooks run, and see another module: what other threads call has its own weight all the time."""
    model, seen = inject(Scores("")), []
    inner = model[0].base_layer
    inner.register_forward_hook(lambda m, args, y: seen.append((m is inner, inner._parameters["weight"] is weight)))
    weight = inner.weight
    model(torch.randn(2, 8)).sum().backward()
    assert seen == [(False, True)] and weight.grad is None
    for part in ("lora_A", "lora_B"):
        assert getattr(fused_lora.lora_layers(model)["0.weight"], part)["default"].weight.grad.abs().max() > 0


@torch.no_grad()
def test_compiled():
    torch.manual_seed(shifted(7))
    ours, _ = twins("qwen3_moe")
    router, x = ours.model.layers[0].mlp.gate, torch.randn(5, 16)
    torch.compiler.reset()
    for compiled, plain in zip(torch.compile(router, fullgraph=True, backend="aot_eager")(x), router(x), strict=True):
        assert_close(compiled.float(), plain.float(), terms=100)
    with fused_lora.adapter_batch(ours, ["default", None]):
        plain = ours(IDS).logits  # rows are found without torch.compile
        assert_close(torch.compile(ours, backend="eager")(IDS).logits, plain, terms=3000)


@torch.no_grad()
@pytest.mark.parametrize("name", sampled(ROUTERS, 2))
def test_files_go_both_ways(tmp_path, name):
    torch.manual_seed(shifted(8))
    ours, theirs = twins(name)
    expected = theirs(IDS).logits
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
        loaded = routed(name)
        loaded.load_state_dict(
            {k.replace("base_layer.", ""): t for k, t in ours.state_dict().items() if "lora_" not in k}
        )
        base = copy.deepcopy(loaded)
        fused_lora.load_adapter(loaded, tmp_path / "theirs")
    assert torch.equal(loaded(IDS).logits, ours(IDS).logits)
    fused_lora.save_adapter(ours, tmp_path / "ours")
    with quiet():
        back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert torch.equal(back(IDS).logits, expected)
    assert TOKENS > IDS.max()


def test_files_of_patterns_and_copies(tmp_path):
    """A rank_pattern names the parameter, as in PEFT; state dicts, pickles and deletions are those of other layers."""
    config = router_config("mixtral", rank_pattern={"0.mlp.gate.weight": 2}, alpha_pattern={"1.mlp.gate.weight": 5})
    ours = fused_lora.inject(routed("mixtral"), fused_lora.LoraConfig(**config, init_lora_weights=False))
    layers = fused_lora.lora_layers(ours)
    assert [(m.r["default"], m.lora_alpha["default"]) for m in layers.values()] == [(2, 6), (3, 5)]
    fused_lora.save_adapter(ours, tmp_path / "a")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(routed("mixtral"), tmp_path / "a")
    held = {m.parameter_name: m for m in theirs.modules() if hasattr(m, "parameter_name")}
    assert held["weight"].r == {"default": 3} and held["weight"].scaling == {"default": 5 / 3}
    again = fused_lora.load_adapter(other := routed("mixtral"), tmp_path / "a")
    assert again.rank_pattern == {"0.mlp.gate.weight": 2}
    other.load_state_dict(ours.state_dict())
    assert torch.equal(copy.deepcopy(other).eval()(IDS).logits, ours.eval()(IDS).logits)
    fused_lora.delete_adapter(other, "default")
    fused_lora.unload(other)
    assert not fused_lora.lora_layers(other) and type(other.model.layers[0].mlp.gate).__name__ == "MixtralTopKRouter"
