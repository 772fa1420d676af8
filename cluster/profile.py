"""`baton profile`: what steps of a running cluster take, measured by real requests.

Prompts of each length come alone: their TTFT is a prefill step, with the router's share in it. Then
batches of each size decode together: gaps between tokens while all of them run are decode steps.
Batches are spread over the decode workers by the router, so the cluster should have one of them, or
`decode_workers` says how many share a batch. Prompts are random tokens: nothing is cached.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

from rich.progress import Progress

from cluster.failures import first_error
from cluster.long_work import check_writable, given_up, write_result
from cluster.profile_client import (
    Answer,
    Endpoint,
    complete,
    kv_blocks,
    parse_url,
    served_model,
)
from core.errors import ConfigError, InvalidRequest
from simulator.profiles.fit import LEAST_STEPS, fit_latency
from simulator.profiles.own import DecodeRow, OwnProfile, PrefillRow, own_text

_LEAST_GAPS = 3
_LONGER = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    """What is measured. Token ids are drawn below `vocab`, which the model must have."""

    url: str
    api_key: str | None = None
    out: Path
    prompts: tuple[int, ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    answer_tokens: int
    repeats: int
    decode_workers: int
    device: str
    tp: int
    block_size: int
    """Tokens of a KV block; the router tells how many blocks a worker has."""
    vocab: int
    timeout_s: float
    only_json: bool


def run_profile(options: ProfileOptions) -> None:
    """Measure, write the file, and print what was found, the JSON object last."""
    check_writable(options.out, "--out")
    _check_enough(options)
    with given_up("the measuring was given up, no profile is written"):
        profile = asyncio.run(_measure(options))
    write_result(options.out, own_text(profile), "--out")
    print(f"wrote {options.out}", file=sys.stderr)
    fitted = fit_latency(profile.measured)
    prefill, (decode,) = fitted.prefill, fitted.decode
    if not options.only_json:
        print(
            f"prefill {prefill.base_s * 1e3:.3g} ms + {prefill.per_token_s * 1e3:.3g} ms a token"
            f" + {prefill.per_pair_s * 1e3:.3g} ms a pair\n"
            f"decode {decode.base_s * 1e3:.3g} ms + {decode.per_sequence_s * 1e3:.3g} ms a sequence"
            f" + {decode.per_context_token_s * 1e3:.3g} ms a token of context\n"
            f"KV of a worker: {_room(profile)}"
        )
    print(
        json.dumps(
            {
                "file": str(options.out),
                "kv_tokens": profile.kv_tokens,
                "prefill_base_s": prefill.base_s,
                "prefill_per_token_s": prefill.per_token_s,
                "prefill_per_pair_s": prefill.per_pair_s,
                "decode_base_s": decode.base_s,
                "decode_per_sequence_s": decode.per_sequence_s,
                "decode_per_context_token_s": decode.per_context_token_s,
            }
        )
    )


def _room(profile: OwnProfile) -> str:
    if profile.kv_tokens is None:
        return "not told by the server; set simulation.kv_tokens"
    return f"{profile.kv_tokens} tokens"


def _check_enough(options: ProfileOptions) -> None:
    """A profile of fewer steps would be refused by whoever reads it, when all is measured."""
    if len(set(options.prompts)) < LEAST_STEPS:
        raise InvalidRequest(
            f"--prompt: a profile needs {LEAST_STEPS} different lengths at least, for the base, the"
            " cost of a token and that of attention"
        )
    if len(set(options.batches)) * len(set(options.contexts)) < LEAST_STEPS:
        raise InvalidRequest(
            f"--batch, --context: a profile needs {LEAST_STEPS} pairs of them at least, such as"
            " --batch 1 --batch 8 --context 128 --context 1024"
        )


async def _measure(options: ProfileOptions) -> OwnProfile:
    host, port = parse_url(options.url)
    nameless = Endpoint(host, port, options.api_key)
    endpoint = replace(nameless, model=await served_model(nameless, options.timeout_s))
    random = Random(0)

    def prompt(tokens: int) -> list[int]:
        return [random.randrange(options.vocab) for _ in range(tokens)]

    prefill, decode = list[PrefillRow](), list[DecodeRow]()
    total = len(options.prompts) + len(options.batches) * len(options.contexts)
    with Progress(disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        await complete(endpoint, prompt(options.prompts[0]), 2, options.timeout_s)  # warm
        for length in options.prompts:
            answers = [
                await complete(endpoint, prompt(length), 1, options.timeout_s)
                for _ in range(options.repeats)
            ]
            prefill.append(prefill_row(length, answers))
            bar.advance(task)
        for batch in options.batches:
            for context in options.contexts:
                decode.append(await _decode(options, endpoint, prompt, batch, context))
                bar.advance(task)
    blocks = await kv_blocks(endpoint, options.timeout_s)
    return OwnProfile(
        model=endpoint.model,
        device=options.device,
        tp=options.tp,
        kv_tokens=None if blocks is None else blocks * options.block_size,
        prefill=tuple(prefill),
        decode=tuple(decode),
    )


async def _decode(
    options: ProfileOptions,
    endpoint: Endpoint,
    prompt: Callable[[int], list[int]],
    batch: int,
    context: int,
) -> DecodeRow:
    """Longer answers while prompts come so slowly that the first answers end before the last."""
    tokens = options.answer_tokens
    while True:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        complete(endpoint, prompt(context), tokens, options.timeout_s)
                    )
                    for _ in range(batch * options.decode_workers)
                ]
        except ExceptionGroup as group_error:
            raise first_error(group_error) from group_error
        try:
            return decode_row(batch, context, [task.result() for task in tasks])
        except ConfigError:
            if tokens >= _LONGER * options.answer_tokens:
                raise
            tokens *= 2


def prefill_row(tokens: int, answers: Sequence[Answer]) -> PrefillRow:
    """The median of prompts that came alone."""
    return PrefillRow(start=0, end=tokens, seconds=median(answer.ttft_s for answer in answers))


def decode_row(batch: int, context: int, answers: Sequence[Answer]) -> DecodeRow:
    """The median gap between tokens while all of the answers decode, and the mean context there.

    Raises ConfigError when they hardly overlap: then no step had the whole batch.
    """
    begin_s = max(answer.token_at_s[0] for answer in answers)
    end_s = min(answer.token_at_s[-1] for answer in answers)
    gaps, grown = list[float](), list[int]()
    for answer in answers:
        times = answer.token_at_s
        for i in range(1, len(times)):
            if times[i - 1] >= begin_s and times[i] <= end_s:
                gaps.append(times[i] - times[i - 1])
                grown.append(i)
    if len(gaps) < _LEAST_GAPS * len(answers):
        raise ConfigError(
            f"{batch} answers of prompts of {context} tokens hardly decoded together;"
            " ask for longer answers (--answer-tokens)"
        )
    mean_context = context + sum(grown) / len(grown)
    return DecodeRow(
        sequences=batch, context_tokens=round(batch * mean_context), seconds=median(gaps)
    )
