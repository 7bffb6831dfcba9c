"""Log probabilities in OpenAI's shapes: of completions, with the prompt's where it is echoed, and of chats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from fused_lora.serving.engine.logprobs import TokenLogprob

MOST_OF_COMPLETIONS, MOST_OF_CHATS = 5, 20  # OpenAI's limits
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Scored(NamedTuple):
    """A token of an answer, and where it begins in the answer's text, in characters."""

    told: TokenLogprob
    offset: int


class Speller:
    """What a token is as bytes and as text.

    Args:
        tokenizer: transformers'.
    """

    def __init__(self, tokenizer: Any):
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        byte_level = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
        added = tokenizer.added_tokens_decoder

        @lru_cache(maxsize=1 << 16)
        def spelled(token: int) -> bytes:
            piece = tokenizer.convert_ids_to_tokens(token) or ""  # a model may have more tokens than its tokenizer
            if token in added:
                return piece.encode()
            if byte_level and all(c in byte_of for c in piece):
                return bytes(byte_of[c] for c in piece)
            byte = _BYTE.fullmatch(piece)
            return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()

        self.bytes = spelled

    def text(self, token: int, prefix: str = "") -> str:
        r"""The token's text; of a part of a character its bytes, as ``\xf0\x9f`` behind ``prefix``."""
        spelled = self.bytes(token)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in spelled)

    def of_completion(self, scored: Sequence[Scored]) -> dict[str, list]:
        """``logprobs`` of a completion's choice; ``top_logprobs`` has the token itself, too, if it is none of them."""

        def text(token: int) -> str:
            return self.text(token, "bytes:")

        def likeliest(told: TokenLogprob) -> dict[str, float] | None:
            if told.logprob is None:
                return None
            found: dict[str, float] = {}
            for token, logprob in (*told.top, (told.token, told.logprob)):
                found.setdefault(text(token), logprob)  # of two with one text the likelier
            return found

        return {
            "tokens": [text(told.token) for told, _ in scored],
            "token_logprobs": [told.logprob for told, _ in scored],
            "top_logprobs": [likeliest(told) for told, _ in scored],
            "text_offset": [offset for _, offset in scored],
        }

    def of_chat(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """``logprobs`` of a chat's choice."""

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            return {"token": self.text(token), "logprob": logprob, "bytes": list(self.bytes(token))}

        content = [
            {**entry(told.token, told.logprob), "top_logprobs": [entry(*one) for one in told.top]} for told, _ in scored
        ]
        return {"content": content, "refusal": None}
