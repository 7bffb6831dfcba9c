"""Embeddings and stacked experts in the store: mixed with other adapters in one batch, and what is refused at load."""

import copy

import peft
import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.reference import bits
from fused_lora.serving.residency.packing import Part, Site, by_expert
from fused_lora.serving.residency.tables import SlotTables
from fused_lora.serving.store import AdapterStore
from fused_lora.testing.numeric import assert_close
from helpers.accelerated import TOKENS, wrap
from helpers.experts import HIDDEN, ROUTERS, llama4, moe, routed, router_config
from helpers.seeds import shifted
from helpers.thorough import sampled

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
ADAPTERS = {
    "lin": {"target_modules": ["q_proj", "v_proj"], "r": 3},
    "emb": {"target_modules": ["embed_tokens"], "r": 5},
    "moe": {"target_modules": [], "target_parameters": PARAMETERS, "r": 2},
    "down": {"target_modules": [], "target_parameters": PARAMETERS[1:], "r": 4},
    "all": {"target_modules": ["embed_tokens", "q_proj"], "target_parameters": PARAMETERS, "r": 3},
    "router": {"target_modules": [], "target_parameters": ["gate.weight"], "r": 2},
    "linear": {"target_modules": "all-linear", "r": 3},  # in PEFT: attention, routers and experts
}
IDS = torch.arange(1, 43).reshape(7, 6) % TOKENS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The adapters as PEFT saves them, each with what PEFT computes with it."""
    torch.manual_seed(shifted(5))
    base, root, expected = moe(), tmp_path_factory.mktemp("kinds"), {}
    for name, fields in ADAPTERS.items():
        live = wrap(copy.deepcopy(base), **fields).eval()
        for key, parameter in live.named_parameters():
            if "lora_embedding" in key:
                parameter.data.normal_(std=0.2)
        live.save_pretrained(root / name)
        with torch.no_grad():
            expected[name] = live(IDS).logits
    return base, root, expected


def store_with(base, root, names=ADAPTERS, **options):
    store = AdapterStore(copy.deepcopy(base), **options)
    for name in names:
        store.load(name, root / name)
    return store


@torch.no_grad()
def run(store, names, ids=IDS):
    with store.batch(names):
        return store.model(ids).logits


def assert_rows(mixed, names, plain, expected):
    """Rows of the base have its bits, the others the results of their adapters."""
    for row, name in enumerate(names):
        if name is None:
            assert torch.equal(bits(mixed[row]), bits(plain[row]))
        else:
            assert_close(mixed[row], expected[name][row], terms=2000)


def test_all_kinds_in_one_batch(folders):
    base, root, expected = folders
    store, names = store_with(base, root), ["lin", None, "emb", "moe", "down", "all", None]
    with torch.no_grad():
        plain = base(IDS).logits
    for _ in range(3):  # the first two calls are followed
        assert_rows(run(store, names), names, plain, expected)
    shorter = run(store, names, IDS[:, :4])  # other sizes
    assert torch.equal(bits(shorter[1]), bits(base(IDS[:, :4]).logits.detach()[1]))
    assert_close(shorter[5], expected["all"][5, :4], terms=2000)  # causal
    assert torch.equal(bits(base.state_dict()["lm_head.weight"]), bits(store.model.state_dict()["lm_head.weight"]))


def test_routers_in_a_batch(folders):
    """Beside other kinds, and several of them at once; base rows choose the experts that they had."""
    base, root, expected = folders
    store, names = store_with(base, root), ["router", None, "linear", "moe", "router", "lin", "linear"]
    with torch.no_grad():
        plain = base(IDS).logits
    for _ in range(3):
        assert_rows(run(store, names), names, plain, expected)
    found = run(store, [{"router": 0.7, "linear": -0.3}] * 7)
    ours = copy.deepcopy(base)
    for name in ("router", "linear"):
        fused_lora.load_adapter(ours, root / name, name)
    fused_lora.merge(ours, ["router", "linear"], weights=[0.7, -0.3])
    with torch.no_grad():
        assert_close(found, ours(IDS).logits, terms=3000)
    used = [store_with(base, root, [name]).stats()["bytes_used"] for name in ("router", "moe", "linear")]
    assert 0 < used[0] < used[1] < used[2]


@torch.no_grad()
@pytest.mark.parametrize("name", sampled(ROUTERS, 2))
def test_every_router(tmp_path, name):
    """Whatever it returns and gets; a plain linear layer among them. From files, and from live models."""
    torch.manual_seed(shifted(6))
    base = routed(name)
    expected, store = {None: base(IDS[:1]).logits}, AdapterStore(copy.deepcopy(base))
    for adapter, r in (("a", 2), ("b", 3)):
        live = wrap(copy.deepcopy(base), **router_config(name, r=r)).eval()
        live.save_pretrained(tmp_path / adapter)
        expected[adapter] = live(IDS[:1]).logits
        store.load(adapter, tmp_path / adapter)
        store.load(f"live_{adapter}", live)
    names = ["b", None, "a", "live_b", "live_a"]
    for _ in range(2):
        mixed = run(store, names, IDS[:1].repeat(len(names), 1))
        for row, used in zip(mixed, names, strict=True):
            assert_close(row[None], expected[used and used.removeprefix("live_")], terms=3000)


@torch.no_grad()
def test_a_router_in_compiled_code(folders):
    base, root, _ = folders
    store, x = store_with(base, root, ["router"]), torch.randn(6, HIDDEN)
    router = store.model.model.layers[0].mlp.gate
    torch.compiler.reset()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    with store.batch(["router"]):
        adapted = router(x)
        for found, plain in zip(compiled(x), adapted, strict=True):
            assert torch.equal(found, plain)
    assert not torch.equal(compiled(x)[0], adapted[0]) and torch.equal(compiled(x)[0], router(x)[0])


class Odd(nn.Module):
    """A matrix, and outputs without rows."""

    def __init__(self, pair):
        super().__init__()
        self.pair, self.weight = pair, nn.Parameter(torch.randn(4, HIDDEN))

    def forward(self, x, more=None):
        y = x @ self.weight.t()
        return (y, more) if self.pair else {"y": y}


@torch.no_grad()
@pytest.mark.parametrize("pair", [True, False])
def test_what_has_no_rows_is_an_error(pair):
    """In eager and in compiled code; other adapters are served."""
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), Odd(pair))
    store, x = AdapterStore(model), torch.randn(2, HIDDEN)
    store.load("linear", {"0": (torch.randn(2, HIDDEN), torch.randn(HIDDEN, 2), 1.0)})
    store.load("odd", {"1.weight": (torch.randn(2, HIDDEN), torch.randn(4, 2), 1.0)})
    torch.compiler.reset()
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with store.batch(["linear", None]):
            call(x)
        with store.batch(["odd", None]), pytest.raises(RuntimeError, match="Odd"):
            call(x)


@torch.no_grad()
def test_experts_that_are_called_by_name(folders):
    base, root, _ = folders
    store = store_with(base, root, ["moe"])
    experts = store.model.model.layers[0].mlp.experts
    hidden = torch.randn(5, base.config.hidden_size)
    index, weights = torch.tensor([[0, 1], [1, 2], [2, 0], [1, 0], [0, 2]]), torch.rand(5, 2)
    with store.batch_rows(["moe", None], [3, 2]):
        by_place = experts(hidden, index, weights)
        by_name = experts(top_k_weights=weights, hidden_states=hidden, top_k_index=index)
    assert torch.equal(by_name, by_place) and not torch.equal(by_name, experts(hidden, index, weights))


def test_weights_of_several_adapters(folders):
    base, root, _ = folders
    store = store_with(base, root)
    found = run(store, [{"all": 0.5, "moe": -1.5, "emb": 2.0}] * 7)
    ours = copy.deepcopy(base)
    for name in ("all", "moe", "emb"):
        fused_lora.load_adapter(ours, root / name, name)
    fused_lora.merge(ours, ["all", "moe", "emb"], weights=[0.5, -1.5, 2.0])
    with torch.no_grad():
        assert_close(found, ours(IDS).logits, terms=2000)


def test_an_embeddings_rows_do_not_depend_on_their_neighbours(folders):
    base, root, _ = folders
    store = store_with(base, root, ["emb", "all"])
    embedding, ids = store.model.get_input_embeddings(), torch.arange(1, 33).reshape(16, 2) % TOKENS
    with torch.no_grad():
        with store.batch(["emb"] + [None, "all", "emb"] * 5):
            many = embedding(ids)
        with store.batch(["emb"]):
            alone = embedding(ids[:1])
    assert torch.equal(bits(many[0]), bits(alone[0]))


def test_generate_and_eviction(folders):
    base, root, _ = folders
    store, names = store_with(base, root, max_resident=2), ["moe", "emb", "moe"]
    tokens = {}
    for name in ("moe", "emb"):
        ours = copy.deepcopy(base)
        fused_lora.load_adapter(ours, root / name)
        tokens[name] = ours.generate(IDS[:3], max_new_tokens=4, do_sample=False, pad_token_id=0)
    for _ in range(2):
        with store.batch(names):
            found = store.model.generate(IDS[:3], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert all(torch.equal(found[row], tokens[name][row]) for row, name in enumerate(names))
        run(store, ["lin", "all"] + [None] * 5)  # takes both places
    assert store.stats()["evictions"] > 0


@torch.no_grad()
def test_experts_that_get_the_rows_of_all_tokens(tmp_path):
    """Llama-4's: the rows of a sequence lie apart, expert by expert. Called by themselves they are refused."""
    torch.manual_seed(shifted(6))
    base, expected = llama4(), {}
    for name in ("moe", "down", "lin"):
        live = wrap(copy.deepcopy(base), **ADAPTERS[name]).eval()
        live.save_pretrained(tmp_path / name)
        expected[name] = live(IDS).logits
    store, names = store_with(base, tmp_path, list(expected)), ["moe", None, "down", "lin", "moe", None, "down"]
    plain = base(IDS).logits
    for _ in range(3):
        assert_rows(run(store, names), names, plain, expected)
    shorter = run(store, names, IDS[:, :4])
    assert torch.equal(bits(shorter[1]), bits(base(IDS[:, :4]).logits[1]))
    assert_close(shorter[4], expected["moe"][4, :4], terms=2000)
    assert_close(run(store, ["moe"] * 7), expected["moe"], terms=2000)
    experts, hidden = store.model.model.layers[0].feed_forward.experts, torch.randn(8, base.config.hidden_size)
    with store.batch(["moe", None]), pytest.raises(ValueError, match="Llama4TextExperts gets the rows of all"):
        experts(hidden)
    with store.batch(["moe"]):
        assert not torch.equal(experts(hidden), base.model.layers[0].feed_forward.experts(hidden))


