"""Why a version of an adapter is not served: its files were damaged a moment ago, or its output was not finite."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fused_lora.serving.residency.packing import Signature, signature

# a damaged adapter is not read again for so long, unless its files change
FAILED_LOAD_SECONDS = 30.0


class NonFiniteOutput(RuntimeError):
    """Rows under these adapters have values that are NaN or infinite: their terms overflow, or the base does.

    Attributes:
        identities: ``name@version`` of each adapter; empty for rows of the base model.
    """

    def __init__(self, message: str, identities: Sequence[str] = ()):
        super().__init__(message)
        self.identities = tuple(identities)


@dataclass
class Refusal:
    """``error`` is raised for a version until its files are no longer in the state ``files``: for good, or for
    ``FAILED_LOAD_SECONDS`` where a later read may succeed."""

    error: Exception
    folder: str | None
    files: Signature | None
    for_good: bool = False
    since: float = field(default_factory=time.monotonic)

    @property
    def files_are_the_same(self) -> bool:
        """Whether nothing has been changed that it was about."""
        return self.folder is None or signature(self.folder) == self.files

    def now(self) -> Exception | None:
        """The error to raise, a copy that nobody else raises at the same time. None if another try is worth it."""
        if not self.for_good and time.monotonic() - self.since > FAILED_LOAD_SECONDS:
            return None
        return self.copy() if self.files_are_the_same else None

    def copy(self) -> Exception:
        """The error, without what was raised before."""
        again = type(self.error).__new__(type(self.error), *self.error.args)
        again.__dict__.update(self.error.__dict__)
        return again
