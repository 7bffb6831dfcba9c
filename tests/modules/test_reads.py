"""Layers whose weight is read without calling them: named by inject's first forward, the store and verify."""

import copy
import functools
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_lora
from fused_lora.diagnostics.verification import report
from fused_lora.modules import reads
from fused_lora.serving.store import AdapterStore
from fused_lora.testing.numeric import assert_close
from helpers.hooks import hooks as hooks_of
from helpers.seeds import shifted
from helpers.waiting import HANG

K = 8


class Net(nn.Module):
    """``read`` is never called, ``unused`` neither called nor read, ``both`` read for its dtype and called."""

    def __init__(self):
        super().__init__()
        self.called, self.read, self.unused, self.both = (nn.Linear(K, K) for _ in range(4))

    def forward(self, x):
        return F.linear(self.both(self.called(x).to(self.both.weight.dtype)), self.read.weight)


class Tied(nn.Module):
    """The head, not called here, has the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(16, K), nn.Linear(K, K), nn.Linear(K, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.mid(F.embedding(ids, self.embed.weight))


@pytest.fixture
def net():
    torch.manual_seed(shifted(0))
    return Net().eval()


class Scores(nn.Module):
    """A linear layer of another class, as a router is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, K))

    def forward(self, x):
        return F.linear(x, self.weight)


def injected(model, targets="all-linear"):
    config = fused_lora.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return fused_lora.inject(model, config).eval()


def hooks(model):
    return [hook for module in model.modules() for hook in hooks_of(module)]


def plain(model):
    return all(type(m._parameters) is dict for m in model.modules())


def warned(call):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in told if "without calling" in str(w.message)]


def test_the_first_forward_of_an_injected_model_names_them(net):
    model, x = injected(net), torch.randn(3, K)
    (text,) = warned(lambda: model(x))
    assert "'read'" in text and "exclude_modules" in text
    assert not any(name in text for name in ("'called'", "'unused'", "'both'"))
    assert plain(model) and not hooks(model)  # nothing stays
    assert warned(lambda: model(x)) == []


def test_a_model_that_calls_its_layers_is_left_alone(net):
    model, x = injected(net, ["called", "both"]), torch.randn(3, K)
    expected = copy.deepcopy(model)(x)
    assert warned(lambda: model(x)) == []
    assert torch.equal(model(x), expected) and plain(model) and not hooks(model)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_before_the_first_forward(net, again):
    model, x = injected(net), torch.randn(3, K)
    other = again(model)
    assert len(warned(lambda: other(x))) == 1 and plain(other) and not hooks(other)
    assert len(warned(lambda: model(x))) == 1 and plain(model) and not hooks(model)


def test_a_forward_that_fails_leaves_nothing(net):
    model = injected(net)
    with pytest.raises(ValueError, match="x: expected"):
        model(torch.randn(3, K + 1))
    assert plain(model)
    warned(lambda: model(torch.randn(3, K)))
    assert plain(model) and not hooks(model)


def test_a_forward_that_failed_between_read_and_call_tells_nothing(net):
    model = injected(net)
    handle = model.called.lora_A["default"].register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ZeroDivisionError):
                model(torch.randn(3, K))
    handle.remove()
    with pytest.warns(UserWarning, match="reads the weights of 'read' without calling"):
        model(torch.randn(3, K))
    assert plain(model) and not hooks(model)


