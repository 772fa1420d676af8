"""Ray, started for one run: on loopback, inside the run's folder, behind the run's own token.

All calls that may block go through one thread that lives as long as Ray does: Ray's processes are
killed by the kernel when the thread that started them ends, which is what should happen when the
controller dies, and only then.
"""

import asyncio
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TypeVar

import psutil

from cluster.config import ClusterConfig
from cluster.last_words import tail
from cluster.run_dir import RUN_DIR_VARIABLE, RunDir
from core.errors import Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")

_OBJECT_STORE_BYTES = 80 * 1024 * 1024  # Ray takes no less; nothing of ours goes through it
_SHUTDOWN_S = 10.0
_CORE = ("gcs_server", "raylet")
_LOOK_EVERY_S = 0.5


class RayRuntime:
    """One Ray instance of this process, from `start` to `stop`."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._thread = ThreadPoolExecutor(1, "ray", initializer=_block_terminal_signals)

    async def start(self, config: ClusterConfig) -> None:
        """Start Ray with room for the config's workers, in 4 to 8 s. Raises Unavailable."""
        try:
            await self.call(lambda: self._start(config))
        except Exception as error:  # Ray raises nothing narrower, down to bare Exception
            log_end = tail(self._run.ray / "session_latest" / "logs" / "raylet.out")
            raise Unavailable(
                f"Ray could not start: {error}\nits log ends with:\n{log_end}"
            ) from error
        finally:
            _take_back_signals()

    async def watch(self) -> None:
        """After `start`, for ever. Raises Unavailable when a process that Ray itself needs has
        ended: no worker can be started any more, and a minute later Ray would end this process as
        well, on the spot.
        """
        core = _core_processes()
        while not (ended := [name for name in _CORE if not _runs(core.get(name))]):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_EVERY_S)
        log_end = tail(self._run.ray / "session_latest" / "logs" / f"{ended[0]}.out")
        raise Unavailable(
            f"Ray's own process {ended[0]} has ended, killed from outside perhaps; no worker can be"
            f" kept running without it, so start the cluster again\nits log ends with:\n{log_end}"
        )

    async def call(self, function: Callable[[], T]) -> T:
        """Run a blocking call of Ray on its thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def stop(self) -> None:
        """Stop Ray and its processes; whoever calls ends what is left after 10 s."""
        try:
            await asyncio.wait_for(self.call(_stop), _SHUTDOWN_S)
        except TimeoutError:
            log.warning("ray_stop_timed_out timeout_s=%s", _SHUTDOWN_S)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self, config: ClusterConfig) -> None:
        workers, wanted = config.num_workers, config.resources
        import_ray().init(
            address="local",
            namespace=self._run.run_id,
            num_cpus=max(1, math.ceil(workers * wanted.cpus)),
            num_gpus=None if wanted.gpus else 0,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=str(self._run.ray),
            _plasma_directory=str(self._run.shm),
            _node_ip_address="127.0.0.1",
        )


def import_ray() -> ModuleType:
    """Ray reads some of its environment when it is first imported: call inside `environment`."""
    import ray  # noqa: PLC0415

    module: ModuleType = ray
    return module


@contextmanager
def environment(run: RunDir) -> Iterator[None]:
    """Inside the block new processes inherit what marks them as this run's and keeps Ray quiet."""
    with _environ(
        {
            RUN_DIR_VARIABLE: str(run.path),
            "SPT_NOENV": "1",  # or the titles of Ray's agents overwrite their environment
            "UCX_POSIX_DIR": str(run.shm),
            "TORCHINDUCTOR_CACHE_DIR": str(run.path / "torch"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(run.ray_token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # this makes Ray listen on loopback only
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
        }
    ):
        yield


@contextmanager
def _environ(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _block_terminal_signals() -> None:
    # Inherited by Ray's processes: Ctrl-C and a closed terminal are the controller's to handle.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})


def _take_back_signals() -> None:
    """Undo what Ray's core did to SIGTERM: print a stack trace, abort the process 3 s later.

    Python still knows the handler that was there before; setting it again puts it in force.
    """
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
        signal.alarm(0)


def _core_processes() -> dict[str, psutil.Process]:
    """By name: children of this process."""
    found: dict[str, psutil.Process] = {}
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            found[child.name()] = child
    return found


def _runs(process: psutil.Process | None) -> bool:
    try:
        return process is not None and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _stop() -> None:
    import_ray().shutdown()
