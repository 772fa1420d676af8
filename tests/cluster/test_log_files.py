import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from cluster.log_files import rotate


def test_a_log_that_has_grown_begins_anew_for_the_process_that_has_it_open(tmp_path: Path) -> None:
    file = tmp_path / "decode-0.log"
    with file.open("a", buffering=1) as stream:
        stream.write("first\n" * 10)
        rotate(file, 60)
        assert file.stat().st_size == 60
        stream.write("more\n")
        rotate(file, 60)
        stream.write("last\n")
    assert file.read_text() == "last\n"
    assert file.with_name("decode-0.log.1").read_text() == "first\n" * 10 + "more\n"


def test_on_a_full_disk_it_is_cut_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> NoReturn:
        target.write_text("a part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    file = tmp_path / "router.log"
    file.write_text("much")
    rotate(file, 1)
    assert file.read_text() == ""
    assert list(tmp_path.iterdir()) == [file]


def test_a_log_that_is_gone_is_no_error(tmp_path: Path) -> None:
    rotate(tmp_path / "router.log", 1)
