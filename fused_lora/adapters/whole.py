"""Whole parameters where a process holds a part of them: gathered where that can be done, else refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# where torch's layers and transformers' Conv1D keep the length of their bias
_LENGTHS = ("out_features", "normalized_shape", "num_features", "num_channels", "out_channels", "nf")


def bias_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the module's bias when it is whole; None for a kind of module that does not tell."""
    size = next((size for name in _LENGTHS if (size := getattr(module, name, None)) is not None), None)
    return None if size is None else (size,) if isinstance(size, int) else tuple(size)


def check_whole(name: str, tensor: Tensor, shape: tuple[int, ...] | None) -> None:
    """Raise RuntimeError unless ``tensor`` has the ``shape`` of the whole parameter (None: any that is not empty)."""
    if tuple(tensor.shape) != tuple(getattr(tensor, "ds_shape", tensor.shape)):
        raise RuntimeError(
            f"{name} is sharded by DeepSpeed ZeRO-3: expected {list(tensor.ds_shape)}, found {list(tensor.shape)}. "  # type: ignore[attr-defined]
            "Make the call inside deepspeed.zero.GatheredParameters(list(model.parameters())), in all processes"
        )
    if not tensor.numel() or (shape is not None and tuple(tensor.shape) != shape):
        wanted = "a parameter that is not empty" if shape is None else f"the shape {list(shape)} of the whole layer"
        raise RuntimeError(
            f"{name}: expected {wanted}, found {list(tensor.shape)}. Is the model sharded? Under FSDP1 make the call "
            "inside FullyShardedDataParallel.summon_full_params(model), in all processes"
        )


def gather(tensors: Mapping[Any, Tensor]) -> tuple[dict[Any, Tensor], Any]:
    """(the tensors with DTensors gathered, their device mesh or None). All processes of the mesh must call it.

    Raises RuntimeError when the DTensors are on several meshes.
    """
    sharded = {name: tensor for name, tensor in tensors.items() if hasattr(tensor, "full_tensor")}
    meshes = {tensor.device_mesh for tensor in sharded.values()}  # type: ignore[attr-defined]
    if len(meshes) > 1:
        raise RuntimeError(f"expected DTensors on one device mesh, found {sorted(map(str, meshes))}")
    gathered = {name: tensor.full_tensor().cpu() for name, tensor in sharded.items()}  # type: ignore[attr-defined]
    return {**tensors, **gathered}, next(iter(meshes), None)


def once(mesh: Any, action: Callable[[], None]) -> None:
    """Do ``action`` in the first process of ``mesh``, and return in all of them when it is done (None: do it here).

    Raises what the action raises in the first process, and RuntimeError in the others.
    """
    if mesh is None:
        return action()
    first = int(mesh.mesh.flatten()[0])
    failed = torch.zeros(1, device=mesh.device_type)
    try:
        if torch.distributed.get_rank() == first:
            failed += 1
            action()
            failed -= 1
    finally:
        for dimension in range(mesh.ndim):
            torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX, group=mesh.get_group(dimension))
    if failed.item():
        raise RuntimeError(f"process {first} could not write the files; its own error says why")
