"""The names that a checkpoint's tensors get as transformers loads them, by its own rules and without weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from fused_lora.checkpoints.files import Checkpoint


class Loaded(NamedTuple):
    """A tensor of the checkpoint, or the ``part``-th of ``parts`` equal blocks of its rows."""

    stored: str
    part: int = 0
    parts: int = 1


def loaded_names(folder: str, names: Iterable[str]) -> dict[str, Loaded]:
    """{parameter of the model: where it is} of all tensors that transformers renames, or splits by rows.

    With and without the beginning that models with a head have around their backbone. Empty without transformers 5, and
    where the ``folder`` has no config of a model whose class is transformers' own.
    """
    try:
        import transformers
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import Chunk, WeightConverter, rename_source_key
    except ImportError:
        return {}
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(folder, local_files_only=True)
        kind: Any = getattr(transformers, config["architectures"][0])
        with torch.device("meta"):
            model = kind(kind.config_class.from_dict(config))
    except Exception:  # whatever a config of another release, or of code beside it, leads to
        return {}
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings: list[Any] = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    prefix, own = model.base_model_prefix, model.state_dict()
    found: dict[str, Loaded] = {}
    for stored in names:
        name, source = rename_source_key(stored, renamings, converters, prefix, own)
        targets = {name: Loaded(stored)}
        if source is not None:
            rule = next(rule for rule in converters if source in rule.source_patterns)
            whole, ends = len(rule.source_patterns) == 1, rule.target_patterns
            by_rows = [type(op) is Chunk and op.dim == 0 for op in rule.operations] == [True]
            parts = enumerate(ends if whole and by_rows else ())
            targets = {name.replace(ends[0], end): Loaded(stored, i, len(ends)) for i, end in parts}
        for target, place in targets.items():
            inner = target.removeprefix(f"{prefix}.")
            found |= {other: place for other in (target, inner, f"{prefix}.{inner}") if other not in found}
    return found


def model_names(base: Checkpoint) -> dict[str, str]:
    """{tensor: the name that it has in the model} of the weights that transformers loads as they are."""
    found: dict[str, str] = {}
    for name, place in loaded_names(base.folder, base.tensors).items() if base.config is not None else ():
        if place.parts == 1 and name.endswith(".weight"):
            found.setdefault(place.stored, name)
    return found
