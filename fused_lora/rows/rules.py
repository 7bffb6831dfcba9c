"""What each of torch's operators does to the rows of its operands.

A rule takes (operator call) and returns the states of its results. An operator without a rule gives Unknown results, so
that a layer behind it is refused, not served wrongly. Rules go by the operator's name without a trailing underscore.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from fused_lora.rows.state import Owned, State, Unknown, along, broadcast, meet, reshaped

RULES: dict[str, Callable[[Any], Any]] = {}
# index movement whose result is found by moving the owners themselves
_MOVES = (
    "alias as_strided detach diagonal expand flip movedim narrow permute repeat roll rot90 select slice split "
    "split_with_sizes squeeze swapaxes t transpose unbind unfold unsafe_split unsqueeze chunk lift_fresh "
    "unsafe_chunk unsafe_split_with_sizes"
)
_RESHAPES = "view _unsafe_view reshape _reshape_alias flatten unflatten view_copy _reshape_copy"
_ALONG = {  # elementwise but for one dimension, along which they combine: its position and default
    "_softmax": 1, "softmax": 1, "_log_softmax": 1, "log_softmax": 1, "cumsum": 1, "cumprod": 1, "logcumsumexp": 1,
    "cummax": 1, "cummin": 1, "glu": 1, "_safe_softmax": 1,
}  # fmt: skip
_SELECTS = {"sort": 1, "argsort": 1, "topk": 2, "kthvalue": 2}  # they keep the other dimensions, not this one
_REDUCES = (
    "sum mean amax amin any all prod var std logsumexp argmax argmin max min norm linalg_vector_norm var_mean std_mean "
    "count_nonzero median nansum nanmean aminmax"
)
_ELEMENTWISE = (
    "_to_copy clone contiguous masked_fill fill zero where bucketize isin floor_divide tril triu dropout bernoulli "
    "native_dropout nan_to_num prelu _prelu_kernel threshold to rrelu_with_noise hardswish log_sigmoid_forward"
)
_TEMPLATES = (
    "zeros_like ones_like full_like empty_like rand_like randn_like randint_like "
    "new_zeros new_ones new_full new_empty new_empty_strided"
)
_ATTENTION = re.compile("attention|attn|flash")
_IMAGES = re.compile(
    "(^|_)conv(olution|_|[0-9]|$)|pool[0-9]|upsample|(^|_)pad(_nd|[0-9]|$)|(pixel|channel)_(un)?shuffle|im2col|col2im"
)
_LIBRARIES = re.compile("norm|rotary|rope")  # of kernels outside torch: the first operand's rows stay where they are
_SUMMED = "values of different sequences are summed, as if the sequences were one"


class Applied:
    """One call of an operator with the states of its operands.

    name: without a trailing underscore. args: all arguments in the schema's order. further: after the first, as given.
    misplaced: to be called where a row is written to a place of another sequence.
    """

    args: list[Any]

    def __init__(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict,
        out: Any,
        state: Callable[[Tensor], State],
        packed: bool,
        known_range: Callable[[Tensor], int | None] = lambda t: None,
        misplaced: Callable[[], None] = lambda: None,
    ):
        self.func, self.out, self.state, self.packed, self.known_range = func, out, state, packed, known_range
        self.misplaced = misplaced
        self.name = func._schema.name.partition("::")[2].removesuffix("_")
        names = [argument.name for argument in func._schema.arguments]
        self.further = args[1:], kwargs
        self.args = [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
        self._index = {name: i for i, name in enumerate(names)}

    def get(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the schema."""
        found: Any = self.args[self._index[name]] if name in self._index else None
        return default if found is None else found

    def tensors(self) -> Iterator[Tensor]:
        """All operands, without those that are only written to."""
        for value, argument in zip(self.args, self.func._schema.arguments, strict=True):
            if argument.alias_info is not None and argument.alias_info.is_write and argument.kwarg_only:
                continue
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (list, tuple)):
                yield from (t for t in value if isinstance(t, Tensor))

    @property
    def results(self) -> list[Any]:
        """The results as a list."""
        return list(self.out) if isinstance(self.out, (list, tuple)) else [self.out]

    def meet(self, states: Sequence[State]) -> State:
        """:func:`meet` for this call. Integers of different sequences that meet are masks and counts, not rows."""
        first = self.results[0]
        return meet(states, self.packed, isinstance(first, Tensor) and first.is_floating_point())

    def unknown(self, reason: str, mixed: bool = False) -> State:
        """Unknown, if an operand has values of the inputs."""
        found = [self.state(t) for t in self.tensors()]
        poisoned = next((s for s in found if isinstance(s, Unknown) and s.mixed), None)
        return poisoned or (Unknown(reason, mixed) if any(s is not None for s in found) else None)