class Positions(nn.Embedding):
    """Gets a shape, as those of LED and of models of time series do."""

    def forward(self, shape):
        return super().forward(torch.arange(shape[1]))


class WithPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.up = Positions(9, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.up(x + self.positions(x.shape))


@torch.no_grad()
def test_an_embedding_that_gets_no_tensor():
    model, x = WithPositions(), torch.randn(2, 3, 8)
    base, store = model(x), AdapterStore(model)
    store.load("up", {"up": (torch.randn(2, 8), torch.randn(8, 2), 1.0)})
    with store.batch(["up", None]):
        out = model(x)
    assert torch.equal(out[1], base[1]) and not torch.equal(out[0], base[0])
    with pytest.raises(ValueError, match="'positions' gets a Size, to which nothing can be added"):
        store.load("positions", {"positions": (torch.randn(2, 9), torch.randn(8, 2), 1.0)})


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_linear_layer_that_returns_a_tuple():
    """Llama-4's router: nothing can be added to it, in eager and in compiled code; other adapters are served."""
    base = llama4()
    router, query = "model.layers.0.feed_forward.router", "model.layers.0.self_attn.q_proj"
    tensors = torch.randn(2, HIDDEN), torch.randn(4, 2), 1.0
    for compiled in (False, True):
        store = AdapterStore(copy.deepcopy(base))
        store.load("query", {query: (torch.randn(2, HIDDEN), torch.randn(HIDDEN, 2), 1.0)})
        store.load("router", {router: tensors})
        module = store.model.get_submodule(router)
        call = torch.compile(module, backend="eager", fullgraph=True) if compiled else module
        x = torch.randn(3, HIDDEN)
        expected = base.get_submodule(router)(x)
        with (
            store.batch(["router"]),
            pytest.raises(RuntimeError, match=f"{router}' cannot be added: it gets or returns"),
        ):
            call(x)
        with store.batch(["query"]):
            assert all(torch.equal(a, b) for a, b in zip(call(x), expected, strict=True))
        if not compiled:
            with pytest.raises(ValueError, match=f"'{router}' returns a tuple, to which nothing can be added"):
                store.load("again", {router: tensors})
            assert torch.equal(run(store, [None] * 7), base(IDS).logits)


def test_sources_that_are_no_files(folders):
    """A live model of PEFT's, one of inject, and a mapping in PEFT's packing."""
    base, root, expected = folders
    store = AdapterStore(copy.deepcopy(base))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), root / "all")
    ours = copy.deepcopy(base)
    fused_lora.load_adapter(ours, root / "all")
    store.load("theirs", theirs)
    store.load("ours", ours)
    layers = fused_lora.lora_layers(ours)
    place = "model.layers.0.mlp.experts.down_proj"
    stack = layers[place]
    entry = stack.lora_A["default"].weight, stack.lora_B["default"].weight, stack.scaling["default"]
    store.load("mapping", {place: entry})
    rows = run(store, ["theirs", "ours", "mapping", "theirs", "ours", "mapping", None])
    for row in (0, 1, 3, 4):
        assert_close(rows[row], expected["all"][row], terms=2000)
    assert not torch.equal(rows[2], base(IDS).logits[2])
    with pytest.raises(ValueError, match=r"expected A \[4 experts \* r, 24\] and B \[16, 4 experts \* r\]"):
        store.load("mapping", {place: (entry[0][1:], *entry[1:])})


