"""Rows of mixed batches: each layer's are those of the sequence that they belong to, or the layer is refused.

The same models run under a store and under adapter_batch; the right answers are those of each adapter alone.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_lora
from fused_lora.rows import finder, trace
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

K = 8
QUERIES = torch.randn(1, 2, K, generator=torch.Generator().manual_seed(shifted(1)))  # the same for each sequence


class Block(nn.Module):
    """Attention and an MLP, for [B, T, K]."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o, self.up = (nn.Linear(K, K) for _ in range(5))

    def forward(self, x):
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return x + self.up(x)


class Model(nn.Module):
    """Blocks; ``around`` maps (block, x [B, T, K]) to its output."""

    def __init__(self, around=lambda block, x: block(x), blocks=1):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.around = around
        self.inner = Block()

    def forward(self, x, scale=None, mask=None, *, position_ids=None):
        x = x if scale is None else x * scale
        for layer in self.layers:
            x = self.around(layer, x)
        return x


class Sorted(Model):
    """Tokens go through a layer sorted by value: as many rows as the batch has, in another order."""

    def forward(self, x):
        flat = super().forward(x).reshape(-1, K)
        order = flat[:, 0].argsort()
        out = torch.empty_like(flat)
        out[order] = self.layers[0].up(flat[order])
        return out.view(x.shape)


class Experts(nn.Module):
    """Top-1 experts that are linear layers."""

    def __init__(self, count=3):
        super().__init__()
        self.gate = nn.Linear(K, count)
        self.experts = nn.ModuleList(nn.Linear(K, K) for _ in range(count))

    def forward(self, x):
        flat = x.reshape(-1, K)
        choice, out = self.gate(flat).argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = (choice == i).nonzero()[:, 0]
            if len(rows):
                out[rows] = expert(flat[rows])
        return out.view(x.shape)


