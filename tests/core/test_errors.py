from pathlib import Path

import pytest

from core import errors
from core.errors import BatonError, UserError, from_code, plain


def tree(root: type[BatonError] = BatonError) -> list[type[BatonError]]:
    """All classes of core.errors; other rooms may add their own below it."""
    below = [found for cls in root.__subclasses__() for found in tree(cls)]
    return [cls for cls in [root, *below] if cls.__module__ == errors.__name__]


@pytest.mark.parametrize("cls", [c for c in tree() if c not in (BatonError, UserError)])
def test_an_error_crosses_the_wire_by_its_code(cls: type[BatonError]) -> None:
    assert type(from_code(cls.code, "why")) is cls


def test_a_code_of_a_newer_peer_may_be_retried() -> None:
    error = from_code("never_heard_of", "why")
    assert error.retryable
    assert error.message == "why"


@pytest.mark.parametrize(
    ("cls", "http", "retryable"),
    [
        (errors.InvalidRequest, 400, False),
        (errors.ModelNotFound, 404, False),
        (errors.RequestTooLarge, 413, False),
        (errors.Overloaded, 429, True),
        (errors.NoWorkers, 503, True),
        (errors.WorkerLost, 503, True),
        (errors.WorkerFailed, 500, True),
        (errors.TransferFailed, 503, True),
        (errors.DeadlineExceeded, 504, False),
        (errors.Cancelled, 499, False),
        (errors.InternalError, 500, False),
    ],
)
def test_each_error_leaves_the_process_as_its_page_says(
    cls: type[BatonError], http: int, retryable: bool
) -> None:
    assert (cls.http_status, cls.retryable) == (http, retryable)


def test_overload_says_when_to_come_back() -> None:
    assert errors.Overloaded("full", retry_after_s=2.5).retry_after_s == 2.5


def test_what_the_system_says_is_told_without_python(tmp_path: Path) -> None:
    with pytest.raises(OSError) as missing:
        (tmp_path / "none").read_text()
    assert plain(missing.value) == "No such file or directory"
    with pytest.raises(UnicodeDecodeError) as binary:
        b"\xff".decode()
    assert plain(binary.value) == "it is no text in UTF-8"
    assert plain(ValueError("odd")) == "odd"
    assert plain(TimeoutError()) == "TimeoutError"
