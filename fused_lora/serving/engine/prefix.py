"""A prefix cache with a separate namespace for each adapter version, in transformers' engine."""

from __future__ import annotations

import hashlib
import secrets
from array import array
from functools import partial
from typing import Any

from transformers.generation.continuous_batching.cache_allocators import CacheAllocator
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor
from transformers.generation.continuous_batching.requests import RequestState

from fused_lora.serving.engine.admission import EngineCounters, start_of, version_of
from fused_lora.serving.engine.logprobs import first_missing


class PrefixNamespaces:
    """Gives each adapter version its own namespace in the prefix cache of a processor.

    The cache identifies a block by the hash of its tokens and of the blocks before it. The same tokens have other keys
    and values with another adapter, so the version is the key of the hash. Those before an aLoRA's start are the base
    model's, so blocks that end before it have the base's key.
    """

    def __init__(self, processor: ContinuousBatchProcessor, counters: EngineCounters):
        self.scheduler, self.counters, cache = processor.scheduler, counters, processor.cache
        self.secret, self.key, self.start = secrets.token_bytes(32), b"", 0
        self.base_key = self._key_of("")
        self.search, self.mark = cache.search_prefix_match, cache.mark_complete_blocks
        cache.search_prefix_match, cache.mark_complete_blocks = self._search, self._mark
        for allocator in cache.cache_allocators.values():
            allocator.match_prefix_blocks = partial(self._match_blocks, allocator)
            allocator.mark_complete_blocks = partial(self._mark_blocks, allocator)

    def _use(self, state: RequestState) -> None:
        self.key, self.start = self._key_of(version_of(state)), start_of(state)

    def _key_of(self, version: str) -> bytes:
        return hashlib.blake2b(version.encode(), digest_size=32, key=self.secret).digest()

    def _search(self, request_id: str, prompt_ids: list[int]) -> int:
        state = self.scheduler.waiting_requests[request_id]
        if first_missing(state) < len(state.initial_tokens):
            return 0  # log probabilities of the prompt come from its rows
        self._use(state)
        found = self.search(request_id, prompt_ids)
        self.counters.cached_tokens += found
        return found

    def _mark(self, state: RequestState, complete_blocks: dict[str, int]) -> None:
        self._use(state)
        self.mark(state, complete_blocks)

    def _hash(self, parent: bytes, tokens: list[int], begin: int) -> bytes:
        key = self.base_key if begin + len(tokens) <= self.start else self.key
        return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16, key=key).digest()

    def _match_blocks(self, allocator: CacheAllocator, prompt_ids: list[int]) -> list[int]:
        size, parent, found = allocator.tokens_per_page, b"", []
        ledger: Any = allocator.ledger  # transformers' keys are numbers, ours are digests
        # the last token is always computed: its logits are what the request is there for
        for start in range(0, (len(prompt_ids) - 1) // size * size, size):
            parent = self._hash(parent, prompt_ids[start : start + size], start)
            block = ledger.hash_to_block.get(parent)
            if block is None:
                break
            found.append(block)
        return found

    def _mark_blocks(self, allocator: CacheAllocator, request_id: str, token_ids: list[int], count: int) -> None:
        size, parent = allocator.tokens_per_page, b""
        ledger: Any = allocator.ledger
        table = allocator.block_table.get(request_id, [])  # gone if the request failed during the step
        for i, block in enumerate(table):
            known = ledger.block_to_hash.get(block)
            if known is None:
                tokens = token_ids[i * size : (i + 1) * size]
                if count == 0 or len(tokens) < size:
                    break
                count -= 1
                known = self._hash(parent, tokens, i * size)
                twin = ledger.register_new_hash(block, known)
                if twin is not None:
                    ledger.acquire(twin)
                    table[i] = twin
                    if ledger.release(block):
                        allocator.pool.free_blocks(allocator.index, [block])
            parent = known