class TimeFirst(nn.Module):
    """A model for [T, B, K]."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x.transpose(0, 1)).transpose(0, 1)


class TimeFirstInside(nn.Module):
    """Attention over the first dimension of its input, as layers without batch_first have."""

    def __init__(self):
        super().__init__()
        self.q, self.up = nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x):  # [T, B, K]
        q = self.q(x).transpose(0, 1)
        return self.up(x + torch.softmax(q @ q.transpose(1, 2), -1).matmul(q).transpose(0, 1))


class Pictures(nn.Module):
    """Pictures go through a tower of their own, and then to the places of tokens that are 0."""

    def __init__(self):
        super().__init__()
        self.table, self.tower, self.language = nn.Embedding(9, K), Block(), Block()

    def forward(self, tokens, pictures):
        x = self.table(tokens)
        return self.language(x.masked_scatter((tokens == 0)[..., None], self.tower(pictures)[:, 0]))


def tensors(model, seed, layers=None):
    draw = torch.Generator().manual_seed(shifted(seed))
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and (layers is None or any(word in path for word in layers)):
            found[path] = (torch.randn(2, K, generator=draw), torch.randn(module.out_features, 2, generator=draw), 0.5)
    return found


class Door:
    """A model under adapters a and b through the store or through adapter_batch, and what each gives alone."""

    def __init__(self, kind, model, layers=None):
        self.plain, self.kind = model.eval(), kind
        self.adapters = {name: tensors(model, seed, layers) for seed, name in enumerate("ab")}
        self.model = copy.deepcopy(self.plain)
        if kind == "store":
            self.store = fused_lora.AdapterStore(self.model)
            for name, adapter in self.adapters.items():
                self.store.load(name, adapter)
            return
        for name, adapter in self.adapters.items():
            config = fused_lora.LoraConfig(r=2, lora_alpha=1, target_modules=list(adapter))
            fused_lora.inject(self.model, config, name)
            for path, (A, B, _) in adapter.items():
                layer = self.model.get_submodule(path)
                layer.lora_A[name].weight.data.copy_(A)
                layer.lora_B[name].weight.data.copy_(B)
        self.model.eval()

    def batch(self, names, **options):
        if self.kind == "store":
            return self.store.batch(names, **options)
        return fused_lora.adapter_batch(self.model, names, **options)

    @torch.no_grad()
    def alone(self, name):
        """A plain model with this adapter in its weights."""
        model = copy.deepcopy(self.plain)
        for path, (A, B, scale) in self.adapters.get(name, {}).items():
            model.get_submodule(path).weight += scale * B @ A
        return model

    @torch.no_grad()
    def check(self, names, x, dim=0, **options):
        """Every sequence of a mixed batch gives what its adapter gives alone."""
        with self.batch(names, dim=dim):
            out = self.model(x, **options)
        for i, name in enumerate(names):
            want = self.alone(name)(x.narrow(dim, i, 1), **options)
            got = out.narrow(dim, i, 1)
            assert (got - want).abs().max() <= 1e-4 * want.abs().max(), (i, name)


door = pytest.mark.parametrize("kind", ["store", "adapter_batch"])


@pytest.fixture
def follows(monkeypatch):
    """The calls that were followed."""
    seen = []
    enter = finder.RowTrace.__enter__
    monkeypatch.setattr(finder.RowTrace, "__enter__", lambda self: (seen.append(self), enter(self))[1])
    return seen


@door
@pytest.mark.parametrize(
    "around",
    [
        lambda block, x: block(x),
        lambda block, x: block(x.flip(1)).flip(1),
        lambda block, x: block(x.view(2 * len(x), -1, K)).view(x.shape),
        lambda block, x: torch.cat([block(x[:, :2]), block(x[:, 2:])], 1),
        lambda block, x: block(torch.cat([x, x]))[: len(x)],
        lambda block, x: block.up(x.reshape(-1, K)).view(x.shape),
        lambda block, x: block.up(x.transpose(0, 1)).transpose(0, 1),
        lambda block, x: block.up(x[:, -1])[:, None],
        lambda block, x: block.o(F.scaled_dot_product_attention(block(QUERIES.expand(len(x), -1, -1)), x, block.k(x))),
    ],
    ids=["plain", "reversed", "windows", "chunks", "twice", "flat", "time first", "last token", "learned queries"],
)
@pytest.mark.parametrize("T", [4, 2])
def test_rows_are_followed_through_a_model(kind, around, T):
    at = Door(kind, Model(around, blocks=2))
    at.check(["a", "b"], torch.randn(2, T, K))
    at.check(["a", None, "b", "a"], torch.randn(4, T, K))


@door
@pytest.mark.parametrize(
    "model, why",
    [
        (Sorted, "rows picked by their numbers"),
        (Experts, "rows picked by their numbers"),
        (lambda: Model(lambda block, x: x + block.up(x[x[..., 0] > 0]).sum()), "picked by a mask"),
        (lambda: Model(lambda block, x: block(x.flip(0))), "in another order"),
        (lambda: Model(lambda block, x: x + block.up(x[0])), "some of the batch's rows"),
        (lambda: Model(lambda block, x: x + block.up(QUERIES.view(2, 1, K))), "not come from the model's inputs"),
        (lambda: Model(lambda block, x: x + block.up(torch.ones(2, 2, K))), "not come from the model's inputs"),
        (lambda: Model(lambda block, x: x + block.up(x.mean(0))), "a sum over several sequences"),
        (TimeFirstInside, "as if the sequences were one"),
    ],
    ids="sorted,experts,mask,other order,one sequence,a table,the same twice,mean,attention over the batch".split(","),
)
def test_a_layer_whose_rows_are_not_known_is_refused_by_name(kind, model, why):
    at = Door(kind, model())
    x = torch.randn(2, 2, K)  # as many of each as could be mistaken for the other
    for _ in range(2):
        with (
            pytest.raises(ValueError, match=f"batch: '.*' got an input .*{why}"),
            at.batch(["a", "b"]),
            torch.no_grad(),
        ):
            at.model(x)
    out = at.model(x)  # nothing is left of it
    assert not torch.utils._python_dispatch._get_current_dispatch_mode() and out.shape == x.shape


@door
def test_experts_never_answer_under_anothers_adapter(kind):
    at = Door(kind, Experts(), layers=["experts"])
    for seed in range(30):
        x = torch.randn(2, 1 + seed % 4, K, generator=torch.Generator().manual_seed(shifted(seed)))
        with at.batch(["a", "b"]), torch.no_grad(), pytest.raises(ValueError, match="experts"):
            at.model(x)


@door
def test_any_rows_may_come_where_all_entries_are_the_same(kind):
    at = Door(kind, Experts())
    at.check(["b", "b", "b"], torch.randn(3, 5, K))


@door
def test_an_expert_without_an_adapter_is_no_obstacle(kind):
    Door(kind, Experts(), layers=["gate"]).check(["a", None, "b"], torch.randn(3, 2, K))


@door
def test_another_dimension_may_hold_the_sequences(kind):
    at = Door(kind, TimeFirst())
    for T in (2, 5, 3):
        at.check(["a", "b"], torch.randn(T, 2, K), dim=1)
    with pytest.raises(ValueError, match="dim: expected"), at.batch(["a"], dim=-1):
        pass


@door
def test_the_order_of_keywords_does_not_matter(kind):
    at = Door(kind, Model())
    x, scale, positions = torch.randn(2, 4, K), torch.rand(1, 4, 1), torch.arange(4)[None]
    results = []
    for kw in (dict(x=x, scale=scale, position_ids=positions), dict(position_ids=positions, scale=scale, x=x)):
        with at.batch(["a", "b"]), torch.no_grad():
            results.append(at.model(**kw))
    assert torch.equal(*results)
    at.check(["a", "b"], x, scale=scale, position_ids=positions)


@door
def test_a_module_of_the_model_may_be_called_by_itself(kind):
    at = Door(kind, Model(blocks=2))
    x = torch.randn(6, 4, K)
    with at.batch(["a", "b"]), torch.no_grad():
        at.model(x[:2])
        whole, inner, layer = at.model(x), at.model.inner(x), at.model.layers[1].up(x)
        with pytest.raises(ValueError, match="2 entries for a model batch of 3"):
            at.model.inner(x[:3])
        with pytest.raises(ValueError, match="'layers.0' was called by itself"):
            at.model.layers[0](x)  # nobody knows whether it takes [B, T, K] or [T, B, K]
    for i, name in enumerate("aaabbb"):
        alone = at.alone(name)
        for got, want in (
            (whole, alone(x)),
            (inner, alone.inner(x)),
            (layer, alone.layers[1].up(x)),
        ):
            assert (got[i] - want[i]).abs().max() <= 1e-4 * want.abs().max()


@door
def test_what_is_known_is_not_followed_again(kind, follows):
    at = Door(kind, Model(lambda block, x: block(x) + block.up(x.reshape(-1, K)).view(x.shape), blocks=2))
    for T, calls in ((5, 1), (5, 1), (7, 2), (9, 2), (4, 2)):  # two sizes, then all
        for B in (2, 4):
            at.check(["a", "b"] * (B // 2), torch.randn(B, T, K))
        assert len(follows) == calls
    at.check(["a", "b"], torch.randn(2, 1, K))  # one token: a kind of its own
    assert len(follows) == 3
    at.check(["a", "a"], torch.randn(2, 6, K))
    assert len(follows) == 3


@door
def test_an_order_that_python_chose_is_followed_each_time(kind, follows):
    def by_value(block, x):
        order = x[:, 0, 0].argsort().tolist()
        out = block(torch.stack([x[i] for i in order]))
        return torch.stack([out[order.index(i)] for i in range(len(x))])

    at = Door(kind, Model(by_value))
    x = torch.randn(3, 4, K)
    x[:, 0, 0] = torch.arange(3.0)  # in order by chance
    at.check(["a", "b", None], x)
    at.check(["a", "b", None], x)
    assert len(follows) == 2
    with at.batch(["a", "b", None]), torch.no_grad(), pytest.raises(ValueError, match="in another order"):
        at.model(x.flip(0))


@door
@torch.no_grad()
def test_pictures_are_of_the_sequence_that_they_are_put_into(kind, follows):
    """As many as sequences, but perhaps two of one sequence and none of another: their places tell."""
    pictures, names = torch.randn(3, 2, K), ["a", "b", None]
    even, uneven = torch.tensor([[0, 5], [6, 0], [0, 7]]), torch.tensor([[0, 0], [6, 7], [0, 5]])

    def check(at, tokens):
        with at.batch(names):
            out = at.model(tokens, pictures)
        for i, name in enumerate(names):
            assert_close(out[i], at.alone(name)(tokens, pictures)[i], terms=100)

    at = Door(kind, Pictures())
    for _ in range(2):
        check(at, even)
        with at.batch(names), pytest.raises(ValueError, match="'tower.q' and layers after it .* of other sequences"):
            at.model(uneven, pictures)
    assert len(follows) == 4
    check(Door(kind, Pictures(), ["language"]), uneven)


@door
def test_a_layer_that_was_not_called_before_is_followed_in_the_next_call(kind):
    def sometimes(block, x):
        return block.up(x) if x.sum() > 0 else block.q(x)

    at = Door(kind, Model(sometimes))
    x = torch.ones(2, 4, K)
    at.check(["a", "b"], x)
    with at.batch(["a", "b"]), torch.no_grad():
        with pytest.raises(ValueError, match="the next one is followed again"):
            at.model(-x)
    at.check(["a", "b"], -x)
    at.check(["a", "b"], x)


@door
def test_threads_follow_their_own_calls(kind):
    from concurrent.futures import ThreadPoolExecutor

    at = Door(kind, Model(blocks=2))

    def one(T):
        x = torch.randn(2, T, K)
        if kind == "store":
            at.check(["a", "b"], x)
            return True
        with torch.no_grad():
            return at.model(x), x

    if kind == "store":
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(one, range(2, 14)))
        return
    with at.batch(["a", "b"]), ThreadPoolExecutor(4) as pool:
        results = list(pool.map(one, range(2, 14)))
    for out, x in results:
        for i, name in enumerate("ab"):
            want = at.alone(name)(x)[i]
            assert (out[i] - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    "shape, rows, dim",
    [((1, K), 1, 0), ((1, 1, K), 1, 1), ((1, 1), 1, 1), ((5, 1, K), 5, 0), ((1, 5, K), 5, 1), ((1, K), 5, None)],
    ids=str,
)
def test_the_dimension_of_packed_rows(shape, rows, dim):
    """Of one row, too, whose features are the first dimension that is not 1."""
    assert finder.Entries(rows, packed=True).marks(nn.Identity(), [("x", torch.zeros(shape))]) == (rows, [dim])


def test_packed_rows_are_followed_too():
    at = Door("store", Model(lambda block, x: block.up(x)))
    x = torch.randn(1, 5, K)
    with at.store.batch_rows(["a", "b"], [2, 3]):
        out = at.model(x)
    assert_close(out[:, :2], at.alone("a")(x)[:, :2], terms=200)
    assert_close(out[:, 2:], at.alone("b")(x)[:, 2:], terms=200)
    at = Door("store", Model(lambda block, x: block.up(x[:, x[0, :, 0].argsort()])))
    with at.store.batch_rows(["a", "b"], [2, 3]), pytest.raises(ValueError, match="rows picked by their numbers"):
        at.model(x)


def interrupted(module, args):
    raise KeyboardInterrupt


@door
def test_a_call_that_an_interrupt_broke_off_is_followed_no_longer(kind):
    """torch calls no hook after an interrupt. The next call in the batch is one of the model again."""
    at, x, names = Door(kind, Model()), torch.randn(3, 4, K), ["a", None, "b"]
    with torch.no_grad(), at.batch(names):
        hook = at.model.layers[0].up.register_forward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            at.model(x)
        hook.remove()
        out = at.model(x)
        assert not torch._C._len_torch_dispatch_stack()
        for i, name in enumerate(names):
            assert_close(out[i], at.alone(name)(x[i : i + 1])[0], terms=1000)


@door
def test_an_interrupt_that_ends_a_batch_ends_its_mode(kind):
    at, x, names = Door(kind, Model()), torch.randn(3, 4, K), ["a", None, "b"]
    hook = at.model.layers[0].up.register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), at.batch(names):
        at.model(x)
    assert not torch._C._len_torch_dispatch_stack()
    hook.remove()
    at.check(names, x)


@door
def test_an_interrupt_at_the_start_of_a_call_leaves_no_mode(kind, monkeypatch):
    """torch has the mode by then, and the batch not yet the call that would end it."""

    class Interrupts(type):
        def __instancecheck__(cls, instance):
            raise KeyboardInterrupt

    at, x, names = Door(kind, Model()), torch.randn(3, 4, K), ["a", None, "b"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), torch.no_grad(), at.batch(names):
        patch.setattr(trace, "deque", Interrupts("deque", (), {}))
        at.model(x)
    assert not torch._C._len_torch_dispatch_stack()
    at.check(names, x)