def rows_after(call: Applied) -> list[State]:
    """The state of each result."""
    rule = RULES.get(call.name)
    if rule is None:
        lowered = call.name.lower()
        if torch.Tag.pointwise in call.func.tags:
            rule = _pointwise
        elif _IMAGES.search(lowered):
            rule = _images
        elif _ATTENTION.search(lowered):
            rule = _attention
        elif call.func.namespace != "aten" and _LIBRARIES.search(lowered):
            rule = _like_first
        else:
            rule = _no_rule
    found = rule(call)
    return found if isinstance(found, list) else [found] * len(call.results)


def _rule(names: str) -> Callable:
    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def _no_rule(call: Applied) -> State:
    return call.unknown(f"the operator {call.func._schema.name} may put rows anywhere")


@_rule(_ELEMENTWISE)
def _pointwise(call: Applied) -> State:
    result = call.results[0]
    if not isinstance(result, Tensor):
        return call.unknown("a number made of several rows")
    return call.meet([broadcast(call.state(t), t.shape, result.shape) for t in call.tensors()])


@_rule("copy")
def _copy(call: Applied) -> State:
    target, source = call.args[:2]
    state, old = broadcast(call.state(source), source.shape, target.shape), call.state(target)
    if _has_rows(state) and _has_rows(old) and not (call.packed or state.equals(old)):
        call.misplaced()
    return old if state is None else state


@_rule(_TEMPLATES)
def _template(call: Applied) -> State:
    source, result = call.args[0], call.results[0]
    state = call.state(source)
    if isinstance(state, Owned) and source.shape == result.shape:
        return state._replace(template=True)
    return None


@_rule(_MOVES)
def _move(call: Applied) -> list[State]:
    source = call.args[0]
    state = call.state(source)
    if not isinstance(state, Owned):
        return [state] * len(call.results)
    marks = _marks(state, source.shape)
    if call.name == "as_strided":  # it goes by the places in memory
        offset = call.get("storage_offset", source.storage_offset()) - source.storage_offset()
        places = marks.new_empty_strided(source.shape, source.stride()).copy_(marks)
        return [_of_marks(places.as_strided(call.args[1], call.args[2], offset), state)]
    moved = call.func(marks, *call.further[0], **call.further[1])
    whole = state.owners
    found: list[State] = []
    for part in moved if isinstance(moved, (list, tuple)) else [moved]:
        now = _of_marks(part, state)
        picked = isinstance(now, Owned) and now.single is not None and len(whole) > 1 and len(now.owners) < len(whole)
        if picked and not source.is_floating_point():
            now = Unknown("one sequence's numbers")  # such as mask[0], which stands for all
        found.append(now)
    return found


def _marks(state: Owned, shape: Sequence[int]) -> Tensor:
    """The sequence of each element of a tensor of this shape, int64."""
    sizes = [1] * len(shape)
    sizes[state.dim] = -1
    return torch.from_numpy(state.owners).view(sizes).expand(*shape)


def _has_rows(state: State) -> TypeGuard[Owned]:
    """Whether the tensor holds values of known sequences."""
    return isinstance(state, Owned) and not state.template


def _of_marks(marks: Tensor, state: Owned) -> State:
    """The state that a tensor of owners stands for."""
    if marks.numel() == 0:
        return None
    # where the stride is 0 all are equal
    small = marks[tuple(slice(None) if stride else slice(0, 1) for stride in marks.stride())]
    varies = [d for d, size in enumerate(small.shape) if size > 1 and bool((small != small.narrow(d, 0, 1)).any())]
    if len(varies) > 1:
        return Unknown("a view that cuts the sequences' dimension")
    if marks.dim() == 0:
        return Unknown("a scalar of one row")
    dim = varies[0] if varies else min(state.dim, marks.dim() - 1)
    line = small[tuple(slice(None) if d == dim else 0 for d in range(small.dim()))].numpy()
    return state._replace(dim=dim, owners=line if len(line) == marks.shape[dim] else np.full(marks.shape[dim], line[0]))


@_rule(_RESHAPES)
def _reshape(call: Applied) -> State:
    source, result = call.args[0], call.results[0]
    state = call.state(source)
    return reshaped(state, source.shape, result.shape) if isinstance(state, Owned) else state


