"""`baton plan`: which GPUs to buy for a model, its targets and its traffic, and how to run them.

Everything shown is simulated, and says so.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from cluster.long_work import check_writable, given_up, write_result
from cluster.plan_config import check_model, config_text
from cluster.plan_view import answer_json, show_answer
from core.errors import InvalidRequest
from engine.latency.devices import find_device
from engine.latency.shapes import find_shape
from router.policies.base import Slo
from simulator.plan.memory import find_options
from simulator.plan.search import Progress, search
from simulator.plan.types import Affinity, Offer, Problem
from simulator.workload.build import Shaping, check_rate
from simulator.workload.load import load_workload
from simulator.workload.types import SimRequest, Workload

CHUNKS = (512, 2048, 8192)
"""Step budgets in tokens that are tried when none are given."""

_UNSHARED_BLOCK = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for. `gpu` are names, or NAME:COUNT; `write` None writes none."""

    model: str
    gpu: tuple[str, ...]
    gpus: int
    slo: str
    trace: str
    rate_rps: float | None
    affinity: str
    node_gpus: int
    chunks: tuple[int, ...]
    requests: int
    max_prompt_tokens: int | None
    seed: int
    processes: int
    only_json: bool
    write: Path | None


def run_plan(options: Options) -> None:
    """Search and show; the last line of standard output is the JSON object. An interrupt ends the
    process with status 130, and those of the search with it.
    """
    if options.write is not None:
        check_model(Path(options.model))
        check_writable(options.write, "--write")
    problem, notes = pose(options)
    with given_up("the search was given up, nothing is planned"), _progress() as progress:
        answer = search(
            problem,
            processes=options.processes or os.cpu_count() or 1,
            progress=progress,
            rate_rps=options.rate_rps,
        )
    if not options.only_json:
        show_answer(Console(), options.model, problem, answer, notes)
    print(json.dumps(answer_json(options.model, problem, answer, notes)), flush=True)
    if options.write is not None:
        text = config_text(Path(options.model), problem, answer)
        write_result(options.write, text, "--write")
        print(f"wrote {options.write}", file=sys.stderr)


def pose(options: Options) -> tuple[Problem, tuple[str, ...]]:
    """The problem, and notes for the reader. Raises UserError, a sentence of what is wrong."""
    slo, share = read_slo(options.slo)
    offers = [read_offer(text, options.gpus) for text in options.gpu]
    if not offers:
        raise InvalidRequest("no --gpu is given; for example --gpu h100")
    for offer in offers:
        if [other.gpu for other in offers].count(offer.gpu) > 1:
            raise InvalidRequest(
                f"--gpu names {offer.gpu} twice; say it once, as {offer.gpu}:COUNT"
            )
    model = find_shape(options.model)
    shaping = Shaping(
        seed=options.seed,
        requests=options.requests,
        max_prompt_tokens=options.max_prompt_tokens,
    )
    loaded = load_workload(options.trace, shaping)
    check_rate(options.trace, loaded.workload.requests)
    block_size, requests = plain_requests(loaded.workload)
    fits = [
        find_options(
            model,
            find_device(offer.gpu),
            longest_tokens=max(r.prompt_tokens + r.output_tokens for r in requests),
            most_gpus=min(options.node_gpus, options.gpus, offer.count),
        )
        for offer in offers
    ]
    refused = [why for fit in fits for why in fit.refused]
    if not any(fit.options for fit in fits):
        raise InvalidRequest("\n".join(["nothing fits", *refused]))
    problem = Problem(
        options=tuple(option for fit in fits for option in fit.options),
        offers=tuple(offers),
        gpus=min(options.gpus, sum(offer.count for offer in offers)),
        slo=slo,
        share=share,
        requests=requests,
        block_size=block_size,
        kv_bytes_per_token=int(model.kv_bytes_per_token),
        affinity=read_affinity(options.affinity),
        node_gpus=options.node_gpus,
        chunks=tuple(sorted(set(options.chunks))),
        seed=options.seed,
    )
    return problem, (*loaded.notes, *refused)


def read_slo(text: str) -> tuple[Slo, float]:
    """`500/50` or `500/50/99`: TTFT and TPOT in ms, and the share of requests in percent (90)."""
    parts = text.split("/")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in {2, 3} or not all(0 < n < math.inf for n in numbers):
        raise InvalidRequest(
            f"--slo is {text!r}, but should be TTFT and TPOT in ms, such as 500/50, or 500/50/99"
            " for 99 % of the requests"
        )
    share = numbers[2] / 100 if len(numbers) == 3 else 0.9
    if share > 1:
        raise InvalidRequest(
            f"--slo is {text!r}, but no more than 100 % of the requests can keep it"
        )
    return Slo(ttft_s=numbers[0] / 1e3, tpot_s=numbers[1] / 1e3), share


def read_affinity(text: str) -> Affinity:
    """Raises InvalidRequest unless it is one."""
    try:
        return Affinity(text)
    except ValueError:
        raise InvalidRequest(f"--affinity is {text!r}, but should be high or low") from None


def read_offer(text: str, gpus: int) -> Offer:
    """`h100`, or `h100:16` for at most 16 of them."""
    name, _, count = text.partition(":")
    if count and not (count.isdecimal() and int(count) > 0):
        raise InvalidRequest(f"--gpu is {text!r}, but should be a name, or NAME:COUNT")
    return Offer(gpu=find_device(name).name, count=int(count) if count else gpus)


def plain_requests(workload: Workload) -> tuple[int, tuple[SimRequest, ...]]:
    """Block size and requests. Where no two prompts share a block, hashes say nothing, and small
    blocks waste less memory than those of the trace.
    """
    seen: set[bytes] = set()
    for request in workload.requests:
        if request.hashes and request.hashes[0] in seen:
            return workload.block_size, workload.requests
        seen.update(request.hashes[:1])
    bare: Sequence[SimRequest] = [replace(request, hashes=()) for request in workload.requests]
    return _UNSHARED_BLOCK, tuple(bare)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on standard error; where that is no terminal, a line for each round."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print_round
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("planning", total=None)

        def report(text: str, done: int, total: int) -> None:
            bar.update(task, description=f"simulating {text}", completed=done, total=total)

        yield report


def _print_round(text: str, done: int, total: int) -> None:
    if done == 0 and total:
        print(f"simulating {total} {text}", file=sys.stderr, flush=True)
