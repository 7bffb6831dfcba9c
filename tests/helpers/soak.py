"""What a long run of the server is judged by: whether memory grows, and which texts are right."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from helpers import serving

BLOCKS = 10


@dataclass
class Growth:
    """Bytes that memory grows by for each request, after the warm-up, and the standard error of that number.

    The warm-up is the first third of the requests. The samples after it are averaged in blocks of equal length, for
    neighbours are alike. ``slope`` is that of the line through the averages. A leak is a slope that is more than three
    errors above ``LIMIT``. The limit is what a server keeps at the least if it keeps a request: token ids of 8 bytes
    each, in the engine and in the server, and the objects that hold them.
    """

    LIMIT = 1024.0
    slope: float
    error: float

    @classmethod
    def of(cls, samples: Sequence[tuple[float, float]]) -> Growth:
        """Of (requests so far, bytes)."""
        start = samples[0][0] + (samples[-1][0] - samples[0][0]) / 3
        kept = [sample for sample in samples if sample[0] >= start]
        size = len(kept) // BLOCKS
        if size == 0:
            raise ValueError(f"samples: expected at least {BLOCKS} after the warm-up, got {len(kept)}")
        blocks = [kept[-(i + 1) * size : len(kept) - i * size] for i in range(BLOCKS)]
        x = [statistics.fmean(requests for requests, _ in block) for block in blocks]
        y = [statistics.fmean(memory for _, memory in block) for block in blocks]
        slope, intercept = statistics.linear_regression(x, y)
        off = sum((b - slope * a - intercept) ** 2 for a, b in zip(x, y, strict=True))
        return cls(slope, math.sqrt(off / (BLOCKS - 2) / sum((a - statistics.fmean(x)) ** 2 for a in x)))

    @property
    def is_leak(self) -> bool:
        """Whether memory grows."""
        return self.slope - 3 * self.error > self.LIMIT


class Texts:
    """What each folder's adapter must answer: the greedy text of the base with its weights merged.

    Args:
        model: folder of a language model. most: tokens of the longest answer.
    """

    def __init__(self, model: Path, most: int):
        from transformers import AutoTokenizer

        self.model, self._most = serving.load_model(model), most
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._merged = functools.lru_cache(32)(functools.partial(serving.merged, self.model))
        self._tokens = functools.lru_cache(None)(self._greedy)

    def is_answer(self, folder: Path | None, prompt: str, count: int, said: str, whole: bool = True) -> bool:
        """Whether ``said`` is the text of ``count`` tokens, or begins it where not ``whole``.

        Where the two best tokens are equal up to rounding, the text with the other one is right, too.
        """
        tokens = self._tokens(folder, prompt)[:count]
        return self._fits(said, tokens, whole) or any(
            self._fits(said, other, whole) for other in self._ties(folder, prompt, tokens)
        )

    def _fits(self, said: str, tokens: Sequence[int], whole: bool) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return said == text if whole else text.startswith(said)

    def _greedy(self, folder: Path | None, prompt: str) -> list[int]:
        return serving.greedy(self._merged(folder), self.tokenizer(prompt)["input_ids"], self._most)

    def _ties(self, folder: Path | None, prompt: str, tokens: list[int]) -> Iterator[list[int]]:
        model, ids = self._merged(folder), self.tokenizer(prompt)["input_ids"]
        for place, best in enumerate(tokens):
            before = ids + tokens[:place]
            with torch.no_grad():
                other = int(model(torch.tensor([before])).logits[0, -1].topk(2).indices[1])
            if serving.is_rounding_tie(self.model, folder, before, other, best):
                left = len(tokens) - place - 1
                yield [*tokens[:place], other, *(serving.greedy(model, [*before, other], left) if left else [])]
