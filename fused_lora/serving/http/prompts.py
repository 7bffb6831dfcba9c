"""Texts and chats to token ids: bounded before anything is done with them, and in threads."""

from __future__ import annotations

import asyncio
import copy
import inspect
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

from fused_lora.serving.http.api import ApiError, too_long
from fused_lora.serving.http.text import TextStream

SHORT_CHARACTERS = 16 << 10
_THREADS = 2  # for short texts, and as many for long ones
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 cannot


class PromptReader:
    """Tokenises prompts; a short text never waits for a long one, and what is cancelled before its turn costs nothing.

    A text longer than ``context`` tokens of the longest in the vocabulary cannot fit, and is refused unread. One of
    which the first 8 * ``context`` characters give more than 2 * ``context`` tokens is not read to its end.

    Args:
        tokenizer: transformers'. context: most tokens that a prompt can have.
    """

    def __init__(self, tokenizer: Any, context: int):
        self.context = context
        self.most_characters = context * max(map(len, tokenizer.get_vocab()), default=1)
        tokenizer("x")  # sets its truncation once: from here on a fast one is only read, by any number of threads
        # parameters of the method, which a request must not set: another template, or text in place of tokens
        self._not_of_templates = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
        fast = getattr(tokenizer, "is_fast", False)
        threads = _THREADS if fast else 1
        self._short = tokenizer, ThreadPoolExecutor(threads, "tokenize")
        self._long = (tokenizer if fast else copy.deepcopy(tokenizer)), ThreadPoolExecutor(threads, "tokenize-long")

    async def encode(self, prompt: Any, name: str, template: Mapping[str, Any] = MappingProxyType({})) -> list[int]:
        """Token ids of a text, a chat or a list of ids, from the request's parameter ``name``. Raises ApiError.

        template: what the chat template reads beside the messages.
        """
        if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], dict)):
            return prompt
        if taken := sorted(template.keys() & self._not_of_templates):
            where = f"chat_template_kwargs.{taken[0]}"
            raise ApiError(400, f"{where} is not supported by this server", where, "unsupported_parameter")
        texts = [prompt] if isinstance(prompt, str) else [text for message in prompt for text in message.values()]
        texts += [value for value in template.values() if isinstance(value, str)]
        characters = sum(map(len, texts))
        if characters > self.most_characters or len(texts) > 2 * self.context:
            raise too_long(self.context, f"{characters} characters", name)
        if any(map(_SURROGATE.search, texts)):
            raise ApiError(400, f"{name}: half of a surrogate pair is no text", name)
        tokenizer, pool = self._short if characters <= SHORT_CHARACTERS else self._long

        def work() -> list[int] | None:
            if characters > 8 * self.context:
                start = "".join(texts)[: 8 * self.context]
                if len(tokenizer(start)["input_ids"]) > 2 * self.context:
                    return None
            if isinstance(prompt, str):
                return tokenizer(prompt)["input_ids"]
            told = dict(add_generation_prompt=True, tokenize=True, return_dict=False)
            return tokenizer.apply_chat_template(prompt, **told, **template)

        try:
            ids = await asyncio.get_running_loop().run_in_executor(pool, work)
        except Exception as error:  # templates raise what they like, and say what is wrong with the messages
            raise ApiError(400, f"{name}: cannot be turned into tokens: {error}"[:500], name) from None
        if ids is None:
            has = f"more than {2 * self.context} tokens in its first {8 * self.context} characters"
            raise too_long(self.context, has, name)
        return list(ids)

    async def echo(self, prompt: Any, ids: list[int]) -> tuple[str, list[int]]:
        """(text of a prompt, a text or ids, where each of its tokens begins in the text, in characters)."""
        tokenizer, pool = self._short if len(ids) <= SHORT_CHARACTERS // 4 else self._long

        def work() -> tuple[str, list[int]]:
            if isinstance(prompt, str) and getattr(tokenizer, "is_fast", False):
                return prompt, [start for start, _ in tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]]
            stream = TextStream(tokenizer)
            text = stream.add(ids) + stream.flush()
            return (prompt if isinstance(prompt, str) else text), stream.offsets

        return await asyncio.get_running_loop().run_in_executor(pool, work)
