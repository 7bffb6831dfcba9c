"""The store on top of the grouped kernels: the tables follow loads and evictions, the answers are those without."""

import numpy as np
import pytest
import torch
from torch import nn

from fused_lora.kernels import grouped_expand, grouped_shrink
from fused_lora.ops import guard
from fused_lora.ops.grouped.op import RowLayout, Terms, lora_grouped_
from fused_lora.reference import bits
from fused_lora.serving import AdapterStore
from fused_lora.serving.batch.batch import Batch
from fused_lora.testing.numeric import assert_close
from helpers.seeds import shifted

K, N = 48, 40


@pytest.fixture
def through_kernels(kernels_on, monkeypatch):
    """The launches as (rows, tiles)."""
    launches, launch = [], grouped_shrink.grouped_shrink

    def counted(x, tables, groups):
        launches.append((len(x), int(groups.num_tiles)))
        return launch(x, tables, groups)

    monkeypatch.setattr(grouped_shrink, "grouped_shrink", counted)
    return launches


def adapter(r, seed):
    draw = torch.Generator().manual_seed(shifted(seed))
    return {"0": (torch.randn(r, K, generator=draw), torch.randn(N, r, generator=draw), 0.5)}


def model_on(device):
    return nn.Sequential(nn.Linear(K, N)).to(device).eval()


def wanted(model, x, members):
    out = x.double() @ model[0].weight.double().T + model[0].bias.double()
    for tensors, weight in members:
        A, B, scale = (t.to(x.device).double() if isinstance(t, torch.Tensor) else t for t in tensors["0"])
        out = out + weight * scale * (x.double() @ A.T) @ B.T
    return out


@torch.no_grad()
def test_batches_run_through_the_kernels(device, through_kernels):
    model = model_on(device)
    store = AdapterStore(model)
    sql, poet = adapter(4, 1), adapter(19, 2)
    store.load("sql", sql)
    store.load("poet", poet)
    x = torch.randn(5, 3, K, device=device)
    base = model(x)
    with store.batch(["sql", None, "poet", {"sql": 0.5, "poet": -2}, "sql"]):
        out = model(x)
        again = model(x[:, :1])
    members = [[(sql, 1)], [], [(poet, 1)], [(sql, 0.5), (poet, -2)], [(sql, 1)]]
    for i, m in enumerate(members):
        assert_close(out[i], wanted(model, x[i], m).float(), terms=300)
        assert_close(again[i], wanted(model, x[i, :1], m).float(), terms=300)
    assert torch.equal(bits(out[1]), bits(base[1]))
    assert through_kernels[-2:] == [(15, 3), (5, 3)]


@torch.no_grad()
def test_a_default_device_is_none_of_the_hosts_buffers(device, through_kernels):
    model, x = model_on(device), torch.randn(2, 3, K, device=device)
    store, first, second = AdapterStore(model), adapter(4, 1), adapter(4, 2)
    store.load("first", first)
    with store.batch(["first", None]):
        model(x)  # the trial
    with torch.device("meta"):
        store.load("second", second)
        with store.batch(["second", None]):
            out = model(x)
    assert_close(out[0], wanted(model, x[0], [(second, 1)]).float(), terms=300)
    assert through_kernels[-1] == (6, 1)


@torch.no_grad()
def test_tables_follow_reloads_and_evictions(device, through_kernels):
    model = model_on(device)
    # both ranks take one block of 64-byte aligned parts and 256-byte aligned starts
    store = AdapterStore(model, capacity_bytes=2 * 4096, max_resident=2)
    contents = {f"a{i}": adapter(r, i) for i, r in enumerate((4, 8, 11))}
    x = torch.randn(1, 2, K, device=device)
    for name, tensors in contents.items():
        store.load(name, tensors)
    for name in ("a0", "a1", "a2", "a1", "a0"):
        with store.batch([name]):
            assert_close(model(x), wanted(model, x, [(contents[name], 1)]).float(), terms=300)
    contents["a0"] = adapter(3, 7)
    store.load("a0", contents["a0"])
    with store.batch(["a0"]):
        assert_close(model(x), wanted(model, x, [(contents["a0"], 1)]).float(), terms=300)
    assert store.stats()["evictions"] >= 3
    resident = {version.slot for version in store._residency.resident}
    ranks = store._transfer.tables.sites(0, 0).rank[0]
    assert {slot for slot in range(2) if ranks[slot]} == resident


