"""The whole cluster's settings: every room's own, composed into one tree.

One YAML file holds them; what it leaves out takes the defaults. `load_config` is in config_file.py.
"""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from core.config import Settings
from decode_worker.config import DecodeConfig
from engine.config import EngineConfig
from kv_transfer.config import TransferConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from simulator.config import SimulationConfig


def _from_base(path: Path, info: ValidationInfo) -> Path:
    base = (info.context or {}).get("base", Path.cwd())
    return (Path(base) / path.expanduser()).absolute()


ConfigPath = Annotated[Path, AfterValidator(_from_base)]
"""A path; a relative one starts at the folder of the config file."""


def _redis_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"redis", "rediss"} and parts.hostname and parts.port != 0
        # The client takes a database that is no number for 0, without a word.
        usable = usable and (parts.path in {"", "/"} or parts.path[1:].isdecimal())
    except ValueError:
        usable = False
    if not usable:
        raise PydanticCustomError("redis_url", "a URL such as redis://host:6379/0")
    return url


RedisUrl = Annotated[str, AfterValidator(_redis_url)]


def _off_or_a_second(timeout_s: float) -> float:
    if 0 < timeout_s < 1:
        raise PydanticCustomError("too_short", "0 for never, or at least 1")
    return timeout_s


HangTimeout = Annotated[float, Field(ge=0), AfterValidator(_off_or_a_second)]


class ModelConfig(Settings):
    """Which checkpoint all workers serve."""

    path: ConfigPath
    """Folder of a Hugging Face checkpoint: config.json, *.safetensors, tokenizer.json."""
    served_name: str | None = Field(None, min_length=1)
    """The `model` of requests; unset takes the name of the folder."""

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.served_name or self.path.name


class PrefillPool(PrefillConfig):
    """The pool of prefill workers."""

    workers: int = Field(2, ge=1, le=1024)
    """Processes that start in this role."""


class DecodePool(DecodeConfig):
    """The pool of decode workers."""

    workers: int = Field(2, ge=1, le=1024)
    """Processes that start in this role."""


class RegistryConfig(Settings):
    """Where workers say that they are there, and routers look for them."""

    kind: Literal["embedded", "redis"] = "embedded"
    """embedded: within `baton up`, for one machine; redis: at `url`, for several."""
    url: RedisUrl | None = None
    """redis://[user:password@]host:port/db, or rediss:// for TLS."""
    cluster: str = Field("default", pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    """Clusters of different names share a Redis; two of one name must not run at once."""

    @model_validator(mode="after")
    def _url_if_redis(self) -> Self:
        if self.kind == "redis" and self.url is None:
            raise PydanticCustomError("no_url", "given a url, as its kind is redis")
        if self.kind != "redis" and self.url is not None:
            raise PydanticCustomError("other_kind", "of kind redis, as it has a url")
        return self


class SloConfig(Settings):
    """Latency targets of one request."""

    ttft_ms: float = Field(2000.0, gt=0)
    """From the request's arrival to its first token."""
    tpot_ms: float = Field(100.0, gt=0)
    """Between the tokens that follow, on average."""


class WorkerResources(Settings):
    """What one worker process asks of its machine."""

    cpus: float = Field(1.0, ge=0)
    """Used to place workers on machines; engine.threads says how many threads compute."""
    gpus: float = Field(0.0, ge=0)
    """0 computes on the CPU; below 1, workers share a GPU."""


class TelemetryConfig(Settings):
    """What the processes write about themselves."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_max_mb: int = Field(64, ge=1)
    """A process' log of `baton up` that is larger becomes NAME.log.1, and a new one begins."""
    spans_file: ConfigPath | None = None
    """Append OpenTelemetry spans here, one JSON object per line; unset makes none."""
    worker_metrics_port: int | None = Field(None, ge=0, le=65535)
    """Every worker serves Prometheus metrics on this port; 0 takes a free one, for several
    workers on one machine: `baton status --json` tells its metrics_address. Unset serves none. The
    router's are at its /metrics."""


class ClusterConfig(Settings):
    """One cluster: a router, two pools of workers, one model."""

    model: ModelConfig
    router: RouterConfig = RouterConfig()
    prefill: PrefillPool = PrefillPool()
    decode: DecodePool = DecodePool()
    engine: EngineConfig = EngineConfig()
    transfer: TransferConfig = TransferConfig()
    registry: RegistryConfig = RegistryConfig()
    resources: WorkerResources = WorkerResources()
    slo: SloConfig = SloConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    simulation: SimulationConfig = SimulationConfig()
    start_timeout_s: float = Field(600.0, gt=0)
    """All workers and the router are ready by then, or the start has failed."""
    hang_timeout_s: HangTimeout = 60.0
    """A worker or router of `baton up` that serves and whose process then answers nothing for so
    long (it is stopped, its event loop is stuck, a driver does not return) is killed and started
    again. Longer than any pause it may make, such as a long garbage collection; 0 never kills one.
    A long engine step is no silence: engine.step_timeout_s bounds that."""
    drain_timeout_s: float = Field(10.0, ge=0)
    """At a stop, requests in flight may finish for so long."""

    @property
    def num_workers(self) -> int:
        """Worker processes of both pools."""
        return self.prefill.workers + self.decode.workers