@_rule(" ".join(_ALONG))
def _along(call: Applied) -> State:
    source = call.args[0]
    state, dim = call.state(source), int(call.get("dim", -1)) % max(source.dim(), 1)
    if isinstance(state, Owned) and state.dim == dim and state.single is None and not call.packed:
        return call.unknown("values of different sequences meet", "softmax" in call.name)
    return state


@_rule(" ".join(_SELECTS))
def _selects(call: Applied) -> State:
    source = call.args[0]
    state, dim = call.state(source), int(call.get("dim", -1)) % max(source.dim(), 1)
    if isinstance(state, Owned) and state.dim == dim:
        return call.unknown("rows in an order that depends on their values")
    return state


@_rule(_REDUCES)
def _reduce(call: Applied) -> State:
    source, results = call.args[0], call.results
    other = call.get("other")
    if isinstance(other, Tensor):  # max and min of two tensors
        return _pointwise(call)
    state = call.state(source)
    if not isinstance(state, Owned):
        return state
    dims = call.get("dim")
    dims = list(range(source.dim())) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    dims = [d % max(source.dim(), 1) for d in dims]
    if state.dim in dims:
        return Unknown("a sum over several sequences")
    kept = results[0].dim() == source.dim()
    return state if kept else state._replace(dim=state.dim - sum(d < state.dim for d in dims))


@_rule("_fft_r2c _fft_c2r _fft_c2c")
def _fourier(call: Applied) -> State:
    source, state = call.args[0], call.state(call.args[0])
    if isinstance(state, Owned) and state.dim in [d % source.dim() for d in call.args[1]]:
        return call.unknown("values of different sequences meet", state.single is None)
    return state


@_rule("view_as_real view_as_complex")
def _complex(call: Applied) -> State:
    return _like(call.state(call.args[0]), call.args[0], call.results[0])


@_rule("grid_sampler_2d grid_sampler_3d")
def _sampled(call: Applied) -> State:
    """Samples of images [N, channels, ...] at grids [N, ..., 2]."""
    states = [call.state(t) for t in call.args[:2]]
    if any(isinstance(s, Owned) and s.single is None and s.dim > 0 for s in states):
        return call.unknown(_SUMMED, True)
    return call.meet([_like(s, t, call.results[0]) for s, t in zip(states, call.args, strict=False)])


@_rule("native_layer_norm layer_norm rms_norm _fused_rms_norm")
def _layer_norm(call: Applied) -> State:
    source, state = call.args[0], call.state(call.args[0])
    if isinstance(state, Owned) and state.dim >= source.dim() - len(call.get("normalized_shape")):
        return call.unknown("values of different sequences meet", True)
    return state


@_rule("mm bmm matmul mv linear _int_mm")
def _product(call: Applied) -> State:
    return _product_of(call, call.args[0], call.args[1], [])


@_rule("addmm baddbmm addmv addbmm _addmm_activation")
def _sum_and_product(call: Applied) -> State:
    return _product_of(call, call.args[1], call.args[2], [call.args[0]])


def _product_of(call: Applied, left: Tensor, right: Tensor, added: list[Tensor]) -> State:
    """Rows of ``left`` are rows of the result, columns of ``right`` its columns."""
    result = call.results[0]
    sides: list[State] = []
    one, other = call.state(left), call.state(right)
    if call.name == "linear":  # of a weight of a class of its own: others are taken apart
        other = None if other is None else Unknown("a weight that depends on the inputs")
    for state, operand, summed in ((one, left, left.dim() - 1), (other, right, max(right.dim() - 2, 0))):
        if not isinstance(state, Owned):
            sides.append(state)
        elif state.single is not None:
            sides.append(state._replace(dim=0, owners=np.full(result.shape[0], state.single)) if result.dim() else None)
        elif state.dim != summed:
            shift = result.dim() - operand.dim() if operand is right else 0
            sides.append(state._replace(dim=state.dim + shift))
        elif not call.packed:
            return Unknown(_SUMMED, True)
    return call.meet([*sides, *(broadcast(call.state(t), t.shape, result.shape) for t in added)])


def _attention(call: Applied) -> list[State]:
    """Attention of query, key and value [..., rows, features], in this order."""
    tensors = list(call.tensors())
    query, *others = [t for t in tensors if t.dim() >= 3] or tensors  # masks and lengths have fewer dimensions
    if call.packed:
        return _like_first(call)
    states: list[State] = []
    for i, tensor in enumerate((query, *others)):  # one tensor may be all three
        state = call.state(tensor)
        if isinstance(state, Owned) and state.single is None:
            dim = state.dim - tensor.dim()  # from the last, for masks are spread
            if dim == -1 or (dim == -2 and i > 0):
                return [Unknown(_SUMMED, True)] * len(call.results)
            state = broadcast(state, tensor.shape, query.shape) if tensor.dim() <= query.dim() else Unknown(_SUMMED)
        states.append(state)
    met = call.meet(states)
    return [_like(met, query, result) for result in call.results]


