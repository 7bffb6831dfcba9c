"""Two processes that save one model, sharded in several ways."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fused_lora
from fused_lora.integrations.peft import layer_report
from helpers.seeds import shifted


def run_case(folder: str) -> dict[str, Any]:
    """What a save of each kind of model said in each process; the adapters are in ``folder``."""
    root = Path(folder)
    if torch.distributed.get_rank() == 0:
        fused_lora.save_adapter(_model(), root / "bare")
        (root / "fsdp2, not a folder").write_text("a file")
    torch.distributed.barrier()
    found = {}
    for kind in ("fsdp2", "fsdp2 linears", "fsdp2, not a folder", "ddp", "fsdp1, not summoned"):
        found[kind] = _in_all(_save, _sharded(kind), root / kind)
    for kind in ("fsdp2", "embedding", "fsdp1"):
        model = _embedding() if kind == "embedding" else _sharded(kind)
        held = [parameter.shape for parameter in model.parameters()]
        found[f"{kind}, reported"] = _in_all(lambda model: [str(row) for row in layer_report(model)], model)
        assert held == [parameter.shape for parameter in model.parameters()]
    with FullyShardedDataParallel.summon_full_params(model):
        found["fsdp1"] = _in_all(_save, model, root / "fsdp1")
    return found


def _model() -> nn.Module:
    torch.manual_seed(shifted(3))  # the same in every process
    model = nn.Sequential(*(nn.Sequential(OrderedDict(fc=nn.Linear(6, 6), norm=nn.LayerNorm(6))) for _ in range(2)))
    config = fused_lora.LoraConfig(r=3, target_modules=["fc"], init_lora_weights=False, bias="all")
    return fused_lora.inject(model, config)


def _sharded(kind: str) -> nn.Module:
    model = _model()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind.startswith("fsdp1"):
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    mesh = init_device_mesh("cpu", (2,))
    for block in model:
        if kind == "fsdp2 linears":
            fully_shard(block.fc, mesh=mesh)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _embedding() -> nn.Module:
    model = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6))
    return fully_shard(fused_lora.accelerate(peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"]))))


def _save(model: nn.Module, folder: Path) -> str:
    try:
        fused_lora.save_adapter(model, folder)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "saved"


def _in_all(action: Any, *args: Any) -> list[Any]:
    said: list[Any] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, action(*args))
    torch.distributed.barrier()
    return said
