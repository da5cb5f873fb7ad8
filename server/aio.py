"""Waiting with a limit, without losing a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises asyncio.TimeoutError where it takes longer.

    asyncio.wait_for (before Python 3.12) returns the result, and forgets the cancellation, where both come in the same
    turn of the loop: a client's disconnect would be lost, and the request would go on for nobody.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=max(0.0, seconds))
        if not task.done():
            raise asyncio.TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order. Where one fails, or this is cancelled, the others are cancelled and have ended."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        return [task.result() for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merged(streams: Sequence[AsyncIterator[T]]) -> AsyncIterator[T]:
    """The items of all streams as they come. Where one fails the others are given up."""
    queue: asyncio.Queue[T] = asyncio.Queue(maxsize=len(streams))  # a slow reader holds the streams up

    async def pump(stream: AsyncIterator[T]) -> None:
        async for item in stream:
            await queue.put(item)

    pumping = asyncio.ensure_future(together([pump(stream) for stream in streams]))
    try:
        while True:
            taking = asyncio.ensure_future(queue.get())
            await asyncio.wait({taking, pumping}, return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                yield taking.result()
                continue
            taking.cancel()
            pumping.result()
            while not queue.empty():
                yield queue.get_nowait()
            return
    finally:
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)