def _like_first(call: Applied) -> list[State]:
    source = next(call.tensors())
    state = call.state(source)
    if state is None:
        state = call.unknown("its first operand is a constant")
    return [_like(state, source, result) for result in call.results]


def _like(state: State, source: Tensor, result: Any) -> State:
    """``state`` where the result has its dimension."""
    if not isinstance(state, Owned):
        return state
    fits = isinstance(result, Tensor) and state.dim < result.dim() and result.shape[state.dim] == len(state.owners)
    return state if fits and result.dim() >= source.dim() - 1 else Unknown("a result of another shape")


def _images(call: Applied) -> list[State]:
    """Convolution, pooling, padding and resizing: over all dimensions after the first two."""
    source = next(call.tensors())
    state = call.state(source)
    if isinstance(state, Owned) and state.single is None and not call.packed:
        pad = call.get("pad", call.get("padding")) if "pad" in call.name else None
        last = 2 * (source.dim() - 1 - state.dim)  # pads are given from the last dimension on
        combined = any(pad[last : last + 2]) if isinstance(pad, (list, tuple)) else state.dim > 0
        if combined:
            return [call.unknown(_SUMMED, True)]
    return [_like(state, source, result) for result in call.results]


@_rule(
    "native_batch_norm batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm native_group_norm group_norm"
)
def _batch_norm(call: Applied) -> list[State]:
    source = call.args[0]
    return [_like(call.state(source), source, result) for result in call.results]


@_rule("embedding")
def _embedding(call: Applied) -> State:
    weight, indices = call.args[:2]
    return call.unknown("an embedding that depends on the inputs") if call.state(weight) else call.state(indices)


@_rule("cat concat")
def _cat(call: Applied) -> State:
    tensors = [t for t in call.args[0] if t.numel()]
    result = call.results[0]
    if not tensors:
        return None
    dim, states = int(call.get("dim", 0)) % max(result.dim(), 1), [call.state(t) for t in tensors]
    owned = [s for s in states if isinstance(s, Owned) and not s.template]
    if len(owned) == len(states):
        parts = [along(s, t.shape[dim], dim) for s, t in zip(owned, tensors, strict=True)]
        of_one = owned[0].single is not None and len({s.single for s in owned}) == 1
        if not of_one and all(part is not None for part in parts):
            lines = [part for part in parts if part is not None]
            partial = len({tuple(np.unique(line).tolist()) for line in lines}) > 1
            return Owned(dim, np.concatenate(lines), assembled=partial or any(s.assembled for s in owned))
    others = [s for s in states if not (isinstance(s, Owned) and s.dim == dim)]
    if len(others) < len(states):
        return call.unknown("rows of the batch next to others")
    return call.meet([broadcast(s, result.shape, result.shape) for s in others])


@_rule("stack")
def _stack(call: Applied) -> State:
    result, tensors = call.results[0], call.args[0]
    dim, states = int(call.get("dim", 0)) % result.dim(), [call.state(t) for t in tensors]
    owned = [s for s in states if isinstance(s, Owned)]
    if len(owned) == len(states) and all(s.single is not None for s in owned):
        return Owned(dim, np.array([s.single for s in owned]), assembled=True)
    return call.meet([s._replace(dim=s.dim + (s.dim >= dim)) if isinstance(s, Owned) else s for s in states])


@_rule("index _unsafe_index")
def _index(call: Applied) -> State:
    source, indices, result = call.args[0], list(call.args[1]), call.results[0]
    state = call.state(source)
    where = [d for d, index in enumerate(indices) if index is not None]
    used = [indices[d] for d in where]
    if any(index.dtype in (torch.bool, torch.uint8) for index in used):
        return call.unknown("rows picked by a mask")
    wide = torch.broadcast_shapes(*(index.shape for index in used))
    first = where[0] if where == list(range(where[0], where[-1] + 1)) else 0  # where the picked dimensions go
    of_index = call.meet([broadcast(call.state(index), index.shape, wide) for index in used])
    if state is None:
        moved = of_index._replace(dim=of_index.dim + first) if isinstance(of_index, Owned) else of_index
        return moved
    if not isinstance(state, Owned):
        return state
    if state.dim in where:
        own = indices[state.dim]
        if call.known_range(own) != len(state.owners) or own.numel() != len(state.owners):
            return call.unknown("rows picked by their numbers")
        position = next(d for d, size in enumerate(own.shape) if size == own.numel()) + len(wide) - own.dim()
        return state._replace(dim=first + position) if own.numel() == wide[position] else call.unknown("picked rows")
    before = sum(d < state.dim for d in where)
    dim = state.dim - before + (len(wide) if state.dim > first or first < state.dim else 0)
    return state._replace(dim=dim) if result.shape[dim] == len(state.owners) else call.unknown("rows picked")


