"""Which registry a process uses, and whether a cluster may start with it."""

import asyncio
import time
from collections.abc import Collection

from cluster.config import RegistryConfig
from cluster.redis_registry import RedisRegistry
from cluster.registry_client import RegistryClient
from core.errors import Unavailable
from core.ids import WorkerId

_CHECK_TIMEOUT_S = 5.0
_LAST_LEASES_S = 12.0
_POLL_S = 0.5


def connect_registry(
    config: RegistryConfig, embedded_address: str = ""
) -> RedisRegistry | RegistryClient:
    """The registry of a cluster, as an async context manager.

    The controller serves the embedded one at `embedded_address`. Neither needs to be there yet.
    """
    if config.url is not None:
        return RedisRegistry(config.url, config.cluster)
    return RegistryClient(embedded_address)


def registry_problems(config: RegistryConfig, wanted: Collection[WorkerId]) -> list[str]:
    """Why workers of these ids cannot use it now; a sentence each. Runs an event loop.

    Leases of a cluster that was killed may take `_LAST_LEASES_S` to expire.
    """
    if config.url is None:
        return []
    return asyncio.run(_redis_problems(config.url, config.cluster, wanted))


async def _redis_problems(url: str, cluster: str, wanted: Collection[WorkerId]) -> list[str]:
    async with RedisRegistry(url, cluster, call_timeout_s=_CHECK_TIMEOUT_S) as registry:
        try:
            await registry.check()
            return await _taken(registry, cluster, wanted)
        except Unavailable as error:
            return [
                f"{error.message}: start it, correct registry.url, or set registry.kind to embedded"
            ]


async def _taken(registry: RedisRegistry, cluster: str, wanted: Collection[WorkerId]) -> list[str]:
    give_up_at_s = time.monotonic() + _LAST_LEASES_S
    while there := [each for each in await registry.workers() if each.worker_id in wanted]:
        if time.monotonic() > give_up_at_s:
            return [
                f"registry.cluster {cluster} is in use: {there[0].worker_id} is registered at"
                f" {there[0].address}; stop that cluster, or set registry.cluster to another name"
            ]
        await asyncio.sleep(_POLL_S)
    return []
