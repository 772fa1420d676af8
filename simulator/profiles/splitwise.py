"""Splitwise's measurements (ISCA'24): prompts alone, and batches of prompts of 512 tokens."""

from collections import defaultdict
from pathlib import Path
from statistics import median

from simulator.profiles.rows import read_rows
from simulator.profiles.types import BadProfile, DecodePoint, Measured, PrefillPoint


def read_splitwise(file: Path, model: str, hardware: str, tp: int) -> Measured:
    """Medians of one model on one device. Raises BadProfile naming those there are."""
    rows = read_rows(file)
    wanted = (model, hardware, str(tp))
    names = ("model", "hardware", "tensor_parallel")
    mine = [row for row in rows if tuple(row.text(name) for name in names) == wanted]
    if not mine:
        known = sorted({"/".join(row.text(name) for name in names) for row in rows})
        raise BadProfile(f"{file} has no {'/'.join(wanted)}, only: {', '.join(known)}")
    prompts = defaultdict[int, list[float]](list)
    steps = defaultdict[tuple[int, int], list[float]](list)
    for row in mine:
        prompt, batch, answer = (
            row.whole(name, 1) for name in ("prompt_size", "batch_size", "token_size")
        )
        if batch == 1:
            prompts[prompt].append(row.number("prompt_time") / 1e3)
        steps[batch, prompt + answer // 2].append(row.number("token_time") / 1e3)
    return Measured(
        prefill=tuple(PrefillPoint(0, n, median(seen)) for n, seen in sorted(prompts.items())),
        decode=tuple(
            DecodePoint(batch, batch * context, median(seen))
            for (batch, context), seen in sorted(steps.items())
        ),
    )
