"""Small models whose files have the layout of published ones, and PEFT's adapters of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

from helpers.checkpoint_files import save_trained
from helpers.seeds import shifted

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TEXT = dict(SIZES, vocab_size=90, num_key_value_heads=2, pad_token_id=0)


def built(kind: Any, sizes: dict[str, Any], folder: Path) -> Any:
    """A small model of this class as it is read from the files that it wrote into ``folder``."""
    torch.manual_seed(shifted(0))
    model = kind(kind.config_class(**sizes)).eval()
    model.save_pretrained(folder)
    return kind.from_pretrained(folder).eval()


def adapted(model: Any, folder: Path, **config: Any) -> Any:
    """PEFT's model with an adapter that does something, saved into ``folder``."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **config))
    save_trained(wrapped, folder)
    return wrapped
