"""Small problems: workers of round numbers, and requests of one length."""

from random import Random

from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve
from router.policies.base import Slo
from simulator.plan.types import Affinity, Offer, Option, Problem
from simulator.workload.types import SimRequest


def option(
    tp: int = 1,
    *,
    gpu: str = "h100",
    kv_tokens: int = 100_000,
    per_token_s: float = 1e-4,
    decode_s: float = 0.01,
    per_context_s: float = 2e-7,
) -> Option:
    """`tp` GPUs are 0.8 tp times as fast as one, and a decode step slows with what it reads."""
    speed = 1.0 if tp == 1 else 0.8 * tp
    return Option(
        gpu=gpu,
        tp=tp,
        latency=FittedLatency(
            prefill=PrefillCurve(base_s=0.004 / speed, per_token_s=per_token_s / speed),
            decode=(
                DecodeCurve(base_s=decode_s / speed, per_context_token_s=per_context_s / speed),
            ),
        ),
        kv_tokens=kv_tokens * tp,
        nic_bytes_per_s=50e9 * tp,
        nvlink_bytes_per_s=450e9 * tp,
    )


def asked(count: int, prompt: int, output: int, *, seed: int = 0) -> tuple[SimRequest, ...]:
    """Poisson arrivals, one per second."""
    random, at_s, requests = Random(seed), 0.0, list[SimRequest]()
    for _ in range(count):
        requests.append(SimRequest(at_s=at_s, prompt_tokens=prompt, output_tokens=output))
        at_s += random.expovariate(1.0)
    return tuple(requests)


def problem(
    *options: Option,
    gpus: int = 4,
    prompt: int = 1000,
    output: int = 50,
    slo: Slo | None = None,
    affinity: Affinity = Affinity.HIGH,
    node_gpus: int = 8,
    count: int = 100,
    chunks: tuple[int, ...] = (512,),
) -> Problem:
    """All kinds of the options are on offer in any number."""
    kinds = dict.fromkeys(one.gpu for one in options)
    return Problem(
        options=options,
        offers=tuple(Offer(gpu=gpu, count=gpus) for gpu in kinds),
        gpus=gpus,
        slo=slo or Slo(ttft_s=0.4, tpot_s=0.03),
        share=0.9,
        requests=asked(count, prompt, output),
        block_size=16,
        kv_bytes_per_token=100_000,
        affinity=affinity,
        node_gpus=node_gpus,
        chunks=chunks,
        least_requests=count,
        run_s=0.0,
        width=0.1,
    )