class Stopped(nn.Module):
    """Reads ``last`` before it calls it, and does ``between`` meanwhile."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(K, K), nn.Linear(K, K), between

    def forward(self, x):
        x = self.first(x).to(self.last.weight.dtype)
        self.between(self)
        return self.last(x)


def test_a_forward_that_was_interrupted_tells_nothing():
    """torch calls no hooks then."""

    def interrupt(model):
        raise KeyboardInterrupt

    x = torch.randn(3, K)
    for further in (lambda model: model(x), fused_lora.unload):
        model = injected(Stopped(interrupt))
        with pytest.raises(KeyboardInterrupt):
            model(x)
        model.forward = model.first.forward
        assert warned(lambda: further(model)) == [] and plain(model)  # noqa: B023


def test_hooks_of_others_do_not_hide_an_error():
    """torch goes over the hooks of a failed call while they run: none may be removed."""
    model = injected(Stopped(lambda model: model.register_forward_hook(lambda *_: None) and 1 / 0))
    with pytest.raises(ZeroDivisionError):
        model(torch.randn(3, K))
    assert plain(model)


@pytest.mark.parametrize("again", [copy.deepcopy, pickle.dumps], ids=["copy", "pickle"])
def test_copies_in_the_first_forward(net, again):
    held, model = [], injected(net)
    model.called.forward = lambda x, forward=model.called.forward: held.append(again(model.both)) or forward(x)
    assert len(warned(lambda: model(torch.randn(3, K)))) == 1
    other = held[0] if again is copy.deepcopy else pickle.loads(held[0])
    assert plain(other) and not hooks(other)


def test_a_copy_in_the_first_forward_has_one_of_its_own():
    copies = []
    model, x = (
        injected(Stopped(lambda model: copies.append(copy.deepcopy(model)) if not copies else None)),
        torch.ones(K),
    )
    model(x)
    assert warned(lambda: copies[0](x)) == [] and plain(copies[0])


def in_a_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(HANG)


@pytest.mark.parametrize("run", [lambda call: call(), in_a_thread], ids=["itself", "thread"])
def test_a_forward_inside_of_the_first_does_not_end_it(net, run):
    model, x, begun = injected(net), torch.randn(3, K), []

    def forward(x):
        x = x.to(model.called.weight.dtype)
        if begun:
            return x
        begun.append(x)
        run(lambda: model(x))
        return F.linear(model.called(x), model.read.weight)

    model.forward = forward
    (text,) = warned(lambda: model(x))
    assert "'read'" in text and "'called'" not in text and plain(model)


def test_a_layer_is_called_by_its_forward_too(net):
    net.forward = lambda x: net.both.forward(net.called(x)) + net.called.forward(x)
    assert warned(lambda: injected(net)(torch.randn(3, K))) == []


def test_the_dicts_of_parameters_stay(net):
    class Gathering(dict):
        """As DeepSpeed's."""

    model = injected(net)
    vars(model.read.base_layer)["_parameters"] = Gathering(model.read.base_layer._parameters)
    before = [m._parameters for m in model.modules()]
    warned(lambda: model(torch.randn(3, K)))
    assert all(now is then for now, then in zip((m._parameters for m in model.modules()), before, strict=True))


@pytest.mark.parametrize("mover", ["accelerate", "torch"])
def test_what_is_moved_is_not_read(mover):
    model = injected(nn.ModuleDict({"block": Net()}))
    model.forward = lambda x: model.block.both(x)
    if mover == "torch":
        base = model.block.read.base_layer
        model.register_forward_pre_hook(lambda *_: setattr(base, "weight", nn.Parameter(torch.zeros(K, K))))
    else:
        offload = pytest.importorskip("accelerate").cpu_offload
        offload(model, torch.device("cpu"), preload_module_classes=["ModuleDict"])
    assert warned(lambda: model(torch.randn(3, K))) == []


def test_the_warning_names_mode_and_layers_in_order(net):
    net.forward = lambda x: sum(F.linear(x, layer.weight) for layer in (net.unused, net.read, net.both, net.called))
    (told,) = warned(lambda: injected(net).train()(torch.randn(3, K)))
    assert "'called', 'read', 'unused', 'both'" in told and "so in training mode their adapters" in told


def test_a_further_adapter_looks_again(net):
    model, x = injected(net, ["called"]), torch.randn(3, K)
    assert warned(lambda: model(x)) == []
    fused_lora.inject(model, fused_lora.LoraConfig(r=2, target_modules=["read"]), "other")
    assert len(warned(lambda: model(x))) == 1


def test_a_tied_weight_may_be_read_by_its_other_owner():
    model, ids = injected(Tied().eval()), torch.arange(4)
    assert warned(lambda: model(ids)) == []
    store = AdapterStore(Tied().eval())
    store.load("a", {"head": (torch.ones(2, K), torch.ones(16, 2), 1.0), "mid": pair()})
    with store.batch(["a"] * 4):
        store.model(ids)
    store.model.mid.forward = lambda x: x * store.model.head.weight[0]  # now it is the head's own
    with pytest.raises(ValueError, match="the layer 'head' has its weight read"), store.batch(["a"] * 4):
        store.model(ids)


def test_compiled_models_are_not_watched(net):
    model = injected(net)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert warned(lambda: compiled(torch.randn(3, K))) == []
    assert plain(model)


