"""Two pools of workers that stand still, as one router's chooser sees them: views without streams,
loaded as a busy fleet is, and curves taught by prompts and answers of such workers.
"""

from dataclasses import dataclass
from random import Random

from core.clock import FakeClock
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import KvSnapshot, LegTimes, LoadReport, WorkerHello
from core.registry import WorkerRecord
from core.step import work_alone
from router.chooser import Chooser
from router.config import RouterConfig
from router.curves import DecodeCurve, PrefillCurve
from router.index import PrefixIndex
from router.policies.build import build_policies
from router.pool import Pool
from router.view import WorkerView

BLOCK = 16
ARENA_BLOCKS = 1_000_000
ANSWER_TOKENS = 500
_MODEL = ModelId("bench")
_LESSONS = 64
_PREFILL = PrefillCurve(3.91e-3, 1.424e-5, 1.5e-9)
_DECODE = DecodeCurve(6.12e-3, 9.1e-6, 4.21e-8)


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingLink:
    """Implements router.members.Link."""

    record: WorkerRecord
    view: WorkerView


class StandingFleet:
    """Implements router.members.Members: as many prefill as decode workers."""

    def __init__(self, workers: int, random: Random) -> None:
        self.index = PrefixIndex()
        links = [self._link(role, i, random) for role in Role for i in range(workers)]
        self._links = {link.record.worker_id: link for link in links}
        self.views = [link.view for link in links]
        self.everyone = Pool({view.hello.worker_id: view for view in self.views})
        self._pools = {
            role: Pool({v.hello.worker_id: v for v in self.views if v.hello.role is role})
            for role in Role
        }

    def pool(self, role: Role) -> Pool:
        return self._pools[role]

    def link(self, role: Role, worker_id: WorkerId) -> StandingLink:
        return self._links[worker_id]

    def _link(self, role: Role, i: int, random: Random) -> StandingLink:
        worker_id, life = WorkerId(f"{role}-{i:04d}"), Incarnation(f"{role}-{i:04d}")
        address = f"{role}-{i:04d}:1"
        record = WorkerRecord(
            worker_id=worker_id,
            incarnation=life,
            role=role,
            epoch=1,
            address=address,
            router_address=address,
            model_id=_MODEL,
            pid=1,
        )
        hello = WorkerHello(
            worker_id=worker_id,
            incarnation=life,
            role=role,
            epoch=1,
            model_id=_MODEL,
            layout=KvLayout(
                block_size=BLOCK, num_kv_heads=8, num_layers=32, head_dim=128, dtype="bfloat16"
            ),
            num_blocks=ARENA_BLOCKS,
            context_tokens=BLOCK * ARENA_BLOCKS,
            peer_address=address,
        )
        view = WorkerView(hello, self.index.join(worker_id))
        view.apply_snapshot(KvSnapshot(next_number=1))
        view.reported(_prefill_load(random) if role is Role.PREFILL else _decode_load(random))
        return StandingLink(record=record, view=view)


def taught_chooser(fleet: StandingFleet, clock: FakeClock, random: Random) -> Chooser[StandingLink]:
    """With the default policies. It has seen prompts and answers enough to predict."""
    chooser: Chooser[StandingLink] = Chooser(fleet, build_policies(RouterConfig()), clock, random)
    prefill, decode = (fleet.pool(role).workers for role in (Role.PREFILL, Role.DECODE))
    for i in range(_LESSONS):
        clock.advance(1.0)
        tokens, there = random.randrange(100, 30_000), decode[i % len(decode)]
        link = fleet.link(Role.PREFILL, prefill[i % len(prefill)])
        work = work_alone(0, tokens)
        times = LegTimes(prefill_s=_PREFILL.of(work), work=work)
        chooser.learning.prefilled(link, times)
        load = fleet.link(Role.DECODE, there).view.load
        if load is not None:
            steps = random.randrange(50, 2 * ANSWER_TOKENS)
            step_s = _DECODE.seconds(load.running, load.context_tokens)
            chooser.learning.answer_ended(there, steps + 2, steps * step_s)
    return chooser


def _prefill_load(random: Random) -> LoadReport:
    """A queue, and beside it some answers that have stayed, at every fourth."""
    decoding = random.choice((0, 0, 0, 2))
    return LoadReport(
        last_submit=0,
        queued_tokens=random.randrange(20_000),
        waiting=random.randrange(8),
        running=1 + decoding,
        context_tokens=8_000 * decoding,
        decoding=decoding,
        decoding_tokens=8_000 * decoding,
        free_blocks=ARENA_BLOCKS,
        total_blocks=ARENA_BLOCKS,
    )


def _decode_load(random: Random) -> LoadReport:
    """Answers, and prompts that it computes itself."""
    running = random.randrange(1, 33)
    return LoadReport(
        last_submit=0,
        queued_tokens=random.randrange(40_000),
        waiting=random.randrange(4),
        running=running,
        context_tokens=8_000 * running,
        decoding=running,
        decoding_tokens=8_000 * running,
        free_blocks=ARENA_BLOCKS - 8_000 * running // BLOCK,
        total_blocks=ARENA_BLOCKS,
    )
