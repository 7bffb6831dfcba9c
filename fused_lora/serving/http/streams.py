"""Several answers as one stream, and work that is cancelled when its client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request

from fused_lora.serving.http.api import ApiError, too_slow, unexpected
from fused_lora.serving.http.engine import AsyncEngine, Job, Piece

_T = TypeVar("_T")
_log = logging.getLogger("fused_lora.serve")


async def merged(engine: AsyncEngine, jobs: list[Job]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several jobs as they come, with the index of their job. Closing it early cancels all jobs."""
    ready: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()

    async def pump(index: int, job: Job) -> None:
        try:
            async with contextlib.aclosing(engine.generate(job)) as pieces:
                async for piece in pieces:
                    ready.put_nowait((index, piece))
            ready.put_nowait((index, None))
        except Exception as error:
            if not isinstance(error, ApiError):
                _log.error("an answer failed", exc_info=error)
                error = unexpected(error)
            ready.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, job)) for index, job in enumerate(jobs)]
    try:
        left = len(jobs)
        while left:
            index, piece = await ready.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield index, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def begun(http: Request, pieces: AsyncGenerator[_T, None]) -> AsyncGenerator[_T, None]:
    """``pieces`` once the first has come. What fails before that is raised here; see :func:`unless_gone`."""

    async def begin() -> _T:
        return await anext(pieces)

    first = await unless_gone(http, begin())

    async def whole() -> AsyncGenerator[_T, None]:
        async with contextlib.aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return whole()


async def unless_gone(http: Request, work: Coroutine, since: float = 0.0, seconds: float = math.inf) -> Any:
    """The result of ``work``. It is cancelled when the client disconnects.

    Args:
        since, seconds: cancel it so many seconds after this time (``time.monotonic``), too.

    Raises:
        ApiError: 499 for a client that disconnected, 504 for the time.
    """

    async def hung_up() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(hung_up())
    left = None if seconds == math.inf else max(since + seconds - time.monotonic(), 0)
    try:
        await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection") if gone.done() else too_slow(seconds)
        return await task
    finally:
        for waiting in (task, gone):
            waiting.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
