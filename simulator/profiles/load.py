"""A profile by the name a user gives.

    roofline:h100                    the roofline of a device, for any model
    distserve:opt-13b                coefficients of DistServe's simulator
    FILE.json                        what `baton profile` wrote
    NAME_prefill.npz                 Dynamo's planner; its NAME_decode.npz lies beside it
    perf_model.csv.gz#MODEL/DEVICE   Splitwise
    FOLDER/h100_sxm                  aiconfigurator's kernels: FOLDER/h100_sxm-gemm_perf.csv.gz, ...
    NAME-attention.csv.gz            LLMServingSim; -dense and -per_sequence lie beside it

Whole steps are interpolated (`table`) or fitted (`fitted`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from engine.latency.base import LatencyModel
from engine.latency.devices import Device, find_device
from engine.latency.roofline import RooflineLatency
from engine.latency.shapes import ModelShape, find_shape, published_shape
from simulator.profiles.fit import fit_latency
from simulator.profiles.kernel_tables import read_aiconfigurator, read_llmservingsim
from simulator.profiles.memory import kv_room, named_device
from simulator.profiles.npz_curves import npz_model, read_npz
from simulator.profiles.own import read_own
from simulator.profiles.published import DISTSERVE_KV_TOKENS, distserve_latency
from simulator.profiles.splitwise import read_splitwise
from simulator.profiles.tables import table_of
from simulator.profiles.types import BadProfile, Measured, Profile

Kind = Literal["table", "fitted"]

STEP_OVERHEAD_S = 2e-3
"""What a step takes beside its kernels, where a profile holds kernels alone: DistServe's figure for
its own engine (OSDI'24, its simulator).
"""


def load_profile(
    source: str, *, model: str | None = None, tp: int = 1, kind: Kind = "table"
) -> Profile:
    """`model` is a name or a checkpoint folder; profiles that are of no one model need it. Raises
    BadProfile, one of another model too, or ConfigError for a model or device that is not known.
    """
    profile = _load(source, model, tp, kind)
    known = published_shape(profile.model) if profile.model is not None else None
    if model is not None and known is not None:
        shape = find_shape(model)
        if replace(shape, name=known.name) != known:
            raise BadProfile(f"{source} is of {profile.model}, but the model is {shape.name}")
    return profile


def _load(source: str, model: str | None, tp: int, kind: Kind) -> Profile:
    scheme, _, rest = source.partition(":")
    if scheme == "roofline":
        return _roofline(source, find_device(rest), _shape(source, model), tp)
    if scheme == "distserve":
        fit = distserve_latency(rest, tp)
        kv = DISTSERVE_KV_TOKENS[tp] if rest == "opt-13b" else _room(rest, "a100-80gb", tp)
        return Profile(name=source, tp=tp, latency=fit, kv_tokens=kv, model=rest)
    path, _, part = source.partition("#")
    file = Path(path)
    if file.suffix == ".json":
        return _own(file, tp, kind)
    if file.suffix == ".npz":
        return _npz(file, tp, kind)
    if part:
        name, _, hardware = part.partition("/")
        measured = read_splitwise(file, name, hardware, tp)
        return Profile(
            name=part,
            tp=tp,
            latency=_latency(file, measured, kind),
            kv_tokens=_room(name, hardware, tp),
            measured=measured,
            model=name,
        )
    if "-attention." in file.name:
        shape = _shape(source, model)
        table = read_llmservingsim(file, shape, overhead_s=STEP_OVERHEAD_S)
        name = file.name.split("-attention.")[0]
        return Profile(name=name, tp=tp, latency=table, model=shape.name)
    if file.with_name(f"{file.name}-gemm_perf.csv.gz").is_file():
        return _kernels(file, _shape(source, model), tp)
    raise BadProfile(
        f"{source!r} is no profile: neither a file of a known format nor roofline:DEVICE"
        " nor distserve:MODEL"
    )


def _roofline(source: str, device: Device, shape: ModelShape, tp: int) -> Profile:
    latency, room = RooflineLatency(model=shape, device=device, tp=tp), kv_room(shape, device, tp)
    return Profile(name=source, tp=tp, latency=latency, kv_tokens=room, model=shape.name)


def _kernels(prefix: Path, shape: ModelShape, tp: int) -> Profile:
    device = named_device(prefix.name)
    return Profile(
        name=f"{prefix.name} {shape.name}",
        tp=tp,
        latency=read_aiconfigurator(prefix, shape, tp, overhead_s=STEP_OVERHEAD_S),
        kv_tokens=kv_room(shape, device, tp) if device is not None else None,
        model=shape.name,
    )


def _own(file: Path, tp: int, kind: Kind) -> Profile:
    own = read_own(file)
    if own.tp != tp:
        raise BadProfile(f"{file} was measured with tensor parallel degree {own.tp}, not {tp}")
    return Profile(
        name=f"{own.model} on {own.device}",
        tp=tp,
        latency=_latency(file, own.measured, kind),
        kv_tokens=own.kv_tokens,
        measured=own.measured,
        model=own.model,
    )


def _npz(file: Path, tp: int, kind: Kind) -> Profile:
    measured, kv_tokens = read_npz(file, tp)
    return Profile(
        name=file.name.split("_prefill")[0],
        tp=tp,
        latency=_latency(file, measured, kind),
        kv_tokens=kv_tokens,
        measured=measured,
        model=npz_model(file),
    )


def _latency(file: Path, measured: Measured, kind: Kind) -> LatencyModel:
    try:
        return table_of(measured) if kind == "table" else fit_latency(measured)
    except BadProfile as error:
        raise BadProfile(f"{file}: {error.message}") from error


def _shape(source: str, model: str | None) -> ModelShape:
    if model is None:
        raise BadProfile(f"{source} is of no one model: name the model, or give its folder")
    return find_shape(model)


def _room(model: str, device_name: str, tp: int) -> int | None:
    """None where the model or the device is not known."""
    shape, device = published_shape(model), named_device(device_name)
    return kv_room(shape, device, tp) if shape is not None and device is not None else None
