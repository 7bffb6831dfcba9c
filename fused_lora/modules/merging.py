"""Merge and unmerge a whole model: all layers or none. Unmerge restores every bit of the base."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fused_lora.bases import base_of
from fused_lora.modules import of_peft
from fused_lora.modules.activated import Activation
from fused_lora.modules.auxiliary import SavedModule, TrainedTokens, auxiliary_modules, breaks_a_tie
from fused_lora.modules.changes import alone, changing, undone_on_error, unwatch
from fused_lora.modules.config import check_bool
from fused_lora.modules.dense import become_dense, dense_parts, forget_quantisation, warn_of_other_dtypes
from fused_lora.modules.experts import LoraStack, place_of
from fused_lora.modules.inject import (
    AFTER_CHANGE,
    adapter_configs,
    as_list,
    check_module,
    check_names,
    check_no_batch,
    lora_layers,
    mergeable_layers,
)
from fused_lora.modules.layer import LoraLayer
from fused_lora.modules.linear import go_back, naming, snapshot, together, unmerge_all
from fused_lora.modules.mixin import Later, _Merge
from fused_lora.modules.names import some
from fused_lora.modules.reads import FirstForward
from fused_lora.modules.tree import CONFIGS, named_modules, parent_of, places, unwrapped, watchers
from fused_lora.modules.variants import has_magnitude
from fused_lora.ops.checks import overlap, span_of
from fused_lora.ops.merge.exact import in_double
from fused_lora.ops.merge.op import seed_of
from fused_lora.ops.native import MERGE

LEAST_SURVIVING = 0.5  # share of an adapter that a merge should keep
_SAMPLED_LAYERS, _SAMPLED_ROWS = 32, 8
_NOTHING: Mapping[str, _Merge] = {}


@alone
@of_peft.by_peft(of_peft.merge)
def merge(
    model: nn.Module,
    adapter_names: Sequence[str] | None = None,
    safe_merge: bool = False,
    weights: Sequence[float] | None = None,
    stochastic: int | None = None,
) -> None:
    """Add adapters to the base weights in place, with one rounding. :func:`unmerge` restores the original bits.

    Args:
        model: a model with LoRA layers.
        adapter_names: names to merge (default: the active ones). Layers without these adapters do not change.
        safe_merge: accepted as in PEFT. Every merge checks for NaN and infinity before it writes.
        weights: one finite number for each of these names, which its scaling is multiplied by; None: 1. The adapters
            themselves do not change.
        stochastic: a seed: sums are rounded to bf16 or fp16 at random, so that the expectation of each weight is its
            sum. The same seed gives the same bits. :func:`unmerge` restores all bits as ever. None: to the nearest.

    Warns where rounding to 16, 8 or 4 bits takes more than half of the adapters; of 16 bits by a sample of rows, and
    not where they are rounded at random.

    Raises:
        TypeError: adapter_names is no list of names. AdapterNotFound: an unknown name.
        ValueError: a finite number would become NaN or infinite, or two adapters train the same token; or the weights
            do not belong to the names. A PEFT model takes no weights and no seed. Weights that are not of 16 bits and
            stacks of experts take no seed.
        RuntimeError: the model has no LoRA layers, a lora_bias has no base bias to go to, or a weight also belongs to
            another module, whose output a merge would change.
            In every case all layers are back at the bits they had before the call.

    A PEFT model is merged by its ``merge_adapter`` and keeps PEFT's rules: layers merged before an error stay merged,
    and what is not finite is merged unless ``safe_merge`` is set.
    """
    layers = _mergeable(model)
    names = _checked_names(model, layers, adapter_names)
    with _weighted(layers, names, _checked_weights(names, weights)), _seeded(layers, names, stochastic):
        _merge(layers, names, safe_merge)


@alone
def switch(
    model: nn.Module, adapter_names: Sequence[str], weights: Sequence[float] | None = None, safe_merge: bool = False
) -> None:
    """Merge these adapters in the place of those that are merged now: all layers hold the new ones, or the old ones.

    The bits are those of an :func:`unmerge` and a :func:`merge`, so a later unmerge still restores the original. Linear
    layers and stacks of experts are read and written once. The two calls one after the other run where they must:
    for DoRA, whose norms ask for the base weight, a lora_bias, embeddings, convolutions, quantised layers, and where
    plain torch merges.

    Args:
        model: a model of ``inject``, merged or not. adapter_names, weights, safe_merge: as in :func:`merge`.

    Raises what :func:`merge` and :func:`unmerge` raise; every layer then has the bits that it had before the call.
    RuntimeError also for a PEFT model, whose own calls undo nothing.
    """
    of_peft.refuse(model, "switch", "call unmerge_adapter and merge_adapter")
    layers = _mergeable(model)
    names = as_list(adapter_names)
    check_names(model, names)
    factors = _checked_weights(names, weights)
    before, sampled = snapshot(layers.values()), _to_sample(layers)
    old = {p: layer.merge_state for p, layer in layers.items() if _in_one_pass(layer, names, p in sampled)}
    try:
        unmerge_all({path: layer for path, layer in layers.items() if path not in old})
        with _weighted(layers, _checked_names(model, layers, names, switching=True), factors):
            _merge(layers, names, safe_merge, old)
    except BaseException:
        go_back(before)
        raise


def _in_one_pass(layer: Any, names: list[str], sampled: bool) -> bool:
    if not isinstance(layer, LoraLayer) or not layer._switches(layer._present(names)):
        return False
    return not sampled or layer.merge_state.rows_before is not None


@contextlib.contextmanager
def merged(
    model: nn.Module, adapter_names: Sequence[str] | None = None, weights: Sequence[float] | None = None
) -> Iterator[nn.Module]:
    """Adapters are merged inside, and the base has its original bits behind, whatever is raised inside.

    For loops that send merged weights elsewhere, as to an engine that generates rollouts.

    Args:
        model: a model of ``inject``, or an accelerated PEFT model. Nothing may be merged yet.
        adapter_names, weights: as in :func:`merge`.

    Yields:
        ``model``. An :func:`unmerge` inside is no error.

    Raises:
        RuntimeError: something is merged already; or, behind, a weight was changed inside, so that its bits cannot come
            back, and all layers stay merged. Also what :func:`merge` raises.
    """
    check_module(model)
    if held := _merged_paths(model):
        raise RuntimeError(f"merged: {some(held)} are merged already; call fused_lora.unmerge(model) first")
    if of_peft.peft_layer(model) and not any(hasattr(layer, "merge_state") for _, layer in named_modules(model)):
        raise RuntimeError("merged: PEFT's unmerge changes the base; call fused_lora.accelerate(model) first")
    try:
        merge(model, adapter_names, weights=weights)
        yield model
    finally:
        try:
            _unmerge_if_merged(model)
        except Exception:
            raise
        except BaseException:  # an interrupt: all of it is merged still, or nothing
            _unmerge_if_merged(model)
            raise


def _unmerge_if_merged(model: nn.Module) -> None:
    if _merged_paths(model):
        unmerge(model)


def _merged_paths(model: nn.Module) -> list[str]:
    return [path for path, layer in named_modules(model) if getattr(layer, "merged_adapters", None)]


def _checked_weights(names: Sequence[str], weights: Any) -> list[float] | None:
    if weights is None:
        return None
    found = list(weights) if isinstance(weights, (list, tuple)) else weights
    numbers = isinstance(found, list) and all(isinstance(w, (int, float)) and not isinstance(w, bool) for w in found)
    if not numbers:
        raise TypeError(f"weights: expected a list of numbers or None, got {weights!r:.200}")
    if len(found) != len(names) or not all(abs(w) <= sys.float_info.max for w in found):  # an int may be larger
        raise ValueError(f"weights: expected one finite number for each of {some(names)}, got {found!r:.200}")
    if len(set(names)) != len(names):
        raise ValueError(f"weights: expected different adapters, got {some(names)}")
    return found


@contextlib.contextmanager
def _weighted(layers: Mapping[str, Any], names: Sequence[str], weights: Sequence[float] | None) -> Iterator[None]:
    """The layers' scalings times the weights inside; a merge freezes its own copies of what it adds."""
    before = []
    try:
        for layer in layers.values() if weights is not None else ():
            for name, weight in zip(names, weights or (), strict=True):
                if isinstance(layer, LoraLayer) and name in layer.scaling:
                    before.append((layer.scaling, name, layer.scaling[name]))
                    layer.scaling[name] = layer.scaling[name] * weight
        yield
    finally:
        for scaling, name, value in before:
            scaling[name] = value


