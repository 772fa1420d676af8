"""What the rounds with peers mean: a table, targets, and keys of the JSON object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.router.loops import STALL_TOKENS, Loop
from benchmarks.router.peers.catalog import Engine
from benchmarks.router.peers.rounds import BATON, CLIENTS, ROUNDS, Outcome, measure_peers
from benchmarks.types import PEERS, Finding, Json, Part, ResultTable, Run, Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHORT_TOKENS, LONG_TOKENS = 16, 128
_GATEWAY_TARGETS = {SHORT_TOKENS: 0.75, LONG_TOKENS: 1.5}
"""Answers per CPU-second over the best gateway's, which does not tokenize; by tokens per answer."""
_DYNAMO_TARGET = 4.0
_HEADLINE_CLIENTS = 32


def run(run: Run, answer_tokens: int) -> Finding:
    """Raises BenchFailed when Baton itself does not answer."""
    return finding(measure_peers(run, answer_tokens), answer_tokens)


def finding(outcomes: Sequence[Outcome], answer_tokens: int) -> Finding:
    """Of one length of answers."""
    cells: list[Json] = [
        _cell(outcome, clients)
        for outcome in outcomes
        for clients in CLIENTS
        if outcome.loops.get(clients) and not outcome.reason
    ]
    keys: dict[str, Json] = {f"peers_{answer_tokens}": cells}
    if answer_tokens == LONG_TOKENS:
        keys["peers"] = {
            outcome.name: round(outcome.median(_HEADLINE_CLIENTS).tokens_per_cpu_s)
            for outcome in outcomes
            if outcome.peer is not None and not outcome.reason
        }
    return Finding(
        tables=(_table(outcomes, answer_tokens),),
        targets=tuple(_targets(outcomes, answer_tokens)),
        notes=_NOTES,
        keys=keys,
        draw=lambda axes: _draw(axes, outcomes, answer_tokens),
    )


_NOTES = (
    f"Medians of {ROUNDS} rounds in turns; 1 KB prompts of 50 shared prefixes; prefill and decode"
    " apart, two workers of each. CPU is that of each router's processes, from the OS. The gateways"
    " neither tokenize nor detokenize; Baton and Dynamo do both. Dynamo's frontend is its router;"
    " the row with mockers adds its mock engine, which its transport is part of.",
    "Workers answer as fast as they can, a token of every answer per turn. 'events' are SSE events"
    " per answer, 'shared' is the share of them that came in one piece with an earlier one; stalls"
    f" are pauses of 40 ms in answers of {STALL_TOKENS} tokens to 4 clients with delayed ACKs,"
    " 'quick' those left when the clients acknowledge at once, which have another cause.",
)


def _table(outcomes: Sequence[Outcome], answer_tokens: int) -> ResultTable:
    rows: list[tuple[str, ...]] = []
    for outcome in outcomes:
        if outcome.reason:
            rows.append((outcome.name, outcome.reason.splitlines()[0], *[""] * 10))
            continue
        for clients in CLIENTS:
            loop = outcome.median(clients)
            rows.append(_row(outcome, loop))
            if outcome.peer is not None and outcome.peer.engine is Engine.OWN:
                rows.append(_row_with_workers(outcome, loop))
    columns = ("router", "note", "clients", "answers/s", "answers/CPU-s", "tokens/CPU-s")
    return ResultTable(
        title=f"{answer_tokens} tokens per answer, closed loops",
        columns=(*columns, "TTFT p50 ms", "p99 ms", "events", "shared", "stalls", "quick"),
        texts=2,
        rows=tuple(rows),
    )


def _row(outcome: Outcome, loop: Loop) -> tuple[str, ...]:
    return (
        outcome.name,
        "" if outcome.peer is None else outcome.peer.version,
        f"{loop.clients}",
        f"{loop.answers_per_s:.0f}",
        f"{loop.answers_per_cpu_s:.0f}",
        f"{loop.tokens_per_cpu_s:.0f}",
        f"{loop.ttft_ms_p50:.1f}",
        f"{loop.ttft_ms_p99:.1f}",
        f"{loop.events_per_answer:.1f}",
        f"{loop.coalesced_share:.0%}",
        _stalls(outcome.stall),
        _stalls(outcome.quick),
    )


def _stalls(loop: Loop | None) -> str:
    return "" if loop is None else f"{loop.stalls} in {loop.answers}"


