"""Seeds of the tests, all shifted by FUSED_LORA_TEST_SEED, so that no test rests on the numbers of one seed."""

from __future__ import annotations

import os


def shifted(seed: int) -> int:
    """``seed`` itself, or another one for every other integer in the environment variable FUSED_LORA_TEST_SEED."""
    return (seed + 1_000_003 * int(os.environ.get("FUSED_LORA_TEST_SEED", "0"))) % 2**32
