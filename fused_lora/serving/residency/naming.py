"""What adapters of a store may be called."""

from __future__ import annotations

import re

from fused_lora.modules.mixin import BASE

_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"  # no part is "." or "..": a name may be a path below a folder
_NAME = re.compile(rf"(?=.{{1,256}}\Z){_PART}(?:/{_PART})?")


def check_served_name(name: str) -> str:
    """``name`` if it is one as the Hugging Face hub writes it: ``adapter`` or ``org/adapter``, 256 characters at most.

    Raises:
        ValueError: it is another. TypeError: it is no str.
    """
    if not isinstance(name, str):
        raise TypeError(f"adapter_name must be a str, got {name!r}")
    if not _NAME.fullmatch(name) or name == BASE:
        what = "'adapter' or 'org/adapter', of letters, digits, '_', '-' and '.', at most 256 characters"
        raise ValueError(f"adapter_name must be {what}, and not {BASE!r}, the base model's name, got {name[:100]!r}")
    return name
