"""Asks a router whether it is ready, over one plain HTTP connection."""

import asyncio
from urllib.parse import urlsplit

_TIMEOUT_S = 5.0


async def answers_ready(router_url: str) -> bool:
    """GET /ready answers 200: a prefill and a decode worker are routable. Never raises."""
    parts = urlsplit(router_url)
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                request = (
                    f"GET /ready HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n"
                )
                writer.write(request.encode())
                await writer.drain()
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
