"""One small model trained by every route: PEFT's own, accelerated, installed, injected; and the data to train it on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fused_lora
from fused_lora.integrations import peft as peft_integration
from fused_lora.integrations.peft_linear import CALLS
from helpers.seeds import shifted

ROUTES = ("accelerate", "install", "inject")
VOCABULARY = 61
ADAPTER = {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def llama(dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    """A Llama of two layers and 33 thousand parameters with random weights, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    tokens = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **tokens, **fields})).to(dtype).train()


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The weights of :func:`llama` that ``seed`` stands for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shifted(seed))
        return llama(dtype)


def counting_texts(count: int, length: int = 12, seed: int = 0) -> Tensor:
    """[count, length] token ids that count upwards from a random start: something that can be learned."""
    starts = torch.randint(0, VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(shifted(seed)))
    return (starts + torch.arange(length)) % VOCABULARY


@contextmanager
def built(route: str, base: nn.Module, seed: int = 0, **fields: Any) -> Iterator[nn.Module]:
    """``base`` with a LoRA adapter drawn under ``seed``, by one of ROUTES or by "peft" alone."""
    torch.manual_seed(shifted(seed))
    fields = {**ADAPTER, **fields}
    if route == "inject":
        yield fused_lora.inject(base, fused_lora.LoraConfig(**fields))
        return
    import peft

    if route == "install":
        with installed():
            yield peft.get_peft_model(base, peft.LoraConfig(**fields))
        return
    model = peft.get_peft_model(base, peft.LoraConfig(**fields))
    yield fused_lora.accelerate(model) if route == "accelerate" else model


@contextmanager
def installed() -> Iterator[None]:
    """``integrations.peft.install()`` for the time of the block."""
    peft_integration.install()
    try:
        yield
    finally:
        peft_integration.uninstall()


@contextmanager
def counted_calls() -> Iterator[dict[str, int]]:
    """The calls of accelerated layers during the block, fused or by reason of the fallback, filled in at its end."""
    before = dict(CALLS)
    found: dict[str, int] = {}
    yield found
    found.update({reason: n - before.get(reason, 0) for reason, n in CALLS.items() if n > before.get(reason, 0)})


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by their name in the bare model, the same for every route."""
    named = model.named_parameters()
    return {n.removeprefix("module.").removeprefix("base_model.model."): p for n, p in named if p.requires_grad}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the trainable parameters, whole even where the parameters are sharded."""
    found = {}
    for name, parameter in trainable(model).items():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
    return found


def train(
    model: nn.Module,
    data: Tensor,
    rows: int = 4,
    lr: float = 5e-3,
    autocast: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Losses of a plain loop over ``data`` [n, length], ``rows`` at a time, with a new AdamW or the given optimizer."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model).values(), lr=lr)
    losses = []
    for ids in data.split(rows):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def largest_relative(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest ||a - b|| / ||b|| over the tensors of two equally named sets."""
    assert ours.keys() == theirs.keys() and ours, f"{sorted(ours)[:3]} and {sorted(theirs)[:3]}"
    return max(((ours[n].double() - t.double()).norm() / t.double().norm()).item() for n, t in theirs.items())
