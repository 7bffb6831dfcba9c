"""Two gloo processes on a CPU: how they are started, and what each does to train under DDP and FSDP2."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fused_lora
from helpers import training

WORLD = 2
STEPS, ROWS = 4, 4  # rows of one process


def run_in_processes(
    cases: Mapping[str, Mapping[str, Any]], folder: Path, run: Callable | None = None
) -> dict[str, dict[str, Any]]:
    """Every case of ``run`` (:func:`run_case`) in turn, in one group of WORLD processes; results of process 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, args=(dict(cases), port, str(folder), run or run_case), nprocs=WORLD)
    return torch.load(folder / "results.pt")


def run_case(kind: str, route: str, **fields: Any) -> dict[str, Any]:
    """Losses of STEPS steps, the first step's gradients and the final parameters, of one way to train.

    Args:
        kind: "one" trains on the whole batch in this process; "ddp" and "fsdp2" (decoder layers sharded), "fsdp2
            linears" (every LoRA layer sharded too) and "fsdp2 parts" (every lora_A and lora_B) on its share of it.
        route: as in ``training.built``. fields: of its LoraConfig; ``checkpointing`` turns gradient checkpointing on.
    """
    checkpointing = fields.pop("checkpointing", False)
    data = training.counting_texts(STEPS * ROWS * WORLD).reshape(STEPS, WORLD, ROWS, -1)
    with training.built(route, training.tiny_llama(dtype=torch.float64), init_lora_weights=False, **fields) as model:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        with training.counted_calls() as calls:
            found = _train(kind, _wrap(kind, model), data)
        explained = {str(layer) for layer in fused_lora.explain(model).layers}
    return {**found, "calls": calls, "explained": explained}


def _train(kind: str, model: nn.Module, data: torch.Tensor) -> dict[str, Any]:
    dist = torch.distributed
    optimizer = torch.optim.AdamW(training.trainable(model).values(), lr=5e-3)
    losses, first = [], {}
    for batch in data:
        ids = batch.flatten(0, 1) if kind == "one" else batch[dist.get_rank()]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        first = first or training.gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    if kind != "one":
        dist.all_reduce(losses)
        losses /= WORLD
    final = {n: p.detach() for n, p in training.trainable(model).items()}
    final = {n: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for n, p in final.items()}
    return {"losses": losses, "gradients": first, "final": final, "apart": 0.0 if kind == "one" else _apart(final)}


def _apart(tensors: Mapping[str, torch.Tensor]) -> float:
    """How far a checksum of the tensors differs between the processes."""
    sums = torch.stack([t.double().sum() for t in tensors.values()])
    low, high = sums.clone(), sums.clone()
    torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX)
    return (high - low).max().item()


def _wrap(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind.startswith("fsdp2"):
        from torch.distributed.fsdp import fully_shard

        inner = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        if kind == "fsdp2 parts":
            inner = [part["default"] for layer in inner for part in (layer.lora_A, layer.lora_B)]
        for module in (*(inner if kind != "fsdp2" else ()), *model.get_decoder().layers, model):
            fully_shard(module)
    return model


def _process(rank: int, cases: Mapping[str, Mapping[str, Any]], port: int, folder: str, run: Callable) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        results = {name: run(**case) for name, case in cases.items()}
        if rank == 0:
            torch.save(results, Path(folder) / "results.pt")
    finally:
        torch.distributed.destroy_process_group()
    os._exit(0)  # models still hold groups, whose threads torch may not have joined: an end by Python aborted at times