@torch.no_grad()
def test_a_kernel_that_fails_its_check_gives_way(device, through_kernels, monkeypatch):
    model = model_on(device)
    store = AdapterStore(model)
    store.load("a", adapter(4, 1))
    x = torch.randn(2, 3, K, device=device)
    monkeypatch.setattr(grouped_expand, "grouped_expand", lambda S, outputs, tables, groups: outputs[0].add_(1))
    with store.batch(["a", None]), pytest.warns(UserWarning, match="grouped.*dropped"):
        out = model(x)
    assert_close(out[0], wanted(model, x[0], [(adapter(4, 1), 1)]).float(), terms=300)
    assert torch.equal(out[1], model(x)[1])


@torch.no_grad()
def test_a_graph_takes_adapters_from_buffers_alone(device, through_kernels, monkeypatch):
    """Rows, and the slots that they name, are others by the time of a replay."""
    model, x = model_on(device), torch.randn(2, K, device=device)
    store = AdapterStore(model)
    store.load("a", adapter(4, 1))
    buffers = store.row_buffers(max_rows=2, max_groups=1, max_rank=16)
    with store.batch_rows(["a", None], [1, 1], buffers):
        model(x)
        monkeypatch.setattr(guard, "capturing", lambda device: True)
        through_kernels.clear()
        model(x)
        assert through_kernels
    with pytest.raises(RuntimeError, match="before the capture"), store.batch_rows(["a"], [1], buffers):
        pass
    monkeypatch.setattr(guard, "capturing", lambda device: False)
    with store.batch(["a", None]):
        model(x)  # its rows are on the device
        monkeypatch.setattr(guard, "capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="graph would keep"):
            model(x)
        monkeypatch.setattr(guard, "capturing", lambda device: False)
    assert store.stats()["in_use"] == 0


@torch.no_grad()
def test_a_store_that_was_made_in_inference_mode(device, through_kernels):
    model, x = model_on(device), torch.randn(2, K, device=device)
    with torch.inference_mode():
        store = AdapterStore(model, max_resident=1)
        buffers = store.row_buffers(max_rows=2, max_groups=1, max_rank=16)
    for name, r in (("a", 4), ("b", 8)):
        store.load(name, adapter(r, r))
        with store.batch_rows([name, None], [1, 1], buffers):
            assert_close(model(x)[0], wanted(model, x[0], [(adapter(r, r), 1)]).float(), terms=300)
    assert store.stats()["evictions"] == 1 and through_kernels


@torch.no_grad()
def test_a_call_without_rows(device, through_kernels):
    model, x = model_on(device), torch.randn(2, 3, K, device=device)
    store = AdapterStore(model)
    store.load("a", adapter(4, 1))
    with store.batch(["a", None]):
        model(x)
        assert model(x[:, :0]).shape == (2, 0, N)


@torch.no_grad()
def test_the_default_dtype_is_none_of_the_trials(device, through_kernels, monkeypatch):
    """A scaling in float64 does not compile where a group has several adapters."""
    dtypes, expand = set(), grouped_expand.grouped_expand

    def seen(S, outputs, tables, groups):
        dtypes.add(tables.scaling.dtype)
        expand(S, outputs, tables, groups)

    monkeypatch.setattr(grouped_expand, "grouped_expand", seen)
    model, x = model_on(device), torch.randn(2, 3, K, device=device)
    store = AdapterStore(model)
    store.load("a", adapter(4, 1))
    torch.set_default_dtype(torch.float64)
    try:
        with store.batch(["a", None]):
            model(x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes == {torch.float32}


@torch.no_grad()
def test_dtypes_without_a_kernel_take_the_eager_path(device, through_kernels):
    model = model_on(device).double()
    store = AdapterStore(model)
    store.load("a", adapter(4, 1))
    x = torch.randn(1, 3, K, device=device, dtype=torch.float64)
    with store.batch(["a"]):
        assert_close(model(x), wanted(model, x, [(adapter(4, 1), 1)]), terms=300)
    assert not through_kernels


@torch.no_grad()
def test_one_buffer_describes_step_after_step(device, through_kernels):
    """What a captured graph would read: tables that never move; more groups, fewer, none, and evictions between."""
    model = model_on(device)
    store = AdapterStore(model, capacity_bytes=3 * 4096, max_resident=3)
    contents = {f"a{i}": adapter(r, i) for i, r in enumerate((4, 8, 11, 3))}
    for name, tensors in contents.items():
        store.load(name, tensors)
    buffers = store.row_buffers(max_rows=6, max_groups=3, max_rank=16, group_size=2)
    address, x = buffers.groups.order.data_ptr(), torch.randn(6, K, device=device)
    with store.batch_rows(["a0"], [1], buffers):
        model(x)
    through_kernels.clear()
    steps = [["a0", "a1", "a2"], [None, "a3"], [None] * 6, ["a2", {"a1": 0.5, "a2": 2}], ["a1"] * 6, ["a3", None, "a0"]]
    for names in steps:
        with store.batch_rows(names, [1] * len(names), buffers):
            out = model(x)
        for i, entry in enumerate([*names, *[None] * (6 - len(names))]):
            weights = {} if entry is None else entry if isinstance(entry, dict) else {entry: 1}
            members = [(contents[name], w) for name, w in weights.items()]
            assert_close(out[i], wanted(model, x[i], members).float(), terms=300)
    assert len(through_kernels) == len(steps)  # a step of base rows launches too: the graph of it serves any other
    assert buffers.groups.order.data_ptr() == address
    with pytest.raises(ValueError, match="rank 17.*16 at most"):
        store.load("wide", adapter(17, 1))
    with pytest.raises(ValueError, match="the buffers hold 6"), store.batch_rows(["a0"], [7], buffers):
        pass
    with (
        pytest.raises(ValueError, match="holds 3"),
        store.batch_rows(["a0", "a1", {"a0": 2.0}, {"a1": 2.0}], [1] * 4, buffers),
    ):
        pass
    with pytest.raises(ValueError, match="largest rank loaded"):
        store.row_buffers(6, 3, max_rank=4)
    wider = store.row_buffers(6, 3, max_rank=32)
    store.load("wide", adapter(17, 1))
    with pytest.raises(ValueError, match="rank 17, the buffers are made for 16"):  # its graphs have no room for it
        store.batch_rows(["wide"], [1], buffers).__enter__()
    with store.batch_rows(["wide"], [1], wider):
        assert_close(model(x)[0], wanted(model, x[0], [(adapter(17, 1), 1)]).float(), terms=300)
    assert store.stats()["in_use"] == 0


@torch.no_grad()
def test_buffers_have_the_rows_of_one_batch(device, through_kernels, monkeypatch):
    """A second one, of a thread say, filled in other rows and adapters while the first ran, or its streams did."""
    model, x = model_on(device), torch.randn(2, K, device=device)
    store = AdapterStore(model)
    store.load("a", adapter(4, 1))
    buffers = store.row_buffers(max_rows=2, max_groups=1, max_rank=16)
    join, held = Batch._join_streams, []
    monkeypatch.setattr(Batch, "_join_streams", lambda self: (held.append(buffers.free.locked()), join(self)))
    for _ in range(2):
        with store.batch_rows(["a", None], [1, 1], buffers):
            with pytest.raises(RuntimeError, match="buffers: a batch that has not ended uses them"):
                store.batch_rows([None, "a"], [1, 1], buffers).__enter__()
            assert_close(model(x)[0], wanted(model, x[0], [(adapter(4, 1), 1)]).float(), terms=300)
        assert all(held) and held and not buffers.free.locked()


@torch.no_grad()
def test_buffers_are_those_of_one_store(device, through_kernels):
    mine, other = AdapterStore(model_on(device)), AdapterStore(model_on(device))
    with pytest.raises(ValueError, match="another store"):
        mine.batch_rows([None], [1], other.row_buffers(1, 1, 1))


def test_row_buffers_are_for_the_kernels():
    store = AdapterStore(model_on("cpu"))
    with pytest.raises(RuntimeError, match="kernels do not run on cpu"):
        store.row_buffers(8, 2, 16)


@pytest.mark.gpu
@torch.no_grad()
def test_a_cold_adapter_arrives_while_the_step_runs(tmp_path):
    """Loaded, evicted and reloaded on the side stream again and again: every answer is the adapter's own."""
    device = torch.device("cuda")
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).to(device).eval()
    contents = {}
    for i in range(6):
        draw = torch.Generator().manual_seed(shifted(i))
        contents[f"a{i}"] = {
            str(n): (torch.randn(16, 1024, generator=draw), torch.randn(1024, 16, generator=draw) / 32, 0.5)
            for n in range(8)
        }
    size = 8 * 2 * 16 * 1024 * 4
    store = AdapterStore(model, capacity_bytes=2 * size + 4096)
    x = torch.randn(64, 1024, device=device)
    alone = {}
    for name, tensors in contents.items():
        store.load(name, tensors)
        with store.batch([name]):
            alone[name] = model(x)
    order = np.random.default_rng(shifted(0)).choice(list(contents), 100)
    outs = []
    for name in order:
        with store.batch([name]):
            outs.append(model(x))
    torch.cuda.synchronize()
    assert all(torch.equal(out, alone[name]) for out, name in zip(outs, order, strict=True))
    assert store.stats()["misses"] > 20


@pytest.mark.gpu
@torch.no_grad()
def test_the_eager_path_on_a_gpu():
    device = torch.device("cuda")
    x, y = torch.randn(50, K, device=device), torch.randn(50, N, device=device)
    rows = np.arange(50) % 3 - 1
    A, B = torch.randn(8, K, device=device), torch.randn(8, N, device=device)
    out = lora_grouped_(y.clone(), x, RowLayout(rows, device), Terms({0: [(A.t(), B, 0.5)], 1: [(A.t(), B, 1.5)]}))
    term = x.double() @ A.double().T @ B.double()
    want = y.double() + term * torch.tensor([0.0, 0.5, 1.5], device=device).double()[rows + 1][:, None]
    assert_close(out, want.float(), terms=300)


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_replays_any_mix():
    device = torch.device("cuda")
    model = model_on(device)
    store = AdapterStore(model)
    contents = {f"a{i}": adapter(r, i) for i, r in enumerate((4, 16, 11))}
    for name, tensors in contents.items():
        store.load(name, tensors)
    buffers = store.row_buffers(max_rows=8, max_groups=3, max_rank=16)
    x, graph = torch.randn(8, K, device=device), torch.cuda.CUDAGraph()
    with store.batch_rows([None], [1], buffers):
        model(x)  # the kernels' first use
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = model(x)
    for names in (["a0"] * 8, ["a0", None, "a1", "a2"], [None] * 3, ["a2", "a2", "a1"]):
        with store.batch_rows(names, [1] * len(names), buffers):
            graph.replay()
        for i, name in enumerate([*names, *[None] * (8 - len(names))]):
            members = [] if name is None else [(contents[name], 1)]
            assert_close(out[i], wanted(model, x[i], members).float(), terms=300)
