"""Set-ups that must be refused before anything starts."""

import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.preflight import find_problems, port_problems

NO_MODEL = "there is no checkpoint"


def config(**sections: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"model": {"path": "/nowhere"}, **sections})


def test_a_missing_checkpoint_is_one_sentence() -> None:
    (problem,) = find_problems(config())
    assert "/nowhere" in problem
    assert "\n" not in problem


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (problem,) = find_problems(config(model={"path": str(tmp_path)}))
    assert str(tmp_path) in problem


@pytest.mark.parametrize(
    ("gpus", "workers", "wanted"), [(1, 1000, 1001), (2, 1000, 2002), (0.5, 1000, 501)]
)
def test_more_gpus_than_there_are_is_refused_with_both_counts(
    gpus: float, workers: int, wanted: int
) -> None:
    sections = config(resources={"gpus": gpus}, prefill={"workers": 1}, decode={"workers": workers})
    (problem,) = [text for text in find_problems(sections) if "GPU" in text]
    assert f"need {wanted} GPUs, but this machine has " in problem


def test_a_gpu_engine_without_gpus_is_refused() -> None:
    problems = find_problems(config(engine={"device": "cuda"}))
    assert any("set resources.gpus to 1" in problem for problem in problems)


def test_one_and_a_half_gpus_are_refused() -> None:
    problems = find_problems(config(resources={"gpus": 1.5}))
    assert any("must be a whole number" in problem for problem in problems)


def test_a_port_in_use_is_told_and_a_free_one_is_not() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        (problem,) = port_problems(config(router={"port": port}))
    assert str(port) in problem
    assert port_problems(config(router={"port": port})) == []


def test_a_transport_within_one_process_is_refused() -> None:
    problems = find_problems(config(transfer={"backend": "loopback"}))
    assert any("set it to nixl" in problem for problem in problems)


def test_one_metrics_port_for_several_workers_of_a_machine_is_refused() -> None:
    def problems(port: int) -> list[str]:
        return find_problems(config(telemetry={"worker_metrics_port": port}))

    (problem,) = [text for text in problems(9100) if "metrics" in text]
    assert "telemetry.worker_metrics_port is 9100, which one of the 4 workers" in problem
    assert "set it to 0" in problem
    assert "started by hand, one per machine, may share it" in problem
    assert not any("metrics" in text for text in problems(0))


def test_a_spans_file_that_cannot_be_is_refused_and_one_that_can_is_not_made(
    tmp_path: Path,
) -> None:
    def problems(file: Path) -> list[str]:
        found = find_problems(config(telemetry={"spans_file": str(file)}))
        return [text for text in found if "spans_file" in text]

    (tmp_path / "there").write_text("")
    assert problems(tmp_path / "there") == []
    assert problems(tmp_path / "new" / "spans") == []
    assert not (tmp_path / "new").exists()
    assert len(problems(tmp_path)) == 1
    assert len(problems(tmp_path / "there" / "spans")) == 1
