"""What can be known to be wrong before anything starts: one sentence per problem."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from cluster.config import ClusterConfig, TelemetryConfig
from cluster.long_work import can_be_file
from cluster.ray_pools import worker_ids
from cluster.registries import registry_problems
from core.errors import ConfigError
from router.serve import bind_listener

_TORCH_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def find_problems(config: ClusterConfig) -> list[str]:
    """All problems but a taken port. Imports torch, so it takes seconds."""
    with _torch_leaves_nothing():
        return [
            *_checkpoint_problems(config),
            *_transfer_problems(config),
            *_gpu_problems(config),
            *_telemetry_problems(config.telemetry, config.num_workers),
            *registry_problems(config.registry, worker_ids(config)),
        ]


def port_problems(config: ClusterConfig) -> list[str]:
    """Whether the router's port is taken now."""
    try:
        bind_listener(config.router.host, config.router.port).close()
    except ConfigError as error:
        return [error.message]
    return []


@contextmanager
def _torch_leaves_nothing() -> Iterator[None]:
    """Importing torch makes a cache folder in the temporary folder, unless it is told where."""
    if _TORCH_CACHE in os.environ:
        yield
        return
    with TemporaryDirectory(prefix="baton-") as folder:
        os.environ[_TORCH_CACHE] = folder
        try:
            yield
        finally:
            del os.environ[_TORCH_CACHE]


def _checkpoint_problems(config: ClusterConfig) -> list[str]:
    from engine.checkpoint import read_checkpoint  # noqa: PLC0415 - imports torch

    try:
        read_checkpoint(config.model.path, config.engine)
    except ConfigError as error:
        return [error.message]
    return []


def _transfer_problems(config: ClusterConfig) -> list[str]:
    if config.transfer.backend == "loopback":
        return [
            "transfer.backend is loopback, which reaches nobody from a process of its own:"
            " set it to nixl"
        ]
    return []


def _telemetry_problems(config: TelemetryConfig, workers: int) -> list[str]:
    """Of a cluster whose workers share this machine, as those of `baton up` do."""
    problems = list[str]()
    if config.worker_metrics_port and workers > 1:
        problems.append(
            f"telemetry.worker_metrics_port is {config.worker_metrics_port}, which one of the"
            f" {workers} workers on this machine can have: set it to 0, and each takes a free one,"
            " which its log names (only workers started by hand, one per machine, may share it)"
        )
    spans = config.spans_file
    if spans is not None and not can_be_file(spans):
        problems.append(
            f"telemetry.spans_file {spans} cannot be written: name a file in a folder of yours"
        )
    return problems


def _gpu_problems(config: ClusterConfig) -> list[str]:
    per_worker = config.resources.gpus
    if per_worker == 0:
        if config.engine.device == "cuda":
            return [
                "engine.device is cuda, but workers get no GPU:"
                " set resources.gpus to 1, or engine.device to cpu"
            ]
        return []
    if 1 < per_worker != math.floor(per_worker):
        return [f"resources.gpus is {per_worker:g}: above 1 it must be a whole number"]
    import torch  # noqa: PLC0415 - takes seconds, and only this needs it

    there = torch.cuda.device_count()
    wanted = _gpus_taken(config.num_workers, per_worker)
    if wanted > there:
        return [
            f"{config.num_workers} workers with {per_worker:g} GPUs each need {wanted} GPUs,"
            f" but this machine has {there}: lower resources.gpus, prefill.workers or"
            " decode.workers"
        ]
    return []


def _gpus_taken(workers: int, per_worker: float) -> int:
    if per_worker >= 1:
        return workers * int(per_worker)
    return math.ceil(workers / math.floor(1 / per_worker))
