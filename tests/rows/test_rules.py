"""What the rules say of an operator's result, compared with what happens when one sequence's input is changed."""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fused_lora.rows.rules import Applied, rows_after
from fused_lora.rows.state import Owned, Unknown
from fused_lora.rows.trace import RowTrace
from helpers.seeds import shifted
from helpers.waiting import HANG

B, T, C = 3, 4, 6
W = torch.randn(C, C, generator=torch.Generator().manual_seed(shifted(1)))
TABLE = torch.randn(9, C, generator=torch.Generator().manual_seed(shifted(2)))


def heads(x):
    return x.view(B, T, 2, C // 2).transpose(1, 2)


def into(x, write):
    out = torch.zeros(B, T, C)
    write(out, x)
    return out


# name: (operation on x [B, T, C], the owned dimension that must be found; None: it must be Unknown)
OPERATIONS = {
    "linear": (lambda x: F.linear(x, W, W[0]), 0),
    "matmul": (lambda x: x @ W, 0),
    "flat rows": (lambda x: x.reshape(-1, C) @ W, 0),
    "sequence first": (lambda x: F.linear(x.transpose(0, 1), W), 1),
    "sequence first, flat": (lambda x: F.linear(x.transpose(0, 1).reshape(T * B, C), W), 0),
    "heads": (lambda x: heads(x).reshape(B * 2, T, C // 2), 0),
    "heads first": (lambda x: heads(x).transpose(0, 1).reshape(2 * B, T, C // 2), 0),
    "attention": (lambda x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), is_causal=True), 0),
    "attention by hand": (lambda x: torch.softmax(heads(x) @ heads(x).transpose(2, 3), -1) @ heads(x), 0),
    "einsum": (lambda x: torch.einsum("btc,bsc->bts", x, x), 0),
    "attention of one tensor over the batch": (
        lambda x: F.scaled_dot_product_attention(*[heads(x).transpose(0, 2)] * 3),
        None,
    ),
    "attention over the batch": (lambda x: F.scaled_dot_product_attention(*[x.transpose(0, 1)] * 3), None),
    "by hand over the batch": (lambda x: torch.softmax(x.transpose(0, 1) @ x.permute(1, 2, 0), -1), None),
    "layer norm": (lambda x: F.layer_norm(x, (C,)), 0),
    "rms norm": (lambda x: F.rms_norm(x, (C,)), 0),
    "layer norm over all": (lambda x: F.layer_norm(x, (B, T, C)), None),
    "batch norm, eval": (lambda x: F.batch_norm(x, torch.zeros(T), torch.ones(T)), 0),
    "conv1d": (lambda x: F.conv1d(x.transpose(1, 2), W[:, :, None]), 0),
    "conv1d over the batch": (lambda x: F.conv1d(x.permute(1, 2, 0), W[:, :, None]), None),
    "pool": (lambda x: F.avg_pool1d(x.transpose(1, 2), 2), 0),
    "pad": (lambda x: F.pad(x, (1, 0, 0, 2)), 0),
    "pad of the batch": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)), None),
    "upsample": (lambda x: F.interpolate(x.transpose(1, 2), scale_factor=2.0), 0),
    "mean over tokens": (lambda x: x.mean(1), 0),
    "mean over the batch": (lambda x: x.mean(0), None),
    "sum of all": (lambda x: x.sum(), None),
    "norm": (lambda x: x.norm(dim=-1, keepdim=True), 0),
    "softmax over the batch": (lambda x: x.softmax(0), None),
    "softmax": (lambda x: x.softmax(1), 0),
    "cumsum": (lambda x: x.cumsum(1), 0),
    "cumsum over the batch": (lambda x: x.cumsum(0), None),
    "sort of tokens": (lambda x: x.sort(1).values, 0),
    "sort of the batch": (lambda x: x.sort(0).values, None),
    "topk": (lambda x: x.topk(2, -1).values, 0),
    "max over tokens": (lambda x: x.max(1).values, 0),
    "glu": (lambda x: F.glu(x), 0),
    "split": (lambda x: torch.cat([part * 2 for part in x.split(2, 1)], 1), 0),
    "split of the batch": (lambda x: torch.cat([part * 2 for part in x.split([1, 2], 0)], 0), 0),
    "reversed parts": (lambda x: torch.cat(list(x.split(1, 0))[::-1]), 0),
    "stack of sequences": (lambda x: torch.stack([x[2], x[0], x[1]]), 0),
    "stack over tokens": (lambda x: torch.stack([x[:, t] for t in range(T)], 1), 0),
    "flip": (lambda x: x.flip(0), 0),
    "roll": (lambda x: x.roll(1, 0), 0),
    "twice": (lambda x: torch.cat([x, x]), 0),
    "repeat": (lambda x: x.repeat(2, 1, 1), 0),
    "repeat interleave": (lambda x: x.repeat_interleave(2, 0), 0),
    "part of the batch": (lambda x: x[1:], 0),
    "every second": (lambda x: x[::2], 0),
    "one token": (lambda x: x[:, -1], 0),
    "unfold": (lambda x: x.unfold(1, 2, 1), 0),
    "as strided": (lambda x: x.contiguous().as_strided((C, B, T), (1, T * C, C)), 1),
    "expand": (lambda x: x[:, :, None].expand(B, T, 2, C), 0),
    "picked tokens": (lambda x: x[:, torch.tensor([2, 0])], 0),
    "picked by arange": (lambda x: x[torch.arange(B), torch.tensor([1, 3, 0])], 0),
    "picked by arange and lists": (lambda x: x[torch.arange(B)[:, None], torch.tensor([[1, 3]] * B)], 0),
    "picked by numbers": (lambda x: x[torch.tensor([1, 0, 2])], None),
    "picked by values": (lambda x: x.view(-1, C)[x.view(-1, C).argmax(-1) > 2], None),
    "sorted rows": (lambda x: x.view(-1, C)[x.view(-1, C)[:, 0].argsort()], None),
    "index select": (lambda x: x.index_select(0, torch.tensor([1, 0, 2])), None),
    "index select of tokens": (lambda x: x.index_select(1, torch.tensor([1, 0])), 0),
    "gather": (lambda x: x.gather(1, torch.zeros(B, 2, C, dtype=torch.long)), 0),
    "gather over the batch": (lambda x: x.gather(0, torch.zeros(B, T, C, dtype=torch.long)), None),
    "embedding": (lambda x: F.embedding(x.argmax(-1), TABLE), 0),
    "one hot": (lambda x: F.one_hot(x.argmax(-1), C).float(), 0),
    "written to a buffer": (lambda x: into(x, lambda out, x: out.copy_(x)), 0),
    "written to a part": (lambda x: into(x[:, 1:], lambda out, x: out[:, :3].copy_(x)), 0),
    "written to places": (lambda x: into(x[:, :2], lambda out, x: out.index_copy_(1, torch.tensor([3, 1]), x)), 0),
    "written by a mask": (lambda x: into(x, lambda out, x: out.__setitem__(x > 0, x[x > 0])), None),
    "written to sorted places": (lambda x: torch.empty_like(x).index_put_((x[:, 0, 0].argsort(),), x), None),
    "added at sorted places": (lambda x: into(x, lambda out, x: out.index_add_(0, x[:, 0, 0].argsort(), x)), None),
    "in place": (lambda x: x.clone().mul_(2).add_(W[0]), 0),
    "out": (lambda x: torch.mm(x[:, 0], W, out=torch.empty(B, C)), 0),
    "where": (lambda x: torch.where(x > 0, x, TABLE[0]), 0),
    "pairs": (lambda x: x[:, None] * x[None], None),
    "pair products": (lambda x: x[:, 0] @ x[:, 0].T, None),
    "residual after a gather": (lambda x: x + x[torch.tensor([1, 0, 2])] * 0, 0),
    "times statistics": (lambda x: x * x.detach().mean().sign().abs(), 0),
    "linear of pairs": (lambda x: F.linear(x[:, 0], x[:, 1]), None),
    "linear with a bias of the batch": (lambda x: F.linear(x[:, 0], W[:B], x[:, 1, 0]), None),
    "linear over the batch": (lambda x: F.linear(x[:, 0].T, x[:, 0].T), None),
    "linear of a vector": (lambda x: F.linear(x, W[0]), 0),
    "attention of matrices": (lambda x: F.scaled_dot_product_attention(x[:, 0], W, W), 0),
    "attention of matrices over the batch": (lambda x: F.scaled_dot_product_attention(*[x[:, 0]] * 3), None),
    "cross": (lambda x: torch.cdist(x[:, 0], x[:, 0]), None),
    "lstm": (lambda x: torch.nn.LSTM(C, C, batch_first=True)(x)[0], 0),
    "gru": (lambda x: torch.nn.GRU(C, C, batch_first=True)(x)[0], 0),  # turns its result in place
    "turned in place": (lambda x: x.clone().transpose_(0, 1), 1),
    "unsqueezed in place": (lambda x: x.clone().unsqueeze_(0), 1),
    "a view turned in place": (lambda x: x.view(B, T, C).transpose_(0, 1), None),
    "times a vector": (lambda x: x @ W[0], 0),
    "hardswish": (lambda x: F.hardswish(x), 0),
    "log sigmoid": (lambda x: F.logsigmoid(x), 0),
    "parametric relu": (lambda x: F.prelu(x, W[0, :1]), 0),
    "rotated": (lambda x: torch.rot90(x, 1, (1, 2)), 0),
    "fourier": (lambda x: torch.fft.fft2(x).real + torch.fft.irfft(torch.fft.rfft(x), n=C), 0),
    "fourier over the batch": (lambda x: torch.fft.fft(x, dim=0).real, None),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.view(B, T, 3, 2)) * 1j).flatten(2), 0),
    "folded": (lambda x: F.fold(F.unfold(x[:, None], 2), (T, C), 2), 0),
    "sampled": (lambda x: F.grid_sample(x[:, None], x[:, :2, None, :2].tanh(), align_corners=False), 0),
    "sampled over the batch": (lambda x: F.grid_sample(x.mT[None], W[None, :2, None, :2], align_corners=False), None),
}


