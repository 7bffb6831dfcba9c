"""The names that a checkpoint's tensors get as transformers loads them, by its own rules and without weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from fused_lora.checkpoints.files import Checkpoint


class Loaded(NamedTuple):
    """A tensor of the checkpoint, or the ``part``-th of ``parts`` equal blocks of its rows."""

    stored: str
    part: int = 0
    parts: int = 1


class _Bounded(TorchFunctionMode):
    """Calls of torch, for a model without weights: a ValueError after ``most``."""

    def __init__(self, most: int):
        self._left = most

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError("a model of more layers than the files have")
        return function(*args, **(kwargs or {}))


def loaded_names(folder: str, names: Collection[str]) -> dict[str, Loaded]:
    """{parameter of the model: where it is} of all tensors that transformers loads as they are, or splits by rows.

    Then with and without the beginning that models with a head have around their backbone. Empty without transformers
    5, and where the ``folder`` has no config of a model whose class is transformers' own, or of many more layers.
    """
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import Chunk, WeightConverter, dot_natural_key, rename_source_key
    except ImportError:
        return {}
    most = 10_000 + 30 * len(names)  # calls of torch, of which transformers' models make 3 to 7 for each tensor
    try:
        about, _ = transformers.PretrainedConfig.get_config_dict(folder, local_files_only=True)
        for part in (about, *(value for value in about.values() if isinstance(value, dict))):
            if any("layer" in key and isinstance(count, int) and count > most for key, count in part.items()):
                return {}  # a config makes lists of them
        kind: Any = getattr(transformers, about["architectures"][0])
        config = kind.config_class.from_dict(about)
        config._attn_implementation = "eager"  # another may be a kernel that is downloaded and run
        with _Bounded(most), torch.device("meta"):
            model = kind(config)
        rules, own = get_model_conversion_mapping(model), model.state_dict()
        prefix = model.base_model_prefix
    except Exception:  # whatever a config of another release, or of code beside it, leads to
        return {}
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    found: dict[str, Loaded] = {}
    for stored in sorted(names, key=dot_natural_key):  # as it loads them: some rules wait for a first name
        name, source = rename_source_key(stored, renamings, converters, prefix, own)
        places = {name: Loaded(stored)}
        if source is not None:
            renamed, _ = rename_source_key(stored, renamings, [])
            rule = next(rule for rule in converters if rule.rename_source_key(renamed)[1] is not None)
            ends = rule.target_patterns
            whole = len(rule.source_patterns) == 1 and [(type(op), getattr(op, "dim", 0)) for op in rule.operations]
            parts = enumerate(ends if whole == [(Chunk, 0)] else ())
            places = {name.replace(ends[0], end): Loaded(stored, i, len(ends)) for i, end in parts}
        found |= {target: place for target, place in places.items() if target in own}
    for target, place in list(found.items()):
        inner = target.removeprefix(f"{prefix}.")
        for other in (inner, f"{prefix}.{inner}"):
            found.setdefault(other, place)
    return found


def model_names(base: Checkpoint) -> dict[str, str]:
    """{tensor: the name that it has in the model} of the weights that transformers loads as they are."""
    found: dict[str, str] = {}
    for name, place in loaded_names(base.folder, base.tensors).items() if base.config is not None else ():
        if place.parts == 1 and name.endswith(".weight"):
            found.setdefault(place.stored, name)
    return found
