"""Read an adapter from files, tensors or a model, check it against the model, and lay it out as one run of bytes.

For each layer the bytes hold A [r, K] and then B^T [r, N], contiguous, at the exact rank. Each starts at a multiple of
64 bytes. B is transposed because its rows have r elements, so that their loads would not be aligned. Of stacked experts
r counts the rows of all, expert after expert, and that of each is filled up to whole 16 bytes.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_lora.adapters.checkpoint import CONFIG_NAME, MAX_WEIGHT_BYTES, WEIGHTS_NAME, Adapter, Plan, read_checked
from fused_lora.adapters.read import check_copies, check_model, of_model, warn_left_out, warn_of_another_base
from fused_lora.modules.config import MAX_RANK, scaling
from fused_lora.modules.experts import why_not_fused
from fused_lora.modules.names import mismatch, some
from fused_lora.ops.checks import FLOAT_DTYPES

_ALIGNMENT = 64
Signature = tuple[tuple[int, ...], ...]  # device, inode, size and times of each file
_ALONE = "adapters that are served beside others bring A and B only. Merge this one, or use load_adapter"


class Site(NamedTuple):
    """What adapters of the model may target: its number, path, module, K and N.

    kind: "linear", "embedding", whose K are its tokens, or "experts", a stacked parameter of ``experts`` matrices, or
    the one of a module such as a router, whose module is called at the path ``place``.
    """

    index: int
    path: str
    module: nn.Module
    K: int
    N: int
    kind: str = "linear"
    experts: int = 1

    @property
    def place(self) -> str:
        """The path of the module."""
        return self.path.rpartition(".")[0] if self.kind == "experts" else self.path


def why_not_experts(site: Site) -> str | None:
    """None where adapters of a stacked parameter can be computed as the experts are now, with the store's one hook."""
    return why_not_fused(site.module, site.path.rpartition(".")[2], own_hooks=1)