def test_compiled_models_give_the_same(folders):
    base, root, _ = folders
    store, names = store_with(base, root, ["all", "emb"]), ["all", None, "emb", "all", None, None, "emb"]
    eager = run(store, names)
    plain = base(IDS).logits
    embedding = store.model.get_input_embeddings()
    compiled = torch.compile(embedding, backend="eager", fullgraph=True)
    with torch.no_grad(), store.batch(names):
        assert torch.equal(compiled(IDS), embedding(IDS))
    assert torch.equal(bits(eager[1]), bits(plain[1].detach()))


def test_what_cannot_be_served_is_refused_at_load(folders):
    base, root, _ = folders
    store = AdapterStore(copy.deepcopy(base))
    experts = store.model.model.layers[1].mlp.experts
    experts.config._experts_implementation = "sonicmoe"
    text = "cannot be served: the parameter 'model.layers.0.mlp.experts.gate_up_proj': the experts implementation"
    for name in ("moe", "all"):
        with pytest.raises(ValueError, match=text):
            store.load(name, root / name)
    store.load("emb", root / "emb")
    experts.config._experts_implementation = None
    store.load("moe", root / "moe")
    handle = experts.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj.*a hook on the experts"):
        store.load("down", root / "down")
    with store.batch(["moe"]), pytest.raises(RuntimeError, match="cannot be computed: a hook on the experts"):
        store.model(IDS[:1])
    handle.remove()
    assert store.names() == ["emb", "moe"]


