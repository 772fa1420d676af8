"""The bench `validate`: its parts, in the order of the report."""

from benchmarks.types import Bench
from benchmarks.validate import curves, determinism, distserve, headline, queueing, vllm_run

BENCH = Bench(
    name="validate",
    takes_traces=True,
    takes_profiles=True,
    parts=(
        queueing.PART,
        vllm_run.PART,
        distserve.PART,
        curves.PART,
        determinism.PART,
        headline.PART,
        headline.PART_LARGE,
    ),
)
