"""How classes of stacked experts run: what their parameters are, and a call with the terms of adapters.

Registered  all of transformers' registry of experts: each token through the experts that it was routed to
Llama4      Llama4TextExperts: rows in as many parts as there are experts, one for each
Rerun       any module with a matrix ``weight``, as routers: called with W + s B A in its place, a stack of one
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MemberDescriptorType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fused_lora.bases.expert_terms import Even, ExpertTerm, Routed, add_terms, back
from fused_lora.ops.linear.op import without_autocast
from fused_lora.rows import why_rows_meet

IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")  # of one arithmetic: which experts a row goes through
_FLAGS = ("has_gate", "has_bias", "is_transposed", "num_experts")
Terms = Mapping[str, Sequence[ExpertTerm]]  # of each adapted parameter, by its name


class Route(NamedTuple):
    """Rows of a call's output that an expert adds to, its inputs [n, K], and what its results [n, N] are weighed by."""

    expert: int
    rows: Tensor
    x: Tensor
    weight: Tensor | float


class Given(tuple):
    """A call's arguments in the order of the forward's. args, kwargs: as they were given, which is what hooks get."""

    args: tuple
    kwargs: Mapping[str, Any]


def positional(module: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """A call's arguments in the order of the forward's, not of the call."""
    if not kwargs:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    if torch.compiler.is_compiling():
        return bound.args
    found = Given(bound.args)
    found.args, found.kwargs = args, kwargs
    return found


def run(module: Any, call: Sequence[Any]) -> Any:
    """The module's own call, hooks and all."""
    return module(*call.args, **call.kwargs) if isinstance(call, Given) else module(*call)


class Form:
    """How one kind of experts is called. The methods take the module; a Form has no state of its own.

    inputs: the names of a call's tensors, whose first dimension is that of its rows. turned: PEFT's lora_A and lora_B
    are of W [experts, N, K] as x W reads it, so that x meets lora_B first.
    """

    inputs: tuple[str, ...] = ()
    turned = False
    dim = 3  # of a parameter
    calls_module = False  # whether a call with adapters is one of the module, hooks and all

    def parameters(self, experts: Any) -> tuple[str, ...]:
        """The names of the stacks that a call multiplies with, in this order."""
        raise NotImplementedError

    def is_transposed(self, experts: Any) -> bool:
        """Whether PEFT takes a stack for [experts, K, N], not for [experts, N, K]."""
        raise NotImplementedError

    def count(self, experts: Any) -> int:
        """How many experts there are."""
        raise NotImplementedError

    def why_not_adapted(self, experts: Any) -> str | None:
        """None where :meth:`forward` knows what a call does, besides its parameters; else the reason."""
        return None

    def why_not_fused(self, experts: Any) -> str | None:
        """The same for what may change from call to call."""
        return None

    def fault(self, experts: Any, call: Sequence[Any]) -> Exception | None:
        """None where these tensors, as many as ``inputs``, are a call's; else the ValueError or TypeError to raise."""
        raise NotImplementedError

    def fault_of_rows(self, experts: Any, call: Sequence[Any]) -> Exception | None:
        """The same of a call whose rows are under different adapters."""
        return self.fault(experts, call)

    def why_not_alone(self, experts: Any) -> str | None:
        """None where rows of a call are the rows of a batch in their order, as if the experts were a linear layer."""
        return None

    def forward(self, experts: Any, call: Sequence[Tensor], terms: Terms) -> Any:
        """What the experts give for a call, with the terms."""
        raise NotImplementedError

    def forward_of_groups(self, experts: Any, call: Sequence[Any], groups: Sequence[tuple[Tensor, Terms]]) -> Any:
        """The same where groups of rows have different terms; the other rows keep the bits that they have without."""
        y = run(experts, call)
        for rows, terms in groups:
            y = self.replace_rows(experts, y, call, rows, terms)
        return y

    def replace_rows(self, experts: Any, y: Any, call: Sequence[Tensor], rows: Tensor, terms: Terms) -> Any:
        """y, what the experts gave for a call, with the results under adapters of these rows; in place if it can be."""
        y[rows] = self.forward(experts, [t[rows] for t in call], terms).to(y.dtype)
        return y

    def activated(self, experts: Any, y: Tensor) -> Tensor:
        """What stands between the two products of an expert."""
        raise NotImplementedError

    def by_token(self, experts: Any, call: Sequence[Tensor]) -> Tensor:
        """A call as one tensor in float64, a row for each token."""
        raise NotImplementedError

    def of_tokens(self, experts: Any, tokens: Tensor) -> tuple[Tensor, ...]:
        """The call that :meth:`by_token` made this of, in float64."""
        raise NotImplementedError

    def results_by_token(self, experts: Any, y: Tensor) -> Tensor:
        """A call's output with a row for each token."""
        return y

    def routes(self, experts: Any, call: Sequence[Tensor]) -> Iterator[Route]:
        """Through which experts the rows of a call go."""
        raise NotImplementedError


class Registered(Form):
    """transformers' registry of experts: hidden [tokens, K], top_k_index and top_k_weights [tokens, top_k].

    The forward is transformers' "grouped_mm": rows sorted by expert. Deterministic: a token's results are summed in the
    order of its experts' places, with no atomics. A mask of dropout has a row for each place of a token,
    token * top_k + place, whatever its expert is; each projection and adapter draws one of its own.
    """

    inputs = ("hidden_states", "top_k_index", "top_k_weights")

    def parameters(self, experts: Any) -> tuple[str, ...]:
        return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")

    def is_transposed(self, experts: Any) -> bool:
        return bool(experts.is_transposed)

    def count(self, experts: Any) -> int:
        return experts.num_experts

    def why_not_adapted(self, experts: Any) -> str | None:
        # transformers 5.17 marks all layers of a model that it spreads
        if getattr(experts, "_is_expert_parallel", getattr(experts, "_is_hooked", False)):
            return "experts are spread over processes"
        dtypes = [getattr(experts._parameters.get(name), "dtype", None) for name in self.parameters(experts)]
        return "float64 experts have no grouped product" if torch.float64 in dtypes else None

    def why_not_fused(self, experts: Any) -> str | None:
        implementation = getattr(experts.config, "_experts_implementation", None)
        return None if implementation in IMPLEMENTATIONS else f"the experts implementation is {implementation!r}"

    def fault(self, experts: Any, call: Sequence[Tensor]) -> Exception | None:
        hidden, index, weights = call
        if not hidden.is_floating_point():
            return TypeError(f"hidden_states: expected a floating dtype, got {hidden.dtype}")
        if index.dtype not in (torch.int32, torch.int64):
            return TypeError(f"top_k_index: expected int32 or int64, got {index.dtype}")
        shape = tuple(index.shape)
        if len(shape) != 2 or shape != tuple(weights.shape) or hidden.dim() != 2 or len(hidden) != shape[0]:
            return ValueError(
                f"hidden_states, top_k_index, top_k_weights: expected [tokens, K] and twice [tokens, top_k], "
                f"got {tuple(hidden.shape)}, {shape} and {tuple(weights.shape)}"
            )
        return None

    def forward(self, experts: Any, call: Sequence[Tensor], terms: Terms) -> Tensor:
        from transformers.integrations.moe import _grouped_linear

        hidden, index, weights = call
        tokens, top_k = index.shape
        ids, order = torch.sort(index.reshape(-1), stable=True)
        _check_experts(ids, experts.num_experts)
        # of a size that does not depend on numbers, so that it compiles
        numbers = torch.arange(experts.num_experts, device=ids.device)
        rows = Routed(torch.searchsorted(ids, numbers, right=True, out_int32=True), order)

        def project(x: Tensor, name: str) -> Tensor:
            bias = getattr(experts, f"{name}_bias")[ids] if experts.has_bias else None
            W, turned = getattr(experts, name), experts.is_transposed
            y = _grouped_linear(x, W, rows.offsets, bias=bias, is_transposed=turned)
            return add_terms(y, x, terms.get(name, ()), rows)

        up, down = self.parameters(experts)
        y = project(self.activated(experts, project(hidden[order // top_k], up)), down)
        if getattr(experts, "has_post_expert_norm", False):  # since transformers 5.20
            y = experts.post_expert_norm(y)
        y = y * weights.reshape(-1)[order, None]
        return y[back(order)].view(tokens, top_k, y.shape[-1]).sum(1).to(hidden.dtype)

    def activated(self, experts: Any, y: Tensor) -> Tensor:
        return experts._apply_gate(y) if experts.has_gate else experts.act_fn(y)

    def by_token(self, experts: Any, call: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.double() for t in call], 1)

    def of_tokens(self, experts: Any, tokens: Tensor) -> tuple[Tensor, ...]:
        K = experts.hidden_dim if hasattr(experts, "hidden_dim") else experts.hidden_size
        top_k = (tokens.shape[1] - K) // 2
        return tokens.split([K, top_k, top_k], 1)

    def routes(self, experts: Any, call: Sequence[Tensor]) -> Iterator[Route]:
        hidden, index, weights = call
        for e in index.unique().tolist():
            tokens, places = torch.where(index == e)
            yield Route(e, tokens, hidden[tokens], weights[tokens, places, None])


class Llama4(Form):
    """Llama4TextExperts: hidden [experts * tokens, K], the rows of an expert after those of the one before.

    Its stacks are [experts, in, out] and do not say so: PEFT reads in as N and out as K. A mask of dropout has the rows
    of hidden; each projection and adapter draws one of its own.
    """

    inputs = ("hidden_states",)
    turned = True

    def parameters(self, experts: Any) -> tuple[str, ...]:
        return ("gate_up_proj", "down_proj")

    def is_transposed(self, experts: Any) -> bool:
        return False

    def count(self, experts: Any) -> int:
        return experts.num_experts

    def fault(self, experts: Any, call: Sequence[Tensor]) -> Exception | None:
        [hidden], E, K = call, experts.num_experts, experts.hidden_size
        if not hidden.is_floating_point():
            return TypeError(f"hidden_states: expected a floating dtype, got {hidden.dtype}")
        if hidden.dim() != 2 or hidden.shape[1] != K or len(hidden) % E:
            return ValueError(f"hidden_states: expected [{E} experts * tokens, {K}], got {tuple(hidden.shape)}")
        return None

    def why_not_alone(self, experts: Any) -> str | None:
        return f"{type(experts).__name__} gets the rows of all sequences for one expert after the other"

    def forward(self, experts: Any, call: Sequence[Tensor], terms: Terms) -> Tensor:
        [hidden], rows = call, Even(experts.num_experts, self.turned)

        def project(x: Tensor, name: str) -> Tensor:
            y = torch.bmm(x.view(rows.experts, -1, x.shape[1]), getattr(experts, name)).flatten(0, 1)
            return add_terms(y, x, terms.get(name, ()), rows)

        up, down = self.parameters(experts)
        return project(self.activated(experts, project(hidden, up)), down)

    def activated(self, experts: Any, y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return up * experts.act_fn(gate)

    def by_token(self, experts: Any, call: Sequence[Tensor]) -> Tensor:
        return self.results_by_token(experts, call[0].double())

    def of_tokens(self, experts: Any, tokens: Tensor) -> tuple[Tensor, ...]:
        return (tokens.unflatten(1, (experts.num_experts, -1)).transpose(0, 1).flatten(0, 1),)

    def results_by_token(self, experts: Any, y: Tensor) -> Tensor:
        return y.unflatten(0, (experts.num_experts, -1)).transpose(0, 1).flatten(1)

    def routes(self, experts: Any, call: Sequence[Tensor]) -> Iterator[Route]:
        [hidden], rows = call, torch.arange(len(call[0]), device=call[0].device)
        for e, own in enumerate(rows.unflatten(0, (experts.num_experts, -1))):
            yield Route(e, own, hidden[own], 1.0)


class Rerun(Form):
    """Any module that multiplies with its ``weight`` [N, K]: it is called with W + s B A in the place of W, as by PEFT.

    So is a router, whatever it makes of its products. A call is any arguments; of rows under different adapters
    x [..., K] comes first. Each delta is rounded to W's dtype, as PEFT rounds it, so that the same experts are chosen.
    """

    dim = 2
    calls_module = True

    def parameters(self, experts: Any) -> tuple[str, ...]:
        return ("weight",)

    def is_transposed(self, experts: Any) -> bool:
        return False

    def count(self, experts: Any) -> int:
        return 1

    def why_not_adapted(self, experts: Any) -> str | None:
        if isinstance(experts, nn.Embedding):
            return f"{type(experts).__name__} is an embedding: name it in target_modules"
        # whoever compiles has an adapter there already
        return None if torch.compiler.is_compiling() else _why_not_class(type(experts))

    def why_not_fused(self, experts: Any) -> str | None:
        return "the module is compiled by itself" if experts._compiled_call_impl is not None else None

    def fault(self, experts: Any, call: Sequence[Any]) -> Exception | None:
        return None

    def fault_of_rows(self, experts: Any, call: Sequence[Any]) -> Exception | None:
        x, K = call[0] if call else None, experts._parameters["weight"].shape[1]
        if isinstance(x, Tensor) and x.dim() > 1 and x.shape[-1] == K:
            return None
        got = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        return ValueError(f"{type(experts).__name__}: expected a tensor [..., {K}] as its first argument, got {got}")

    def forward(self, experts: Any, call: Sequence[Any], terms: Terms) -> Any:
        weight = _with_delta(experts._parameters["weight"], terms["weight"])
        if torch.compiler.is_compiling():
            return torch.func.functional_call(experts, {"weight": weight}, tuple(call))
        return _call(experts, _twin(experts, weight), call)

    def forward_of_groups(self, experts: Any, call: Sequence[Any], groups: Sequence[tuple[Tensor, Terms]]) -> Any:
        """As of :class:`Form`. The module's hooks get the input and the output of all rows."""
        if torch.compiler.is_compiling():
            return super().forward_of_groups(experts, call, groups)
        twin = _twin(experts, experts._parameters["weight"])
        own = twin.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            y, inputs = own(*args, **kwargs), positional(experts, args, kwargs)
            for rows, terms in groups:
                y = self.replace_rows(experts, y, inputs, rows, terms)
            return y

        twin.forward = forward
        return _call(experts, twin, call)

    def replace_rows(self, experts: Any, y: Any, call: Sequence[Any], rows: Tensor, terms: Terms) -> Any:
        """As of :class:`Form`. Without the module's hooks, which see y. RuntimeError: an output has no rows, or a row
        is not apart from others."""
        x, weight = call[0], _with_delta(experts._parameters["weight"], terms["weight"])
        part = _part(x, rows) if len(call) == 1 else None  # nobody knows which of further arguments have rows
        alone = part is not None
        again = _forward_again(experts, weight, (part,) if alone else call)
        outputs, found = (_tensors(experts, t) for t in (y, again))
        jobs = []
        for t, new in zip(outputs, found, strict=True):
            where = _rows_of(t, x, rows)
            picked = new if alone or where is None else new[where]
            if where is None or picked.numel() != (old := t[where]).numel():
                raise RuntimeError(
                    f"{type(experts).__name__}: expected a row for each of {x.shape[:-1].numel()} tokens in all that "
                    f"it returns, got {[tuple(t.shape) for t in outputs]}; nothing was replaced"
                )
            jobs.append((t, where, picked.reshape(old.shape).to(t.dtype)))
        _check_apart(experts, call, rows, alone)
        if not any(t.requires_grad or new.requires_grad for t, _, new in jobs):
            for t, where, new in jobs:
                t[where] = new
            return y
        with without_autocast(x):  # a GPU's takes no index_put of the other 16-bit dtype
            changed = [t.index_put(where, new) for t, where, new in jobs]  # a backward may read what was there
        return changed[0] if isinstance(y, Tensor) else tuple(changed)


def _with_delta(weight: Tensor, terms: Sequence[ExpertTerm]) -> Tensor:
    """W + sum_i s_i B_i A_i."""
    delta = None
    with torch.autocast(weight.device.type, enabled=False):
        for term in terms:
            A, B = (t.reshape(-1, t.shape[-1]) for t in (term.lora_A, term.lora_B))  # of a stack of one
            wide = torch.promote_types(A.dtype, torch.float32)
            own = (B.to(wide) @ A.to(wide) * term.scaling).to(weight.dtype)
            delta = own if delta is None else delta + own
        return weight if delta is None else weight + delta


def _twin(module: Any, weight: Tensor) -> Any:
    """A module that shares all with this one but has another ``weight``, which calls in other threads do not see."""
    twin = object.__new__(type(module))
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            value = MethodType(value.__func__, twin)
        elif (
            isinstance(value, functools.partial) and len(value.args) == 1 and value.args[0] is module
        ):  # a forward that accelerate has hooked
            value = functools.partial(value.func, twin, **value.keywords)
        twin.__dict__[name] = value
    twin.__dict__["_parameters"] = _Parameters(module._parameters, weight=weight)
    return twin


class _Parameters(dict):
    """Of a twin; whether its weight was read."""

    read = False

    def __getitem__(self, name: str) -> Any:
        self.read = self.read or name == "weight"
        return super().__getitem__(name)


def _check_read(twin: Any) -> None:
    """Raise RuntimeError where a call has reached the module's own weight, if any, past its twin."""
    if not twin._parameters.read:
        text = f"a call of {type(twin).__name__} has not read the weight of the module that was called"
        raise RuntimeError(f"{text}, so that an adapter would do nothing: it may keep a reference to itself")


def _set(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that a call has set."""
    return {name: value for name, value in after.items() if name not in before or before[name] is not value}


def _call(module: Any, twin: Any, call: Sequence[Any]) -> Any:
    """The module's one call, by its twin: attributes that the forward or hooks set become the module's."""
    before = {**twin.__dict__}
    found = run(twin, call)
    _check_read(twin)
    module.__dict__.update(_set(before, twin.__dict__))
    return found


def _forward_again(module: Any, weight: Tensor, call: Sequence[Any]) -> Any:
    """What the forward gives with this ``weight``, beside the module's own call.

    Raises RuntimeError where it has changed an attribute or a buffer of the module, as the own call has.
    """
    twin = _twin(module, weight)
    before = {**twin.__dict__}
    buffers = [(name, b, b._version) for name, b in module.named_buffers() if not b.is_inference()]
    found = twin.forward(*call)
    _check_read(twin)
    changed = [*_set(before, twin.__dict__), *(name for name, b, version in buffers if b._version != version)]
    if changed:
        text = f"{type(module).__name__} keeps state that its call changes, {changed[0]!r}"
        raise RuntimeError(f"{text}: its rows cannot have different adapters")
    return found


_apart: WeakKeyDictionary[nn.Module, set[tuple]] = WeakKeyDictionary()  # what was found to be so
_KINDS = 256  # kept of a module


@_disable_dynamo
def _check_apart(module: Any, call: Sequence[Any], rows: Tensor, entries: bool) -> None:
    """Raise RuntimeError where these rows of a call would be others if the rest had another adapter, or none.

    entries: they are whole ones of the first dimension. Asked once for each kind of call.
    """
    x = call[0]
    if len(rows) == x.shape[:-1].numel():
        return

    def again() -> list[Tensor]:
        return _tensors(module, _forward_again(module, module._parameters["weight"], call))

    known = _apart.setdefault(module, set())
    for dim in [0] if entries or x.dim() == 2 else _cut(x.shape[:-1], rows):
        # a flag may change what is done, and a number of the module; one of a call is another each time
        flags = [a if isinstance(a, bool | str) else type(a) for a in call]
        flags += [a if isinstance(a, bool | str | int | float) else type(a) for a in vars(module).values()]
        kind = x.dim(), dim, *flags
        if kind not in known:
            if why := why_rows_meet(again, x, dim):
                text = f"a row that {type(module).__name__} returns may depend on other rows ({why})"
                raise RuntimeError(f"{text}: they cannot have different adapters in one batch; call it once for each")
            if len(known) >= _KINDS:
                known.clear()
            known.add(kind)


def _cut(shape: torch.Size, rows: Tensor) -> list[int]:
    """The dimensions of which these rows have some indices: whole along the others, if they are not scattered."""
    counts = [len(places.unique()) for places in torch.unravel_index(rows, shape)]
    scattered = math.prod(counts) != len(rows)
    return [dim for dim, size in enumerate(shape) if counts[dim] < size or scattered and size > 1]


def _tensors(module: Any, y: Any) -> list[Tensor]:
    found = [y] if isinstance(y, Tensor) else y
    if isinstance(found, (tuple, list)) and all(isinstance(t, Tensor) for t in found):
        return list(found)
    raise RuntimeError(f"{type(module).__name__} returns a {type(y).__name__}; expected tensors with a row a token")


def _part(x: Tensor, rows: Tensor) -> Tensor | None:
    """These rows of x [..., K] alone. Of several dimensions whole entries of the first, along which a module may look;
    None where the rows are no such entries."""
    inner = x.shape[1:-1].numel()
    if inner == 1:  # a wait for the device less
        return x[rows]
    if torch.compiler.is_compiling():
        return None
    first = rows[::inner] // inner
    whole = (first[:, None] * inner + torch.arange(inner, device=rows.device)).view(-1)
    return x[first] if torch.equal(whole, rows) else None


def _rows_of(t: Tensor, x: Tensor, rows: Tensor) -> tuple[Tensor, ...] | None:
    """What picks rows of x [..., K] in t: [rows, ...] or [..., ...]; None where t has other rows."""
    shape = x.shape[:-1]
    if t.dim() and t.shape[0] == shape.numel():
        return (rows,)
    return torch.unravel_index(rows, shape) if t.shape[: len(shape)] == shape else None


_BUILDS = ("__init__", "reset_parameters", "extra_repr")  # what a call of a module does not run


@functools.cache
def _why_not_class(kind: type) -> str | None:
    """None where a class reads ``self.weight`` in a method that a call may run, its arguments have an order, and a twin
    has all its attributes."""
    held = [pair for parent in kind.__mro__ if parent not in (nn.Module, object) for pair in vars(parent).items()]
    methods = [inspect.unwrap(m) for name, m in held if callable(m) and name not in _BUILDS]
    if not any("weight" in m.__code__.co_names for m in methods if hasattr(m, "__code__")):
        return f"no method of {kind.__name__} reads its weight"
    if any(isinstance(member, MemberDescriptorType) for _, member in held):
        return f"{kind.__name__} has __slots__, whose values are not in the module's __dict__"
    kinds = {p.kind for p in inspect.signature(kind.forward).parameters.values()}
    if kinds & {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}:
        return f"the forward of {kind.__name__} takes arguments by name alone"
    return None


_REGISTERED, _RERUN = Registered(), Rerun()
_BY_CLASS = {("transformers.models.llama4.modeling_llama4", "Llama4TextExperts"): Llama4()}


def find_form(experts: Any) -> Form | None:
    """How these experts run; None for a class that is not known. A subclass of Llama-4's is a class of its own."""
    if all(hasattr(experts, flag) for flag in (*_FLAGS, "_apply_gate", "config")):
        return _REGISTERED
    kind = type(experts)
    found = _BY_CLASS.get((kind.__module__, kind.__qualname__))
    return found or (_RERUN if experts._parameters.get("weight") is not None else None)


def form_of(experts: Any) -> Form:
    """The same of a class that is known."""
    form = find_form(experts)
    assert form is not None, f"{type(experts).__name__} is not in transformers' registry of experts"
    return form


def _check_experts(ids: Tensor, experts: int) -> None:
    """Raise ValueError unless sorted numbers of experts are all there. Compiled code cannot ask. On a GPU the device
    asserts it, as for an index of torch: the host waits for nothing."""
    if torch.compiler.is_compiling() or not len(ids):
        return
    text = f"top_k_index: expected experts from 0 to {experts - 1}"
    if ids.is_cuda:
        return torch.ops.aten._assert_async.msg((ids[0] >= 0) & (ids[-1] < experts), text)
    first, last = torch.stack((ids[0], ids[-1])).tolist()
    if first < 0 or last >= experts:
        raise ValueError(f"{text}, got {first if first < 0 else last}")