@contextlib.contextmanager
def _seeded(layers: Mapping[str, Any], names: list[str], seed: Any) -> Iterator[None]:
    """The layers round at random inside, each by a seed of its own."""
    if seed is None:
        yield
        return
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"stochastic: expected an int or None, got {seed!r:.100}")
    adapted = {p: layer for p, layer in layers.items() if isinstance(layer, LoraLayer) and layer._present(names)}
    for path, layer in adapted.items():
        weight = layer.base_layer._parameters.get("weight")
        if isinstance(layer, LoraStack):
            raise ValueError(f"stochastic: expected None, for {path} is a stack of experts, which round to the nearest")
        if weight is None or base_of(layer.base_layer).bits or weight.dtype.itemsize != 2:
            found = f"a {type(weight).__name__} of {weight.dtype}"
            raise ValueError(f"stochastic: expected None, for {path} has {found}: only 16 bits are rounded at random")
    try:
        for path, layer in adapted.items():
            layer.rounding_seed = seed_of(seed, f"{path}.weight")
        yield
    finally:
        for layer in adapted.values():
            layer.__dict__.pop("rounding_seed", None)


def _checked_names(
    model: nn.Module, layers: Mapping[str, Any], adapter_names: Sequence[str] | None, switching: bool = False
) -> list[str]:
    """The adapters to merge; the errors and warnings that need no number."""
    first = next(iter(layers.values()))  # a LoRA layer
    names = list(first.active_adapters) if adapter_names is None else as_list(adapter_names)
    check_names(model, names)
    _check_not_shared(model, {path: layer for path, layer in layers.items() if layer._present(names)}, names)
    if not names:
        warnings.warn("merge: no adapters are active or named, nothing to do", stacklevel=5)
    elif not switching and all(name in m.merged_adapters for m in layers.values() for name in m._present(names)):
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=5)
    return names


