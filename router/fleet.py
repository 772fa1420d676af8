"""The workers a router can reach: follows the registry, keeps one link per incarnation."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from core.ids import Incarnation, ModelId, Role, WorkerId
from core.messages import LoadReport
from core.registry import Registry, WorkerRecord
from router.client import WorkerLink
from router.hung import hangs
from router.index import DEFAULT_MAX_BYTES, PrefixIndex
from router.pool import Pool
from router.types import ServingLimits
from router.view import WorkerView

log = logging.getLogger(__name__)

_RECONNECT_S = 0.25
_RECONNECT_MAX_S = 2.0
_LOOK_EVERY_S = 0.01


class Fleet:
    """`run` is its only task. A worker missing from the registry stays while its stream lives."""

    def __init__(
        self,
        registry: Registry,
        *,
        router_id: str,
        model_id: ModelId,
        silence_s: float,
        hung_step_s: float = 0.0,
        index_bytes: int = DEFAULT_MAX_BYTES,
    ) -> None:
        self.index = PrefixIndex(index_bytes)
        """What all workers hold, whatever their role."""
        self._registry = registry
        self._router_id = router_id
        self._model_id = model_id
        self._silence_s = silence_s
        self._hung_step_s = hung_step_s
        self._links: dict[Incarnation, WorkerLink] = {}
        self._wanted: dict[Incarnation, WorkerRecord] = {}
        self._told = False
        """The registry has answered, perhaps that there are none."""
        self._members: _Members | None = None
        self._context_tokens = 0
        self.on_load: Callable[[], None] = lambda: None
        """Called with every load report, and when a worker comes or goes."""
        self.on_hung: Callable[[], None] = lambda: None
        """Called when a worker's engine is found to hang."""
        self.on_well: Callable[[], None] = lambda: None
        """Called when its step has ended after all."""

    def links(self) -> tuple[WorkerLink, ...]:
        """All links, connected or not."""
        return tuple(self._links.values())

    def pool(self, role: Role) -> Pool:
        """Workers of this role that take requests now, those that hang only where all do; the same
        object until one comes or goes.
        """
        return self._now.pools[role]

    def link(self, role: Role, worker_id: WorkerId) -> WorkerLink:
        """Of a member of that pool."""
        return self._now.links[role][worker_id]

    @property
    def everyone(self) -> Pool:
        """All connected workers, also those that take no requests: whose caches may be read."""
        return self._now.everyone

    @property
    def limits(self) -> ServingLimits:
        """What the connected workers can hold; while there is none, what the last ones could: a
        request that finds them all restarting is one to hold, not one to refuse.
        """
        return self._now.limits

    @property
    def _now(self) -> "_Members":
        if self._members is None:
            self._members = _Members(self.links(), self._context_tokens)
            self._context_tokens = self._members.limits.context_tokens
        return self._members

    def _changed(self) -> None:
        self._members = None
        self.on_load()

    def _reported(self, link: WorkerLink) -> None:
        if link.view is not None and link.view.load is not None:
            self._judge(link, link.view, link.view.load)
        self.on_load()

    def _judge(self, link: WorkerLink, view: WorkerView, load: LoadReport) -> None:
        """A worker that hangs keeps its legs while there is no other for them; asked again with
        each of its reports.
        """
        hung = self._hangs(view, load)
        if hung != view.hung:
            view.hung, self._members = hung, None
            event, age_s = "worker_hangs" if hung else "worker_goes_on", load.step_age_s
            log.warning("%s worker_id=%s step_age_s=%.1f", event, link.record.worker_id, age_s)
            if hung:
                self.on_hung()
            else:
                self.on_well()
        if hung and self._now.has_well:
            link.give_up("its engine hangs")

    def _hangs(self, view: WorkerView, load: LoadReport) -> bool:
        if not 0 < self._hung_step_s < load.step_age_s:
            return False
        kin = (other.load for other in self.everyone.views.values() if other.kind == view.kind)
        longest_s = [one.longest_step_s for one in kin if one is not None and one.longest_step_s]
        return hangs(load.step_age_s, load.longest_step_s, longest_s, self._hung_step_s)

    async def run(self) -> None:
        """Follow the registry until cancelled."""
        async with asyncio.TaskGroup() as group:
            async for records in self._registry.watch():  # which never ends by itself
                self._wanted = {record.incarnation: record for record in records}
                for record in records:
                    if record.incarnation not in self._links:
                        group.create_task(self._keep(self._link(record)))
                self._told = True

    async def meet(self, within_s: float) -> None:
        """Beside `run`: wait until every worker that the registry names is connected, or has been
        tried; for so long at most.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self._is_met():  # noqa: ASYNC110 - bounded
                    await asyncio.sleep(_LOOK_EVERY_S)

    def _is_met(self) -> bool:
        return self._told and all(link.view is not None or link.problem for link in self.links())

    def _link(self, record: WorkerRecord, before: WorkerLink | None = None) -> WorkerLink:
        link = WorkerLink(
            record,
            self._router_id,
            self._model_id,
            self._silence_s,
            index=self.index,
            on_change=self._changed,
            on_load=self._reported,
            before=before,
        )
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
            link = self._link(self._wanted.get(incarnation, link.record), link)


class _Members:
    """Who is there; of two lives of one worker, the later one. `context_tokens` is the limit while
    nobody is. `has_well`: each role has a worker that does not hang.
    """

    def __init__(self, links: Sequence[WorkerLink], context_tokens: int) -> None:
        routable: dict[WorkerId, WorkerLink] = {}
        connected: dict[WorkerId, WorkerView] = {}
        for link in links:
            if link.view is not None:
                connected[link.view.hello.worker_id] = link.view
            if link.routable is not None:
                routable[link.record.worker_id] = link
        self.everyone = Pool(connected)
        self.links: dict[Role, dict[WorkerId, WorkerLink]] = {role: {} for role in Role}
        for worker_id, link in routable.items():
            if link.view is not None:
                self.links[link.view.hello.role][worker_id] = link
        self.has_well = True
        for role, members in self.links.items():
            well = {w: link for w, link in members.items() if link.view and not link.view.hung}
            self.has_well = self.has_well and bool(well)
            self.links[role] = well or members
        self.pools = {
            role: Pool({w: link.view for w, link in members.items() if link.view is not None})
            for role, members in self.links.items()
        }
        self.limits = ServingLimits(
            context_tokens=min(
                (view.capacity_tokens for view in connected.values()), default=context_tokens
            ),
            ready=all(pool.workers for pool in self.pools.values()),
        )
