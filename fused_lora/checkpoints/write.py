"""Write an adapter layer by layer, as PEFT's files."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fused_lora.adapters.checkpoint import CONFIG_NAME, EMBEDDING_SLOTS, KEY_PREFIX, WEIGHTS_NAME
from fused_lora.adapters.expert_files import as_peft, stacks_of_layers
from fused_lora.adapters.staging import replace_directory
from fused_lora.adapters.tensorfile import TensorEntry, write_each
from fused_lora.adapters.write import config_text, write_files
from fused_lora.modules.config import LoraConfig
from fused_lora.modules.experts import file_paths

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Shapes = Mapping[str, tuple[int, int, int]]  # path of a layer or parameter -> (r, K, N), of stacked experts of each
Beside = tuple[TensorEntry, Callable[[], Tensor]]  # dtype and shape of a further tensor, and what reads it


def write_layers(
    folder: str,
    config: LoraConfig,
    shapes: Shapes,
    make: Callable[[str], tuple[Tensor, Tensor]],
    dtype: torch.dtype = torch.float32,
    alphas: Mapping[str, float] | None = None,
    *,
    embeddings: Container[str] = (),
    experts: Mapping[str, int] = MappingProxyType({}),
    convolutions: Container[str] = (),
    beside: Mapping[str, Beside] = MappingProxyType({}),
) -> None:
    """Write an adapter; ``make(path)`` gives lora_A [r, K] and lora_B [N, r], one layer at a time.

    The folder appears as a whole. The config is that of ``config`` but for ranks, alphas and targets.

    Args:
        alphas: {path: lora_alpha}; None: the ranks, so that the scaling is 1.
        embeddings: the paths that are, with lora_A [r, num_embeddings] and lora_B [embedding_dim, r].
        experts: how many each of the paths has that is of a parameter (``target_parameters``), in the order of their
            module; lora_A [experts * r, K] and lora_B [N, r * experts] in PEFT's packing.
        convolutions: the paths that are, of 1x1; PEFT has lora_A [r, K, 1, 1] and lora_B [N, r, 1, 1] for them.
        beside: further tensors by key, written as they are.

    Raises ValueError where a tensor has not its shape or is not finite in ``dtype``, and for another dtype than fp32,
    bf16 and fp16. The folder is then as before.
    """
    config = _config(config, shapes, alphas, experts)
    entries = _entries(shapes, dtype, embeddings, experts, convolutions)
    entries += [(key, e.dtype, e.shape) for key, (e, _) in beside.items()]

    def each() -> Iterator[Tensor]:
        for path, (r, K, N) in shapes.items():
            rows = r * experts.get(path, 1)
            for tensor, shape in zip(make(path), ((rows, K), (N, rows)), strict=True):
                cast = tensor.to(dtype)
                if tuple(cast.shape) != shape or not bool(cast.isfinite().all()):
                    raise ValueError(f"{path}: expected finite numbers {list(shape)} in {dtype}, got others")
                yield cast
        for _, read in beside.values():
            yield read()

    def write(stage: str) -> tuple[str, str]:
        with open(os.path.join(stage, WEIGHTS_NAME), "xb", buffering=0) as file:
            write_each(file, entries, each())
        with open(os.path.join(stage, CONFIG_NAME), "x", encoding="utf-8") as file:
            file.write(config_text(config.to_dict()))
        return CONFIG_NAME, WEIGHTS_NAME

    replace_directory(folder, write)


def write_stacked(
    folder: str,
    config: LoraConfig,
    shapes: Shapes,
    make: Callable[[str], tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    alphas: Mapping[str, float],
    source: str,
) -> list[str]:
    """:func:`write_layers`, but layers of single experts go into stacked parameters as transformers 5 has them.

    source: the file that they are from, for errors.

    Returns:
        The paths of these parameters, none where no layer is an expert's.

    Raises AdapterError where the parts of a parameter do not belong together.
    """
    sizes = {path: (K, N) for path, (_, K, N) in shapes.items()}
    entries = {key: TensorEntry(kind, shape, 0, 0) for key, kind, shape in _entries(shapes, dtype)}
    stacks = stacks_of_layers(sizes)
    found = as_peft(source, entries, _config(config, shapes, alphas), None, KEY_PREFIX, stacks)
    if not stacks(None):
        write_layers(folder, config, shapes, make, dtype, alphas)
        return []
    tensors = {}
    for path in shapes:
        tensors |= dict(zip((f"{KEY_PREFIX}{path}.lora_{side}.weight" for side in "AB"), make(path), strict=True))
    tensors = {key: tensor.to(dtype) for key, tensor in found.convert(tensors).items()}
    for key, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{key}: expected finite numbers in {dtype}, got others")
    text = config_text(found.config.to_dict())
    replace_directory(folder, lambda stage: write_files(stage, text, tensors))
    return sorted(stack.path for stack in stacks(None).values())


def _entries(
    shapes: Shapes,
    dtype: torch.dtype,
    embeddings: Container[str] = (),
    experts: Mapping[str, int] = MappingProxyType({}),
    convolutions: Container[str] = (),
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """(key, dtype, shape) of all tensors."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {DTYPES}, got {dtype}")
    entries, wrappers = [], file_paths(experts)
    for path, (r, K, N) in shapes.items():
        A, B = EMBEDDING_SLOTS if path in embeddings else (".lora_A.weight", ".lora_B.weight")
        place, rows = KEY_PREFIX + wrappers.get(path, path), r * experts.get(path, 1)
        kernel = (1, 1) if path in convolutions else ()
        entries += [(place + A, dtype, (rows, K, *kernel)), (place + B, dtype, (N, rows, *kernel))]
    return entries


def _config(
    config: LoraConfig, shapes: Shapes, alphas: Mapping[str, float] | None, experts: Iterable[str] = ()
) -> LoraConfig:
    ranks = {path: r for path, (r, _, _) in shapes.items()}
    alphas = ranks if alphas is None else alphas
    config = LoraConfig.from_dict(config.to_dict())
    config.r, config.rank_pattern = _with_exceptions(ranks)
    config.lora_alpha, config.alpha_pattern = _with_exceptions(alphas)
    config.use_rslora = config.use_rslora and alphas is not ranks
    config.target_modules, config.exclude_modules = set(shapes).difference(experts), None
    config.target_parameters = sorted(experts) or None
    config.layers_to_transform = config.layers_pattern = None
    config.inference_mode = True
    config.validate()
    return config


def _with_exceptions(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The most common value, and a pattern for each path that has another."""
    held = list(values.values())
    common = max(dict.fromkeys(held), key=held.count)
    escaped = {"^" + path.replace(".", "\\."): value for path, value in values.items() if value != common}
    return common, escaped
