"""Views of workers whose streams are up, as far as placement sees, and queries about them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random

from core.ids import BlockHash, Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import KvSnapshot, LoadReport, WorkerHello
from core.step import STEP_TOKENS
from router.curves import Curves, PrefillCurve
from router.index import PrefixIndex
from router.place import DecodePoolQuery, Knowledge, PrefillPoolQuery
from router.policies.base import Slo
from router.pool import Pool
from router.view import WorkerView

BLOCK = 4
CHAIN = [BlockHash(i.to_bytes(16, "little")) for i in range(1, 9)]
IDLE = LoadReport(
    last_submit=0,
    queued_tokens=0,
    waiting=0,
    running=0,
    context_tokens=0,
    free_blocks=100,
    total_blocks=100,
)
HELLO = WorkerHello(
    worker_id=WorkerId("w"),
    incarnation=Incarnation("w"),
    role=Role.PREFILL,
    epoch=1,
    model_id=ModelId("m"),
    layout=KvLayout(block_size=BLOCK, num_kv_heads=1, num_layers=1, head_dim=4, dtype="uint8"),
    num_blocks=100,
    context_tokens=1000,
    peer_address="",
)


class Workers:
    """Some workers of one role and one index; tokens take a second each to prefill."""

    def __init__(self, role: Role = Role.PREFILL, slo: Slo | None = None, seed: int = 0) -> None:
        self.role = role
        self.known = Knowledge(
            index=PrefixIndex(),
            curves=Curves(),
            slo=slo or Slo(ttft_s=1e9, tpot_s=1e9),
            random=Random(seed),
        )
        self.views: dict[WorkerId, WorkerView] = {}

    def add(
        self,
        name: str,
        *,
        cached: int | Sequence[BlockHash] = 0,
        queued: int = 0,
        waiting: int = 0,
        running: int = 0,
        context: int = 0,
        free_blocks: int = 100,
        host: str = "h",
        domain: str = "",
        step_tokens: int = STEP_TOKENS,
        times_slower: float = 1.0,
    ) -> WorkerView:
        """A worker that holds so many blocks of CHAIN, or these."""
        worker_id = WorkerId(name)
        hello = replace(
            HELLO,
            worker_id=worker_id,
            incarnation=Incarnation(name),
            role=self.role,
            peer_address=f"{host}:1",
            network_domain=domain,
            step_tokens=step_tokens,
            chunk_tokens=step_tokens,
            device=f"{times_slower:g} times slower",
        )
        view = WorkerView(hello, self.known.index.join(worker_id))
        view.load = replace(
            IDLE,
            queued_tokens=queued,
            waiting=waiting,
            running=running,
            context_tokens=context,
            free_blocks=free_blocks,
        )
        held = CHAIN[:cached] if isinstance(cached, int) else cached
        view.apply_snapshot(KvSnapshot(next_number=1, hashes=tuple(held)))
        self.known.curves.set_prefill(view.kind, PrefillCurve(0.0, times_slower, 0.0))
        self.views[worker_id] = view
        return view

    @property
    def pool(self) -> Pool:
        return Pool(self.views)

    def prefill(
        self,
        tokens: int = 33,
        hashes: Sequence[BlockHash] = tuple(CHAIN),
        *,
        now_s: float = 0.0,
        closed: Iterable[str] = (),
        pool: Pool | None = None,
    ) -> PrefillPoolQuery:
        return PrefillPoolQuery(
            pool or self.pool,
            self.known,
            now_s,
            tokens=tokens,
            hashes=hashes,
            closed=frozenset(map(WorkerId, closed)),
        )

    def decode(
        self,
        tokens: int = 10,
        max_tokens: int = 20,
        *,
        kv_address: str = "",
        closed: Iterable[str] = (),
    ) -> DecodePoolQuery:
        return DecodePoolQuery(
            self.pool,
            self.known,
            0.0,
            tokens=tokens,
            max_tokens=max_tokens,
            kv_domain=self.pool.domain_at(kv_address) if kv_address else "",
            closed=frozenset(map(WorkerId, closed)),
        )