def followed(operation, x):
    trace = RowTrace(packed=False)
    trace.mark(x, Owned(0, torch.arange(B).numpy()))
    with torch.no_grad(), trace:
        out = operation(x)
    return out, trace.state(out)


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def without_gradients(request):
    """Inference mode dispatches operators whole that no_grad takes apart before."""
    with request.param():
        yield


@pytest.mark.usefixtures("without_gradients")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_sequences_values_are_where_the_rules_say(name):
    operation, dim = OPERATIONS[name]
    torch.manual_seed(shifted(3))
    x = torch.randn(B, T, C)
    generator = torch.random.get_rng_state()
    out, state = followed(operation, x)
    if dim is None:
        assert isinstance(state, Unknown), state
        return
    assert isinstance(state, Owned) and state.dim == dim and len(state.owners) == out.shape[dim], state
    changes = ("times statistics", "residual after a gather")
    for b in range(B):
        other = x.clone()
        other[b] = torch.randn(T, C)
        torch.random.set_rng_state(generator)  # a layer that is drawn anew is drawn the same
        moved = (operation(x if name in changes else other) != out).movedim(dim, 0).reshape(len(state.owners), -1)
        torch.random.set_rng_state(generator)
        assert not moved.any(-1)[torch.from_numpy(state.owners != b)].any()


