"""The workers a router can reach: follows the registry, keeps one link per incarnation."""

import asyncio
import logging
from collections.abc import Collection

from core.errors import Unavailable
from core.ids import Incarnation, ModelId, Role
from core.registry import Registry, WorkerRecord
from router.client import WorkerLink

log = logging.getLogger(__name__)

_RECONNECT_S = 0.25
_RECONNECT_MAX_S = 2.0


class Fleet:
    """`run` is its only task. A worker missing from the registry stays while its stream lives."""

    def __init__(
        self,
        registry: Registry,
        *,
        router_id: str,
        model_id: ModelId,
        silence_s: float,
    ) -> None:
        self._registry = registry
        self._router_id = router_id
        self._model_id = model_id
        self._silence_s = silence_s
        self._links: dict[Incarnation, WorkerLink] = {}
        self._wanted: dict[Incarnation, WorkerRecord] = {}

    def links(self) -> tuple[WorkerLink, ...]:
        """All links, connected or not."""
        return tuple(self._links.values())

    def routable(self, role: Role, excluding: Collection[Incarnation] = ()) -> list[WorkerLink]:
        """Links of this role that take requests now; of two lives of a worker, the later one."""
        latest = {link.record.worker_id: link for link in self._links.values() if link.routable}
        return [
            link
            for link in latest.values()
            if (view := link.routable) is not None
            and view.hello.role is role
            and link.record.incarnation not in excluding
        ]

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    async for records in self._registry.watch():
                        self._wanted = {record.incarnation: record for record in records}
                        for record in records:
                            if record.incarnation not in self._links:
                                link = self._link(record)
                                group.create_task(self._keep(link))
                except Unavailable as error:
                    log.warning("registry_unreachable error=%s", error)
                await asyncio.sleep(_RECONNECT_S)

    def _link(self, record: WorkerRecord) -> WorkerLink:
        link = WorkerLink(record, self._router_id, self._model_id, self._silence_s)
        self._links[record.incarnation] = link
        return link

    async def _keep(self, link: WorkerLink) -> None:
        """Reconnect while the registry names this incarnation."""
        incarnation, delay_s = link.record.incarnation, _RECONNECT_S
        while True:
            try:
                await link.run()
            except Exception:  # the root of the link's task
                log.exception("worker_link_bug worker_id=%s", link.record.worker_id)
            if link.was_connected:
                delay_s = _RECONNECT_S
            if incarnation not in self._wanted:
                del self._links[incarnation]
                return
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _RECONNECT_MAX_S)
            link = self._link(self._wanted.get(incarnation, link.record))
