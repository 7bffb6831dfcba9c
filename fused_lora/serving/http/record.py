"""What is noted of each request: its id, for answers and log lines, and a line of the access log. Never its text."""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

RECORD = "fused_lora.record"  # key of a scope
HEADER = b"x-request-id"
_ID = re.compile(rb"[\w.:@/+=-]{1,128}")  # what cannot break a line of a log
_log = logging.getLogger("fused_lora.access")

request_id: ContextVar[str] = ContextVar("fused_lora_request_id", default="-")


class AddRequestId(logging.Filter):
    """Gives every log record ``request_id``, "-" outside of a request."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


@dataclass
class Record:
    """One request.

    Attributes:
        route: of the known ones, or "other". model: a name that is served. started: ``time.monotonic`` of its first
            byte. first_token: seconds to it. error: code or type of the error.
    """

    request_id: str
    method: str
    route: str
    started: float = field(default_factory=time.monotonic)
    status: int | None = None
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token: float | None = None
    error: str | None = None

    def note_token(self) -> None:
        """A token has come."""
        if self.first_token is None:
            self.first_token = time.monotonic() - self.started

    def write(self) -> None:
        """The line of the access log."""
        first = None if self.first_token is None else f"{self.first_token:.3f}"
        fields = {
            "id": self.request_id,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "model": self.model,
            "tokens_in": self.prompt_tokens,
            "tokens_out": self.completion_tokens,
            "first_token_s": first,
            "seconds": f"{time.monotonic() - self.started:.3f}",
            "error": self.error,
        }
        _log.info(" ".join(f"{name}={'-' if value is None else value}" for name, value in fields.items()))


def taken_or_made(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's x-request-id, if it is 1 to 128 letters, digits and ``_.:@/+=-``; otherwise a new one."""
    given = next((value for name, value in headers if name == HEADER), b"")
    return given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
