"""Temperature, top-p and seed of each request, inside transformers' continuous batching.

The engine takes the arg max of the processed scores, so sampling uses Gumbel's trick: with
``scores = logits / temperature`` cut to the top-p set, ``argmax(scores + noise)`` is distributed as
``softmax(scores)``. The noise depends only on (seed, position in the sequence, token). So a request gives the same
tokens in any batch, and after its cache was dropped and computed again. Temperature 0 is greedy and leaves the logits
unchanged.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState
from transformers.generation.logits_process import LogitsProcessorList

_MASK32 = 0xFFFFFFFF


class PerRequest(ContinuousBatchingLogitsProcessor):
    """One number per request, carried to the device as a row of the engine's int32 inputs.

    If no request of a batch differs from the default, the step is skipped.
    """

    supported_kwargs: dict[str, type]
    ignored_kwargs: tuple[str, ...] = ()
    default: float
    dtype: torch.dtype
    used = False

    def value(self, state: RequestState) -> float:
        """The request's number; ``default`` means no change."""
        (argument,) = self.supported_kwargs
        return state.logit_processor_kwargs.get(argument, self.default)

    def apply(self, scores: Tensor, values: Tensor) -> Tensor:
        """New scores [B, V] from scores [B, V] and values [B]."""
        raise NotImplementedError

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        int32_tensor.copy_(torch.tensor([self.default], dtype=self.dtype, device="cpu").view(torch.int32))

    def prepare_tensor_args(self, requests_with_new_token: list[FutureRequestState]) -> Tensor:
        values = [self.value(request.state) for request in requests_with_new_token]
        self.used = any(value != self.default for value in values)
        return torch.tensor(values, dtype=self.dtype, device="cpu").view(torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        return self.apply(scores, tensor_arg[: len(scores)].view(self.dtype)) if self.used else scores


class Temperature(PerRequest):
    """scores / temperature; the default 0 is greedy and leaves them as they are."""

    supported_kwargs = {"temperature": float}
    default, dtype = 0.0, torch.float32

    def apply(self, scores: Tensor, values: Tensor) -> Tensor:
        return scores / torch.where(values > 0, values, 1.0)[:, None]


class TopP(PerRequest):
    """Cut to the smallest set of likeliest tokens whose probabilities reach top_p; the likeliest always stays."""

    supported_kwargs = {"top_p": float}
    default, dtype = 1.0, torch.float32

    def apply(self, scores: Tensor, values: Tensor) -> Tensor:
        ordered, order = scores.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p
        dropped = (before >= values[:, None]) & (values < 1)[:, None]
        dropped[:, 0] = False
        return scores.masked_fill(dropped.scatter(-1, order, dropped), float("-inf"))


class Draw(PerRequest):
    """scores + Gumbel noise keyed by (seed, position); key 0 is greedy."""

    supported_kwargs = {"seed": int}
    default, dtype = 0, torch.int32

    def value(self, state: RequestState) -> int:
        kwargs = state.logit_processor_kwargs
        if not kwargs.get("temperature"):
            return 0
        text = f"{kwargs['seed']} {state.position_offset}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little", signed=True) or 1

    def apply(self, scores: Tensor, values: Tensor) -> Tensor:
        return torch.where(values[:, None] != 0, scores + gumbel(values, scores.shape[-1]), scores)


def gumbel(keys: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise [B, size] in float32 from int32 keys [B]: the same on every device."""
    tokens = _mix(torch.arange(size, dtype=torch.int64, device=keys.device))
    bits = _mix((tokens + keys.to(torch.int64)[:, None]) & _MASK32) >> 9  # 23 bits: bits + 0.5 is exact in float32
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers that scatters neighbours (https://github.com/skeeto/hash-prospector)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK32
    return x ^ (x >> 16)


def install(processors: ContinuousBatchingLogitsProcessorList, own_keys: dict[str, type]) -> None:
    """Make ``processors`` the per-request ones; ``own_keys`` are further request arguments the engine shall accept."""
    steps = [Temperature(), TopP(), Draw()]
    processors.logits_processor = LogitsProcessorList(steps)
    processors.tensors_required = len(steps)
    processors.do_processing = True
    processors.supported_keys = dict(own_keys)
    processors.ignored_keys = set()
    for step in steps:
        processors.supported_keys.update(step.supported_kwargs)
