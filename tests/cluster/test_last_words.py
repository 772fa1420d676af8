"""What a log tells of a process' end."""

from pathlib import Path

from cluster.last_words import last_words, tail

SILENT = "it ended without a word: killed from outside, perhaps for want of memory"


def log_of(folder: Path, text: str) -> Path:
    log = folder / "worker.log"
    log.write_text(text)
    return log


def test_a_fatal_python_error_is_named(tmp_path: Path) -> None:
    log = log_of(tmp_path, "hello\nFatal Python error: Segmentation fault\n\nThread 1:\n")
    assert last_words(log) == "it crashed: Segmentation fault"


def test_a_signal_that_native_code_reports_is_named(tmp_path: Path) -> None:
    log = log_of(tmp_path, "*** SIGABRT received at time=1 on cpu 0 ***\nPC: @ 0x1\n")
    assert last_words(log) == "it crashed: SIGABRT"


def test_an_end_without_words_says_so(tmp_path: Path) -> None:
    assert last_words(log_of(tmp_path, "serving\n")) == SILENT
    assert last_words(tmp_path / "no.log") == SILENT


def test_only_the_life_in_question_counts(tmp_path: Path) -> None:
    log = log_of(
        tmp_path,
        "born pid=1 x\nFatal Python error: Aborted\nborn pid=2 x\nworks\nborn pid=3 x\nhello\n",
    )
    assert last_words(log, "born pid=1 ", "born") == "it crashed: Aborted"
    assert last_words(log, "born pid=2 ", "born") == SILENT
    assert tail(log, "born pid=2 ", "born").split() == ["x", "works"]


def test_a_tail_is_short_and_indented_and_never_empty(tmp_path: Path) -> None:
    log = log_of(tmp_path, "\n".join(f"line {number}" for number in range(1000)))
    lines = tail(log).splitlines()
    assert len(lines) == 15
    assert lines[-1] == "    line 999"
    assert tail(tmp_path / "no.log") == "    (nothing)"


def test_a_huge_log_with_broken_characters_is_read_from_its_end(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_bytes(b"\xff" * 200_000 + b"\nFatal Python error: Bus error\n")
    assert last_words(log) == "it crashed: Bus error"
