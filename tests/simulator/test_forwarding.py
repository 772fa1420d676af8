"""A full prefill worker's no: on to the next, and when all are full, in line at the router."""

from dataclasses import replace

from router.config import RouterConfig
from simulator.spec import NetworkSpec, SimSpec
from tests.simulator.clusters import ask, run, split


def full(prefill: int, report_s: float = 100.0) -> SimSpec:
    """Workers that keep no queue, and a router that hears of nothing."""
    return replace(
        split(prefill=prefill),
        router=RouterConfig(admission="off", prefill_policy="least_load", local_prefill=False),
        network=NetworkSpec(control_s=0.002),
        max_queued_tokens=1,
        report_s=report_s,
    )


def test_a_refused_prompt_goes_to_the_next_worker_at_once() -> None:
    spec = replace(full(prefill=2), routers=4, seed=3)
    records = run(spec, [ask(at_s=0.001 * i, output=1) for i in range(2)]).records
    assert {r.outcome for r in records} == {"ok"}
    assert len({r.prefill_worker for r in records}) == 2
    assert all(r.ttft_s < 0.165 for r in records)  # 160 ms of prompt, at most one no


def test_whom_all_refuse_waits_in_line_and_nobody_overtakes() -> None:
    records = run(full(prefill=1), [ask(at_s=0.001 * i, output=1) for i in range(6)]).records
    assert {r.outcome for r in records} == {"ok"}
    firsts = [r.first_s for r in records]
    assert firsts == sorted(firsts)
    assert firsts[-1] < 6 * 0.160 + 6 * 0.010


def test_with_true_load_and_room_nothing_is_refused() -> None:
    spec = full(prefill=2, report_s=0.0)
    local = replace(spec, max_queued_tokens=10**9)
    requests = [ask(at_s=0.2 * i, output=5) for i in range(8)]
    assert run(spec, requests).records == run(local, requests).records