@pytest.mark.parametrize("part", ["forward", "layer", "class", "function"])
def test_compiled_methods_are_not_watched(net, part):
    """A function that is compiled alone is not seen, but traced. The rest of the model is watched."""
    compiled = functools.partial(torch.compile, backend="eager", fullgraph=True)

    class Compiled(Net):
        forward = compiled(Net.forward)

    model, x = injected(Compiled() if part == "class" else net), torch.randn(3, K)
    if part == "forward":
        model.forward = compiled(model.forward)
    elif part == "layer":
        model.both.forward = compiled(model.both.forward)
    elif part == "function":
        run = compiled(lambda layer, x: layer(x))
        model.forward = lambda x: run(model.both, x)
    assert len(warned(lambda: model(x))) == (part == "layer") and plain(model)


def test_layers_beside_compiled_ones_are_watched(net):
    net.both.compile(backend="eager", fullgraph=True)
    store, x = AdapterStore(net), torch.randn(3, K)
    store.load("a", {"read": pair()})
    with pytest.raises(ValueError, match="the layer 'read' has its weight read"):
        serve(store, x)


def test_a_look_in_between_compiles_nothing_anew(net):
    model, x = injected(net), torch.randn(3, K)
    outer = torch.compile(nn.Sequential(model), backend="eager", fullgraph=True)
    outer(x)
    assert len(warned(lambda: model(x))) == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        outer(x)


@pytest.mark.parametrize("mode", ["forward", "generate"])
@torch.no_grad()
def test_the_first_forward_of_an_accelerated_model_names_them(net, mode):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["called", "read", "both", "unused"], init_lora_weights=False)
    model, x = peft.get_peft_model(net, config).eval(), torch.randn(3, K)
    expected, marks = model(x), hooks(model)
    call = {"forward": model, "generate": model.base_model.model}[mode]  # generate calls the latter
    fused_lora.accelerate(fused_lora.accelerate(model))
    assert all(row.fused for row in fused_lora.explain(model).layers)  # nothing has been read so far
    (text,) = warned(lambda: call(x))
    assert "'read'" in text.replace("base_model.model.", "") and "called'" not in text and "both" not in text
    assert_close(model(x), expected, terms=100)
    assert warned(lambda: call(x)) == [] and plain(model) and hooks(model) == marks
    reasons = {row.path.rpartition(".")[2]: row.why_not for row in fused_lora.explain(model).layers}
    assert "its weight read by a forward that does not call it" in reasons.pop("read") and not any(reasons.values())
    with pytest.warns(UserWarning, match="adapters of 'base_model.model.read' do nothing, as in PEFT"):
        fused_lora.accelerate(model)
    assert hooks(fused_lora.restore(model)) == marks and not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("bare", [False, True], ids=["wrapped", "bare"])
@torch.no_grad()
def test_install_looks_as_accelerate_does(net, bare):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["called"], init_lora_weights=False)
    further = peft.LoraConfig(r=2, target_modules=["read"], init_lora_weights=False)
    fused_lora.integrations.peft.install()
    try:
        x = torch.randn(3, K)
        model = peft.inject_adapter_in_model(config, net) if bare else peft.get_peft_model(net, config)
        assert warned(lambda: model(x)) == []
        peft.inject_adapter_in_model(further, model, "b") if bare else model.add_adapter("b", further)
        (text,) = warned(lambda: model(x))
        assert "'read'" in text.replace("base_model.model.", "").replace("model.", "")
        assert warned(lambda: fused_lora.accelerate(model)(x)) == []
    finally:
        fused_lora.integrations.peft.uninstall()
    assert not hooks(fused_lora.restore(model)) and plain(model)


@torch.no_grad()
def test_layers_that_come_to_an_accelerated_model_are_looked_at(net):
    peft = pytest.importorskip("peft")
    model, x = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["called"])), torch.randn(3, K)
    fused_lora.accelerate(model)
    assert warned(lambda: model(x)) == []
    model.add_adapter("b", peft.LoraConfig(r=2, target_modules=["read", "called"]))
    (text,) = warned(lambda: model(x))
    assert "of 'base_model.model.read' without" in text
    assert warned(lambda: model(x)) == [] and plain(model)


