"""Several asynchronous iterators as one, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive

from divisi.cluster.errors import DivisiError

T = TypeVar("T")


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[list[tuple[int, T]], None]:
    """Items of all sources as they come, each with its source's index; together what is there at once.

    The first error of a source ends the whole; whenever it ends, all sources are closed before it returns.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for own in only:
                yield [(0, own)]
        return
    # One item per source may wait: a slow reader holds its sources back.
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(len(sources))

    async def pump(index: int, source: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(source):
                async for own in source:
                    await queue.put((index, own))
        except Exception as error:  # noqa: BLE001 - handed on to the reader, whatever it is
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(index, source)) for index, source in enumerate(sources)]
    try:
        open_sources = len(sources)
        while open_sources:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            open_sources -= items.count(None)
            error = next((item for item in items if isinstance(item, BaseException)), None)
            if found := [item for item in items if isinstance(item, tuple)]:
                yield found
            if error is not None:
                raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ClientLeftError(Exception):
    """The client closed its connection before the answer was complete."""


async def until_client_leaves(
    receive: Receive, work: Coroutine[Any, Any, T], over: asyncio.Future[DivisiError] | None = None
) -> T:
    """Run `work`; when the client leaves first, cancel it, wait for its clean-up and raise ClientLeftError.

    When `over` is done first, likewise, and raise what it holds.

    The request's body must have been read: the next message on `receive` is the disconnect.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        waited: set[asyncio.Future[Any]] = {task, watcher} if over is None else {task, watcher, over}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if over is not None and over.done():
            raise over.result()
        raise ClientLeftError
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
