"""The replayed workers keep the clock and the cache they should, and the study its statistics."""

from hashlib import blake2b

import pytest

from benchmarks.routing.replay import Outcome, Replay, World
from benchmarks.routing.study import OURS, Study
from benchmarks.routing.traces import Prompt
from benchmarks.routing.worker import Job, Worker
from core.estimate import Estimate
from core.ids import BlockHash
from router.config import RouterConfig
from router.curves import PrefillCurve
from router.policies.build import PREFILL

BLOCK = 10
CURVE = PrefillCurve(0.0, 0.1, 0.0)  # a block per second


def prompt(at_s: float, *ids: int, tail: int = 0) -> Prompt:
    hashes = [BlockHash(blake2b(bytes([i]), digest_size=16).digest()) for i in ids]
    return Prompt(at_s, BLOCK * len(ids) + tail, tuple(hashes))


def job(*ids: int, at_s: float = 0.0, tail: int = 5) -> Job:
    return Job(prompt(at_s, *ids, tail=tail), at_s, ())


def test_prompts_are_served_in_order_one_at_a_time() -> None:
    worker = Worker(BLOCK, 1000, CURVE)
    first, second = job(1, 2), job(3)
    assert worker.submit(first, 0.0)
    assert not worker.submit(second, 1.0)
    assert first.ends_s == 2.5
    assert worker.queued_tokens(0.5) == 20 + 15
    assert worker.finish()[0] is first
    assert worker.begin(2.5)
    assert second.ends_s == 4.0


def test_a_cached_prefix_is_not_computed_again_and_the_last_token_always() -> None:
    worker = Worker(BLOCK, 1000, CURVE)
    worker.submit(job(1, 2), 0.0)
    worker.finish()
    longer = job(1, 2, 3)
    worker.submit(longer, 10.0)
    assert (longer.hit_tokens, longer.ends_s) == (20, 11.5)
    worker.finish()
    whole = job(1, 2, tail=0)
    worker.submit(whole, 20.0)
    assert whole.hit_tokens == 19


def test_the_cache_forgets_the_oldest_tail_first_and_says_so() -> None:
    worker = Worker(BLOCK, 3 * BLOCK, CURVE)
    worker.submit(job(1, 2), 0.0)
    worker.finish()
    newer = job(3, 4)
    worker.submit(newer, 10.0)
    _, events = worker.finish()
    stored, removed = events.events
    assert stored.hashes == newer.prompt.hashes
    assert removed.hashes == job(1, 2).prompt.hashes[1:]


def replay(policy: str, prompts: list[Prompt], rate: float = 1.0, **world: object) -> Outcome:
    built = World(
        workers=2, block_size=BLOCK, cache_tokens=1000, ttft_s=3.0, curve=CURVE, warm_up=0, **world
    )
    return Replay(built, lambda: PREFILL[policy](RouterConfig()), 0, rate).run(prompts)


def test_the_outcome_counts_what_was_within_the_target_cached_and_uneven() -> None:
    # Two workers, turn by turn: 0 gets both long ones.
    prompts = [prompt(0.0, 1, 2), prompt(0.0, 3), prompt(1.0, 1, 2, 4), prompt(9.0, 3)]
    outcome = replay("round_robin", prompts)
    # TTFT: 2, 1, (1 + 1), and 0.1, as the last token is computed
    assert outcome.within_slo == 1.0
    assert outcome.hit_rate == pytest.approx((20 + 9) / 70)
    assert outcome.imbalance == pytest.approx(3.0 / ((3.0 + 1.1) / 2))


def test_a_rate_divides_the_gaps() -> None:
    prompts = [prompt(float(i), i, i + 50) for i in range(40)]
    slow, fast = replay("least_load", prompts), replay("least_load", prompts, rate=3.0)
    assert slow.within_slo == 1.0
    assert fast.within_slo < 0.7


@pytest.mark.parametrize("name", sorted(PREFILL))
def test_every_policy_places_every_prompt(name: str) -> None:
    prompts = [prompt(i / 4, i % 7, i % 5 + 10) for i in range(60)]
    outcome = replay(name, prompts, routers=3, stale_s=1.0)
    assert 0 < outcome.within_slo <= 1


def test_queued_prompts_move_to_their_other_candidates() -> None:
    # The last one's prefix is where a long one has just begun, and the other worker is busy too.
    prompts = [
        prompt(0.0, 1, 2),
        prompt(1.9, 9),
        prompt(2.5, 1, 2, 3, 4, 5),
        prompt(2.6, 1, 2, tail=5),
    ]
    still, moving = replay("baton", prompts), replay("baton", prompts, moves=True)
    assert still.moved == 0
    assert moving.moved == 1
    assert moving.within_slo > still.within_slo


# -- estimates ----------------------------------------------------------------------------------


def test_an_interval_is_students() -> None:
    estimate = Estimate.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert estimate.mean == 3.0
    assert estimate.half == pytest.approx(2.776 * 2.5**0.5 / 5**0.5)
    assert Estimate.of([1.0]).half == float("inf")


def test_a_study_finds_the_rate_and_ranks_the_policies() -> None:
    replays: list[int] = []

    def prompts_of(seed: int) -> list[Prompt]:
        return [prompt(i + seed / 10, i % 11, i % 6 + 20, i % 200) for i in range(120)]

    study = Study(
        trace="tiny",
        world=World(
            workers=2, block_size=BLOCK, cache_tokens=60, ttft_s=6.0, curve=CURVE, warm_up=10
        ),
        seeds=2,
        refine=3,
        step=lambda: replays.append(1),
        prompts_of=prompts_of,
    )
    (comparison,) = study.compare([0.9])
    assert comparison.rate > 0
    shares = [standing.within_slo.mean for standing in comparison.standings]
    assert shares == sorted(shares, reverse=True)
    assert comparison.best.tied
    assert comparison.best.behind_best == Estimate(0.0, 0.0)
    assert comparison.of(OURS).within_slo.mean > 0.5
    assert len(replays) > 20
