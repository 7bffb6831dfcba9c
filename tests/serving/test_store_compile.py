"""A model with a store under torch.compile: one graph for all batches, and the answers of the same model uncompiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import fused_lora
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

K = 16


class Block(nn.Module):
    def __init__(self, flat=False):
        super().__init__()
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(K, K) for _ in range(5))
        self.flat = flat

    def forward(self, x):
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return x + (self.up(x.reshape(-1, K)).view(x.shape) if self.flat else self.up(x))


class Model(nn.Module):
    def __init__(self, flat=False):
        super().__init__()
        self.layers = nn.ModuleList(Block(flat) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def world(flat=False):
    torch.manual_seed(shifted(7))
    model = Model(flat).eval()
    store = fused_lora.AdapterStore(model)
    for name, rank in (("a", 2), ("b", 4)):
        tensors = {
            path: (torch.randn(rank, K), torch.randn(K, rank) * 0.1, 1.0)
            for path, layer in model.named_modules()
            if isinstance(layer, nn.Linear)
        }
        store.load(name, tensors)
    return model, store


@pytest.fixture(autouse=True)
def clean():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_serves_every_batch(backend):
    model, store = world()
    x = torch.randn(4, 3, K)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for names in (["a", None, "b", "b"], ["b", "a", "a", None], ["a"] * 4, ["a", "b"]):
        with store.batch(names):
            want = model(x)  # followed in the first of them
            got = compiled(x)
        assert_close(got, want, terms=300)
    assert_close(compiled(x), model(x), terms=300)  # without a batch
    store.load("a", {"layers.0.q": (torch.randn(2, K), torch.randn(K, 2), 1.0)})
    with store.batch(["a", "b"]):
        assert_close(compiled(x), model(x), terms=300)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@torch.no_grad()
def test_other_sizes_take_as_many_graphs_as_without_a_store():
    found = []
    for with_store in (True, False):
        torch._dynamo.reset()
        counters.clear()
        model, store = world()
        if not with_store:
            store.detach()
        compiled = torch.compile(model, backend="eager", dynamic=True)
        for shape in ((4, 3, K), (2, 3, K), (4, 9, K), (6, 5, K)):
            x = torch.randn(*shape)
            if not with_store:
                compiled(x)
                continue
            with store.batch(["a", "b"]):
                want = model(x)
                assert_close(compiled(x), want, terms=300)
        found.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    assert found[0] == found[1]


@torch.no_grad()
def test_a_mixed_batch_whose_rows_nobody_has_followed_is_refused():
    model, store = world()
    x = torch.randn(2, 3, K)
    compiled = torch.compile(model, backend="eager")
    with store.batch(["a", "b"]):
        with pytest.raises(ValueError, match="Call the model once in such a batch without torch.compile"):
            compiled(x)
        want = model(x)
        assert_close(compiled(x), want, terms=300)
        with pytest.raises(ValueError, match="3 rows or sequences for 2 entries"):
            compiled(torch.randn(3, 3, K))
    with store.batch(["a", "a"]):
        compiled(x)


@torch.no_grad()
def test_rows_of_all_sequences_in_one_dimension():
    """The layers before tell how many sequences there are, whether they have adapters or not."""
    model, store = world(flat=True)
    up = {f"layers.{i}.up": (torch.randn(2, K), torch.randn(K, 2), 1.0) for i in range(2)}
    store.load("up", up)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for sizes in ((2, 3), (4, 5), (2, 1)):
        x = torch.randn(*sizes, K)
        with store.batch(["up", "b"]):
            want = model(x)
            assert_close(compiled(x), want, terms=300)
    with store.batch(["up", None]), pytest.raises(ValueError, match="'layers.0.up' .* 6 rows or sequences for 2 entri"):
        compiled(torch.randn(3, 2, K))
    compiled = torch.compile(model.layers[0].up, backend="eager")
    with store.batch(["up", None]), pytest.raises(ValueError, match="depends on the sizes of the model's inputs"):
        compiled(torch.randn(4, K))


@torch.no_grad()
def test_packed_rows_in_compiled_code():
    model, store = world()
    model.layers = nn.ModuleList([model.layers[0]])
    layer = model.layers[0].up
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(5, K)
    with store.batch_rows(["a", "b"], [2, 3]):
        want = layer(x)
        assert_close(compiled(x), want, terms=300)
    with store.batch_rows(["b", "a"], [1, 3]), pytest.raises(ValueError, match="5 rows or sequences for 4 entries"):
        compiled(x)


@torch.no_grad()
def test_an_exported_program_looks_up_its_batch_and_a_trace_cannot():
    model, store = world()
    x = torch.randn(4, 3, K)
    program = torch.export.export(model, (x,)).module()
    for names in (["a", None, "b", "a"], ["b"] * 4, [None] * 4):
        with store.batch(names):
            want = model(x)  # its rows are known then
            assert_close(program(x), want, terms=100)
    with store.batch(["a"]), pytest.raises(RuntimeError, match="a trace or a graph would keep"):
        torch.jit.trace(model, x)
