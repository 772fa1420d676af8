"""A sequence as an async generator, for callers that want its items one after the other."""

import asyncio
from collections.abc import AsyncGenerator

from router.types import Generated, GenerateRequest, Generator


class _Items:
    """Implements router.types.TokenSink: keeps what comes until it is asked for."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Generated | None] = asyncio.Queue()

    def token(self, token: int) -> None:
        self.queue.put_nowait(Generated(tokens=(token,)))

    def take(self, item: Generated) -> None:
        self.queue.put_nowait(item)


async def pulled(generator: Generator, request: GenerateRequest) -> AsyncGenerator[Generated, None]:
    """Yield what `generator.run` gives; raise what it raises. Closing this cancels the run."""
    items = _Items()
    running = asyncio.ensure_future(generator.run(request, items))
    running.add_done_callback(lambda _: items.queue.put_nowait(None))
    try:
        while (item := await items.queue.get()) is not None:
            yield item
        await running
    finally:
        running.cancel()
        await asyncio.wait([running])
