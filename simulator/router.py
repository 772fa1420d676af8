"""One router under the virtual clock: production choices and admission, simulated legs.

    arrive -> admitted (or waits in line, or refused) -> placed -> first token -> last token
                                  ^---- a leg's worker is lost: again, from the tokens so far

Who goes where is `router.chooser.Chooser`'s to say, who is admitted `router.admission.decide`'s,
whether a worker takes a leg its role's policy's. Here is only the order of the hops, as
router/attempt.py has it, without the waits that a lost message would need.
"""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import NamedTuple

from core.errors import InvalidRequest, NoWorkers, TransferFailed, Unavailable, WorkerLost
from core.ids import Role, WorkerId
from core.messages import LegTimes
from decode_worker.config import DecodeConfig
from decode_worker.policy import refuse_sequence
from prefill_worker.config import PrefillConfig
from prefill_worker.policy import refuse_prompt
from router.admission import (
    Admit,
    InLine,
    Longs,
    QueueBounds,
    Reject,
    Verdict,
    Wait,
    decide_decode,
    is_full,
    is_late,
    judge,
)
from router.chooser import Chooser
from router.line import Line
from router.outliers import OutlierRules, Outliers
from router.placement import Considered, Placement
from router.policies.build import build_policies
from router.watcher import Requeue, Unwatched
from simulator.balance import Balance
from simulator.deadlines import Deadlines
from simulator.events import Events
from simulator.fleet import Member, SimFleet, SimLink
from simulator.handoff import Handoff
from simulator.job import ComputeLeg, DecodeLeg, Job, Leg, PrefillLeg, Record
from simulator.keep import Keeper
from simulator.links import Network
from simulator.migration import AnswerMove
from simulator.moves import Moves
from simulator.spec import SimSpec
from simulator.workload.types import SimRequest

_LOOK_S = 0.02
"""The first of the line looks for a place so often; the live router does with each load report."""
_ASK_S = 0.005
"""After a round of refusals the next one begins so much later."""
_RETRY_S = 0.25


class _Waits(NamedTuple):
    """One in line."""

    job: Job
    place: InLine


