"""What a run says, in numbers: latencies, attainment, goodput, use."""

from collections import Counter
from dataclasses import dataclass

from core.estimate import percentile
from kv_transfer.metrics import LeaseEnd
from router.policies.base import Slo
from simulator.cluster import Outcome
from simulator.job import Record

SHARES = (0.5, 0.9, 0.99)
"""Percentiles that are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Of all requests of a run but those of the warm-up. Latencies are of complete ones."""

    requests: int
    outcomes: dict[str, int]
    ttft_s: tuple[float, ...]
    """At `SHARES`; empty without a complete request."""
    tpot_s: tuple[float, ...]
    attainment: float
    """Share of the requests that kept both targets; who was not served kept none."""
    ttft_attainment: float
    tpot_attainment: float
    rate_per_s: float
    """Requests that came, per second; 0 where all came at once."""
    goodput_per_gpu_s: float
    """Requests that kept both targets, per second and GPU."""
    output_tokens_per_s: float
    hit_rate: float
    """Share of the prompt tokens that were cached where they were computed."""
    transfer_s: tuple[float, ...]
    """Pauses between first token and usable KV of answers that were handed over, at `SHARES`; empty
    without any.
    """
    leases: dict[str, int]
    """On KV that others read, of the whole run: opened, and how they ended."""
    prompts_moved: int
    prefixes_fetched: int
    fetched_tokens: int


def summarise(outcome: Outcome, slo: Slo, gpus: int, *, warm_up: float = 0.0) -> Summary:
    """`warm_up` is the share of the requests, the first ones, that is left out."""
    records = outcome.records[int(warm_up * len(outcome.records)) :]
    complete = [r for r in records if r.outcome == "ok"]
    in_ttft = [r for r in complete if r.ttft_s <= slo.ttft_s]
    in_tpot = [r for r in complete if r.tpot_s <= slo.tpot_s]
    good = sum(r.tpot_s <= slo.tpot_s for r in in_ttft)
    span_s = records[-1].at_s - records[0].at_s if records else 0.0
    per_s = 1 / span_s if span_s > 0 else 0.0
    until_s = max([1e-9, *(r.end_s - records[0].at_s for r in complete)])
    count = max(1, len(records))
    prompt_tokens, leases = sum(r.prompt_tokens for r in complete), outcome.leases
    return Summary(
        requests=len(records),
        outcomes=dict(Counter(r.outcome for r in records)),
        ttft_s=_at_shares([r.ttft_s for r in complete]),
        tpot_s=_at_shares([r.tpot_s for r in complete]),
        attainment=good / count,
        ttft_attainment=len(in_ttft) / count,
        tpot_attainment=len(in_tpot) / count,
        rate_per_s=len(records) * per_s,
        goodput_per_gpu_s=good * per_s / gpus,
        output_tokens_per_s=sum(r.output_tokens for r in complete) / until_s,
        hit_rate=sum(r.cached_tokens for r in complete) / max(1, prompt_tokens),
        transfer_s=_at_shares([r.transfer_s for r in complete if _was_handed(r)]),
        leases={"opened": leases.opened} | {str(how): leases.ended[how] for how in LeaseEnd},
        prompts_moved=outcome.prompts_moved,
        prefixes_fetched=outcome.prefixes_fetched,
        fetched_tokens=outcome.fetched_tokens,
    )


def _was_handed(record: Record) -> bool:
    """An answer of one token ends at its prefill worker, though a decode worker was chosen."""
    elsewhere = bool(record.decode_worker) and record.decode_worker != record.prefill_worker
    return elsewhere and record.output_tokens > 1


def _at_shares(values: list[float]) -> tuple[float, ...]:
    return tuple(percentile(values, share) for share in SHARES) if values else ()