def heads_of_8(x):
    return torch.cat([x, x[..., :2]], -1).view(B, T, 2, 4).transpose(1, 2)


def cudnn(x, batch_first):
    state, weights = torch.zeros(1, x.shape[not batch_first], C, device="meta"), [W.to("meta")] * 4
    rest = None, state, state, 2, C, 0, 1, batch_first, 0.0, False, False, [], None
    return torch.ops.aten._cudnn_rnn(x, weights, 4, *rest)


aten = torch.ops.aten
# what a GPU runs in place of a CPU's operators: the owned dimension of each result; None: it must be Unknown
ON_A_GPU = {
    "cudnn": (lambda x: cudnn(x, True)[:3], [0, 1, 1]),
    "cudnn, time first": (lambda x: cudnn(x.transpose(0, 1), False)[:3], [1, 1, 1]),
    "cudnn over the batch": (lambda x: cudnn(x, False)[:1], [None]),
    "cudnn over the batch, turned": (lambda x: cudnn(x.transpose(0, 1), True)[:1], [None]),
    "cudnn of one sequence": (lambda x: [torch.stack([cudnn(x[b : b + 1], True)[0][0] for b in range(B)])], [0]),
    "flash": (lambda x: aten._scaled_dot_product_flash_attention(*[heads_of_8(x)] * 3)[:1], [0]),
    "efficient": (lambda x: aten._scaled_dot_product_efficient_attention(*[heads_of_8(x)] * 3, None, False)[:1], [0]),
    "attention of cudnn": (
        lambda x: aten._scaled_dot_product_cudnn_attention(*[heads_of_8(x)] * 3, None, False)[:1],
        [0],
    ),
    "flash over the batch": (
        lambda x: aten._scaled_dot_product_flash_attention(*[heads_of_8(x).transpose(0, 2)] * 3)[:1],
        [None],
    ),
}
if "normalized_shape" in {argument.name for argument in aten._fused_rms_norm.default._schema.arguments}:
    # under torch 2.8 it is Apple's alone, and takes other arguments
    ON_A_GPU["rms norm"] = lambda x: aten._fused_rms_norm(x, [C], None, 1e-6)[:1], [0]


