"""Quantised weights of a checkpoint as transformers saves them: bitsandbytes' 4 and 8 bits, and block-scaled fp8.

A merge cannot add to so few bits. Where an adapter is for such a weight, the whole checkpoint becomes a dense one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_lora.adapters.errors import AdapterError
from fused_lora.adapters.tensorfile import TensorEntry
from fused_lora.bases import bitsandbytes_4bit, bitsandbytes_8bit, transformers_fp8
from fused_lora.checkpoints.files import Checkpoint, Shard

_METHODS = ("bitsandbytes", "fp8")
_STATE = ".quant_state.bitsandbytes__"
_FP8 = torch.float8_e4m3fn

Tensors = Mapping[str, tuple[Shard, TensorEntry]]
Reader = Callable[[Tensor, int], Tensor]  # (bytes of whole rows, the first of them) -> the rows in fp32


@dataclass(frozen=True)
class Packed:
    """One quantised weight.

    shape: [N, K] that it stands for. row_bytes: of its codes. parts: the tensors beside it. reader: reads these and
    gives what dequantises rows, on a CPU.
    """

    shape: tuple[int, int]
    row_bytes: int
    parts: list[str]
    reader: Callable[[], Reader]


def find_quantised(base: Checkpoint) -> dict[str, Packed]:
    """{name: weight} of all that is quantised in a known way.

    Raises AdapterError where the tensors beside a weight are not what its kind has.
    """
    settings: Any = (base.config or {}).get("quantization_config")
    block = settings.get("weight_block_size", ()) if isinstance(settings, dict) else ()
    found = {}
    for name, (_, entry) in base.tensors.items():
        if not name.endswith("weight"):
            continue
        path = name.removesuffix("weight")
        states = [f"{name}{_STATE}{kind}" for kind in ("nf4", "fp4") if f"{name}{_STATE}{kind}" in base.tensors]
        if states:
            found[name] = _four_bits(base.tensors, name, states[0])
        elif entry.dtype is torch.int8 and f"{path}SCB" in base.tensors:
            found[name] = _eight_bits(base.tensors, name, path)
        elif entry.dtype is _FP8 and f"{name}_scale_inv" in base.tensors and len(entry.shape) == 2:
            found[name] = _fp8(base.tensors, name, path, block)
    return found


def check_dequantised(base: Checkpoint, packed: Mapping[str, Packed], dense: tuple[torch.dtype, ...]) -> None:
    """Raise AdapterError unless every tensor of the checkpoint has a floating dtype or another one that is no weight's
    (``dense``), or will be dequantised."""
    settings: Any = (base.config or {}).get("quantization_config") or {}
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if settings and method not in _METHODS:
        raise AdapterError(base.folder, "quantization_config", f"quant_method {' or '.join(_METHODS)}", method)
    parts = {part for weight in packed.values() for part in weight.parts}
    for name, (shard, entry) in base.tensors.items():
        if name not in packed and name not in parts and entry.dtype not in dense:
            expected = "a tensor that is not quantised, or a linear layer of bitsandbytes or block-scaled fp8"
            raise AdapterError(shard.path, name, expected, f"{entry.dtype} {list(entry.shape)}")


def _read(tensors: Tensors, name: str) -> Tensor:
    return tensors[name][0].read(name)


def _expect(tensors: Tensors, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> None:
    """AdapterError unless there is such a tensor; its shape may have further ones."""
    if name not in tensors:
        raise AdapterError(next(iter(tensors.values()))[0].path, name, f"a tensor {list(shape)}", "no such tensor")
    shard, entry = tensors[name]
    if tuple(n for n in entry.shape if n != 1) != tuple(n for n in shape if n != 1) or entry.dtype not in dtypes:
        expected = f"{list(shape)} of {' or '.join(map(str, dtypes))}"
        raise AdapterError(shard.path, name, expected, f"{list(entry.shape)} of {entry.dtype}")


def _check_bitsandbytes(shard: Shard, name: str) -> None:
    if not bitsandbytes_4bit.is_installed():
        raise AdapterError(shard.path, name, "bitsandbytes to dequantise it with", "it is not installed")


def _four_bits(tensors: Tensors, name: str, state: str) -> Packed:
    shard, entry = tensors[name]
    _check_bitsandbytes(shard, name)
    try:
        about = json.loads(bytes(_read(tensors, state).view(torch.uint8).tolist()))
        (N, K), size, kind = about["shape"], about["blocksize"], about["quant_type"]
        inner = about["nested_blocksize"] if f"{name}.nested_absmax" in tensors else None
        offset = float(about["nested_offset"]) if inner else 0.0
        known = size in bitsandbytes_4bit.BLOCK_SIZES and kind == state.removeprefix(f"{name}{_STATE}")
        known = known and all(type(n) is int and n > 0 for n in (N, K, inner or 1))
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            shard.path, state, "the state of a 4-bit weight", f"{type(error).__name__}: {error}"
        ) from None
    if not known or K % size or entry.dtype not in bitsandbytes_4bit.STORAGE or entry.end - entry.begin != N * K // 2:
        expected = "4 bits for each number, in rows of whole blocks of a known size"
        raise AdapterError(shard.path, name, expected, f"{entry.end - entry.begin} bytes for {about}")
    count = N * K // size
    parts = [state, f"{name}.absmax", f"{name}.quant_map"]
    _expect(tensors, parts[1], (count,), torch.uint8 if inner else torch.float32)
    _expect(tensors, parts[2], (16,), torch.float32)
    if inner:
        parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
        _expect(tensors, parts[3], (-(-count // inner),), torch.float32)
        _expect(tensors, parts[4], (256,), torch.float32)

    def reader() -> Reader:
        held = {part.removeprefix(f"{name}."): _read(tensors, part).reshape(-1) for part in parts}
        scales = held["absmax"]
        if inner:
            mean = torch.tensor(offset, dtype=torch.float32, device="cpu")
            of_scales = held["nested_quant_map"], held["nested_absmax"], inner, mean
            scales = bitsandbytes_4bit.nested_scales(scales, *of_scales)

        def values(data: Tensor, first: int) -> Tensor:
            rows = data.numel() * 2 // K
            own = scales[first * K // size : (first + rows) * K // size]
            return bitsandbytes_4bit.values_of_rows(data, own, size, kind, (rows, K), torch.float32)

        return values

    return Packed((N, K), K // 2, parts, reader)


def _eight_bits(tensors: Tensors, name: str, path: str) -> Packed:
    shard, entry = tensors[name]
    _check_bitsandbytes(shard, name)
    if len(entry.shape) != 2:
        raise AdapterError(shard.path, name, "a matrix of int8", list(entry.shape))
    N, K = entry.shape
    _expect(tensors, f"{path}SCB", (N,), torch.float32)
    parts = [f"{path}SCB", *([f"{path}weight_format"] if f"{path}weight_format" in tensors else [])]
    if len(parts) > 1 and int(_read(tensors, parts[1])) != 0:
        raise AdapterError(shard.path, parts[1], "0, rows as they are", int(_read(tensors, parts[1])))

    def reader() -> Reader:
        scales = _read(tensors, parts[0]).reshape(-1)
        of_rows = bitsandbytes_8bit.values_of_rows
        return lambda data, first: of_rows(data.view(torch.int8).view(-1, K), scales[first:][: data.numel() // K])

    return Packed((N, K), K, parts, reader)


def _fp8(tensors: Tensors, name: str, path: str, block: Any) -> Packed:
    shard, entry = tensors[name]
    N, K = entry.shape
    sizes = [N, K] if block is None else block
    if not isinstance(sizes, (list, tuple)) or [type(n) for n in sizes] != [int, int] or min(sizes) < 1:
        expected = "a quantization_config with weight_block_size, two positive integers or null, for its scales"
        raise AdapterError(shard.path, name, expected, block)
    rows, columns = sizes
    scales = f"{name}_scale_inv"
    kinds = torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu
    _expect(tensors, scales, (-(-N // rows), -(-K // columns)), *kinds)
    others = [f"{path}{end}" for end in ("activation_scale", "input_scale") if f"{path}{end}" in tensors]

    def reader() -> Reader:
        held, of_rows = _read(tensors, scales), transformers_fp8.values_of_rows
        return lambda data, first: of_rows(data.view(_FP8).view(-1, K), held, (rows, columns), first)

    return Packed((N, K), K, [scales, *others], reader)