def test_tables_of_the_kernels_know_linear_layers_alone():
    linear, other = nn.Linear(8, 4), nn.Embedding(8, 4)
    parts = (
        Part(Site(0, "lin", linear, 8, 4), 2, 1.0, 0, 64),
        Part(Site(1, "emb", other, 8, 4, "embedding"), 99, 1.0, 0, 64),
    )
    tables = SlotTables(1, 16, torch.device("cpu"), torch.float32)
    tables.check(parts)
    tables.limit(16)
    with pytest.raises(ValueError, match="'emb' is no linear layer, and the store's row buffers are for those alone"):
        tables.check(parts)
    tables.check(parts[:1])


@pytest.mark.parametrize("dtype, whole", [(torch.float32, 4), (torch.bfloat16, 8)])
def test_experts_are_laid_out_one_after_another(dtype, whole):
    A, B = torch.randn(3 * 5, 7), torch.randn(6, 5 * 3)
    packed_A, packed_B = by_expert(A, B, 3, dtype)
    rows = -(-5 // whole) * whole
    assert packed_A.shape == (3 * rows, 7) and packed_B.shape == (6, 3 * rows)
    for e in range(3):
        own = slice(e * rows, e * rows + 5)
        assert torch.equal(packed_A[own], A[5 * e : 5 * e + 5]) and torch.equal(packed_B[:, own], B[:, e::3])
        assert not packed_A[e * rows + 5 : (e + 1) * rows].any()
