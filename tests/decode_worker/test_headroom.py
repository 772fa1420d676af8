"""What sequences still grow into: by hand, and between its bounds."""

from random import Random

from decode_worker.headroom import (
    Held,
    PastLengths,
    limit_headroom_blocks,
    peak_headroom_blocks,
    predicted_headroom_blocks,
)

BLOCK = 16


def test_the_limit_is_all_that_clients_allow() -> None:
    held = [Held(known=100, generated=4, most=60), Held(known=16, generated=1, most=16)]
    assert limit_headroom_blocks(held, BLOCK) == (10 - 7) + 1


def test_nothing_is_held_for_nobody() -> None:
    assert limit_headroom_blocks([], BLOCK) == peak_headroom_blocks([], [10], BLOCK) == 0


def test_a_lone_sequence_may_go_on_as_long_as_answers_did() -> None:
    lone = [Held(known=160, generated=0, most=1000)]
    assert peak_headroom_blocks(lone, [320] * 20, BLOCK) == 20 + 1


def test_what_is_generated_already_is_not_to_come() -> None:
    late = [Held(known=160 + 304, generated=304, most=1000)]
    assert peak_headroom_blocks(late, [320] * 20, BLOCK) == 1 + 1


def test_a_client_s_limit_is_never_exceeded() -> None:
    assert peak_headroom_blocks([Held(160, 0, 16)], [320] * 20, BLOCK) == 1 + 1


def test_who_has_outlived_all_answers_may_go_on_as_long_again() -> None:
    assert peak_headroom_blocks([Held(1600, 800, 5000)], [320] * 20, BLOCK) == 50 + 1


def test_blocks_of_those_that_end_sooner_count_for_those_that_stay() -> None:
    """After ten tokens there are 1,000 back, and the other needs 100."""
    soon = Held(known=1000, generated=90, most=5000)
    late = Held(known=100, generated=0, most=5000)
    assert peak_headroom_blocks([late], [100] * 20, BLOCK) == 6 + 1
    assert peak_headroom_blocks([late, soon], [100] * 20, BLOCK) == 2


def test_a_peak_is_between_nothing_and_the_limit() -> None:
    random = Random(1)
    for _ in range(200):
        past = sorted(random.randrange(1, 2000) for _ in range(50))
        held = [
            Held(random.randrange(1, 4000), random.randrange(1000), random.randrange(1, 4000))
            for _ in range(random.randrange(1, 30))
        ]
        peak = peak_headroom_blocks(held, past, BLOCK)
        assert 0 <= peak <= limit_headroom_blocks(held, BLOCK) + 2 * len(held)


def test_only_the_last_lengths_are_remembered_in_order() -> None:
    past = PastLengths()
    for tokens in (5, *range(2000, 1000, -1)):
        past.ended(tokens)
    assert past.ordered == list(range(1001, 1513))


def test_a_predicted_peak_leaves_a_reserve_and_without_a_prediction_a_block_for_each() -> None:
    one = Held(160, 0, 5000)
    few = predicted_headroom_blocks([one], [320] * 15, BLOCK, least=3, num_blocks=100)
    many = predicted_headroom_blocks([one], [320] * 16, BLOCK, least=3, num_blocks=100)
    assert few == 3
    assert many == peak_headroom_blocks([one], [320] * 16, BLOCK) + 5
