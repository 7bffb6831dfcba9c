"""State dicts and merges: a weight that an adapter is merged into is neither overwritten nor taken for the base's own.

Without this, loading a base over a merge drops the adapter, and loading merged weights into a model whose adapters are
not merged adds it twice, both without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_lora.bases import torchao

_MERGED = "merged"  # in the metadata of a state dict, which torch.save keeps: names of the adapters


def _equal(left: Tensor, right: Tensor) -> bool:
    mine, theirs = torchao.parts(left), torchao.parts(right)  # torch.equal takes no tensor of torchao's
    return mine.keys() == theirs.keys() and all(torch.equal(part, theirs[name]) for name, part in mine.items())


class MergedState:
    """For a module with a ``base_layer`` and ``merged_adapters``."""

    def _merged_weights(self) -> list[tuple[str, Any, list[str]]]:
        """Weights that merges change: end of the key in a state dict, who has it as ``weight``, adapters in it."""
        return [("base_layer.weight", self, list(getattr(self, "owner", self).merged_adapters))]  # type: ignore[attr-defined]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        module: Any = super()
        module._save_to_state_dict(destination, prefix, keep_vars)
        names = list(dict.fromkeys(name for *_, merged in self._merged_weights() for name in merged))
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if names and metadata is not None:
            metadata[_MERGED] = names

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, local_metadata: Mapping[str, Any], *rest: Any
    ) -> None:
        theirs = local_metadata.get(_MERGED, [])
        for end, holder, names in self._merged_weights():
            key = f"{prefix}{end}"
            new = state_dict.get(key)
            if isinstance(new, Tensor) and names:
                weight = holder.weight
                if new.is_meta or weight.is_meta or not _equal(new.to(weight.device), weight):
                    raise RuntimeError(f"{key}: {names} are merged into it; unmerge before load_state_dict")
            elif isinstance(new, Tensor) and theirs:
                raise RuntimeError(
                    f"{key}: the state was taken while {theirs} were merged, and would add them twice; unmerge before "
                    "state_dict"
                )
        module: Any = super()
        module._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
