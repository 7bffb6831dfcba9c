"""Log probabilities of a request's tokens, generated ones and, if asked for, those of its prompt.

They are of the model's own logits, in fp32, before temperature and top_p. They are kept in ``RequestState.logprobs``,
which the engine copies to every output, and to the new request where it drops a cache and starts again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# keys in a request's logit_processor_kwargs
LOGPROBS, PROMPT_LOGPROBS = "logprobs", "prompt_logprobs"
MAX_LOGPROBS = 20


class TokenLogprob(NamedTuple):
    """``logprob``: natural logarithm of the probability of ``token`` (-9999.0 stands for less than that), None for a
    first token. ``top``: the likeliest tokens and theirs, best first."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


LEAST = -9999.0  # JSON has no -inf
_ROWS = 128  # whose fp32 copies are in memory at a time: 0.5 MB each for a vocabulary of 128k


def first_missing(state: Any) -> int:
    """The position of the first token of a request that is still to get a log probability; very far for none."""
    options = state.logit_processor_kwargs
    if LOGPROBS not in options:
        return 1 << 62
    prompt = state._true_initial_tokens or len(state.initial_tokens)
    return (1 if options.get(PROMPT_LOGPROBS) else prompt) + len(state.logprobs)


def _positions(future: Any) -> range:
    """The positions of tokens that this step tells the log probabilities of: a row's is that of the next token."""
    end = future.state.position_offset
    return range(max(first_missing(future.state), end - future.query_length + 1), end + 1)


def need_all_rows(futures: Sequence[Any]) -> bool:
    """Whether a step has to compute the logits of rows that no token is taken from."""
    return any(len(_positions(future)) > future.has_new_token for future in futures)


def record(futures: Sequence[Any], logits: Tensor, every_row: bool, new_tokens: Tensor) -> None:
    """Append to the requests of a step what it tells.

    Args:
        futures: ``FutureRequestState`` of the step, its inputs prepared. logits: [1, rows, V]; all rows of the step
            with ``every_row``, otherwise those that a token is taken from. new_tokens: the tokens taken, int32.
    """
    first = taken = 0  # of this request's rows, of this request's new token
    for future in futures:
        state, end, positions = future.state, future.state.position_offset, _positions(future)
        if positions:
            start = end - future.query_length
            rows = slice(first + positions[0] - 1 - start, first + future.query_length)
            rows = rows if every_row else slice(taken, taken + 1)
            tokens = state.initial_tokens[positions[0] : end + 1]
            if future.has_new_token:
                tokens.append(int(new_tokens[taken]))
            count = state.logit_processor_kwargs[LOGPROBS]
            for i, part in enumerate(logits[0, rows].split(_ROWS)):
                state.logprobs.extend(_of_rows(part, tokens[i * _ROWS :][: len(part)], count))
        first += future.query_length
        taken += future.has_new_token


def _of_rows(logits: Tensor, tokens: list[int], count: int) -> list[TokenLogprob]:
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None]) - total
    values, order = logits.topk(min(count, logits.shape[1]))
    values = (values - total).clamp_(min=LEAST).tolist()
    tops = [tuple(zip(*pair, strict=True)) for pair in zip(order.tolist(), values, strict=True)]
    found = zip(tokens, own[:, 0].clamp_(min=LEAST).tolist(), tops, strict=True)
    return [TokenLogprob(*each) for each in found]