@_rule("index_select")
def _index_select(call: Applied) -> State:
    source, dim, index = call.args[:3]
    state, picked = call.state(source), call.state(index)
    dim %= max(source.dim(), 1)
    if state is None:
        return picked._replace(dim=dim) if isinstance(picked, Owned) else picked
    if isinstance(state, Owned) and state.dim == dim:
        return call.unknown("rows picked by their numbers")
    return state


@_rule("gather scatter scatter_add scatter_reduce index_copy index_add index_fill")
def _scatter(call: Applied) -> State:
    """Rows stay where they are along every dimension but one."""
    source, dim = call.args[0], int(call.args[1]) % max(call.args[0].dim(), 1)
    result, state = call.results[0], call.state(source)
    others = [t for t in list(call.tensors())[1:] if t.dim() == source.dim()]
    states = [state, *(call.state(t) for t in others)]
    if isinstance(state, Owned) and state.dim == dim and not state.template and call.name != "gather":
        return state  # what is written at a row is meant for it
    for s in states:
        if isinstance(s, Owned) and (s.dim == dim or len(s.owners) != result.shape[s.dim]):
            return call.unknown("rows written to places that depend on their values")
    lone = [t for t in call.tensors() if t.dim() != source.dim()]  # index of index_copy: places along ``dim``
    return call.meet([*states, *(Unknown("places that depend on values") for t in lone if call.state(t) is not None)])


@_rule("index_put _index_put_impl _unsafe_index_put masked_scatter")
def _index_put(call: Applied) -> State:
    """What is written at a row is meant for it, as images among the tokens of a sequence.

    So it must be of the same sequence. Which rows are written depends on values: that is known for one call alone.
    """
    (target, places, source), state = call.args[:3], call.state(call.args[0])
    written = call.state(source)
    if not _has_rows(state):
        return call.unknown("rows written to places that depend on their values")
    if not _has_rows(written) or call.packed:
        return state
    there, here = _marks(state, target.shape), _marks(written, source.shape)
    if call.name == "masked_scatter":
        there = there.masked_select(places.cpu())
        here = here.reshape(-1)[: len(there)]
    else:
        there = there[tuple(slice(None) if index is None else index.cpu() for index in places)]
    if not torch.equal(here.expand_as(there), there):
        call.misplaced()
    return state._replace(assembled=True)


@_rule("masked_select nonzero unique _unique2 repeat_interleave")
def _picked(call: Applied) -> State:
    return call.unknown("rows picked by their values")


@_rule("mkldnn_rnn_layer")
def _recurrent(call: Applied) -> State:
    state = call.state(call.args[0])
    if isinstance(state, Owned) and state.dim == 0 and state.single is None:
        return Unknown(_SUMMED, True)
    return state


@_rule("_cudnn_rnn")
def _recurrent_of_cudnn(call: Applied) -> list[State]:
    """Results: [time, sequences, features], or these two turned; then states [layers, sequences, features]."""
    source, results = call.args[0], call.results
    state, turned = call.state(source), bool(call.get("batch_first"))
    if isinstance(state, Owned) and state.single is None:
        if source.dim() != 3 or state.dim == 2:  # packed: [rows, features]
            state = call.unknown("packed sequences, or features of different ones")
        elif state.dim == turned:
            state = Unknown(_SUMMED, True)
    if not isinstance(state, Owned):
        return [state] * len(results)
    if state.single is None:
        found: list[State] = [state, *[state._replace(dim=1)] * 2]
    else:
        found = [state._replace(dim=0, owners=np.full(t.shape[0], state.single)) for t in results[:3]]
    return [*found, None, None]  # of memory for a backward, and the weights


@_rule("_thnn_fused_lstm_cell _thnn_fused_gru_cell")
def _cell_of_cuda(call: Applied) -> State:
    """Gates and states [sequences, features]."""
    return call.meet([call.state(t) for t in call.args[:3]])