class Part(NamedTuple):
    """One layer's share of an adapter: the site, rank, scaling and where A and B^T start (bytes)."""

    site: Site
    r: int
    scaling: float
    A: int
    B_t: int

    def views(self, memory: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A [r, K] and B^T [r, N] in the adapter's bytes."""
        size_A, size_B = self.r * self.site.K * dtype.itemsize, self.r * self.site.N * dtype.itemsize
        A, B_t = memory[self.A : self.A + size_A], memory[self.B_t : self.B_t + size_B]
        return A.view(dtype).view(self.r, self.site.K), B_t.view(dtype).view(self.r, self.site.N)


class Packed(NamedTuple):
    """An adapter laid out: its parts in the order of the sites, their bytes, and the tensors (A, B) of each part.

    invocation: of an aLoRA, whose rows begin at these tokens.
    """

    parts: tuple[Part, ...]
    nbytes: int
    tensors: tuple[tuple[Tensor, Tensor], ...]
    invocation: tuple[int, ...] = ()

    def write(self, memory: Tensor, dtype: torch.dtype) -> None:
        """Fill ``memory``, uint8 of at least ``nbytes``, with the tensors in ``dtype``."""
        for part, (A, B) in zip(self.parts, self.tensors, strict=True):
            into_A, into_B_t = part.views(memory, dtype)
            into_A.copy_(A)
            into_B_t.copy_(B.t())


def signature(folder: str) -> Signature | None:
    """The state of the two files in ``folder``, which changes when one is replaced or written; None without them."""
    found = []
    try:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            info = os.stat(os.path.join(folder, name))
            found.append((info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns))
    except (OSError, ValueError):
        return None
    return tuple(found)


def from_folder(
    model: nn.Module,
    sites: Mapping[str, Site],
    folder: str,
    dtype: torch.dtype,
    inside: str | None = None,
    allow_partial: bool = False,
) -> tuple[Packed, Signature | None]:
    """A PEFT checkpoint, and the state of its files that was read; they must lie in the folder ``inside``, if given.

    ``allow_partial`` is that of ``load_adapter``.

    Raises:
        AdapterError: a file is damaged, or does not fit the model. ValueError: it trains biases, or a value is out of
            the range of ``dtype``.
    """
    for _ in range(5):
        before = signature(folder)
        adapter, plan = _read(model, folder, inside, allow_partial, tensors=True)
        if signature(folder) == before:
            break
    else:
        raise ValueError(f"source: {folder!r} changed while it was read, 5 times")
    _check_served(folder, plan)
    check_copies(model, adapter, plan)
    warn_left_out(model, plan)
    warn_of_another_base(model, plan)
    layers = {}
    for path, tensors in adapter.layers.items():
        r, alpha = plan.ranks[path]
        layers[path] = (tensors.lora_A, tensors.lora_B, scaling(r, alpha, plan.config.use_rslora))
    invocation = tuple(plan.config.alora_invocation_tokens or ())
    return _pack(sites, _of_layers(sites, layers), dtype)._replace(invocation=invocation), before


def check_folder(model: nn.Module, folder: str, inside: str | None = None, allow_partial: bool = False) -> Plan:
    """What the config and the header of the weights say. Raises what :func:`from_folder` would for them; no tensor is
    read."""
    plan = _read(model, folder, inside, allow_partial, tensors=False)[1]
    _check_served(folder, plan)
    return plan


def _read(
    model: nn.Module, folder: str, inside: str | None, allow_partial: bool, tensors: bool
) -> tuple[Adapter, Plan]:
    def check(plan: Plan) -> Plan:
        return check_model(model, plan, allow_partial)

    options: dict[str, Any] = dict(tensors=tensors, allow_partial=allow_partial, **of_model(model))
    return read_checked(folder, MAX_WEIGHT_BYTES, check, inside=inside, **options)


def _check_served(folder: str, plan: Plan) -> None:
    if plan.config.bias != "none" or plan.config.lora_bias or plan.config.use_dora:
        more = {name: getattr(plan.config, name) for name in ("bias", "lora_bias", "use_dora")}
        said = ", ".join(f"{name}={value!r}" for name, value in more.items())
        raise ValueError(f"source: {folder!r} has {said}; {_ALONE}")
    if plan.config.alora_invocation_tokens and plan.embeddings:
        raise ValueError(
            f"source: {folder!r} has alora_invocation_tokens and adapts the embedding {min(plan.embeddings)!r}"
        )
    if plan.beside:
        raise ValueError(
            f"source: {folder!r} has modules_to_save or trainable_token_indices, {next(iter(plan.beside))!r} for one; "
            + _ALONE
        )


def from_tensors(
    sites: Mapping[str, Site], layers: Mapping[str, Any], dtype: torch.dtype, allow_partial: bool = False
) -> Packed:
    """An adapter of ``{path: (A [r, K], B [N, r], scaling)}``; ``allow_partial`` leaves out paths that are no site.

    Of stacked experts A and B are in PEFT's packing.

    Raises:
        ValueError: no layers; a path that is no layer of the model that takes LoRA; a shape or rank that does not fit;
            or a value that is not finite in ``dtype``. TypeError: an entry is not such a triple.
    """
    if not layers:
        raise ValueError("source: expected at least one layer, got an empty mapping")
    layers = _of_layers(sites, layers)
    missing = [str(path) for path in layers if path not in sites]
    if missing and (not allow_partial or len(missing) == len(layers)):
        linear = [path for path, site in sites.items() if site.kind == "linear"]
        raise ValueError(f"source: {mismatch(missing, len(layers), linear)}")
    if missing:
        warnings.warn(f"source: {len(missing)} of {len(layers)} layers are left out: {some(missing)}", stacklevel=3)
        layers = {path: entry for path, entry in layers.items() if path in sites}
    for path, entry in layers.items():
        _check_entry(sites[path], entry)
    return _pack(sites, layers, dtype)


def _of_layers(sites: Mapping[str, Site], layers: Mapping[str, Any]) -> dict[str, Any]:
    """The layers with linear ones in place of their parameter ``weight``, which target_parameters may name as well."""

    def place(path: Any) -> Any:
        layer = path.removesuffix(".weight") if isinstance(path, str) else path
        return path if path in sites or layer not in sites or layer in layers else layer

    return {place(path): entry for path, entry in layers.items()}


def _check_entry(site: Site, entry: Any) -> None:
    if not (isinstance(entry, (tuple, list)) and len(entry) == 3):
        raise TypeError(f"source[{site.path!r}]: expected (A, B, scaling), got {type(entry).__name__}")
    A, B, scale = entry
    if not all(isinstance(t, Tensor) and t.dtype in FLOAT_DTYPES for t in (A, B)):
        raise TypeError(f"source[{site.path!r}]: expected floating tensors A and B")
    if any(t.layout != torch.strided or t.is_meta for t in (A, B)):
        raise TypeError(f"source[{site.path!r}]: expected dense tensors with values, none sparse or meta")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"source[{site.path!r}]: expected a number as scaling, got {scale!r}")
    shapes = tuple(A.shape), tuple(B.shape)
    each = site.experts
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != site.K or B.shape[0] != site.N or A.shape[0] % each:
        r = "r" if each == 1 else f"{each} experts * r"
        raise ValueError(f"source[{site.path!r}]: expected A [{r}, {site.K}] and B [{site.N}, {r}], got {shapes}")
    if A.shape[0] != B.shape[1] or not 1 <= A.shape[0] // each <= MAX_RANK:
        raise ValueError(f"source[{site.path!r}]: expected one rank of 1 to {MAX_RANK} in A and B, got {shapes}")


