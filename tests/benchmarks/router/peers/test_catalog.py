"""Command lines of peers: what is installed where, and that all of it stays on loopback."""

from pathlib import Path

import pytest

from benchmarks.router.peers.catalog import Engine, Peer, Ports, catalog, start_of
from benchmarks.router.peers.install import InstallFailed, install, pip_command

PORTS = Ports(http=1001, metrics=1002, bootstrap=(11, 12), prefill=(21, 22), decode=(31, 32))
MODEL = Path("/models/tiny")


def peer(name: str, home: Path = Path("/peers")) -> Peer:
    return next(one for one in catalog(home) if one.name == name)


def words(name: str, tmp_path: Path) -> str:
    return " ".join(start_of(peer(name), PORTS, MODEL, "tiny", tmp_path).router)


@pytest.mark.parametrize("name", ["smg", "sglang-router"])
def test_gateways_of_sglang_get_a_bootstrap_port_with_each_prefill_worker(
    name: str, tmp_path: Path
) -> None:
    line = words(name, tmp_path)
    assert "--pd-disaggregation" in line
    assert "--prefill http://127.0.0.1:21 11 --prefill http://127.0.0.1:22 12" in line
    assert "--decode http://127.0.0.1:31 --decode http://127.0.0.1:32" in line


def test_the_gateway_of_vllm_gets_urls_alone(tmp_path: Path) -> None:
    line = words("vllm-router", tmp_path)
    assert "--vllm-pd-disaggregation" in line
    assert "--prefill http://127.0.0.1:21 --prefill http://127.0.0.1:22 --decode" in line


def test_dynamo_brings_workers_of_both_kinds_and_its_planes_agree(tmp_path: Path) -> None:
    start = start_of(peer("dynamo"), PORTS, MODEL, "tiny", tmp_path)
    prefill, decode = (" ".join(worker) for worker in start.workers)
    planes = "--discovery-backend file --request-plane tcp --event-plane zmq"
    assert all(planes in line for line in (prefill, decode, " ".join(start.router)))
    assert prefill.endswith("--disaggregation-mode prefill --bootstrap-ports 11,12")
    assert decode.endswith("--disaggregation-mode decode")
    assert start.environment["DYN_FILE_KV"] == str(tmp_path)


@pytest.mark.parametrize("name", [one.name for one in catalog()])
def test_every_router_listens_on_loopback_and_the_port_it_was_given(
    name: str, tmp_path: Path
) -> None:
    line = words(name, tmp_path)
    assert "127.0.0.1" in line
    assert "1001" in line.split()
    assert "0.0.0.0" not in line


def test_every_peer_is_pinned_and_has_an_environment_of_its_own() -> None:
    peers = catalog()
    assert len({one.home for one in peers}) == len(peers) == 4
    for one in peers:
        assert any(f"=={one.version}" in package for package in one.installs[0].packages)


def test_a_peer_counts_as_installed_only_with_its_program_and_this_version(tmp_path: Path) -> None:
    smg = peer("smg", tmp_path)
    smg.path("smg").parent.mkdir(parents=True)
    smg.path("smg").touch()
    assert not smg.installed
    (smg.home / "installed-0.0.1").touch()
    assert not smg.installed
    smg.mark.touch()
    assert smg.installed


def test_dynamos_own_packages_come_without_what_they_ask_for() -> None:
    first, second = (pip_command(peer("dynamo"), step) for step in peer("dynamo").installs)
    assert "--no-deps" in first
    assert "--no-deps" not in second
    assert first[0] == str(peer("dynamo").path("python"))


def test_an_install_that_fails_says_what_to_run_to_see_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = peer("smg", tmp_path)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(InstallFailed, match="status 1; to see all of it: /bin/false -m venv"):
        install(broken)
    assert not broken.installed


def test_only_dynamo_brings_an_engine_of_its_own() -> None:
    assert [one.name for one in catalog() if one.engine is Engine.OWN] == ["dynamo"]
