"""From settings to what is simulated."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.errors import ConfigError
from engine.config import EngineConfig
from engine.latency.fitted import FittedLatency
from kv_transfer.config import TransferConfig
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.config import SimulatedPool, SimulationConfig
from simulator.kv_size import kv_size, unread_notes
from simulator.profiles.load import load_profile
from simulator.profiles.types import Profile
from simulator.spec import Cut, Failure, NetworkSpec, PoolRole, PoolSpec, SimSpec
from simulator.worker import WorkerSpec
from simulator.workload.types import SimRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The sections of a cluster config that a simulation is made of."""

    simulation: SimulationConfig
    engine: EngineConfig
    router: RouterConfig
    slo: Slo
    prefill_workers: int
    decode_workers: int
    max_queued_tokens: int
    max_sequences: int
    transfer: TransferConfig = field(default_factory=TransferConfig)


def build_spec(settings: Settings, block_size: int, seed: int) -> SimSpec:
    """Blocks are the workload's, whose hashes say what is shared. Raises ConfigError."""
    sim, pools = settings.simulation, _pools(settings)
    _check(pools, sim)
    return SimSpec(
        pools=tuple(_pool(pool, settings, block_size) for pool in pools),
        router=settings.router,
        slo=settings.slo,
        network=NetworkSpec(
            control_s=sim.handoff_ms / 1e3,
            uplink_bytes_per_s=sim.uplink_gb_per_s * 1e9,
            domain_workers=sim.domain_workers,
        ),
        routers=sim.routers,
        report_s=sim.report_ms / 1e3,
        max_tokens=sim.max_tokens,
        closed_sessions=sim.closed_sessions,
        sessions=sim.sessions,
        max_queued_tokens=settings.max_queued_tokens,
        max_sequences=settings.max_sequences,
        failures=tuple(
            Failure(
                at_s=f.at_s,
                pool=f.pool,
                worker=f.worker,
                restart_s=f.restart_s,
                silent=f.silent,
            )
            for f in sim.failures
        ),
        cuts=tuple(Cut(at_s=c.at_s, pool=c.pool, worker=c.worker, for_s=c.for_s) for c in sim.cuts),
        transfer=settings.transfer,
        seed=seed,
    )


def describe_workers(settings: Settings) -> str:
    """Whose steps are simulated: profile and model of every pool, once each. Raises ConfigError."""
    engine = "engine.timed's model"
    said = [
        f"{loaded.name}, {loaded.model or 'a model that it does not name'}" if loaded else engine
        for loaded in (_profile(pool, settings.simulation) for pool in _pools(settings))
    ]
    return "steps of " + " and of ".join(dict.fromkeys(said))


def describe_kv(settings: Settings, requests: Sequence[SimRequest]) -> list[str]:
    """What the config leaves open about KV and memory, and what it says in vain."""
    sim = settings.simulation
    sizes = [kv_size(pool, sim, _profile(pool, sim)) for pool in _pools(settings)]
    assumed = dict.fromkeys(note for size in sizes for note in size.notes)
    return [*assumed, *unread_notes(settings.engine, sizes, requests)]


def _pools(settings: Settings) -> tuple[SimulatedPool, ...]:
    return settings.simulation.pools or (
        SimulatedPool(name="prefill", role="prefill", workers=settings.prefill_workers),
        SimulatedPool(name="decode", role="decode", workers=settings.decode_workers),
    )


def _pool(pool: SimulatedPool, settings: Settings, block_size: int) -> PoolSpec:
    sim = settings.simulation
    loaded, gpus = _profile(pool, sim), pool.tensor_parallel or sim.tensor_parallel
    kv = kv_size(pool, sim, loaded)
    if kv.tokens < block_size:
        raise ConfigError(
            f"pool {pool.name}: {kv.tokens} tokens of KV hold no block of {block_size} tokens,"
            " the size of the trace's blocks; set simulation.kv_tokens"
        )
    return PoolSpec(
        name=pool.name,
        role=PoolRole(pool.role),
        workers=pool.workers,
        ready_s=pool.ready_s,
        worker=WorkerSpec(
            latency=loaded.latency if loaded else FittedLatency.of(settings.engine.timed),
            kv_blocks=kv.tokens // block_size,
            block_size=block_size,
            step_tokens=pool.step_tokens or settings.engine.step_tokens,
            chunk_tokens=pool.chunk_tokens or settings.engine.chunk_tokens,
            max_batch=settings.engine.max_batch,
            kv_bytes_per_token=kv.bytes_per_token,
            nic_bytes_per_s=(pool.nic_gb_per_s or sim.nic_gb_per_s) * 1e9,
            gpus=gpus,
            device=f"{gpus} {loaded.name}" if loaded else "",
        ),
    )


def _profile(pool: SimulatedPool, sim: SimulationConfig) -> Profile | None:
    """None where steps are those of engine.timed."""
    source, tp = pool.profile or sim.profile, pool.tensor_parallel or sim.tensor_parallel
    return load_profile(source, model=sim.model, tp=tp) if source is not None else None


def _check(pools: tuple[SimulatedPool, ...], sim: SimulationConfig) -> None:
    names, roles = [pool.name for pool in pools], {pool.role for pool in pools}
    if len(set(names)) < len(names):
        raise ConfigError("simulation.pools: two pools have the same name")
    if len(roles & {"prefill", "decode"}) == 1:
        missing = "decode" if "prefill" in roles else "prefill"
        raise ConfigError(
            f"simulation.pools: there is no {missing} pool; prefill and decode pools need each"
            " other, also beside colocated ones, which may be all there is"
        )
    known = {pool.name: pool.workers for pool in pools}
    for section, named in (("failures", sim.failures), ("cuts", sim.cuts)):
        for one in named:
            if one.worker >= known.get(one.pool, 0):
                raise ConfigError(
                    f"simulation.{section}: there is no worker {one.worker} in a pool"
                    f" {one.pool!r}; there is: {', '.join(names)}"
                )