@pytest.mark.parametrize("name", ON_A_GPU)
def test_operators_of_a_gpu(name):
    """No number is computed: a CPU has no kernels for them."""
    operation, dims = ON_A_GPU[name]
    trace = RowTrace(packed=False)
    x = torch.empty(B, T, C, device="meta")
    trace.mark(x, Owned(0, np.arange(B)))
    with torch.no_grad(), trace:
        results = operation(x)
    for result, dim in zip(results, dims, strict=True):
        state = trace.state(result)
        if dim is None:
            assert isinstance(state, Unknown) and state.mixed, state
        else:
            assert isinstance(state, Owned) and state.dim == dim, state
            assert state.owners.tolist() == [*range(B)] and result.shape[dim] == B


@pytest.mark.parametrize("cell, count", [(aten._thnn_fused_lstm_cell, 4), (aten._thnn_fused_gru_cell, 3)])
@pytest.mark.parametrize("other", [None, [2, 1, 0]])
def test_cells_of_a_gpu(cell, count, other):
    """Gates of the inputs and of the state, which may be of other sequences; the results are given."""
    sides = [torch.empty(B, count * C), torch.empty(B, count * C), torch.empty(B, C)]
    owners = [np.arange(B), np.arange(B), np.arange(B) if other is None else np.array(other)]
    states = {id(t): Owned(0, of) for t, of in zip(sides, owners, strict=True)}
    out = torch.empty(B, C), torch.empty(B, count * C)
    call = Applied(cell.default, sides, {}, out, lambda t: states.get(id(t)), packed=False)
    for state in rows_after(call):
        if other is None:
            assert isinstance(state, Owned) and state.dim == 0 and state.owners.tolist() == [*range(B)]
        else:
            assert isinstance(state, Unknown) and state.mixed


def test_a_view_without_elements_tells_nothing():
    _, state = followed(lambda x: x.reshape(-1, C).view(B, 0, C), torch.randn(B, 0, C))
    assert isinstance(state, Unknown)


def test_what_is_not_made_of_the_inputs_is_a_constant():
    _, state = followed(lambda x: F.linear(torch.ones(B, C), W), torch.randn(B, T, C))
    assert state is None


@pytest.mark.parametrize("over", [lambda x: torch.empty_like(x), lambda x: x.clone()])
def test_what_is_written_over_a_buffer_decides_for_it(over):
    def sort(x):
        out = over(x)
        return out.copy_(x[x[:, 0, 0].argsort()])

    assert isinstance(followed(sort, torch.randn(B, T, C))[1], Unknown)


