"""Whether a request is placed now, waits in the router, or is refused at once, by its TTFT target.
Pure: the line of those who wait is kept in admission_line.py, the simulator keeps one of its own.

A request that has waited `w` and whose prompt is `work` on a worker with `queue` before it has its
first token after w + queue + work. Only waiting is overload, the work is not: a prompt whose own
work is more than the target is served all the same. So what is bounded is w + queue, by

    patience = max(target - work, target / 2, work)

which keeps the target wherever a prompt leaves half of it for waiting, and lets a longer one wait
as long as it computes. Over all candidates the policy looked at:

    admit    w + queue + work <= target, or queue <= calm and w + queue <= patience, on one of them
    wait     w + queue / 2  <= patience on one of them: a queue may drain twice as fast as predicted
    reject   otherwise; where no prediction is wrong by more than that, waiting was for nothing

So whoever cannot be in time is placed in calm moments alone, and does the rest of its waiting here.
If it joined any queue within its patience, long prompts would keep queues as long as they compute,
past the patience of every short one: in overload the short ones were refused, which could have been
in time, and the long ones served, which could not (docs/headline.md).

That holds as long as they are few (`Longs`): those that give way mostly miss their target, though
half of them would have kept it, as queues are moved and cancelled. Where one prompt in twelve is
long, as may be with a large model, they join any queue within their patience.

Those who wait stand in a line, first those who can be in time (line.py), and only the first is
admitted, or whoever would go to a worker that none of those before it wants.

Whoever is admitted by its TTFT may still be refused because no decode worker could keep its TPOT
target (`router.admission_decode`; decode_load.py): that does not wait, as answers take long to end.

An idle worker admits whoever has not outwaited its patience, so a prediction that is far too high
corrects itself. Whoever comes while a pool has no worker waits in the same bounded line: a restart
gathers no crowd. Late binding and early rejection are those of Mooncake (FAST'25, section 5.2) and
P/D-Serve (arXiv 2408.08147).
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple, Self

from core.ids import WorkerId
from router.decode_load import DecodeLoad
from router.members import L
from router.placement import Considered, Outlook
from router.policies.base import Slo
from router.watcher import RejectReason

_DRAIN_DOUBT = 0.5
"""Part of a predicted queue that may be gone sooner: legs are cancelled, prompts found cached."""
_AIM = 0.8
"""Of the TTFT target: one prediction in ten is a fifth too short."""
_CALM = 0.2
"""Of the TTFT target; what may be before a prompt that is not in time, where such are few."""
_FEW, _MANY = 0.05, 0.08
"""Of the latest prompts. A goodput of 90 % has a tenth of them to give away, and misses others."""
_LATEST = 256
_AT_FIRST = 64
"""Prompts of which none was long, as it were, before the first one."""
_LATE_SHARE = 0.5
"""Of the bounds of what waits: those that are late anyway leave room for the others."""
LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueBounds:
    """Of what waits in one router, all classes together; a request of many choices is one."""

    requests: int
    prompt_tokens: int


class InLine(NamedTuple):
    """One in line: the least seconds of work it is anywhere, and the workers it may go to; None
    where that is not known yet.
    """

    work_s: float
    workers: Collection[WorkerId] | None

    @classmethod
    def of(cls, considered: Considered[L] | None) -> Self:
        """As it was considered last; None is for what found a pool without workers."""
        if considered is None:
            return cls(0.0, None)
        outlooks = dict(considered.outlooks())
        work_s = min((outlook.work_s for outlook in outlooks.values()), default=0.0)
        return cls(work_s, frozenset(outlooks) | {considered.worker_id})

    def would_go_to(self, worker: WorkerId) -> bool:
        """Whether a prompt that goes there may be in its way."""
        return self.workers is None or worker in self.workers


class Longs:
    """How many of the latest prompts, of one router and class, are too long to wait in a queue. Who
    was refused and asks again is one more of them.
    """

    def __init__(self) -> None:
        self._share, self._seen = 0.0, _AT_FIRST

    def saw(self, considered: Considered[L], slo: Slo) -> None:
        """A prompt has come."""
        first = next(iter(considered.outlooks()), None)
        if first is not None:
            is_long = _is_long(first[1].work_s, slo)
            if is_long:  # there; to look at all places costs more
                is_long = _is_long(InLine.of(considered).work_s, slo)
            self._seen = min(self._seen + 1, _LATEST)
            self._share += (is_long - self._share) / self._seen

    @property
    def give_way(self) -> float:
        """1 where they are few, 0 where they are many."""
        return min(1.0, max(0.0, (_MANY - self._share) / (_MANY - _FEW)))


class Admit(NamedTuple):
    """Place it now."""


class Wait(NamedTuple):
    """Place it later. If the prediction stays as it is, the answer is another one `recheck_s` from
    now; `drain_s` as a Reject's `retry_after_s`.
    """

    recheck_s: float
    drain_s: float


class Reject(NamedTuple):
    """A request like it would be admitted after `retry_after_s`."""

    retry_after_s: float
    reason: RejectReason = RejectReason.TARGET


Verdict = Admit | Wait | Reject


def judge(
    now_s: float,
    arrived_s: float,
    considered: Considered[L],
    slo: Slo,
    ahead: Sequence[InLine],
    *,
    give_way: float,
) -> Verdict:
    """Of one that comes, or one in line, with those before it there. It passes them where none of
    them would go: a long prompt that waits for a prefill worker holds up no turn of a chat whose
    decode worker has it all but for a question. `give_way` is that of `Longs`.
    """
    if not ahead:
        seen = (outlook for _, outlook in considered.outlooks())
        return decide(now_s, arrived_s, seen, slo, give_way=give_way)
    outlooks = dict(considered.outlooks())
    here = considered.worker_id
    if here in outlooks and not any(other.would_go_to(here) for other in ahead):
        verdict = decide(now_s, arrived_s, [outlooks[here]], slo, give_way=give_way)
        if isinstance(verdict, Admit):
            return verdict
    ahead_s = sum(other.work_s for other in ahead) / considered.places
    return decide(now_s, arrived_s, outlooks.values(), slo, ahead_s=ahead_s, give_way=give_way)


def decide(
    now_s: float,
    arrived_s: float,
    outlooks: Iterable[Outlook],
    slo: Slo,
    *,
    ahead_s: float | None = None,
    give_way: float = 1.0,
) -> Verdict:
    """`ahead_s` are seconds of work, spread over the pool, of those before it in its line; None is
    for the first, as only that one is admitted.

    Without an outlook nothing is predicted, and the first is admitted whatever it is.
    """
    waited_s = now_s - arrived_s
    latest_s, after_s = -inf, inf
    for queue_s, work_s in outlooks:
        patience_s, spare_s = patience_of(work_s, slo), _AIM * slo.ttft_s - work_s
        before_s = queue_s + (ahead_s or 0.0)
        calm_s = give_way * _CALM * slo.ttft_s + (1 - give_way) * patience_s
        in_time = waited_s + before_s <= spare_s
        calm = before_s <= calm_s and waited_s + before_s <= patience_s
        if ahead_s is None and (in_time or calm):
            return Admit()
        latest_s = max(latest_s, patience_s - waited_s - (1 - _DRAIN_DOUBT) * before_s)
        after_s = min(after_s, before_s - max(spare_s, calm_s))
    if after_s == inf:
        return Admit() if ahead_s is None else Wait(slo.ttft_s, LEAST_RETRY_S)
    drain_s = min(max(LEAST_RETRY_S, after_s), _MOST_RETRY_S)
    return Wait(latest_s, drain_s) if latest_s > 0 else Reject(drain_s)


def decide_decode(load: DecodeLoad | None) -> Verdict:
    """Of a prompt that its TTFT admits: whether there is a decode worker for it. Where nothing is
    predicted, there is.
    """
    if load is None or load.share <= 1.0:
        return Admit()
    return Reject(min(max(LEAST_RETRY_S, load.drain_s), _MOST_RETRY_S), RejectReason.DECODE)


def is_full(
    requests: int, waiting_tokens: int, prompt_tokens: int, bounds: QueueBounds, *, late: bool
) -> bool:
    """Whether a prompt may not wait beside so many requests of so many tokens; an empty queue takes
    any.
    """
    share = _LATE_SHARE if late else 1.0
    over_tokens = waiting_tokens + prompt_tokens > share * bounds.prompt_tokens
    return requests > 0 and (requests >= share * bounds.requests or over_tokens)


def is_late(waited_s: float, work_s: float, slo: Slo) -> bool:
    """Whether a prompt of so much work, where it is least, is in time in calm moments at most, or
    not at all any more.
    """
    return _is_long(work_s, slo) or waited_s + work_s > _AIM * slo.ttft_s


def _is_long(work_s: float, slo: Slo) -> bool:
    return work_s > (_AIM - _CALM) * slo.ttft_s


def patience_of(work_s: float, slo: Slo) -> float:
    """How long a prompt that takes `work_s` itself may wait, here and at its worker."""
    return max(_AIM * slo.ttft_s - work_s, slo.ttft_s / 2, work_s)
