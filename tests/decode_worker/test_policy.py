import pytest

from core.errors import InvalidRequest, Overloaded
from decode_worker.config import DecodeConfig
from decode_worker.policy import pull_headroom_blocks, refuse_sequence

CONFIG = DecodeConfig(max_sequences=3)


@pytest.mark.parametrize(
    ("context", "remaining", "open_legs", "error"),
    [
        (10, 90, 0, type(None)),
        (10, 91, 0, InvalidRequest),
        (0, 5, 0, InvalidRequest),
        (10, 0, 0, InvalidRequest),
        (10, 10, 2, type(None)),
        (10, 10, 3, Overloaded),
    ],
)
def test_a_sequence_is_taken_when_it_fits_alone_and_there_is_room(
    context: int, remaining: int, open_legs: int, error: type
) -> None:
    refused = refuse_sequence(context, remaining, 100, open_legs, CONFIG)
    assert type(refused) is error


def test_a_pull_leaves_what_running_sequences_grow_into_and_what_one_has_waited_for() -> None:
    assert pull_headroom_blocks(3, 0) == 3
    assert pull_headroom_blocks(3, 40) == 43
