"""Checks before the routes: the API key, the size of bodies, and the folder of adapters."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
from collections.abc import Coroutine, MutableMapping
from pathlib import Path
from typing import Any

from fused_lora.adapters.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from fused_lora.serving.http.api import ApiError
from fused_lora.serving.http.engine import Limits
from fused_lora.serving.http.metrics import Metrics
from fused_lora.serving.http.record import HEADER, RECORD, Record, request_id, taken_or_made

OPEN_PATHS = ("/health", "/metrics")
_ROUTES = (*OPEN_PATHS, "/openapi.json") + tuple(
    f"/v1/{name}" for name in "completions chat/completions models load_lora_adapter unload_lora_adapter".split()
)


class Guard:
    """ASGI middleware: refuses without the key, reads bodies within their limits, counts and logs answers."""

    def __init__(self, app: Any, limits: Limits, api_key: str | None, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self._key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # a label per path that somebody makes up would fill the memory
        path = "/v1/models" if scope["path"].startswith("/v1/models/") else scope["path"]
        route = path if path in _ROUTES else "other"
        record = scope[RECORD] = Record(taken_or_made(scope["headers"]), scope["method"], route)
        request_id.set(record.request_id)
        ended = streams = False

        async def noted(message: dict) -> None:
            nonlocal ended, streams
            if message["type"] == "http.response.start":
                record.status = message["status"]
                streams = any(value.startswith(b"text/event-stream") for _, value in message.get("headers", ()))
                self.metrics.requests[route, message["status"]] += 1
                message["headers"] = [*message.get("headers", ()), (HEADER, record.request_id.encode())]
            elif not message.get("more_body"):
                ended = True
            await send(message)

        try:
            try:
                self._check_key(scope)
                body = await self._body(scope, receive)
            except ApiError as error:
                record.error = error.name
                await _refuse(noted, error)
                return
            # what HEAD asks for is the head of what GET answers; uvicorn leaves the body out
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            if not await _ends(self.app({**scope, "method": method}, _replay(body, receive), noted)):
                error = ApiError(503, "the server is shutting down", code="shutting_down")
                record.error = error.name
                with contextlib.suppress(asyncio.CancelledError):  # a client that does not read is cut off
                    if record.status is None:
                        await _refuse(noted, error)
                    elif streams and not ended:
                        event = f"data: {json.dumps(error.body())}\n\n".encode()
                        await noted({"type": "http.response.body", "body": event})
        finally:
            record.error = record.error or (None if ended else "disconnected")
            record.write()

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        if self._key is None or scope["path"] in OPEN_PATHS:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # digests are of one length, so the comparison says nothing about the key's
        same = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._key)
        if scheme.lower() != b"bearer" or not same:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key", kind="authentication_error")

    async def _body(self, scope: MutableMapping[str, Any], receive: Any) -> bytes:
        limit = self.limits.body_bytes
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not length.isdigit() or int(length[:20]) > limit:
            raise too_large

        async def read() -> bytes:
            body = bytearray()
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client closed the connection")
                body += message.get("body", b"")
                if len(body) > limit:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)

        try:
            return await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not come in time", code="timeout") from None


async def _ends(work: Coroutine) -> bool:
    """Whether ``work`` ends by itself: uvicorn cancels what still runs when a server that stops has waited its time."""
    try:
        await work
    except asyncio.CancelledError:
        return False
    return True


def _replay(body: bytes, receive: Any) -> Any:
    given = False

    async def replay() -> dict:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Any, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    # the rest of a refused body is not read, so the connection cannot be used again
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def allowed_adapter(root: Path, path: str) -> Path:
    """The folder of an adapter inside ``root``, links resolved; ``path`` is absolute or relative to ``root``.

    Raises ApiError: 400 for a path outside, also through ``..`` or a link, whether it exists or not; 404 for a path
    inside that is not a folder or lacks a file.
    """
    outside = ApiError(400, "lora_path: expected a folder inside this server's adapter folder", "lora_path")
    try:
        root = root.resolve(strict=True)
        folder = (root / path).resolve()
        inside = folder.is_relative_to(root) and folder != root
        files = [(folder / name).resolve() for name in (CONFIG_NAME, WEIGHTS_NAME)] if inside else []
        there = all(file.is_file() for file in files)
    except (OSError, ValueError, RuntimeError):  # a loop of links, a NUL byte, a name too long
        raise outside from None
    if not inside or not all(file.is_relative_to(root) for file in files):
        raise outside
    if not there:
        raise ApiError(404, f"lora_path: no adapter in {path[:200]!r}", "lora_path", "adapter_not_found")
    return folder
