"""Check the arguments of a request before it is queued. Errors name the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from fused_lora.modules.arguments import check_int
from fused_lora.modules.config import check_bool
from fused_lora.serving.engine.logprobs import LOGPROBS, MAX_LOGPROBS, PROMPT_LOGPROBS

# below this the quotients leave float32's range, and the draw would be the arg max anyway
SMALLEST_TEMPERATURE = 1e-5


def token_ids(ids: Any, vocabulary: int) -> list[int]:
    """A prompt, a sequence or a one-dimensional tensor or array, as a list.

    Raises:
        TypeError: not a sequence of integers. ValueError: empty, or an id out of range.
    """
    found = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(found, (str, bytes)) or not isinstance(found, Sequence):
        raise TypeError(f"input_ids: expected a list of token ids, got {type(ids).__name__}")
    if not found:
        raise ValueError("input_ids: expected at least one token id, got none")
    for i, token in enumerate(found):
        if type(token) is not int:
            check_int(f"input_ids[{i}]", token)
        if not 0 <= token < vocabulary:
            raise ValueError(f"input_ids[{i}]: expected a token id in [0, {vocabulary}), got {token}")
    return list(map(int, found))


def ends(value: Any) -> int | list[int] | None:
    """``eos_token_id``: None (the model's own), one token id or several. Raises TypeError."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        return [check_int(f"eos_token_id[{i}]", token) for i, token in enumerate(value)]
    return check_int("eos_token_id", value)


def sampling(temperature: Any, top_p: Any, seed: Any) -> dict[str, float | int]:
    """The sampling arguments, none for a greedy request. ``seed`` may be None. Raises TypeError, ValueError."""
    temperature, top_p = _number("temperature", temperature), _number("top_p", top_p)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature: expected a number >= 0, got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    drawn = {} if seed is None else {"seed": check_int("seed", seed)}
    return {} if temperature < SMALLEST_TEMPERATURE else {"temperature": temperature, "top_p": top_p, **drawn}


def logprobs(count: Any, prompt: Any) -> dict[str, Any]:
    """The arguments of log probabilities, none if there are to be none. Raises TypeError, ValueError."""
    check_bool("prompt_logprobs", prompt)
    if count is None:
        if prompt:
            raise ValueError(f"prompt_logprobs: expected logprobs=0 to {MAX_LOGPROBS} beside it, got None")
        return {}
    return {LOGPROBS: check_int("logprobs", count, 0, MAX_LOGPROBS), PROMPT_LOGPROBS: prompt}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r:.100}")
    try:
        return float(value)
    except OverflowError:  # an int beyond all floats, of either sign: out of every range here
        return math.inf
