"""The simulated workers as a router sees them: the production views, pools and index over them."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.ids import Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import KvRemoved, KvStored, LoadReport, WorkerHello
from core.registry import WorkerRecord
from kv_transfer.leases import LeaseTable
from router.index import Holdings, PrefixIndex
from router.pool import Pool
from router.view import WorkerView
from simulator.handoff import PullQueue
from simulator.links import Port
from simulator.prefix import PrefixFetcher
from simulator.spec import PoolRole
from simulator.worker import SimWorker

MODEL = ModelId("simulated")


@dataclass(slots=True)
class Member:
    """One life of a worker, and what is around it."""

    record: WorkerRecord
    hello: WorkerHello
    worker: SimWorker
    queue: PullQueue
    port: Port
    pool: str
    holdings: Holdings
    unheard: list[KvStored | KvRemoved]
    """KV events routers have not heard of yet."""
    leases: LeaseTable
    fetcher: PrefixFetcher | None = None
    """Of prompts' prefixes, where such are fetched."""
    is_colocated: bool = False
    is_dead: bool = False

    def tell(self) -> None:
        """The index that all routers share hears of them."""
        for event in self.unheard:
            if isinstance(event, KvStored):
                self.holdings.stored(event.hashes)
            else:
                self.holdings.removed(event.hashes)
        self.unheard.clear()


class _TrueView(WorkerView):
    """A view whose load is what the worker would report at this moment."""

    def __init__(self, member: Member) -> None:
        self._worker = member.worker
        super().__init__(member.hello, member.holdings, is_colocated=member.is_colocated)

    @property
    def load(self) -> LoadReport | None:
        return self._worker.load()

    @load.setter
    def load(self, load: LoadReport | None) -> None:
        pass


class SimLink:
    """Implements router.members.Link, for one router."""

    def __init__(self, member: Member, view: WorkerView) -> None:
        self.member = member
        self.record = member.record
        self.view = view
        self.sent = 0
        """Submits to it from this router."""

    def submitted(self, tokens: int, prompt_tokens: int) -> None:
        """A submit is on its way there; a view of what is true shows it anyhow."""
        self.sent += 1
        if not isinstance(self.view, _TrueView):
            self.view.submitted(self.sent, tokens, prompt_tokens)

    def reported(self) -> None:
        """A report arrives."""
        if not isinstance(self.view, _TrueView):
            self.view.reported(self.member.worker.load(self.sent))


class SimFleet:
    """Implements router.members.Members, for one router."""

    def __init__(self, index: PrefixIndex, *, sees_truth: bool) -> None:
        self.index = index
        self._sees_truth = sees_truth
        self._links: dict[WorkerId, SimLink] = {}
        self._roles: dict[Role, Pool] | None = None
        self._everyone: Pool | None = None

    def join(self, member: Member) -> None:
        """It is up."""
        if self._sees_truth:
            view: WorkerView = _TrueView(member)
        else:
            colocated = member.is_colocated
            view = WorkerView(member.hello, member.holdings, is_colocated=colocated)
            view.reported(member.worker.load(0))
        self._links[member.record.worker_id] = SimLink(member, view)
        self._roles = self._everyone = None

    def leave(self, worker_id: WorkerId) -> None:
        """It is lost."""
        del self._links[worker_id]
        self._roles = self._everyone = None

    def links(self) -> Sequence[SimLink]:
        """All that are up."""
        return list(self._links.values())

    @property
    def everyone(self) -> Pool:
        if self._everyone is None:
            self._everyone = Pool({w: link.view for w, link in self._links.items()})
        return self._everyone

    def pool(self, role: Role) -> Pool:
        if self._roles is None:
            self._roles = {
                each: Pool({w: k.view for w, k in self._links.items() if k.view.hello.role is each})
                for each in Role
            }
        return self._roles[role]

    def find(self, worker_id: WorkerId) -> Member | None:
        """Of any role; None once it is lost."""
        link = self._links.get(worker_id)
        return None if link is None else link.member

    def link(self, role: Role, worker_id: WorkerId) -> SimLink:
        return self._links[worker_id]


def make_hello(name: str, role: PoolRole, worker: SimWorker, domain: int, life: int) -> WorkerHello:
    """What the worker says of itself; a colocated one stands where prompts go."""
    spec = worker.spec
    return WorkerHello(
        worker_id=WorkerId(name),
        incarnation=Incarnation(f"{name}.{life}"),
        role=Role.DECODE if role is PoolRole.DECODE else Role.PREFILL,
        epoch=0,
        model_id=MODEL,
        layout=KvLayout(
            block_size=spec.block_size,
            num_kv_heads=1,
            num_layers=1,
            head_dim=max(1, spec.kv_bytes_per_token // 2),
            dtype="uint8",
        ),
        num_blocks=spec.kv_blocks,
        context_tokens=spec.kv_blocks * spec.block_size,
        peer_address=f"domain{domain}:{name}",
        step_tokens=spec.step_tokens,
        chunk_tokens=min(spec.chunk_tokens or spec.step_tokens, spec.step_tokens),
        device=spec.device,
    )


def make_record(hello: WorkerHello) -> WorkerRecord:
    return WorkerRecord(
        worker_id=hello.worker_id,
        incarnation=hello.incarnation,
        role=hello.role,
        epoch=hello.epoch,
        address="",
        router_address="",
        model_id=hello.model_id,
        pid=0,
    )
