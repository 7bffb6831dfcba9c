"""What a key of an adapter file is that no layer here takes: said in the error that refuses the file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fused_lora.modules.names import some

CONVERT = "`fused-lora convert` reads such files"
WHOLE = (
    "a parameter saved whole that the config does not name in modules_to_save (a resized vocabulary, or "
    "ensure_weight_tying?). PEFT writes it over the base's. Add its module to modules_to_save, and it is read as the "
    "adapter's own"
)
_KINDS = (  # the first that is found in the key
    (r"^lora_(unet|te\d?|transformer)_|\.lora_(down|up)\.|\.alpha$", f"the names of kohya's scripts: {CONVERT}"),
    (r"\.lora_magnitude_vector", "a DoRA magnitude, which the config does not name (use_dora)"),
    (r"\.lora_embedding_[AB]", "LoRA on an embedding, which is not supported"),
    (r"\.lora_[AB]\.(?!weight$|bias$)[^.]+\.", f"an adapter's name inside the key: a state dict: {CONVERT}"),
    (r"\.lora_B\.bias$", "a bias of lora_B, which the config does not have (lora_bias)"),
    (r"token_adapter|trainable_tokens", "trained tokens, which the config does not name (trainable_token_indices)"),
    (r"\.modules_to_save\.", "a module saved whole inside its wrapper: a state dict, no PEFT checkpoint"),
    (r"\.base_layer\.", "a parameter of the base model, which an adapter must not replace"),
    (r"(^|\.)module\..*\.", f"the name of a wrapper, 'module': {CONVERT}"),
    (r"^(?!base_model\.model\.).*\.lora_[AB]\.", f"another beginning: {CONVERT}"),
    (r"^(?!base_model\.model\.)", "another beginning"),
    (r"\.lora_", "a kind of LoRA tensor that is not supported"),
    ("", WHOLE),
)


def not_read(keys: Sequence[str], key: str, total: int) -> str:
    """What ``key`` is, and how many of the file's keys are not read."""
    found = next(text for pattern, text in _KINDS if re.search(pattern, key))
    return f"{found}; {len(keys)} of {total} keys are not read: {some(keys)}"
