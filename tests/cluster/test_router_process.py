"""The router's child process and its port, with a small router in place of the real one."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cluster.config import ClusterConfig, ModelConfig
from cluster.events import Event, RouterDied
from cluster.probe import answers_ready
from cluster.router_process import RouterFailed, RouterProcess, url_of
from cluster.run_dir import RunDir, all_runs
from router.serve import bind_listener

HERE = Path(__file__).parent
CONFIG = ClusterConfig(model=ModelConfig(path=Path("/nowhere")))


def with_router(
    folder: Path,
    test: Callable[[RouterProcess, str, list[Event]], Awaitable[None]],
    module: str = "stub_router",
    config: ClusterConfig = CONFIG,
) -> None:
    async def run(run_dir: RunDir) -> None:
        with closing(bind_listener("127.0.0.1", 0)) as opened:
            events: list[Event] = []
            router = RouterProcess(config, run_dir, opened, report=events.append, module=module)
            async with asyncio.timeout(30):
                await test(router, url_of(opened), events)

    run_dir = RunDir.create(folder, "tiny")
    try:
        asyncio.run(run(run_dir))
    finally:
        run_dir.remove()


@pytest.fixture(autouse=True)
def _stub_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def test_a_router_is_ready_once_it_answers_and_stops_when_asked(tmp_path: Path) -> None:
    async def test(router: RouterProcess, url: str, events: list[Event]) -> None:
        watching = asyncio.create_task(router.supervise())
        await router.wait_ready()
        assert await answers_ready(url)
        watching.cancel()
        await asyncio.wait([watching])
        await router.stop(drain_s=5)
        assert events == []

    with_router(tmp_path, test)


def test_a_router_that_dies_is_told_and_takes_requests_again(tmp_path: Path) -> None:
    async def test(router: RouterProcess, url: str, events: list[Event]) -> None:
        watching = asyncio.create_task(router.supervise())
        await router.wait_ready()
        assert router.pid is not None
        os.kill(router.pid, signal.SIGKILL)
        assert await answers_ready(url)
        (died,) = events
        assert isinstance(died, RouterDied)
        assert died.reason == "it was killed by SIGKILL"
        watching.cancel()
        await asyncio.wait([watching])
        await router.stop(drain_s=5)

    with_router(tmp_path, test)


def test_a_router_that_hangs_is_killed_and_takes_requests_again(tmp_path: Path) -> None:
    async def test(router: RouterProcess, url: str, events: list[Event]) -> None:
        watching = asyncio.create_task(router.supervise())
        await router.wait_ready()
        hung = router.pid
        assert hung is not None
        os.kill(hung, signal.SIGSTOP)
        while not await answers_ready(url):
            pass
        (died,) = events
        assert isinstance(died, RouterDied)
        assert (died.pid, died.restart_in_s) == (hung, 0.0)
        assert died.reason.startswith("it hung: nothing came within 1 s (hang_timeout_s)")
        watching.cancel()
        await asyncio.wait([watching])
        await router.stop(drain_s=5)

    with_router(tmp_path, test, config=CONFIG.model_copy(update={"hang_timeout_s": 1.0}))


def test_a_router_that_is_never_there_is_killed(tmp_path: Path) -> None:
    async def test(router: RouterProcess, url: str, events: list[Event]) -> None:
        with pytest.raises(RouterFailed, match="answered nothing within 1 s"):
            await router.supervise()

    config = CONFIG.model_copy(update={"start_timeout_s": 1.0})
    with_router(tmp_path, test, module="silent_router", config=config)


def test_a_router_that_cannot_start_fails_with_its_status_and_log(tmp_path: Path) -> None:
    async def test(router: RouterProcess, url: str, events: list[Event]) -> None:
        with pytest.raises(RouterFailed, match="ended with status 1") as caught:
            await router.supervise()
        assert "No module named no_such_router" in caught.value.message

    with_router(tmp_path, test, module="no_such_router")


def test_while_a_router_drains_new_clients_are_refused(tmp_path: Path) -> None:
    async def test(router: RouterProcess, url: str, events: list[Event]) -> None:
        watching = asyncio.create_task(router.supervise())
        await router.wait_ready()
        watching.cancel()
        await asyncio.wait([watching])
        (run,) = all_runs(tmp_path)
        (run.path / "drains").touch()
        stopping = asyncio.create_task(router.stop(drain_s=60))
        while await takes_clients(url):
            await asyncio.sleep(0.01)
        assert not stopping.done()
        (run.path / "drains").unlink()
        await stopping

    with_router(tmp_path, test)


async def takes_clients(url: str) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


def test_a_frozen_router_is_killed_after_its_drain_time(tmp_path: Path) -> None:
    async def test(router: RouterProcess, url: str, events: list[Event]) -> None:
        watching = asyncio.create_task(router.supervise())
        await router.wait_ready()
        pid = router.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        watching.cancel()
        await asyncio.wait([watching])
        await router.stop(drain_s=0)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    with_router(tmp_path, test)


@pytest.mark.parametrize(
    ("host", "start"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")]
)
def test_the_url_is_one_that_clients_on_this_machine_reach(host: str, start: str) -> None:
    with closing(bind_listener(host, 0)) as opened:
        assert url_of(opened).startswith(start)


def test_nobody_there_is_not_ready() -> None:
    with closing(bind_listener("127.0.0.1", 0)) as opened:
        url = url_of(opened)
    assert not asyncio.run(answers_ready(url))
