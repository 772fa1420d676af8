"""Which peers there are: versions, packages and command lines. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

HOME = Path(__file__).parents[3] / ".venv-peers"
"""Where `make peers` puts them, a folder per peer."""
LOOPBACK = "127.0.0.1"
_BLOCK_TOKENS = 16


class Engine(Enum):
    """Whose HTTP API a peer expects of its workers; Dynamo brings a mock engine of its own."""

    SGLANG = "sglang"
    VLLM = "vllm"
    OWN = "own"


@dataclass(frozen=True, slots=True, kw_only=True)
class Install:
    """One call of pip."""

    packages: tuple[str, ...]
    no_deps: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A router to compare with. `home` is its environment, `program` a file in its bin."""

    name: str
    version: str
    engine: Engine
    installs: tuple[Install, ...]
    program: str
    home: Path

    @property
    def mark(self) -> Path:
        """There once all of it is installed in this version."""
        return self.home / f"installed-{self.version}"

    @property
    def installed(self) -> bool:
        return self.mark.exists() and self.path(self.program).exists()

    def path(self, program: str) -> Path:
        return self.home / "bin" / program


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Free ports of this machine for one peer: its own, its metrics', its workers'."""

    http: int
    metrics: int
    bootstrap: tuple[int, ...]
    prefill: tuple[int, ...] = ()
    decode: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Command lines of a peer: its router, and workers that it brings itself."""

    router: tuple[str, ...]
    workers: tuple[tuple[str, ...], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def catalog(home: Path = HOME) -> tuple[Peer, ...]:
    """All of them, in the order of the report."""
    return (
        _python_package("smg", "1.13.0", Engine.SGLANG, "smg", home),
        _python_package("sglang-router", "0.3.2", Engine.SGLANG, "python", home),
        _python_package("vllm-router", "0.1.17", Engine.VLLM, "vllm-router", home),
        Peer(
            name="dynamo",
            version="1.6.1",
            engine=Engine.OWN,
            installs=(
                # what ai-dynamo asks for brings an engine, which a router does not need
                Install(
                    packages=("ai-dynamo==1.6.1", "ai-dynamo-runtime==1.6.1"),
                    no_deps=True,
                ),
                Install(
                    packages=(
                        *("pydantic", "uvloop", "aiohttp", "certifi", "kubernetes", "msgspec"),
                        *("prometheus-client", "pyzmq", "redis", "tqdm", "transformers"),
                        *("typing-extensions", "zstandard", "tokenizers"),
                    )
                ),
            ),
            program="python",
            home=home / "dynamo",
        ),
    )


def _python_package(name: str, version: str, engine: Engine, program: str, home: Path) -> Peer:
    return Peer(
        name=name,
        version=version,
        engine=engine,
        installs=(Install(packages=(f"{name}=={version}",)),),
        program=program,
        home=home / name,
    )


def start_of(peer: Peer, ports: Ports, model: Path, model_name: str, folder: Path) -> Start:
    """How to start it with prefill and decode apart; `folder` is empty and its own.

    Flags are those of the peers' own documentation for this mode, cache aware placement on.
    """
    if peer.engine is Engine.OWN:
        return _dynamo(peer, ports, model, model_name, folder)
    return _gateway(peer, ports)


def _gateway(peer: Peer, ports: Ports) -> Start:
    """SMG, and two routers of the family it comes from."""
    launch = {
        "smg": (str(peer.path("smg")), "launch"),
        "sglang-router": (str(peer.path("python")), "-m", "sglang_router.launch_router"),
        "vllm-router": (str(peer.path("vllm-router")),),
    }[peer.name]
    own = ("--host", LOOPBACK, "--port", str(ports.http), "--log-level", "error")
    metrics = ("--prometheus-host", LOOPBACK, "--prometheus-port", str(ports.metrics))
    workers: list[str] = []
    for port, bootstrap in zip(ports.prefill, ports.bootstrap, strict=True):
        workers += ["--prefill", _url(port)]
        if peer.engine is Engine.SGLANG:
            workers.append(str(bootstrap))
    for port in ports.decode:
        workers += ["--decode", _url(port)]
    apart = "--vllm-pd-disaggregation" if peer.engine is Engine.VLLM else "--pd-disaggregation"
    return Start(router=(*launch, *own, *metrics, apart, *workers, "--policy", "cache_aware"))


def _dynamo(peer: Peer, ports: Ports, model: Path, model_name: str, folder: Path) -> Start:
    python = str(peer.path("python"))
    planes = ("--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq")
    engine = (
        *(python, "-m", "dynamo.mocker", "--model-path", str(model), "--model-name", model_name),
        *("--num-workers", "2", "--num-gpu-blocks-override", "16384"),
        *("--block-size", str(_BLOCK_TOKENS), "--speedup-ratio", "1000000"),
        *("--max-num-seqs", "1024", "--max-num-batched-tokens", "8192", *planes),
    )
    bootstrap = ",".join(map(str, ports.bootstrap))
    frontend = (
        *(python, "-m", "dynamo.frontend", "--http-host", LOOPBACK, "--http-port", str(ports.http)),
        *("--router-mode", "kv", "--kv-cache-block-size", str(_BLOCK_TOKENS), *planes),
    )
    return Start(
        router=frontend,
        workers=(
            (*engine, "--disaggregation-mode", "prefill", "--bootstrap-ports", bootstrap),
            (*engine, "--disaggregation-mode", "decode"),
        ),
        environment={"DYN_FILE_KV": str(folder), "HF_HUB_OFFLINE": "1", "DYN_LOG": "error"},
    )


def _url(port: int) -> str:
    return f"http://{LOOPBACK}:{port}"


def missing(peers: Sequence[Peer]) -> list[str]:
    """Names of those that are not installed."""
    return [peer.name for peer in peers if not peer.installed]
