"""An adapter's files, checked as a whole and then read tensor by tensor."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_lora.adapters.checkpoint import MAX_WEIGHT_BYTES, Plan, path_text, read_checked
from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.tensorfile import check_unchanged, each_tensor, open_regular, read_header, state_of
from fused_lora.checkpoints.files import told
from fused_lora.checkpoints.stream import read_tensor
from fused_lora.modules.config import MAX_ALPHA, scaling

_STACKS = 4  # lora_A and lora_B of two stacks, whose experts may take turns in a file

Weighted = str | os.PathLike | tuple[str | os.PathLike, float]


class AdapterFile:
    """One adapter that stays open: what its headers say, and its tensors on demand.

    Attributes:
        folder: as it was named. weight: what its scaling is multiplied by. plan: its checked headers.
        sha256: of the file of weights.
    """

    def __init__(
        self, folder: str, weight: float, plan: Plan, file: Any, state: tuple[int, int], raw: bytes, sha256: str
    ):
        self.folder, self.weight, self.plan, self.sha256 = folder, weight, plan, sha256
        self._file, self._state, self._data = file, state, len(raw)
        self._stacks: dict[str, Tensor] = {}  # the last few that were asked for

    def tensor(self, key: str) -> Tensor:
        """The tensor under a key of the file, in its dtype, on the CPU. Safe in several threads."""
        # no seek: pieces of a merge are computed, and read from here, in several threads
        found = read_tensor(self.plan.weights, self._file.fileno(), self._data, self.plan.entries[key])
        check_unchanged(self.plan.weights, self._file.fileno(), self._state)
        return found

    def experts(self, path: str, field: str) -> Tensor:
        """lora_A [experts, r, K] or lora_B [experts, N, r], from PEFT's packing, [experts * r, K] and [N, r * experts].

        One expert where the layer is no stack. Its rank must be known: ``plan.ranks`` has it from the checkpoint, or
        from the config alone.
        """
        key, r = self.plan.slots[path][field], self.plan.ranks[path][0]
        if key not in self._stacks:
            while len(self._stacks) >= _STACKS:
                del self._stacks[next(iter(self._stacks))]
            whole = self.tensor(key)
            by_expert = whole.view(-1, r, whole.shape[1]) if field == "lora_A" else whole.view(len(whole), r, -1)
            self._stacks[key] = by_expert if field == "lora_A" else by_expert.permute(2, 0, 1).contiguous()
        return self._stacks[key]

    def sizes(self, path: str) -> tuple[int, int, int, int]:
        """(experts, r, K, N) of a layer's factors; one expert where it is no stack."""
        keys, r = self.plan.slots[path], self.plan.ranks[path][0]
        (rows, K), (N, _) = (self.plan.entries[keys[field]].shape for field in ("lora_A", "lora_B"))
        return rows // r, r, K, N

    def scaling(self, path: str, weighted: bool = True) -> float:
        """What lora_B lora_A of a layer is multiplied by, with the adapter's weight or without."""
        r, alpha = self.plan.ranks[path]
        return scaling(r, alpha, self.plan.config.use_rslora) * (self.weight if weighted else 1.0)

    def acts(self) -> bool:
        """Whether it changes anything. Ranks of stacks must be known."""
        plan = self.plan
        if plan.biases or plan.beside:
            return True
        for path, keys in plan.slots.items():
            if keys.keys() - {"lora_A", "lora_B"}:  # a magnitude, or a bias
                return True
            if self.scaling(path) and all(bool(self.tensor(key).any()) for key in keys.values()):
                return True
        return False

    def describe(self) -> dict[str, Any]:
        """Which adapter it is, for a report and for the merged files."""
        base = self.plan.config.base_model_name_or_path
        return {
            "path": told(self.folder),
            "weight": self.weight,
            "sha256": self.sha256,
            "base_model_name_or_path": base,
        }


@contextlib.contextmanager
def open_adapters(adapters: Weighted | Iterable[Weighted]) -> Iterator[list[AdapterFile]]:
    """Open adapters of all kinds and check every byte of them: structure, digest, finite values.

    Raises:
        AdapterError: a file is malformed, or of a kind that is not supported.
        TypeError, ValueError: no adapter, no path, or a weight that is no finite number.
    """
    with contextlib.ExitStack() as stack:
        yield [_open(stack, path, weight) for path, weight in _pairs(adapters)]


def _pairs(adapters: Any) -> Sequence[tuple[Any, float]]:
    lone = isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[1], (int, float))
    several: Any = [adapters] if lone or isinstance(adapters, (str, bytes, os.PathLike)) else adapters
    if not isinstance(several, Iterable):
        raise TypeError(f"adapters: expected paths or pairs (path, weight), got {adapters!r:.200}")
    pairs = [one if isinstance(one, tuple) else (one, 1.0) for one in several]
    if not pairs:
        raise ValueError("adapters: expected at least one adapter, got none")
    for pair in pairs:
        if len(pair) != 2 or isinstance(pair[1], bool) or not isinstance(pair[1], (int, float)):
            raise TypeError(f"adapters: expected paths or pairs (path, weight), got {pair!r:.200}")
        if not -MAX_ALPHA <= pair[1] <= MAX_ALPHA:  # as of lora_alpha
            expected = f"a finite weight of at most {MAX_ALPHA:.0f} in size for {pair[0]!r:.200}"
            raise ValueError(f"adapters: expected {expected}, got {pair[1]!r:.100}")
    return pairs


def _open(stack: contextlib.ExitStack, path: Any, weight: float) -> AdapterFile:
    folder = path_text("adapters", path)
    _, plan = read_checked(folder, MAX_WEIGHT_BYTES, lambda plan: plan, tensors=False, all_kinds=True)
    with open_regular(plan.weights, MAX_WEIGHT_BYTES) as (opened, size):
        file, state = stack.enter_context(io.FileIO(os.dup(opened.fileno()))), state_of(opened.fileno())
    header = read_header(plan.weights, file, size)
    if header.entries != plan.entries:
        raise AdapterError(plan.weights, None, "a file that stays as it is", "another file by now")
    whole = hashlib.sha256(header.raw)
    for _, tensor in each_tensor(plan.weights, file, header):
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return AdapterFile(folder, float(weight), plan, file, state, header.raw, whole.hexdigest())
