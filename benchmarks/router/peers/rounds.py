"""Parts `peers-16` and `peers-128`: the same requests through Baton and other routers, in turns.

Prefill and decode workers are apart for all. Each round sends the same bodies through every router,
in an order of its own; all routers are alive all the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from random import Random

import uvloop

from benchmarks.machine import raise_file_limit
from benchmarks.router.client import chat_body
from benchmarks.router.loops import (
    STALL_TOKENS,
    Bodies,
    Front,
    Loop,
    measure_loop,
    measure_stalls,
    median_loop,
    warm,
)
from benchmarks.router.peers.catalog import Engine, Peer, catalog
from benchmarks.router.peers.network import loopback_only
from benchmarks.router.peers.running import WORKERS, begin, ready
from benchmarks.router.rig import Rig, router_rig
from benchmarks.types import BenchFailed, Run
from core.ids import Role

BATON = "baton"
ROUNDS = 5
CLIENTS = (32, 256)
_SECONDS = 1.0
_GROUPS = 50
_PREFIX_CHARS, _PROMPT_CHARS = 800, 1024
_ROUND_BODIES = 1_000_000
_ORDER_SEED = 0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What one router did. With a `reason` it did not finish, or never began."""

    name: str
    peer: Peer | None
    loops: dict[int, list[Loop]] = field(default_factory=dict)
    """By clients, one per round."""
    stall: Loop | None = None
    quick: Loop | None = None
    """The same with quick ACKs."""
    reason: str = ""

    def median(self, clients: int) -> Loop:
        return median_loop(self.loops[clients])


def measure_peers(run: Run, answer_tokens: int) -> list[Outcome]:
    """Baton first, then all peers, those too that are missing."""
    raise_file_limit()
    with loopback_only() as apart:
        outcomes: list[Outcome] = uvloop.run(_measure(run, answer_tokens, apart=apart))
    return outcomes


async def _measure(run: Run, answer_tokens: int, *, apart: bool) -> list[Outcome]:
    roles = (Role.PREFILL,) * WORKERS + (Role.DECODE,) * WORKERS
    with ExitStack() as stack:
        async with router_rig(roles) as rig:
            run.progress("peers start", 0, ROUNDS)
            fronts: dict[str, Front] = {BATON: rig}
            outcomes = [Outcome(name=BATON, peer=None)]
            for peer in catalog():
                outcomes.append(await _started(stack, peer, rig, fronts, apart=apart))
            await _rounds(run, rig, answer_tokens, fronts, outcomes)
    return outcomes


async def _started(
    stack: ExitStack, peer: Peer, rig: Rig, fronts: dict[str, Front], *, apart: bool
) -> Outcome:
    """Puts it among `fronts` once it serves."""
    outcome = Outcome(name=peer.name, peer=peer)
    if not peer.installed:
        outcome.reason = "not installed: make peers"
    elif peer.engine is Engine.OWN and not apart:
        outcome.reason = (
            "it listens on the machine's own address, and a network of its own takes Linux and root"
        )
    else:
        try:
            front = begin(stack, peer, rig.model)
            await ready(front, rig.model)
            fronts[peer.name] = front
        except BenchFailed as failed:
            outcome.reason = f"did not start: {failed}"
    return outcome


async def _rounds(
    run: Run,
    rig: Rig,
    answer_tokens: int,
    fronts: dict[str, Front],
    outcomes: Sequence[Outcome],
) -> None:
    orders = Random(_ORDER_SEED)
    running = [outcome for outcome in outcomes if outcome.name in fronts]
    for number in range(ROUNDS + 1):
        run.progress("rounds", number, ROUNDS + 1)
        orders.shuffle(running)
        for outcome in list(running):
            try:
                await _turn(rig, answer_tokens, fronts[outcome.name], outcome, number)
            except BenchFailed as failed:
                outcome.reason = f"failed in round {number}: {failed}"
                running.remove(outcome)


async def _turn(rig: Rig, answer_tokens: int, front: Front, outcome: Outcome, number: int) -> None:
    """Round 0 warms up, and looks for stalls."""
    body = bodies(rig, answer_tokens, number * _ROUND_BODIES)
    if number == 0:
        for clients in CLIENTS:
            await warm(front, body, clients=clients)
        few = bodies(rig, STALL_TOKENS, 0)
        outcome.stall = await measure_stalls(front, few, _SECONDS)
        outcome.quick = await measure_stalls(front, few, _SECONDS, quick_acks=True)
        return
    for clients in CLIENTS:
        outcome.loops.setdefault(clients, []).append(
            await measure_loop(
                front, body, clients=clients, answer_tokens=answer_tokens, seconds=_SECONDS
            )
        )


def bodies(rig: Rig, answer_tokens: int, first: int) -> Bodies:
    """Prompts of 1 KB: 50 prefixes, each shared by many requests, and an end of each one's own."""

    def body(number: int) -> bytes:
        group = (first + number) % _GROUPS
        shared = f"Group {group}. {rig.text[100 * group :]}"[:_PREFIX_CHARS]
        own = f" Question {first + number}. {rig.text}"
        return chat_body(rig.model, (shared + own)[:_PROMPT_CHARS], answer_tokens)

    return body