def test_a_view_follows_its_base():
    def write(x):
        base = torch.zeros(B, T, C)
        view = base.view(B * T, C)
        base.copy_(x)
        return view

    state = followed(write, torch.randn(B, T, C))[1]
    assert isinstance(state, Owned) and state.owners.tolist() == [0] * T + [1] * T + [2] * T


def test_an_unknown_operator_is_not_trusted():
    @torch.library.custom_op("fused_lora_tests::shuffle", mutates_args=())
    def shuffle(x: torch.Tensor) -> torch.Tensor:
        return x.flip(0)

    state = followed(shuffle, torch.randn(B, T, C))[1]
    assert isinstance(state, Unknown) and "fused_lora_tests::shuffle" in state.reason


PLACES = torch.zeros(B, T, dtype=torch.bool)
PLACES[0, 1], PLACES[1, 2], PLACES[2, 0] = True, True, True
WRITES = {
    "masked scatter": lambda x, parts: x.masked_scatter(PLACES[..., None], parts),
    "by a mask": lambda x, parts: x.clone().index_put_((PLACES,), parts),
    "by numbers": lambda x, parts: x.clone().index_put_(PLACES.nonzero(as_tuple=True), parts),
    "in a loop": lambda x, parts: into(x, lambda out, x: (out.copy_(x), [out[i, 1].copy_(parts[i]) for i in range(B)])),
}


@pytest.mark.parametrize("write", WRITES)
def test_rows_that_are_written_among_those_of_other_sequences_are_noticed(write):
    x = torch.randn(B, T, C)
    for flips in (False, True):
        trace, misplaced = RowTrace(packed=False), []
        trace.misplaced = functools.partial(misplaced.append, 1)
        trace.mark(x, Owned(0, torch.arange(B).numpy()))
        with trace:
            out = WRITES[write](x, x[:, 0].flip(0) if flips else x[:, 0] * 2)
        state = trace.state(out)
        assert isinstance(state, Owned) and state.dim == 0 and state.owners.tolist() == [0, 1, 2]
        assert bool(misplaced) == flips and (state.assembled or write == "in a loop")


def test_nothing_of_a_followed_call_stays_alive():
    import gc
    import weakref

    gc.disable()
    try:
        seen = []

        def operation(x):
            y = x.view(B * T, C).split(2)[0].t() * 1
            seen.append(weakref.ref(y))
            return x * 1

        followed(operation, torch.randn(B, T, C))
        assert seen[0]() is None
    finally:
        gc.enable()


def test_two_threads_may_follow_one_tensor():
    x = torch.randn(3, 4)
    first, second = RowTrace(packed=False), RowTrace(packed=False)
    first.mark(x, Owned(0, np.arange(3)))
    second.mark(x, Owned(1, np.arange(4)))
    assert first.state(x).dim == 0 and second.state(x).dim == 1
    first.forget()
    assert first.state(x) is None and second.state(x).dim == 1
    second.forget()
    assert not vars(x)


@pytest.mark.parametrize("last", ["first", "second"])
def test_traces_of_two_threads_leave_no_mode_in_torchs_globals(last):
    """Dynamo of torch 2.8 compiles nothing while they say that there is one."""
    traces = {name: RowTrace(packed=False) for name in ("first", "second")}
    with contextlib.ExitStack() as stack:
        threads = {name: stack.enter_context(ThreadPoolExecutor(1)) for name in traces}
        for name, trace in traces.items():
            threads[name].submit(trace.__enter__).result(HANG)
        for name in sorted(traces, key=lambda name: name == last):
            threads[name].submit(traces[name].__exit__, None, None, None).result(HANG)
    assert not is_in_torch_dispatch_mode() and not is_in_torch_dispatch_mode(include_infra_modes=False)
    with traces["first"]:
        with traces["second"]:
            assert is_in_torch_dispatch_mode(include_infra_modes=False)
        assert is_in_torch_dispatch_mode(include_infra_modes=False)
    assert not is_in_torch_dispatch_mode()
