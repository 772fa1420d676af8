"""Where disaggregation does not pay, said plainly and with the reason. Pure."""

from collections.abc import Iterator, Sequence
from math import ceil

from simulator.plan.combine import Phase, fits_apart
from simulator.plan.types import Affinity, Problem, Rated

_SHORT_PROMPTS = 0.1
"""Share of a request's computed tokens that are prompt, below which prefill is a small part."""
_HIGH_HITS = 0.5


def advise(
    problem: Problem,
    best: Sequence[Rated],
    colocated: Rated | None,
    *,
    prefills: Sequence[Phase],
    decodes: Sequence[Phase],
    both: Sequence[Phase],
    rate_rps: float | None,
) -> Iterator[str]:
    """Sentences for a buyer; none where rates are known and the best plan is ahead by more than the
    search's width.
    """
    if rate_rps is not None:
        yield from _too_few(rate_rps, [*best, *filter(None, [colocated])])
    if not best:
        yield _none_apart(problem, colocated)
        return
    if any(rated.goodput.at_least for rated in (*best, *filter(None, [colocated]))):
        yield (
            f"a run offers at most {problem.most_requests} requests, and too few for some plans:"
            " these serve at least (>=) what is shown, and which of them is best is not known"
        )
    if colocated is not None:
        gain = best[0].rps_per_gpu / colocated.rps_per_gpu - 1
        if gain <= problem.width and not best[0].goodput.at_least:
            yield (
                f"disaggregation does not pay here: simulated, the best plan serves"
                f" {best[0].rps_per_gpu:.3g} requests/s per GPU, colocated workers"
                f" {colocated.rps_per_gpu:.3g} ({gain:+.0%}){_because(problem, colocated)}"
            )
    if rate_rps is not None:
        yield from _at_low_load(rate_rps, prefills, decodes, both)


def _none_apart(problem: Problem, colocated: Rated | None) -> str:
    if fits_apart(problem):
        text = "no disaggregated plan keeps the targets at any rate"
        return text + ("; colocated workers do" if colocated else ", nor does a colocated one")
    low = problem.affinity is Affinity.LOW
    where = "the GPUs of one node" if low else f"{problem.gpus} GPUs"
    smallest = min(option.tp for option in problem.options)
    text = (
        f"a prefill and a decode worker do not fit on {where}: the smallest that hold the model"
        f" take {smallest} each; colocated workers "
    )
    return text + ("keep the targets" if colocated else "keep the targets at no rate")


def _too_few(rate_rps: float, served: Sequence[Rated]) -> Iterator[str]:
    if any(rated.goodput.at_least for rated in served):
        return
    most_rps = max((rated.rps for rated in served), default=0.0)
    if 0 < most_rps < rate_rps:
        yield (
            f"these GPUs are too few for {rate_rps:g} requests/s: simulated, the best plan serves"
            f" {most_rps:.3g}"
        )


def _because(problem: Problem, colocated: Rated) -> str:
    prompts = sum(request.prompt_tokens for request in problem.requests)
    outputs = sum(request.output_tokens for request in problem.requests)
    hits = colocated.goodput.hit_share
    share = prompts * (1 - hits) / max(1.0, prompts * (1 - hits) + outputs)
    reasons: list[str] = []
    if hits >= _HIGH_HITS:
        reasons.append(f"{hits:.0%} of the prompt tokens are cached")
    mean = prompts / len(problem.requests)
    if mean * (1 - hits) * _SHORT_PROMPTS <= outputs / len(problem.requests) or share < 0.5:
        reasons.append(
            f"a request computes {mean * (1 - hits):.0f} prompt tokens"
            f" and generates {outputs / len(problem.requests):.0f}"
        )
    return ": " + " and ".join(reasons) if reasons else ""


def _at_low_load(
    rate_rps: float, prefills: Sequence[Phase], decodes: Sequence[Phase], both: Sequence[Phase]
) -> Iterator[str]:
    """GPUs that the rate needs, by what each worker serves alone."""
    apart = [_gpus_for(rate_rps, phases) for phases in (prefills, decodes)]
    together = _gpus_for(rate_rps, both)
    if None in apart or together is None:
        return
    needed = sum(gpus for gpus in apart if gpus is not None)
    if together <= needed:
        yield (
            f"at {rate_rps:g} requests/s disaggregation does not pay: simulated phase by phase, it"
            f" takes {needed} GPUs, and colocated workers {together}"
        )


def _gpus_for(rate_rps: float, phases: Sequence[Phase]) -> int | None:
    needs = [ceil(rate_rps / phase.rps) * phase.option.tp for phase in phases if phase.rps > 0]
    return min(needs, default=None)