@torch.no_grad()
def test_install_looks_at_mixed_models(net):
    """Their tuner is no LoraModel, though the layers are."""
    peft = pytest.importorskip("peft")
    fused_lora.integrations.peft.install()
    try:
        model = peft.PeftMixedModel(net, peft.LoraConfig(r=2, target_modules=["called", "read"]), "default")
        (text,) = warned(lambda: model(torch.randn(3, K)))
    finally:
        fused_lora.integrations.peft.uninstall()
    assert "'model.read'" in text and not hooks(fused_lora.restore(model))


def test_install_names_attention_of_torch():
    peft = pytest.importorskip("peft")
    fused_lora.integrations.peft.install()
    try:
        model, config = nn.Sequential(nn.MultiheadAttention(K, 2)), peft.LoraConfig(target_modules=["out_proj"])
        with pytest.warns(UserWarning, match="install: adapters of 'model.0.out_proj' do nothing, as in PEFT"):
            peft.get_peft_model(model, config)
    finally:
        fused_lora.integrations.peft.uninstall()


@pytest.mark.parametrize("way", ["peft", "inject"])
def test_who_computes_the_adapters_itself_calls_no_layer(net, way):
    """As kernels of trainers do."""

    def forward(x):
        layer = model.get_submodule(path)
        A, B = (getattr(layer, name)["default"].weight for name in ("lora_A", "lora_B"))
        return F.linear(x, layer.base_layer.weight) + x @ A.T @ B.T

    path, x = "base_model.model.read" if way == "peft" else "read", torch.randn(3, K)
    net.forward = forward
    if way == "peft":
        peft = pytest.importorskip("peft")
        model = fused_lora.accelerate(peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["read"])))
    else:
        model = injected(net)
    assert warned(lambda: model(x)) == [] and plain(model)


def test_explain_of_an_injected_model_names_them(net):
    model = injected(net)
    warned(lambda: model(torch.randn(3, K)))
    assert [row.path for row in fused_lora.explain(model).layers if row.why_not] == ["read"]
    assert not any(row.why_not for row in fused_lora.explain(model.train()).layers)  # of that mode nothing is known


# ---- the store


def pair(N=K):
    return torch.randn(2, K), torch.randn(N, 2), 1.0


def serve(store, x, name="a"):
    with torch.no_grad(), store.batch([name] * len(x)):
        return store.model(x)


def test_the_store_refuses_the_answer_and_the_adapter_from_then_on(net):
    store, x = AdapterStore(net), torch.randn(3, K)
    store.load("a", {"read": pair()})
    store.load("b", {"called": pair(), "unused": pair(), "both": pair()})
    with pytest.raises(ValueError, match="adapter 'a@1' cannot be served: the layer 'read' has its weight read"):
        serve(store, x)
    for use in (lambda: serve(store, x), lambda: store.lease("a")):
        with pytest.raises(ValueError, match="adapter 'a@1' cannot be served"):
            use()
    with pytest.raises(ValueError, match="source: an adapter cannot be served: the layer 'read' has its weight read"):
        store.load("c", {"called": pair(), "read": pair()})
    with torch.no_grad():
        base = net(x)
    assert not torch.equal(serve(store, x, "b"), base)  # what is called is served, and nobody reads "unused"
    store.detach()
    assert plain(net) and not hooks(net)


def test_a_forward_of_the_base_tells_it_too(net):
    store, x = AdapterStore(net), torch.randn(3, K)
    with torch.no_grad():
        net(x)
    with pytest.raises(ValueError, match="the layer 'read'"):
        store.load("a", {"read": pair()})


def test_a_weight_that_is_asked_for_its_dtype_alone_is_not_read(net, monkeypatch):
    def forward(x):
        x = x.to(net.unused.weight.device).reshape(-1, net.read.weight.size(0))
        return net.called(x.to(net.unused.weight.dtype))

    net.forward, x = forward, torch.randn(3, K)
    store = AdapterStore(net)
    store.load("a", {"called": pair(), "unused": pair(), "read": pair()})
    serve(store, x)
    with monkeypatch.context() as steps:  # which would take several times as long
        steps.setattr(reads.dis, "get_instructions", None)
        serve(store, x)
    store.detach()
    assert warned(lambda: injected(net)(x)) == []


def test_reads_outside_of_a_forward_do_not_count(net):
    store, x = AdapterStore(net), torch.randn(3, K)
    store.load("a", {"unused": pair(), "called": pair()})
    net.unused.weight.norm()
    serve(store, x)
    net.unused.weight.norm()
    serve(store, x)


