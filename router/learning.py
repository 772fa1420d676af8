"""What answers teach: the curves of each kind of worker, and which one fails or is far slower."""

from typing import Generic

from core.clock import Clock
from core.ids import Incarnation, Role, WorkerId
from core.messages import LegTimes, LoadReport
from core.stages import Stage
from router.members import L, Members
from router.outliers import Outliers
from router.place import Knowledge
from router.progress import COMPLETE, SequenceEnd
from router.view import WorkerView

_SMALL_SHARE = 0.1
"""More of a prompt's time, taken for that of answers by a guess, would bend the prefill curve."""
_FEW_TOKENS = 8
"""Fewer steps tell too little of what a step takes."""


class Learning(Generic[L]):
    """Told of every leg and every end by whoever drives them."""

    def __init__(
        self, fleet: Members[L], known: Knowledge, outliers: Outliers, clock: Clock
    ) -> None:
        self._fleet = fleet
        self._known = known
        self._outliers = outliers
        self._clock = clock

    def prefilled(self, link: L, times: LegTimes) -> None:
        """A prompt has its first token from there. By a worker that does not tell of its steps
        nothing is learned: what else was in them may be most of it.
        """
        view, now_s, curves = link.view, self._clock.now_s(), self._known.curves
        if view is None:
            return
        incarnation = view.hello.incarnation
        self._outliers.answered(incarnation, now_s)
        seconds, work = times.prefill_s, times.work
        if seconds <= 0 or not work.steps:
            return
        speed = curves.of(view.kind)
        alone_s, decodes_s = speed.prefill.of(work), 0.0
        if (load := view.load) is not None and load.decoding and self._has_shared_steps(view):
            decode_s = work.steps * speed.decode.seconds(load.decoding, load.decoding_tokens)
            decodes_s = speed.beside * decode_s
            if not view.is_prefill:
                curves.saw_beside(view.kind, decode_s, seconds - alone_s)
        if view.is_prefill:
            if decodes_s <= _SMALL_SHARE * seconds:
                curves.saw_prefill(view.kind, work, seconds - decodes_s, now_s)
            peers = self._fleet.pool(Role.PREFILL).incarnations
            self._outliers.took(incarnation, peers, seconds, alone_s + decodes_s, now_s)

    def decoding(self, link: L) -> None:
        """A sequence has its first token of its decode from there."""
        self._outliers.answered(link.record.incarnation, self._clock.now_s())

    def failed(self, role: Role, incarnation: Incarnation, *, fault: bool = False) -> None:
        """A leg failed there, or was not answered in time; `fault`: by an error of the worker
        itself. A worker's no is no failure.
        """
        peers = self._fleet.pool(role).incarnations
        self._outliers.failed(incarnation, peers, self._clock.now_s(), fault=fault)

    def ended(self, end: SequenceEnd) -> None:
        """Implements router.progress.SequenceObserver."""
        times = end.timings
        if end.outcome not in COMPLETE:
            return
        for incarnation in end.served_by:
            self._outliers.completed(incarnation)
        if times.attempts != 1:
            return
        began = next((mark.at_s for mark in end.marks if mark.stage is Stage.DECODE), None)
        alone = began is not None and not times.migrations
        decode_s = end.ended_at_s - began if began is not None and alone else None
        self.answer_ended(WorkerId(times.decode_worker), end.output_tokens, decode_s)

    def answer_ended(self, worker: WorkerId, output_tokens: int, decode_s: float | None) -> None:
        """An answer is complete, at the first attempt. `decode_s`: since its second token, if all
        of that passed on `worker`.
        """
        now_s, curves = self._clock.now_s(), self._known.curves
        curves.saw_output(output_tokens)
        view = self._fleet.everyone.views.get(worker)
        steps = output_tokens - 2  # the prefill's token, and the one that began the decode
        if view is None or view.load is None or decode_s is None or steps < _FEW_TOKENS:
            return
        if view.is_prefill and self._has_shared_steps(view):
            return  # its steps are the prompts', which come all the time
        if view.load.running:
            step_s, running = decode_s / steps, view.load.running
            context_tokens = _running_tokens(view.load)
            predicted_s = curves.of(view.kind).decode.seconds(running, context_tokens)
            curves.saw_decode(view.kind, running, context_tokens, step_s, now_s)
            # Steps of a colocated worker hold prompts: those of decode workers are no measure.
            peers = () if view.is_colocated else self._fleet.pool(Role.DECODE).incarnations
            self._outliers.took(view.hello.incarnation, peers, step_s, predicted_s, now_s)

    def _has_shared_steps(self, view: WorkerView) -> bool:
        """Whether what answers add to its steps is told apart from what prompts take."""
        if view.is_colocated:
            return False
        return self._known.local_decode or not view.is_prefill


def _running_tokens(load: LoadReport) -> int:
    """Context of those that run, if any do: reports count what is on its way there as well, which
    no step reads.
    """
    return load.context_tokens * load.running // (load.running + load.waiting)
