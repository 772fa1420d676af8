"""The curves of Dynamo's planner: NAME_prefill.npz and NAME_decode.npz, a row per TP degree.

Prefill: TTFT (ms) of prompts of one length, alone. Decode: mean ITL (ms) with the KV cache filled
to a share by sequences of one context; how many really ran follows from the throughput (Little's
law), as a full engine runs fewer than were sent.
"""

import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from simulator.profiles.types import BadProfile, DecodePoint, Measured, PrefillPoint

Row = npt.NDArray[np.float64]


def read_npz(file: Path, tp: int) -> tuple[Measured, int]:
    """What was measured with `tp`, and how many tokens the KV cache holds. Raises BadProfile."""
    stem = file.name.removesuffix("_prefill.npz").removesuffix("_decode.npz")
    prefill = _rows(file.with_name(f"{stem}_prefill.npz"), tp, ("prefill_isl", "prefill_ttft"))
    decode = _rows(
        file.with_name(f"{stem}_decode.npz"),
        tp,
        ("y_context_length", "z_itl", "z_thpt_per_gpu", "max_kv_tokens"),
    )
    points = []
    for context, itl_ms, per_gpu in zip(
        decode["y_context_length"], decode["z_itl"], decode["z_thpt_per_gpu"], strict=True
    ):
        sequences = max(1, round(per_gpu * tp * float(itl_ms) / 1e3))
        points.append(DecodePoint(sequences, round(sequences * context), float(itl_ms) / 1e3))
    measured = Measured(
        prefill=tuple(
            PrefillPoint(0, int(tokens), float(ttft_ms) / 1e3)
            for tokens, ttft_ms in zip(prefill["prefill_isl"], prefill["prefill_ttft"], strict=True)
        ),
        decode=tuple(points),
    )
    return measured, int(decode["max_kv_tokens"][0])


def npz_model(file: Path) -> str | None:
    """As the file names it, if it does."""
    with np.load(file, allow_pickle=False) as arrays:
        return str(arrays["model"].flat[0]) if "model" in arrays else None


def _rows(file: Path, tp: int, names: tuple[str, ...]) -> dict[str, Row]:
    """Of the degree `tp`; all that is measured has one length."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            degrees = [int(value) for value in arrays["tp"].ravel()]
            if tp not in degrees:
                raise BadProfile(f"{file} has no tensor parallel degree {tp}, only {degrees}")
            place = degrees.index(tp)
            rows = {n: np.asarray(arrays[n][place], dtype=np.float64).ravel() for n in names}
    except (OSError, EOFError, BadZipFile, zlib.error, LookupError, ValueError) as error:
        raise BadProfile(f"{file} is no profile of Dynamo's planner: {error}") from error
    for name, row in rows.items():
        bad = np.flatnonzero(~(np.isfinite(row) & (row > 0)))
        if bad.size or not row.size:
            at = f"at {int(bad[0])} of the row of degree {tp}" if bad.size else "at all"
            raise BadProfile(f"{file}: {name} has no number above 0 {at}")
    if len({row.size for name, row in rows.items() if name != "max_kv_tokens"}) > 1:
        raise BadProfile(f"{file}: {', '.join(names)} differ in length at degree {tp}")
    return rows
