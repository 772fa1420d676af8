"""A worker whose engine hangs while its event loop is well: when it is taken for one, what then.

The workers are real ones in this process; their engines take a step only by permit.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from core.errors import DeadlineExceeded
from core.ids import Role
from router.config import RouterConfig
from router.hung import _MULTIPLE, hangs
from router.types import Generated, GenerateRequest
from tests.builders import (
    Cluster,
    ServedWorker,
    expected_tokens,
    make_prompt,
    make_request,
    make_settings,
    running_cluster,
    soon,
    until,
    until_idle,
)

FLOOR_S = 0.5
TOKENS = 30
PERMITS = 100_000
STEP_TOKENS = 8
"""A warm-up prompt of so many takes more steps than an engine is cold for."""


# -- the rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("age_s", "own_s", "kind_s", "hung"),
    [
        (9.9, 0.01, [0.01], False),
        (10.1, 0.01, [0.01], True),
        (10.1, 0.01, [0.01, 1.0, 1.0], False),
        (_MULTIPLE + 0.1, 0.01, [0.01, 1.0, 1.0], True),
        (10.1, 0.01, [0.01, 0.01, 30.0], True),
        (10.1, 0.01, [0.01, 30.0], True),
        (_MULTIPLE + 0.1, 2.0, [2.0, 1.0, 1.0], False),
        (119.0, 0.0, [0.01], False),
        (119.0, 0.01, [], True),
        (0.0, 0.01, [0.01], False),
    ],
    ids=[
        "below",
        "above",
        "its kin are slow",
        "slower",
        "one of three has hung before",
        "one of two has",
        "it is slow",
        "it is cold",
        "nobody is known",
        "no step",
    ],
)
def test_a_step_hangs_that_is_longer_than_the_floor_and_than_many_usual_ones(
    age_s: float, own_s: float, kind_s: list[float], hung: bool
) -> None:
    assert hangs(age_s, own_s, kind_s, 10.0) is hung


def test_a_floor_of_0_judges_none() -> None:
    assert not hangs(1e9, 0.01, 0.01, 0.0)


# -- what follows -------------------------------------------------------------------------------


@asynccontextmanager
async def warm_cluster(role: Role, *, hung_step_s: float = FLOOR_S) -> AsyncIterator[Cluster]:
    """Two workers of the role have ended enough steps; their next one waits for a permit."""
    settings = make_settings(step_tokens=STEP_TOKENS)
    router = RouterConfig(
        hung_step_s=hung_step_s, worker_wait_s=0, local_prefill=False, requeue=False
    )
    async with running_cluster(
        prefill=2 if role is Role.PREFILL else 1,
        decode=2 if role is Role.DECODE else 1,
        gated_prefill=role is Role.PREFILL,
        gated_decode=role is Role.DECODE,
        prefill_settings=settings,
        decode_settings=settings,
        router=router,
    ) as cluster:
        of_role = workers(cluster, role)
        for served in of_role:
            served.gate.allow(PERMITS)
        for seed in range(1000, 1100):
            if all(served.worker.load().longest_step_s for served in of_role):
                break
            await soon(answer(cluster, seed, name=f"warm-{seed}"))
        for served in of_role:
            served.gate.close()
        yield cluster
        for served in of_role:
            served.gate.open()
        await until_idle(*cluster.workers)


def workers(cluster: Cluster, role: Role) -> list[ServedWorker]:
    return cluster.prefill if role is Role.PREFILL else cluster.decode


def prompt_of(seed: int) -> tuple[int, ...]:
    return make_prompt(20 * STEP_TOKENS, seed=seed)


async def answer(cluster: Cluster, seed: int, *, name: str = "", tokens: int = TOKENS) -> None:
    """The whole of it, which must be right."""
    request = make_request(prompt_of(seed), name=name or f"r-{seed}", max_tokens=tokens)
    items: list[Generated] = [item async for item in cluster.flow.generate(request)]
    said = [token for item in items for token in item.tokens]
    assert said == expected_tokens(prompt_of(seed), tokens)


def hung(cluster: Cluster) -> list[str]:
    return sorted(w.worker_id for w in cluster.flow.workers() if w.ejected_for == "hung")


@pytest.mark.parametrize("role", list(Role))
async def test_what_a_worker_runs_goes_on_elsewhere_when_its_engine_hangs(role: Role) -> None:
    async with warm_cluster(role) as cluster, asyncio.TaskGroup() as group:
        asked = group.create_task(answer(cluster, 1))
        first, second = workers(cluster, role)
        await until(lambda: first.gate.waiting.is_set() or second.gate.waiting.is_set())
        stuck, other = (first, second) if first.gate.waiting.is_set() else (second, first)
        stuck.gate.allow(4)  # in the middle of it
        other.gate.open()
        await soon(asked)
        assert hung(cluster) == [stuck.record.worker_id]
        assert cluster.fleet.pool(role).workers == (other.record.worker_id,)
        await until(lambda: not stuck.worker.open_legs, "the worker told")
        for seed in range(2, 6):
            await soon(answer(cluster, seed))
        stuck.gate.open()
        await until(lambda: not hung(cluster), "the end of its step seen")
        assert len(cluster.fleet.pool(role).workers) == 2


async def test_where_all_hang_nothing_is_given_up_until_one_goes_on() -> None:
    async with warm_cluster(Role.DECODE) as cluster, asyncio.TaskGroup() as group:
        asked = [group.create_task(answer(cluster, seed)) for seed in range(4)]
        await until(lambda: all(served.gate.waiting.is_set() for served in cluster.decode))
        await until(lambda: len(hung(cluster)) == 2, "both hang")
        asked.append(group.create_task(answer(cluster, 5)))
        await until(lambda: sum(s.worker.open_legs for s in cluster.decode) == 5, "the fifth there")
        assert cluster.fleet.limits.ready
        assert not any(task.done() for task in asked)
        cluster.decode[0].gate.open()
        await soon(asyncio.gather(*asked))
        assert hung(cluster) == [cluster.decode[1].record.worker_id]


async def test_a_request_that_finds_all_hanging_ends_by_its_deadline() -> None:
    async with warm_cluster(Role.DECODE) as cluster, asyncio.TaskGroup() as group:
        asked = [group.create_task(answer(cluster, seed)) for seed in range(4)]
        await until(lambda: len(hung(cluster)) == 2, "both hang")
        request = make_request(prompt_of(9), name="late", deadline_s=0.5)
        with pytest.raises(DeadlineExceeded):
            await soon(drawn(cluster, request))
        for served in cluster.decode:
            served.gate.open()
        await soon(asyncio.gather(*asked))


async def drawn(cluster: Cluster, request: GenerateRequest) -> None:
    async for _ in cluster.flow.generate(request):
        pass


async def test_switched_off_a_step_may_take_its_time() -> None:
    async with warm_cluster(Role.DECODE, hung_step_s=0) as cluster, asyncio.TaskGroup() as group:
        asked = group.create_task(answer(cluster, 1))
        await until(lambda: any(served.gate.waiting.is_set() for served in cluster.decode))
        await until(lambda: age_of(cluster) > 2 * FLOOR_S, "an old step told")
        assert hung(cluster) == []
        for served in cluster.decode:
            served.gate.open()
        await soon(asked)


def age_of(cluster: Cluster) -> float:
    """Of the oldest step that a worker has told the router of."""
    views = [link.view for link in cluster.fleet.links()]
    return max(v.load.step_age_s for v in views if v is not None and v.load is not None)