def _row_with_workers(outcome: Outcome, loop: Loop) -> tuple[str, ...]:
    rate = loop.answers_per_cpu_s_with_workers
    costs = (f"{rate:.0f}", f"{rate * loop.answer_tokens:.0f}")
    return (outcome.name, "with mockers", f"{loop.clients}", "", *costs, *[""] * 6)


def _targets(outcomes: Sequence[Outcome], answer_tokens: int) -> list[Target]:
    """Only against what was measured; each is judged where it is hardest to reach."""
    done = {outcome.name: outcome for outcome in outcomes if not outcome.reason}
    if BATON not in done:
        return []
    baton = {clients: done[BATON].median(clients) for clients in CLIENTS}
    gateways = [o for o in done.values() if o.peer and o.peer.engine is not Engine.OWN]
    found: list[Target] = []
    if gateways:
        best = {
            clients: max(o.median(clients).answers_per_cpu_s for o in gateways)
            for clients in CLIENTS
        }
        found.append(_ratio("the best gateway's", baton, best, _GATEWAY_TARGETS[answer_tokens]))
    for outcome in done.values():
        if outcome.peer and outcome.peer.engine is Engine.OWN:
            alone = {c: outcome.median(c).answers_per_cpu_s for c in CLIENTS}
            found.append(_ratio(f"{outcome.name}'s frontend's", baton, alone, _DYNAMO_TARGET))
    return found


def _ratio(
    whose: str, baton: Mapping[int, Loop], theirs: Mapping[int, float], least: float
) -> Target:
    ratios = {clients: baton[clients].answers_per_cpu_s / theirs[clients] for clients in CLIENTS}
    tokens = baton[CLIENTS[0]].answer_tokens
    return Target(
        promise=f"answers of {tokens} tokens per CPU-second: at least {least:g} x {whose}",
        measured=", ".join(f"{ratio:.2f} at {clients}" for clients, ratio in ratios.items()),
        held=min(ratios.values()) >= least,
    )


def _cell(outcome: Outcome, clients: int) -> Json:
    loop = outcome.median(clients)
    per_cpu_s: list[Json] = [round(one.answers_per_cpu_s, 1) for one in outcome.loops[clients]]
    cell: dict[str, Json] = {
        "name": outcome.name,
        "version": None if outcome.peer is None else outcome.peer.version,
        "clients": clients,
        "tokens": loop.answer_tokens,
        "answers_per_s": round(loop.answers_per_s),
        "answers_per_cpu_s": round(loop.answers_per_cpu_s, 1),
        "answers_per_cpu_s_rounds": per_cpu_s,
        "answers_per_cpu_s_with_workers": round(loop.answers_per_cpu_s_with_workers, 1),
        "tokens_per_cpu_s": round(loop.tokens_per_cpu_s),
        "ttft_ms_p50": round(loop.ttft_ms_p50, 2),
        "ttft_ms_p99": round(loop.ttft_ms_p99, 2),
        "events_per_answer": round(loop.events_per_answer, 2),
        "coalesced_share": round(loop.coalesced_share, 3),
        "pauses": None if outcome.stall is None else outcome.stall.stalls,
        "pauses_with_quick_acks": None if outcome.quick is None else outcome.quick.stalls,
    }
    return cell


def _draw(axes: Axes, outcomes: Sequence[Outcome], answer_tokens: int) -> None:
    shown = [outcome for outcome in outcomes if not outcome.reason]
    for i, clients in enumerate(CLIENTS):
        places = [place + 0.4 * i - 0.2 for place in range(len(shown))]
        axes.bar(places, [o.median(clients).answers_per_cpu_s for o in shown], 0.4)
    axes.set_xticks(range(len(shown)), [outcome.name for outcome in shown])
    axes.legend([f"{clients} clients" for clients in CLIENTS])
    axes.set(ylabel="answers per CPU-second", title=f"{answer_tokens} tokens per answer")


SHORT_PART = Part(
    name="peers-16",
    what="answers of 16 tokens through Baton and its peers",
    keys=("peers_16",),
    run=partial(run, answer_tokens=SHORT_TOKENS),
    option=PEERS,
)
LONG_PART = Part(
    name="peers-128",
    what="answers of 128 tokens through Baton and its peers",
    keys=("peers_128", "peers"),
    run=partial(run, answer_tokens=LONG_TOKENS),
    option=PEERS,
    otherwise={"peers": {}},
)