def largest_scale(dtype: torch.dtype) -> float:
    """The largest allowed scaling: the largest number of the dtype in which such adapters are summed."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).max


def _pack(sites: Mapping[str, Site], layers: Mapping[str, Any], dtype: torch.dtype) -> Packed:
    parts, tensors, end = [], [], 0
    for path in sorted(layers, key=lambda path: sites[path].index):
        site, (A, B, scale) = sites[path], layers[path]
        A, B = A.detach(), B.detach()
        if not abs(scale) <= largest_scale(dtype):
            most = f"{largest_scale(dtype):.3g}"
            raise ValueError(f"source[{path!r}]: expected a finite scaling of at most {most}, got {str(scale)[:40]}")
        for name, tensor in (("A", A), ("B", B)):
            if not torch.isfinite(tensor.to(dtype)).all():
                raise ValueError(f"source[{path!r}]: {name} has values that are not finite in {dtype}")
        if site.kind == "experts":
            A, B = by_expert(A, B, site.experts, dtype)
        r = A.shape[0]
        B_t = _aligned(end + r * site.K * dtype.itemsize)
        parts.append(Part(site, r, float(scale), end, B_t))
        tensors.append((A, B))
        end = _aligned(B_t + r * site.N * dtype.itemsize)
    if not any(part.scaling for part in parts):
        warnings.warn("source: the scaling of all layers is 0, so the adapter has no effect", stacklevel=3)
    return Packed(tuple(parts), end, tuple(tensors))


def by_expert(lora_A: Tensor, lora_B: Tensor, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """lora_A [experts * r, K] and lora_B [N, experts * r] of PEFT's packing with the expert slowest in both.

    r is filled up with zeros to whole 16 bytes of ``dtype``, as grouped products want it.
    """
    A = lora_A.reshape(experts, -1, lora_A.shape[1])
    B = lora_B.reshape(len(lora_B), -1, experts).transpose(1, 2)
    missing = -A.shape[1] % (16 // dtype.itemsize)
    A, B = nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))
    return A.flatten(0, 1), B.flatten(1, 2)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