def _quantised(layer: LoraLayer) -> bool:
    return layer._merge_place()[1].bits > 0 or not isinstance(getattr(layer, "weight", None), Tensor)


def _to_sample(layers: Mapping[str, Any]) -> set[str]:
    """Paths of layers of 16 bits whose rows are compared with what they were."""
    some = list(layers.items())[:: max(1, len(layers) // _SAMPLED_LAYERS)]
    linear = [(path, layer) for path, layer in some if isinstance(layer, LoraLayer) and not _quantised(layer)]
    return {path for path, layer in linear if layer.weight.dtype.itemsize == 2}


def _merge(
    layers: Mapping[str, Any], names: list[str], safe_merge: bool = False, old: Mapping[str, _Merge] = _NOTHING
) -> None:
    """:func:`merge` for some of a model's layers. old: merges by path that go, in one pass with the new ones."""
    before, sampled = snapshot(layers.values()), _to_sample(layers)
    packed: list[LoraLayer] = []
    samples: list[tuple[LoraLayer, list[str], Tensor]] = []
    rows_before: dict[LoraLayer, Tensor] = {}
    try:
        linear: dict[str, Callable[[], Later | None]] = {}
        for path, layer in layers.items():
            new = [name for name in layer._present(names) if path in old or name not in layer.merged_adapters]
            if new and isinstance(layer, LoraLayer):
                state = old.get(path)
                linear[path] = functools.partial(layer._merge_later, new, state)
                if _quantised(layer):
                    packed.append(layer)
                elif path in sampled:
                    rows = None if state is None else state.rows_before
                    rows = _sample(*_matrix(layer)) if rows is None else rows
                    if state is not None or not layer.merged:
                        rows_before[layer] = rows
                    # at random a weight may be off by more than its delta, and their mean is right
                    if layer.rounding_seed is None and not has_magnitude(layer, new):
                        samples.append((layer, new, rows))
        together(linear, MERGE)
        for path, layer in layers.items():
            new = layer._present(names)
            with naming(path):
                if path in old and layer.merge_state is old[path]:
                    layer._switch(new)
                elif new := [name for name in new if name not in layer.merged_adapters]:
                    layer.merge(safe_merge, new)
        for layer, rows in rows_before.items():
            layer.merge_state.rows_before = rows
        _warn_of_rounding(names, samples, packed)
    except BaseException:
        go_back(before)
        raise


def _warn_of_rounding(
    names: Sequence[str], samples: list[tuple[LoraLayer, list[str], Tensor]], packed: list[LoraLayer]
) -> None:
    """Warn where the weights lost more than half of the adapters: of rows as they were, or of whole packed layers."""
    # (wanted, lost) of all layers of a device at once: on a GPU each number is a wait
    norms: dict[torch.device, list[Tensor]] = {}
    for sample in samples:
        norms.setdefault(sample[-1].device, []).append(_norms(*sample))
    pairs = [pair for found in norms.values() for pair in torch.stack(found).tolist()]
    shares = {16: [lost / max(wanted, 1e-300) for wanted, lost in pairs]}
    for layer in packed:
        shares.setdefault(base_of(layer.base_layer).bits, []).append(layer.delta_fidelity())
    for bits, lost in shares.items():
        where = " (of sampled rows)" if bits == 16 else ""
        kept = sum(1.0 - min(1.0, share) for share in lost) / max(len(lost), 1)
        wider = "merge into float32" if bits == 16 else "unload(model, merge_adapters=True, dtype=...)"
        if lost and kept < LEAST_SURVIVING:
            warnings.warn(
                f"merge: {bits}-bit weights keep only {kept:.0%} of the adapters {names}{where}, rounding takes the "
                f"rest: {wider}, or do not merge",
                stacklevel=6,
            )


def _sample(weight: Tensor, transposed: bool) -> Tensor:
    """Some rows of a weight [N, K], as a copy."""
    rows = weight.detach().t() if transposed else weight.detach()
    return rows[:: max(1, len(rows) // _SAMPLED_ROWS)].clone()


def _matrix(layer: Any) -> tuple[Tensor, bool]:
    """The weight and whether it is [K, N]; of experts that of the first."""
    if isinstance(layer, LoraStack):
        return layer.weight.reshape(-1, *layer.weight.shape[-2:])[0], layer.transposed
    return layer.weight, layer.fan_in_fan_out


def _norms(layer: Any, names: list[str], before: Tensor) -> Tensor:
    """[||D||, ||(Wm - W) - D||] of the sampled rows, on the weight's device."""
    change = in_double(_sample(*_matrix(layer))) - in_double(before)
    delta = torch.zeros_like(change)
    for name in names:
        if isinstance(layer, LoraStack):
            A, B = layer.of_expert(0, name)
        else:
            A, B = (part.weight for part in layer._parts([name])[:2])
        delta += in_double(_sample(B, False)) @ in_double(A.detach()) * float(layer.scaling[name])
    return torch.stack((delta, change - delta)).norm(dim=(1, 2))


@alone
@of_peft.by_peft(of_peft.unmerge)
def unmerge(model: nn.Module) -> None:
    """Give every base weight back the bits it had before :func:`merge`. Warns, as PEFT does, where nothing is merged.

    Raises:
        RuntimeError: a weight was changed while merged. All layers are left merged.
    """
    layers = _mergeable(model)
    if not any(layer.merged for layer in layers.values()):
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=4)
    unmerge_all(layers)


@of_peft.by_peft(of_peft.delta_fidelity)
def delta_fidelity(model: nn.Module) -> dict[str, float]:
    """For each merged layer, the share of its delta that was lost by rounding to the weight's dtype (0: none, 1: all).

    It is ||(Wm - W) - D|| / ||D|| in the Frobenius norm. In bf16 a delta of 0.1 % of the weight loses about 0.8.
    Random rounding (``stochastic``) loses more by this measure, as its errors are larger but have no bias.
    Raises RuntimeError when nothing is merged.
    """
    check_module(model)
    with changing(model, forwards=False):
        merged = {path: layer for path, layer in _layers(model).items() if layer.merged}
        if not merged:
            raise RuntimeError("delta_fidelity: nothing is merged, call fused_lora.merge(model) first")
        return {path: layer.delta_fidelity() for path, layer in merged.items()}


@alone
@of_peft.by_peft(of_peft.unload)
def unload(model: nn.Module, merge_adapters: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Put the plain base layers back in place of the LoRA layers. What is merged stays merged, as in PEFT.

    So does a module that the active adapter trained as a whole (``modules_to_save``): its copy takes the original's
    place, with or without ``merge_adapters``.

    Args:
        model: a model with LoRA layers.
        merge_adapters: merge the active adapters first, beside those that are merged already. Without it adapters
            that are not merged are dropped. Call :func:`unmerge` first to drop merged ones too.
        dtype: bf16, fp16 or fp32: with ``merge_adapters`` each quantised layer of the model, adapted or not, becomes an
            nn.Linear of this dtype. Its weight is dequant(W) + D, a sum in fp32 that is rounded once. Other layers
            keep their dtype, with a warning where it differs. A PEFT model must be accelerated. None: they stay.

    Returns:
        ``model``, without adapters. Its parameters stay frozen as they were.

    Raises:
        RuntimeError: the model has no LoRA layers, an ``adapter_batch`` is open, or a layer is compiled or wrapped for
            checkpointing by itself. With ``merge_adapters`` also what :func:`merge` raises.
        TypeError, ValueError: dtype is none of the three, comes without ``merge_adapters``, or none is quantised.
        RuntimeError: with ``dtype``: a quantised layer is merged already, is of another kind, or has DoRA.
            If anything is raised, the model is as it was.
    """
    layers, modules = _layers(model), dict(named_modules(model))
    check_bool("merge_adapters", merge_adapters)
    check_no_batch(model)
    wrappers = auxiliary_modules(model)
    untied = breaks_a_tie(model)
    bases = {place_of(path, layer): layer.base_layer for path, layer in layers.items()}
    holders = {path: parent_of(modules, path) for path in (*bases, *wrappers)}
    before = snapshot(mergeable_layers(model).values())
    dense = dense_parts(model, merge_adapters, dtype)
    if merge_adapters:
        mergeable = _mergeable(model)
        names = _checked_names(model, mergeable, None)
        _merge({path: layer for path, layer in mergeable.items() if layer.base_layer not in dense}, names)
    root: Any = unwrapped(model)
    try:
        with undone_on_error(model):
            if untied:
                warnings.warn("the two embeddings differ now: config.tie_word_embeddings is set to False", stacklevel=4)
            become_dense(model, dense)
            for path, base in bases.items():
                setattr(*holders[path], base)
            for path, wrapper in wrappers.items():
                setattr(*holders[path], wrapper.current() if isinstance(wrapper, SavedModule) else wrapper.original)
            unwatch(root)
            FirstForward.leave(root)
            for activation in watchers(root, Activation):
                activation.remove()
            delattr(root, CONFIGS)
            del root.peft_config
            for function in AFTER_CHANGE:
                function(root)
            if dtype is not None:
                warn_of_other_dtypes(model, dtype)
    except BaseException:
        go_back(before)
        raise
    if dtype is not None:
        forget_quantisation(model)
    if untied:
        root.config.tie_word_embeddings = False
    return model


def _check_not_shared(model: nn.Module, layers: dict[str, Any], names: list[str]) -> None:
    """Raise RuntimeError where numbers that a merge of these adapters changes belong to a further parameter as well."""
    parameters = list(_parameters(model))
    owners, mine = _by_memory(parameters), {}
    for path, layer in layers.items():
        base: Any = layer.base_layer
        weight, bias = base._parameters.get(getattr(layer, "parameter_name", "weight")), base._parameters.get("bias")
        if bias is not None and isinstance(layer, LoraLayer) and layer._with_bias(layer._present(names)):
            mine[memory_of(bias)] = path
            if len(shared := owners.get(memory_of(bias), [])) > 1:
                raise RuntimeError(f"{path}: the bias is shared by {shared}; a merge would change all of them")
        if weight is None:
            continue
        mine[memory_of(weight)] = path
        shared = owners.get(memory_of(weight), [])
        if len(shared) <= 1:
            continue
        wrappers = auxiliary_modules(model).values()
        tied = sum(isinstance(wrapper, TrainedTokens) and wrapper.owner is layer for wrapper in wrappers)
        if len(shared) > max(tied, 1):
            raise RuntimeError(
                f"{path}: the weight is shared by {shared}; a merge would change all of them. Untie "
                "them, or save the adapter: `fused-lora merge` gives a tied head a weight of its own"
            )
    strided = {memory_of(p): (name, p) for name, p in parameters if memory_of(p) != id(p)}
    before: list[Any] = []  # those that go on where the next begins
    for begin, (name, parameter) in sorted(strided.items(), key=lambda item: item[0]):
        before = [found for found in before if found[0] > begin]
        for _, other, held in before:
            path = mine.get(begin, mine.get(held.data_ptr()))
            if path is not None and overlap(parameter, held):
                raise RuntimeError(f"{path}: {other} and {name} overlap in memory; a merge would change both")
        before.append((span_of(parameter)[1], name, parameter))


def memory_of(tensor: Tensor) -> int:
    """A number that tensors in one memory share. Quantised, sharded and sparse ones have no address of their own, so it
    is that of the object."""
    return (tensor.layout is torch.strided and tensor.data_ptr()) or id(tensor)


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters in one memory (:func:`memory_of`), one for each place of their module in the model.

    Without those of our adapters, which are most modules of a model and share nothing.
    """
    return _by_memory(_parameters(model))


def _by_memory(parameters: Iterable[tuple[str, Tensor]]) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters:
        owners.setdefault(memory_of(parameter), []).append(name)
    return owners


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    closed = ((path, m) for path, m in named_modules(model, LoraLayer) if isinstance(m, LoraLayer))
    held = [(f"{path}.base_layer", m) for path, m in closed if not isinstance(m, LoraStack)]
    bases = [(path, None, unwrapped(layer.base_layer)) for path, layer in held]
    # a bare layer may have a further place, at another parent
    for path, _, module in (("", None, unwrapped(model)), *places(model, LoraLayer), *bases):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.numel() and not parameter.is_meta:
                yield f"{path}.{name}", parameter


def _mergeable(model: nn.Module) -> dict[str, Any]:
    return _some_layers(model, mergeable_layers(model))


def _layers(model: nn.Module) -> dict[str, LoraLayer]:
    return _some_layers(model, lora_layers(model))


def _some_layers(model: nn.Module, layers: dict[str, Any]) -> dict[str, Any]:
    if not any(isinstance(layer, LoraLayer) for layer in layers.values()):
        raise RuntimeError(f"model: expected LoRA layers, found none (adapters: {some(adapter_configs(model))})")
    return layers