def test_attention_of_torch_is_refused_at_once(tmp_path):
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(K, 2), "lin": nn.Linear(K, K)}).eval()
    store = AdapterStore(model)
    text = "the layer 'attn.out_proj' is never called, nn.MultiheadAttention reads its weight"
    with pytest.raises(ValueError, match=f"source: an adapter cannot be served: {text}"):
        store.load("a", {"attn.out_proj": pair()})
    twin = nn.ModuleDict({"attn": nn.ModuleDict({"out_proj": nn.Linear(K, K)})})
    fused_lora.save_adapter(injected(twin, ["out_proj"]), tmp_path / "a")
    store.register("b", tmp_path / "a")
    assert text in str(store.probe("b"))
    store.load("c", {"lin": pair()})


@pytest.mark.parametrize("part", ["called", "inner"])
def test_a_layer_that_was_replaced_is_not_served(part):
    model = nn.Sequential(nn.Sequential(nn.Linear(K, K)), nn.Linear(K, K)).eval()
    store, x = AdapterStore(model), torch.randn(3, K)
    path = "1" if part == "called" else "0.0"
    store.load("a", {path: pair()})
    serve(store, x)
    model[int(path[0])] = nn.Linear(K, K) if part == "called" else nn.Sequential(nn.Linear(K, K))
    with pytest.raises(ValueError, match=f"adapter 'a@1' cannot be served: the layer '{path}' was replaced"):
        serve(store, x)
    with pytest.raises(ValueError, match=f"the layer '{path}' was replaced"):
        store.load("b", {path: pair()})


def test_an_output_layer_that_a_resize_has_replaced():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=K, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)).eval()
    store = AdapterStore(model)
    store.load("a", {"lm_head": pair(32)})
    serve(store, torch.arange(4).reshape(1, 4))
    model.resize_token_embeddings(40)
    with pytest.raises(ValueError, match="'lm_head' was replaced"):
        serve(store, torch.arange(4).reshape(1, 4))


# ---- verify


def test_verify_finds_them(net):
    model, x = injected(net), torch.randn(3, K)
    result = fused_lora.verify(model, x)
    assert not result.ok and result.causes == [report.UNCALLED]
    (finding,) = result.findings
    assert "read" in finding.layers and "called" not in finding.layers
    assert result.skipped["read"] == "it was not called" and "layer not called" in str(result)
    fused_lora.merge(model)
    merged = fused_lora.verify(model, x)
    assert merged.causes == [report.UNCALLED]


def test_verify_passes_over_layers_that_nobody_reads(net):
    model = injected(net, ["called", "unused"])
    result = fused_lora.verify(model, torch.randn(3, K))
    assert result.verdict == "incomplete" and not result.findings and result.skipped == {"unused": "it was not called"}


@pytest.mark.filterwarnings("ignore")
def test_mamba():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(shifted(0))
    config = transformers.FalconMambaConfig(
        vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1, time_step_rank=2
    )
    model, ids = transformers.FalconMambaForCausalLM(config).eval(), torch.arange(3, 11).reshape(1, 8)
    store, path = AdapterStore(model), "backbone.layers.0.mixer.dt_proj"
    layer = model.get_submodule(path)
    store.load("a", {path: (torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2), 1.0)})
    with pytest.raises(ValueError, match=f"the layer '{path}' has its weight read"):
        serve(store, ids)
    store.detach()
    assert fused_lora.verify(injected(model), ids).causes == [report.UNCALLED]


@torch.no_grad()
def test_matrices_of_other_modules(net):
    """As a router that its parent reads."""
    net.read, net.both = Scores(), Scores()
    store, x = AdapterStore(net), torch.randn(2, K)
    store.load("a", {"read.weight": (torch.randn(2, K), torch.randn(K, 2), 1.0)})
    store.load("b", {"both.weight": (torch.randn(2, K), torch.randn(K, 2), 1.0)})
    with pytest.raises(ValueError, match=r"'read\.weight' has its weight read by a forward that does not call it"):
        with store.batch(["a", None]):
            net(x)
    with store.batch(["b", None]):
        net(x)
    store.detach()
    assert plain(net)
    names = ["read.weight", "both.weight"]
    config = fused_lora.LoraConfig(target_modules=[], target_parameters=names, init_lora_weights=False)
    model = fused_lora.inject(net, config).eval()
    with pytest.warns(UserWarning, match=r"reads the weights of 'read\.weight' without calling"):
        model(x)
    assert plain(model)
