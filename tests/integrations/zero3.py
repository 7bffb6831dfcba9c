"""Train, save, merge and unmerge under DeepSpeed's own ZeRO-3, which the tests imitate: make test-deepspeed.

Losses are PEFT's, also where each LoRA layer gathers its parameters together and runs fused. What needs whole
parameters is refused by name outside of GatheredParameters and right inside.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import deepspeed
import peft
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import distributed, nn

import fused_lora
from fused_lora.testing.numeric import assert_close

sys.path.insert(0, str(Path(__file__).parent.parent))
from helpers.seeds import shifted
from helpers.training import tiny_llama

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
FIELDS = {"r": 4, "target_modules": "all-linear"}


def injected() -> nn.Module:
    """A model of inject."""
    return fused_lora.inject(tiny_llama(), fused_lora.LoraConfig(**FIELDS))


def wrapped() -> nn.Module:
    """A model of PEFT's."""
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**FIELDS))


def train(make: Callable[[], nn.Module], leaf: type | None = None) -> tuple[nn.Module, torch.Tensor, list[float]]:
    """The model after five steps, this process's tokens, and the losses. leaf: the layers that gather as a whole."""
    torch.manual_seed(shifted(0))
    model = make()
    model.enable_input_require_grads()
    if leaf is not None:
        set_z3_leaf_modules(model, [leaf])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)[0]
    tokens = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(shifted(distributed.get_rank())))
    losses = []
    for _ in range(5):
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    model.eval()
    assert not any(p.numel() for p in model.parameters())  # all of them are sharded
    assert leaf is None or all(row.fused for row in fused_lora.explain(model).layers)
    return model, tokens, losses


def refused(call: Callable, *args: object) -> None:
    """The call must name DeepSpeed's context."""
    try:
        call(*args)
    except RuntimeError as error:
        assert "GatheredParameters" in str(error), error
    else:
        raise AssertionError("not refused")


@torch.no_grad()
def check_merges(model: nn.Module, tokens: torch.Tensor, merge: Callable, unmerge: Callable) -> None:
    """Merge and unmerge, outside and inside of the context."""
    before = model(input_ids=tokens).logits
    for change, exact in ((merge, False), (unmerge, True)):
        refused(change, model)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            change(model)
        after = model(input_ids=tokens).logits
        assert_close(after, before, terms=1000)
        assert torch.equal(after, before) or not exact


def main() -> None:
    """All checks."""
    deepspeed.init_distributed("gloo" if deepspeed.get_accelerator().device_name() == "cpu" else None)
    _, _, expected = train(wrapped)
    for leaf in (None, peft.tuners.lora.Linear):
        model, tokens, losses = train(lambda: fused_lora.accelerate(wrapped()), leaf)
        assert_close(torch.tensor(losses), torch.tensor(expected), terms=5000)
        check_merges(model, tokens, lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter())
    for leaf in (fused_lora.LoraLinear, None):
        model, tokens, losses = train(injected, leaf)
        assert_close(torch.tensor(losses), torch.tensor(expected), terms=5000)
        check_merges(model, tokens, fused_lora.merge, fused_lora.unmerge)
    folder = [tempfile.mkdtemp()]
    distributed.broadcast_object_list(folder)
    saved = Path(folder[0], "adapter")
    refused(fused_lora.save_adapter, model, saved)
    assert not saved.exists()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        fused_lora.save_adapter(model, saved)
    distributed.barrier()
    again = peft.PeftModel.from_pretrained(tiny_llama(), saved).eval()
    with torch.no_grad():
        assert_close(again(input_ids=tokens).logits, model(input_ids=tokens).logits, terms=1000)
    print(f"process {distributed.get_rank()}: right")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