class SimRouter:
    """`arrive` with each request; `on_end` hears of each record that is complete."""

    def __init__(
        self,
        spec: SimSpec,
        fleet: SimFleet,
        events: Events,
        network: Network,
        *,
        random: Random,
        on_end: Callable[[Record], None],
        keeper: Keeper | None = None,
    ) -> None:
        self.fleet = fleet
        self._spec = spec
        self._events = events
        self._network = network
        self._on_end = on_end
        self._keeper = keeper
        rules = OutlierRules(failures=spec.router.eject_after_failures, eject_s=spec.router.eject_s)
        self.chooser: Chooser[SimLink] = Chooser(
            fleet,
            build_policies(spec.router, spec.slo),
            events,
            random,
            Outliers(rules, Unwatched()),
        )
        self._prefill_config = PrefillConfig(max_queued_tokens=spec.max_queued_tokens)
        self._decode_config = DecodeConfig(max_sequences=spec.max_sequences)
        self._bounds = QueueBounds(
            requests=spec.router.admission_max_requests,
            prompt_tokens=spec.router.admission_max_tokens,
        )
        self._line: Line[_Waits] = Line()
        self._longs = Longs()
        self._looking = False
        self._jobs: dict[int, Job] = {}
        """That have not ended, in order of arrival."""
        self._deadlines = Deadlines(events, self._jobs, spec.router.request_timeout_s, self._expire)
        self.moves = Moves(spec, self.chooser, events)
        self._balance = None
        if spec.moves_answers:
            self._balance = Balance(fleet, events, running=self._running_at, move=self._move_answer)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._line)

    # -- admission ------------------------------------------------------------------------------

    def arrive(self, request: SimRequest) -> Record:
        """A client asks; answers what will tell of it."""
        if self._keeper is not None:
            self._keeper.asked(request.session)
        job = Job(request, self, self._spec.router.max_attempts)
        self._jobs[id(job)] = job
        self._deadlines.look_later()
        considered, verdict = self._judge(job)
        if isinstance(verdict, Admit):
            self._start(job, considered)
        elif isinstance(verdict, Reject):
            self._refuse(job, verdict.retry_after_s)
        else:
            waits = _Waits(job, InLine.of(considered))
            late = self._is_late(job, considered)
            if self._is_full(job, late=late):
                self._refuse(job, verdict.drain_s)
                return job.record
            self._line.append(waits, late=late)
            self._look_later()
        return job.record

    def _judge(
        self, job: Job, waits: "_Waits | None" = None
    ) -> tuple[Considered[SimLink] | None, Verdict]:
        """Of one that comes, or waits in the line."""
        try:
            considered = self._consider(job)
        except NoWorkers:
            return None, Admit()  # the attempt's to wait for
        if job.record.attempts:
            return considered, Admit()  # what has begun is not refused
        if waits is None and self._spec.router.admission != "off":
            self._longs.saw(considered, self._spec.slo)
        late = bool(self._line) and self._is_late(job, considered)
        if waits is not None:
            self._line.move(waits, late=late)
        ahead = self._line.ahead_of(waits, late=late)
        if self._spec.router.admission == "off":
            return considered, Wait(_LOOK_S, 0.0) if ahead else Admit()
        verdict = judge(
            self._events.now_s(),
            job.request.at_s,
            considered,
            self._spec.slo,
            [other.place for other in ahead],
            give_way=self._longs.give_way,
        )
        if isinstance(verdict, Admit):
            load = self.chooser.decode_load(considered, self._spec.router.admission_decode)
            verdict = decide_decode(load)
        return considered, verdict

    def _is_full(self, job: Job, *, late: bool) -> bool:
        waiting_tokens = sum(other.job.request.prompt_tokens for other in self._line)
        tokens, bounds = job.request.prompt_tokens, self._bounds
        return is_full(len(self._line), waiting_tokens, tokens, bounds, late=late)

    def _is_late(self, job: Job, considered: Considered[SimLink] | None) -> bool:
        if self._spec.router.admission == "off":
            return False
        waited_s = self._events.now_s() - job.request.at_s
        return is_late(waited_s, InLine.of(considered).work_s, self._spec.slo)

    def _is_back(self, job: Job) -> bool:
        first = self._line.next
        return first is not None and first.job is job

    def _look_later(self, pause_s: float = _LOOK_S) -> None:
        if not self._looking:
            self._looking = True
            self._events.at(self._events.now_s() + pause_s, SimRouter._look, self)

    def _look(self) -> None:
        self._looking = False
        while (waits := self._line.next) is not None:
            job = waits.job
            considered, verdict = self._judge(job, waits)
            if isinstance(verdict, Wait):
                if self._line.next is waits:
                    self._look_later()
                    return
                continue  # it has turned late, and lets others go first
            self._line.remove(waits)
            if isinstance(verdict, Reject):
                self._refuse(job, verdict.retry_after_s)
                continue
            self._start(job, considered)
            if job.refused or self._is_back(job):
                return  # nobody overtakes it while it asks

    # -- hops -----------------------------------------------------------------------------------

    def _consider(self, job: Job) -> Considered[SimLink]:
        total = job.request.prompt_tokens + self.max_tokens(job)
        return self.chooser.consider(
            range(job.context_tokens),
            "",
            job.failed | job.refused,
            hashes=job.request.hashes,
            local_total=total if self._spec.router.local_prefill else None,
        )

    def max_tokens(self, job: Job) -> int:
        """What its client asks for at most."""
        return max(self._spec.max_tokens, job.request.output_tokens)

    def _start(self, job: Job, considered: Considered[SimLink] | None) -> None:
        """An attempt, where it was considered just now."""
        try:
            considered = considered or self._consider(job)
        except NoWorkers:
            self._events.at(self._events.now_s() + _RETRY_S, self._again, job)
            return
        job.record.attempts += 1
        job.emitted_before = job.emitted
        local = self.chooser.place_locally(considered)
        placed = local or self.chooser.place(considered, job.failed)
        if considered.is_alone:
            self._compute(job, placed)
        else:
            self._prefill(job, placed)

    def _again(self, job: Job) -> None:
        if id(job) in self._jobs:  # else its time was up meanwhile
            self._start(job, None)

    def _expire(self, job: Job) -> None:
        """Its time is up. Whoever it still waited for, for the whole of it, has failed."""
        for leg in job.legs:
            if leg.sequence.known_tokens == leg.sequence.context_tokens:
                self.chooser.learning.failed(leg.link.record.role, leg.link.record.incarnation)
                break
        self._give_up_legs(job)
        for waits in [waits for waits in self._line if waits.job is job]:
            self._line.remove(waits)
        self._end(job, "deadline")
        self._look_later()

    def _compute(self, job: Job, placed: Placement[SimLink]) -> None:
        """One worker does it all."""
        link, now_s = placed.link, self._events.now_s()
        if not self._takes(job, link, decodes=True):
            return
        job.record.prefill_worker = job.record.decode_worker = link.record.worker_id
        link.submitted(placed.load_tokens, placed.prompt_tokens)
        self._note_queued(job, placed, moves=False)
        job.decode = link
        leg = ComputeLeg(job, link, now_s)
        job.legs = [leg]
        link.member.worker.compute(leg.sequence)
        if self._keeper is not None:
            self._keeper.submitted(link.member)

    def _prefill(self, job: Job, placed: Placement[SimLink]) -> None:
        link, now_s = placed.link, self._events.now_s()
        if not self._takes(job, link, decodes=False):
            return
        job.record.prefill_worker = link.record.worker_id
        link.submitted(placed.load_tokens, placed.prompt_tokens)
        self._note_queued(job, placed, moves=not job.requeued)
        leg = PrefillLeg(job, link, now_s)
        job.legs = [leg]
        if job.emitted + 1 < self.max_tokens(job) and not self._hand_over(job, leg, now_s):
            return
        source = placed.source
        owner = None if source is None else self.fleet.find(source.worker_id)
        deadline_s = job.request.at_s + self._spec.router.request_timeout_s
        leg.compute(source, owner, deadline_s)
        if self._keeper is not None:
            self._keeper.submitted(link.member)

    def _hand_over(self, job: Job, prefill: PrefillLeg, now_s: float) -> bool:
        """Choose where the answer goes on, before the prompt is computed."""
        source = prefill.link.member
        try:
            placed = self.chooser.for_decode(
                job.context_tokens,
                job.request.prompt_tokens + self.max_tokens(job),
                job.failed,
                kv_address=source.hello.peer_address,
            )
        except NoWorkers:
            self._give_up_legs(job)
            self._events.at(now_s + _RETRY_S, self._again, job)
            return False
        link = placed.link
        if not self._takes(job, link, decodes=True):
            return False
        link.submitted(placed.load_tokens, placed.prompt_tokens)
        job.decode, job.record.decode_worker = link, link.record.worker_id
        leg = DecodeLeg(job, link, now_s)
        size = link.member.worker.spec.block_size
        leg.handoff = prefill.handoff = Handoff(
            self._events,
            source=source,
            target=link.member,
            path=self._network.path(source.port, link.member.port),
            control_s=self._spec.network.control_s,
            read_timeout_s=self._spec.transfer.read_timeout_s,
            sequence=leg.sequence,
            hashes=job.hashes(size),
            on_usable=lambda handoff: self._decoding(job),
            on_failed=lambda handoff: self._not_handed(job, handoff),
        )
        job.legs.append(leg)
        return True

    def _note_queued(self, job: Job, placed: Placement[SimLink], *, moves: bool) -> None:
        """What it will leave in that worker's cache counts for prompts to come; until it begins it
        may move to another one.
        """
        if placed.queued is not None:
            job.queued = placed.queued
            placed.queued.arrived_at_s = job.request.at_s
            placed.queued.move = partial(self._withdraw, job) if moves else None
            self.chooser.queued.add(placed.queued)
            if moves:
                self.moves.look_later()

    def _forget_queued(self, job: Job) -> None:
        if job.queued is not None:
            self.chooser.queued.discard(job.queued)
            job.queued = None

    # -- queued prompts that move -----------------------------------------------------------------

    def _withdraw(self, job: Job, to: WorkerId) -> None:
        """The worker gives a prompt back that it has not begun; one that it has goes on there."""
        if not job.legs or job.legs[0].sequence.started_at_s is not None:
            return
        self._give_up_legs(job)
        job.requeued = True
        self.moves.requeued(Requeue.MOVED)
        considered = self.chooser.consider_at(
            to, range(job.context_tokens), "", job.failed, hashes=job.request.hashes
        )
        self._start(job, considered)

    def _give_up_legs(self, job: Job) -> None:
        """Before it goes on elsewhere; a worker lost meanwhile must not start it a second time."""
        for leg in job.legs:
            leg.drop()
        job.legs = []
        self._forget_queued(job)

    def _takes(self, job: Job, link: SimLink, *, decodes: bool) -> bool:
        """Whether the worker takes a leg, by its own policy; if not, the job goes on elsewhere."""
        spec, load = link.member.hello, link.member.worker.load()
        capacity = min(spec.context_tokens, spec.num_blocks * spec.layout.block_size)
        if decodes:
            refusal = refuse_sequence(
                job.context_tokens,
                job.outputs_left,
                capacity,
                load.running + load.waiting,
                self._decode_config,
            )
        else:
            refusal = refuse_prompt(
                job.context_tokens,
                capacity,
                load.queued_tokens,
                load.running + load.waiting,
                self._prefill_config,
            )
        if refusal is None:
            if job.refused:
                job.refused.clear()
                job.noes = 0
                self._look_later(0.0)
            return True
        self._give_up_legs(job)
        if isinstance(refusal, InvalidRequest):
            self._end(job, "too_long")
            self._look_later(0.0)
        elif decodes:
            self._events.at(self._events.now_s() + _RETRY_S, self._again, job)
        else:
            self._forward(job, link)
        return False

    def _forward(self, job: Job, link: SimLink) -> None:
        """A full prefill worker's no, heard a little later: on to another one, and when all or
        many in a row have said no, back into line, before whoever waits there.
        """
        now_s, workers = self._events.now_s(), self.fleet.pool(Role.PREFILL).workers
        job.refused.add(link.record.incarnation)
        job.noes += 1
        others = self.chooser.has_prefill(excluding=job.refused | job.failed)
        if others and job.noes < self._spec.router.max_forwards:
            self._events.at(now_s + self._spec.network.control_s, self._again, job)
            return
        job.noes = 0
        if not others:
            job.refused.clear()
        self._line.appendleft(_Waits(job, InLine(0.0, frozenset(workers))))
        self._look_later(_ASK_S)

    # -- what legs say --------------------------------------------------------------------------

    def prefilled(self, leg: PrefillLeg | ComputeLeg, *, ended: bool) -> None:
        """The first token of this attempt; with `ended` also the answer's last."""
        job, now_s, sequence = leg.job, self._events.now_s(), leg.sequence
        self._forget_queued(job)
        if self._keeper is not None:
            self._keeper.begun(job.request.session)
        job.emitted += 1
        started_s = sequence.started_at_s if sequence.started_at_s is not None else now_s
        record = job.record
        if record.first_s != record.first_s:
            record.first_s = now_s
            record.cached_tokens = min(sequence.cached_tokens, job.request.prompt_tokens)
            record.queue_s = started_s - sequence.arrived_at_s
        times = LegTimes(
            queue_s=started_s - sequence.arrived_at_s,
            prefill_s=now_s - started_s,
            work=leg.link.member.worker.work_of(sequence),
            cached_tokens=sequence.cached_tokens,
        )
        self.chooser.learning.prefilled(leg.link, times)
        job.began_s = now_s
        if ended:
            for other in job.legs:
                other.drop()
            self._complete(job)
        elif self._spec.late_refusals and job.decode is not None:
            self._check_decode(job, job.decode)

    def _check_decode(self, job: Job, link: SimLink) -> None:
        load = self.chooser.decode_load_at(link.record.worker_id, job.context_tokens)
        verdict = decide_decode(load)
        if isinstance(verdict, Reject):
            self._give_up_legs(job)
            self._refuse(job, verdict.retry_after_s)

    def _decoding(self, job: Job) -> None:
        now_s = self._events.now_s()
        job.record.transfer_s = now_s - job.began_s
        job.began_s = now_s
        job.legs = job.generating()
        if job.decode is not None:
            self.chooser.learning.decoding(job.decode)
        if self._balance is not None:
            self._balance.look_later()

    # -- running answers that move --------------------------------------------------------------

    def _running_at(self, worker: WorkerId) -> list[Leg]:
        """Legs that generate there."""
        legs = [leg for job in self._jobs.values() for leg in job.generating()]
        return [leg for leg in legs if leg.link.record.worker_id == worker and leg.sequence.blocks]

    def _move_answer(self, job: Job, to: WorkerId) -> None:
        leg, link, now_s = job.legs[0], self.fleet.link(Role.DECODE, to), self._events.now_s()
        source, target = leg.link.member, link.member
        job.emitted = source.worker.known_now(leg.sequence) - job.request.prompt_tokens
        there = DecodeLeg(job, link, now_s)
        move = AnswerMove(
            self._events,
            source=source,
            target=target,
            path=self._network.path(source.port, target.port),
            control_s=self._spec.network.control_s,
            sequence=leg.sequence,
            arriving=there.sequence,
            on_over=partial(self._moved, job, leg, there),
        )
        if move.begin():
            job.move = move
            link.submitted(job.context_tokens, 0)

    def _moved(self, job: Job, leg: Leg, there: Leg, moved: bool, pause_s: float) -> None:
        job.move = None
        if moved:
            leg.over = True
            job.legs, job.decode = [there], there.link
            job.record.decode_worker = there.link.record.worker_id
            job.record.moves += 1
            job.record.pause_s = max(job.record.pause_s, pause_s)

    def _not_handed(self, job: Job, handoff: Handoff) -> None:
        """The KV did not arrive; either end may be at fault."""
        decode, prefill = handoff.target.record, handoff.source.record
        self.chooser.learning.failed(Role.DECODE, decode.incarnation)
        self.chooser.learning.failed(Role.PREFILL, prefill.incarnation)
        self._continue(job, handoff.target, TransferFailed("the KV did not arrive"))

    def finished(self, job: Job) -> None:
        """The last token is out."""
        if job.move is not None:
            job.move.drop("the answer has ended")
        self._complete(job)

    def lost(self, member: Member) -> None:
        """A worker has died: what had a leg there goes on elsewhere, from its tokens so far."""
        for job in [j for j in self._jobs.values() if j.has_leg_on(member)]:
            self._continue(job, member, WorkerLost("the worker has died"))

    def _continue(self, job: Job, member: Member, error: Unavailable) -> None:
        for leg in job.legs:
            leg.drop()
        self._forget_queued(job)
        job.failed.add(member.record.incarnation)
        left = min([job.outputs_left, *(leg.sequence.outputs_left for leg in job.generating())])
        job.emitted = job.request.output_tokens - max(1, left)
        job.legs = []
        if job.tries.may_follow(error, job.emitted - job.emitted_before):
            self._start(job, None)
        else:
            self._end(job, "failed")

    def _complete(self, job: Job) -> None:
        record, now_s = job.record, self._events.now_s()
        if record.attempts == 1 and job.decode is not None:
            worker = WorkerId(record.decode_worker)
            decode_s = None if record.moves else now_s - job.began_s
            self.chooser.learning.answer_ended(worker, record.output_tokens, decode_s)
        if self._keeper is not None:
            workers = {record.prefill_worker, record.decode_worker} - {""}
            found = [self.fleet.find(WorkerId(worker)) for worker in sorted(workers)]
            members = [member for member in found if member is not None]
            self._keeper.ended(job.request, members, record.queue_s)
        self._end(job, "ok")

    def _refuse(self, job: Job, retry_after_s: float) -> None:
        job.record.retry_after_s = retry_after_s
        self._end(job, "refused")

    def _end(self, job: Job, outcome: str) -> None:
        job.legs = []
        self._jobs.pop(id(job), None)
        job.record.outcome = outcome
        if outcome == "ok":
            job.record.end_s = self._events.now_s()
        self._on_end(job.record)
