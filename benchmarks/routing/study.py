"""Many replays of one trace: at which rates policies part, and how sure the differences are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from benchmarks.routing.replay import Outcome, Replay, World
from benchmarks.routing.traces import Prompt
from core.estimate import Estimate
from router.config import RouterConfig
from router.policies.base import PrefillPolicy
from router.policies.build import PREFILL

OURS = "baton"
TARGETS = (0.99, 0.9, 0.7)
"""Shares within the TTFT target that the best policy reaches at the rates that are compared."""
_SCOUTS = (OURS, "prefix_affinity")
_STEP = 1.25
_MAX_STEPS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrant:
    """A policy as it enters: `moves` lets its queued prompts move among their candidates."""

    name: str
    policy: str
    moves: bool = False

    def build(self) -> PrefillPolicy:
        return PREFILL[self.policy](RouterConfig())


ENTRANTS = (
    Entrant(name=OURS, policy="baton"),
    Entrant(name="baton, moving", policy="baton", moves=True),
    Entrant(name="dualmap", policy="dualmap", moves=True),
    *(
        Entrant(name=name, policy=name)
        for name in (
            "preble",
            "prefix_affinity",
            "mooncake_ttft",
            "dynamo_cost",
            "power_of_two",
            "least_load",
            "round_robin",
            "random",
        )
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One policy at one rate; estimates over seeds."""

    name: str
    within_slo: Estimate
    hit_rate: Estimate
    imbalance: Estimate
    behind_best: Estimate
    """The best policy's share within SLO minus this one's, seed by seed."""

    @property
    def tied(self) -> bool:
        """The difference from the best lies within its own 95 % interval."""
        return self.behind_best.low <= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All policies at one rate, the best first."""

    trace: str
    workers: int
    target: float
    rate: float
    standings: tuple[Standing, ...]

    @property
    def best(self) -> Standing:
        return self.standings[0]

    def of(self, name: str) -> Standing:
        return next(standing for standing in self.standings if standing.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One trace on one number of workers. `step` is called once per replay."""

    trace: str
    world: World
    seeds: int
    refine: int
    step: Callable[[], None]
    prompts_of: Callable[[int], list[Prompt]]
    """By seed."""

    def compare(self, targets: Sequence[float]) -> list[Comparison]:
        """One comparison per target."""
        return [self._compare(target, rate) for target, rate in self._rates(targets).items()]

    def _rates(self, targets: Sequence[float]) -> dict[float, float]:
        """The rate at which the best scout reaches each target, by bisection with one seed."""

        @cache
        def share(rate: float) -> float:
            scouts = [entrant for entrant in ENTRANTS if entrant.name in _SCOUTS]
            return max(self._replay(scout, 0, rate).within_slo for scout in scouts)

        rate = self.world.rate_at(1.0, self.prompts_of(0))
        found: dict[float, float] = {}
        for target in targets:
            low = high = rate
            for _ in range(_MAX_STEPS):
                if share(low) < target:
                    low /= _STEP
                elif share(high) >= target:
                    high *= _STEP
                else:
                    break
            for _ in range(self.refine):
                middle = (low * high) ** 0.5
                low, high = (middle, high) if share(middle) >= target else (low, middle)
            found[target] = rate = low
        return found

    def _compare(self, target: float, rate: float) -> Comparison:
        outcomes = {
            entrant.name: [self._replay(entrant, seed, rate) for seed in range(self.seeds)]
            for entrant in ENTRANTS
        }
        best = max(outcomes, key=lambda name: sum(o.within_slo for o in outcomes[name]))
        standings = [_stand(name, outcomes[name], outcomes[best]) for name in outcomes]
        return Comparison(
            trace=self.trace,
            workers=self.world.workers,
            target=target,
            rate=rate,
            standings=tuple(sorted(standings, key=lambda s: -s.within_slo.mean)),
        )

    def _replay(self, entrant: Entrant, seed: int, rate: float) -> Outcome:
        world = replace(self.world, moves=entrant.moves)
        outcome = Replay(world, entrant.build, seed, rate).run(self.prompts_of(seed))
        self.step()
        return outcome


def _stand(name: str, outcomes: Sequence[Outcome], best: Sequence[Outcome]) -> Standing:
    pairs = zip(best, outcomes, strict=True)
    return Standing(
        name=name,
        within_slo=Estimate.of([outcome.within_slo for outcome in outcomes]),
        hit_rate=Estimate.of([outcome.hit_rate for outcome in outcomes]),
        imbalance=Estimate.of([outcome.imbalance for outcome in outcomes]),
        behind_best=Estimate.of([b.within_slo - o.within_slo for b, o in pairs]),
    )


def verdict(comparison: Comparison) -> Mapping[str, bool]:
    """What the design asks of ours in one comparison."""
    ours = comparison.of(OURS)
    most = max(standing.hit_rate.mean for standing in comparison.standings)
    return {
        "best or tied": ours.tied,
        "hit rate": ours.hit_rate.mean >= 0.95 * comparison.best.hit_rate.mean,
        "hit rate of all": ours.hit_rate.mean >= 0.95 * most,
        "balance": ours.imbalance.mean <= 1.1,
    }
