"""Layers that read one input share work: found by watching, checked at every call, and no bit is other than alone."""

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fused_lora.kernels import grouped_shrink
from fused_lora.ops.grouped.op import lora_grouped_
from fused_lora.reference import bits
from fused_lora.serving import AdapterStore
from fused_lora.serving.batch.prepared import Prepared, Step
from fused_lora.serving.batch.siblings import Siblings
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted
from helpers.waiting import HANG

K, H, KV = 48, 96, 32
LAYERS = {"q": (K, K), "k": (K, KV), "v": (K, KV), "o": (K, K), "gate": (K, H), "up": (K, H), "down": (H, K)}
NAMES = ["a4", "a7", None, {"a16": 0.5, "a4": -1.0}, "a64", "b4"]


class Block(nn.Module):
    """Reads its input as a decoder's layer does; ``between`` is called on q's input before k reads it."""

    def __init__(self):
        super().__init__()
        for name, (inputs, outputs) in LAYERS.items():
            self.add_module(name, nn.Linear(inputs, outputs))
        self.between = lambda x: x
        self.without_k = False

    def forward(self, x):
        x = torch.tanh(x)
        q = self.q(x)
        x = self.between(x)
        k, v = 0.0 if self.without_k else self.k(x), self.v(x)
        h = self.o(q + torch.cat([k + v, v], -1)[..., :K])
        h = torch.tanh(h)
        return self.down(self.gate(h) * self.up(h))


class Model(nn.Module):
    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def adapter(r, seed, targets=tuple(LAYERS), layers=2):
    draw = torch.Generator().manual_seed(shifted(seed))
    found = {}
    for i in range(layers):
        for name in targets:
            inputs, outputs = LAYERS[name]
            A, B = torch.randn(r, inputs, generator=draw), torch.randn(outputs, r, generator=draw)
            found[f"layers.{i}.{name}"] = (A / inputs**0.5, B / 4, 0.5)
    return found


ADAPTERS = {"a4": 4, "a7": 7, "a16": 16, "a64": 64, "b4": 4}


def loaded(model, **options):
    found = AdapterStore(model, **options)
    for i, (name, r) in enumerate(ADAPTERS.items()):
        found.load(name, adapter(r, i, layers=len(model.layers)))
    return found


def made(layers=2):
    with torch.random.fork_rng():
        torch.manual_seed(shifted(1))
        return Model(layers).eval().requires_grad_(False)


@pytest.fixture
def model():
    return made()


def put_between(model, between):
    """What each block does to q's input before k reads it."""
    for block in model.layers:
        block.between = between


@pytest.fixture
def alone(model, monkeypatch):
    """What a store gives that computes every layer for itself: ``alone(names, x)``."""

    def run(names, x):
        copy = Model().eval().requires_grad_(False)
        copy.load_state_dict(model.state_dict())
        for block, of in zip(copy.layers, model.layers, strict=True):
            block.between, block.without_k = of.between, of.without_k
        plain = loaded(copy)
        with monkeypatch.context() as patch:
            patch.setattr(Siblings, "of", lambda self, first: (first,))
            with plain.batch(names):
                return plain.model(x)

    return run


@pytest.fixture
def joint(monkeypatch):
    """Steps as the kernels have them, by the eager operator on a copy of the input: how many layers each served that
    served several, in the order of the calls."""
    counts, init = [], Prepared.__init__

    def made(self, groups, tables):
        init(self, groups, tables)
        self.by_kernels = True

    def step(self, rows, buffers, sites, x, y):
        acting = [site for site in sites if site in self.sites]

        def form(x):
            if len(acting) > 1:
                counts.append(len(acting))
            return x.clone()

        def add(formed, number, y):
            lora_grouped_(y, formed, rows.layout, self._terms_of(acting[number]))
            return True

        return Step({site: i for i, site in enumerate(acting)}, form, add)

    monkeypatch.setattr(Prepared, "__init__", made)
    monkeypatch.setattr(Prepared, "step", step)
    return counts


def test_the_second_step_shares_and_has_the_same_bits(model, joint, alone):
    store, x = loaded(model), torch.randn(6, 5, K)
    with store.batch(NAMES):
        first = model(x)
        assert not joint
        second = model(x)
        assert joint == [3, 2, 3, 2]
        step = model(x[:, :1])
    want = alone(NAMES, x)
    assert torch.equal(first, want) and torch.equal(second, want)
    assert torch.equal(step, alone(NAMES, x[:, :1]))
    with torch.no_grad():
        assert torch.equal(bits(second[2]), bits(model(x)[2]))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_among_others(model, threads, joint):
    """Of one block's q, k and v, whose own outputs are taken away: the terms, not the layers' products."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        store, rows = loaded(model), 70
        block = model.layers[0]
        with torch.no_grad():
            for name in ("q", "k", "v"):
                getattr(block, name).weight.zero_()
                getattr(block, name).bias.fill_(0.25)

        def terms(x, names):
            with store.batch(names):
                x = x + 0  # as one tensor for the three
                return torch.cat([block.q(x), block.k(x), block.v(x)], -1)

        x = torch.randn(rows, 1, K)
        names = [NAMES[i] for i in torch.randint(0, len(NAMES), (rows,)).tolist()]
        terms(x, names), terms(x, names)
        single = torch.cat([terms(x[i : i + 1], names[i : i + 1]) for i in range(rows)])
        joint.clear()
        for size in (2, 3, 5, 8, 17, 33, 64, 70):
            pick = torch.randperm(rows)[:size].tolist()
            assert torch.equal(terms(x[pick], [names[i] for i in pick]), single[pick])
        assert joint and set(joint) == {3}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("how", ["another tensor", "a view of it", "written in place", "written through a view"])
def test_inputs_that_differ_after_all_are_computed_for_themselves(model, joint, alone, how):
    """The first steps have one input for q, k and v, a later one has not."""

    def between(x):
        if how == "another tensor":
            return x * 1.5
        if how == "a view of it":
            return x[:]
        if how == "written in place":
            return x.mul_(1.5)
        x[0].mul_(1.5)
        return x

    store, x = loaded(model), torch.randn(6, 2, K)
    with store.batch(NAMES):
        model(x), model(x)
        put_between(model, between)
        joint.clear()
        out = model(x)
        assert torch.equal(out, alone(NAMES, x))
        joint.clear()
        assert torch.equal(model(x), out)
        # the first time showed that q has an input of its own; k and v may still share theirs
        assert joint == [2, 2, 2, 2]
        put_between(model, lambda x: x)
        assert torch.equal(model(x), alone(NAMES, x))


def test_inputs_that_always_differ_are_never_shared(model, joint, alone):
    put_between(model, lambda x: x + 0)
    store, x = loaded(model), torch.randn(6, 2, K)
    with store.batch(NAMES):
        for _ in range(3):
            out = model(x)
    assert torch.equal(out, alone(NAMES, x))
    assert set(joint) == {2}  # k and v; gate and up


def test_a_layer_that_is_left_out(model, joint, alone):
    store, x = loaded(model), torch.randn(6, 2, K)
    with store.batch(NAMES):
        model(x), model(x)
        for block in model.layers:
            block.without_k = True
        for _ in range(3):
            out = model(x)
        assert torch.equal(out, alone(NAMES, x))
        for block in model.layers:
            block.without_k = False
        assert torch.equal(model(x), alone(NAMES, x))


def test_a_layer_that_is_called_in_between(model, joint, alone):
    store, x = loaded(model), torch.randn(6, 1, K)
    with store.batch(NAMES):
        model(x), model(x)
        for block in model.layers:
            block.between = lambda x, block=block: x if block.o(x * 2) is not None else None
        for _ in range(2):
            assert torch.equal(model(x), alone(NAMES, x))


def test_a_batch_within_a_batch_between_two_layers(model, joint, alone):
    store, x = loaded(model), torch.randn(6, 1, K)
    want = alone(NAMES, x)
    inner, seen = torch.randn(6, 1, K), []

    def between(x):
        block.between = lambda x: x
        with store.batch(NAMES):
            seen.append(torch.cat([block.q(inner), block.k(inner), block.v(inner)], -1))
        block.between = between
        return x

    block = model.layers[0]
    with store.batch(NAMES):
        model(x), model(x)
        block.between = between
        for _ in range(2):
            assert torch.equal(model(x), want)
        block.between = lambda x: x
        assert torch.equal(seen[0], seen[1])
        assert torch.equal(seen[0], torch.cat([block.q(inner), block.k(inner), block.v(inner)], -1))


@pytest.mark.parametrize("targets", [("q", "v"), ("k", "v"), ("q",), ("gate", "down"), ("o",)])
def test_adapters_that_leave_siblings_alone(model, targets, joint):
    """Learned with all layers or with few: only those with terms are computed."""
    store, x = AdapterStore(model), torch.randn(2, 3, K)
    store.load("few", adapter(8, 1, targets))
    store.load("all", adapter(8, 2))
    answers = []
    for names in (["few", None], ["all", "few"], ["few", None], ["few", "few"]):
        with store.batch(names):
            answers.append(model(x))
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[0][0], answers[3][0])
    joint.clear()
    with store.batch(["few", None]):
        model(x)
    shared = max(len({"q", "k", "v"} & set(targets)), len({"gate", "up"} & set(targets)))
    assert joint == ([shared] * 2 if shared > 1 else [])


def test_inference_tensors_are_computed_for_themselves(model, joint, alone):
    """Nothing tells whether one of them was written to."""
    store, x = loaded(model), torch.randn(6, 2, K)
    with store.batch(NAMES), torch.inference_mode():
        for _ in range(3):
            out = model(x)
        assert not joint
    assert torch.equal(out, alone(NAMES, x))
    with store.batch(NAMES):
        model(x), model(x)
        assert joint
        with torch.inference_mode():
            put_between(model, lambda x: x.mul_(1.5))
            out = model(x)
    assert torch.equal(out, alone(NAMES, x))


def test_a_step_that_raised_half_way(model, joint, alone):
    store, x = loaded(model), torch.randn(6, 2, K)

    def fail(x):
        raise KeyError("between")

    with store.batch(NAMES):
        model(x), model(x)
        model.layers[0].between = fail
        with pytest.raises(KeyError):
            model(x)
        model.layers[0].between = lambda x: x
        joint.clear()
        assert torch.equal(model(x), alone(NAMES, x))
        assert joint == [3, 2, 3, 2]


def test_threads_and_handed_on_batches(model, joint, alone):
    store, inputs = loaded(model), [torch.randn(6, 1 + i % 3, K) for i in range(24)]
    other = NAMES[::-1]
    want = [alone(NAMES, x) for x in inputs], [alone(other, x) for x in inputs]
    with store.batch(NAMES):
        model(inputs[0]), model(inputs[1])

    async def handed(names):
        with store.batch(names):
            return await asyncio.gather(*(asyncio.to_thread(model, x) for x in inputs))

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda names: asyncio.run(handed(names)), (NAMES, other), timeout=HANG))
    # the base layers' own products may differ in the last bit from call to call; other adapters differ by far more
    assert min((a - b).abs().max() for a, b in zip(*want, strict=True)) > 1e-2
    for ours, theirs in zip(results, want, strict=True):
        assert max((a - b).abs().max() for a, b in zip(ours, theirs, strict=True)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = made().to(dtype)
    store, x = loaded(model), torch.randn(6, 1, K, dtype=dtype)
    with store.batch(NAMES):
        first = model(x)
        assert torch.equal(model(x), first) and torch.equal(model(x), first)


def test_adapters_in_another_dtype_than_the_sum(model, alone):
    """16-bit adapters are widened at every call, together as alone."""
    store, x = loaded(model, dtype=torch.bfloat16), torch.randn(6, 1, K)
    with store.batch(NAMES):
        first = model(x)
        assert torch.equal(model(x), first) and not torch.equal(first, alone(NAMES, x))


def test_nothing_is_kept_after_a_step(model, joint):
    """The input of a step is free once the last layer has read it."""
    import weakref

    store, x, kept = loaded(model), torch.randn(6, 1, K), []
    with store.batch(NAMES):
        model(x), model(x)
        model.layers[1].between = lambda x: kept.append(weakref.ref(x)) or x
        model(x)
        assert kept[0]() is None


@pytest.fixture
def block(device):
    """A model of one block: the interpreter takes its time."""
    return made(1).to(device)


@pytest.fixture
def launches(kernels_on, monkeypatch):
    """The outputs of each shrink that reads x for several."""
    found, launch = [], grouped_shrink.grouped_shrink

    def counted(x, tables, *args):
        if len(tables.rank) > 1:
            found.append(len(tables.rank))
        return launch(x, tables, *args)

    monkeypatch.setenv("FUSED_LORA_CHECK", "0")
    monkeypatch.setattr(grouped_shrink, "grouped_shrink", counted)
    return found


@torch.no_grad()
def test_one_shrink_for_all_that_read_an_input(block, device, launches):
    store, x = loaded(block), torch.randn(6, 1, K, device=device)
    with store.batch(NAMES):
        first = block(x)
        assert not launches
        second = block(x)
    assert launches == [3, 2]
    assert torch.equal(first, second)
    assert torch.equal(bits(second[2]), bits(block(x)[2]))


@torch.no_grad()
def test_tables_with_other_layers_between_siblings(device, launches):
    """Layers that share an input but are not neighbours in the model are launched one by one."""

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.o, self.v = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x):
            x = x + 0
            return self.o(self.q(x) * self.v(x))

    model = Apart().eval().to(device)
    store, x = AdapterStore(model), torch.randn(1, 2, K, device=device)
    draw = torch.Generator().manual_seed(shifted(0))
    tensors = {n: (torch.randn(4, K, generator=draw), torch.randn(K, 4, generator=draw), 0.1) for n in ("q", "o", "v")}
    store.load("a", tensors)
    with store.batch(["a"]):
        first = model(x)
        assert torch.equal(model(x), first)
    assert not launches


@torch.no_grad()
def test_a_shared_shrink_that_fails_its_check_gives_way(block, device, launches, monkeypatch):
    monkeypatch.delenv("FUSED_LORA_CHECK")
    store, x = loaded(block), torch.randn(6, 1, K, device=device)
    with store.batch(["a4", None, "a7"]):
        first = block(x)
        launch = grouped_shrink.grouped_shrink
        monkeypatch.setattr(grouped_shrink, "grouped_shrink", lambda *args: launch(*args).add_(1))
        with pytest.warns(UserWarning, match="grouped.*shared.*dropped"):
            assert torch.equal(block(x), first)
        launches.clear()
        assert torch.equal(block(x), first)
        assert not launches


@torch.no_grad()
def test_one_buffer_serves_step_after_step(block, device, launches):
    """What a captured graph would launch: the same for any mix, with all siblings whoever has adapters."""
    store, x = AdapterStore(block), torch.randn(3, 1, K, device=device)
    store.load("a4", adapter(4, 0, layers=1))
    store.load("few", adapter(8, 9, ("q", "v"), layers=1))
    steps = [["a4", "few"], [None], ["few", None, "a4"]]
    want = []
    for names in steps:
        with store.batch([*names, *[None] * (3 - len(names))]):
            want.append(block(x))
    buffers = store.row_buffers(max_rows=3, max_groups=2, max_rank=16)
    for names, answer in zip(steps, want, strict=True):
        launches.clear()
        with store.batch_rows(names, [1] * len(names), buffers):
            out = block(x)
        assert launches == [3, 2]
        assert_close(out, answer, terms=100)


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_with_shared_shrinks_replays_any_mix(model):
    device = torch.device("cuda")
    model.to(device)
    store, x = loaded(model), torch.randn(6, 1, K, device=device)
    buffers = store.row_buffers(max_rows=6, max_groups=6, max_rank=64)
    graph = torch.cuda.CUDAGraph()
    with store.batch_rows(["a4"], [1], buffers):
        model(x), model(x)  # learned, and the kernels' first use
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = model(x)
    for names in (["a4"] * 6, [None], ["a64", None, "a7"], ["b4", "a16", "a4", "a7", None, "a64"]):
        with store.batch_rows(names, [1] * len(names), buffers):
            graph.replay()
            replayed = out.clone()
            assert_close(model(x), replayed, terms=100)


@pytest.mark.gpu
@torch.no_grad()
def test_another_stream_computes_for_itself(model):
    """What one stream has shrunk is not yet there for another."""
    device = torch.device("cuda")
    model.to(device)
    store, x = loaded(model), torch.randn(6, 1, K, device=device)
    block, side = model.layers[0], torch.cuda.Stream()
    with store.batch(["a4"] * 6):
        model(x), model(x)
        want = block.q(x), block.k(x), block.v(x)
        y = x + 0
        torch.cuda.synchronize()
        q = block.q(y)
        with torch.cuda.stream(side):
            k = block.k(y)
        v = block.v(y)
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), want, strict=True))


def test_buffers_are_kept_for_the_last_two_mixes_alone(model):
    """However many mixes there were, and the answers are those of the first time."""
    store, x = loaded(model), torch.randn(3, 1, K)
    mixes = list(itertools.combinations([*ADAPTERS, None], 3))

    def answers():
        found = []
        for names in mixes:
            with store.batch(names):
                found.append(model(x))
        return found

    first = answers()
    assert all(torch.equal(a, b) for a, b in zip(first, answers(), strict=True))
    kept = [len(found._rows) for found in store._prepared.values()]
    assert kept == [0] * (len(kept) - 2) + [1, 1] and len(kept) == 16


@pytest.mark.gpu
@torch.no_grad()
def test_no_graph_keeps_the_adapters_of_the_eager_path(model, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_PLAN", "eager")
    model.to("cuda")
    store, x = loaded(model), torch.randn(6, 1, K, device="cuda")
    with store.batch(["a4"] * 6):
        model(x), model(x)
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match="graph would keep"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(x)
