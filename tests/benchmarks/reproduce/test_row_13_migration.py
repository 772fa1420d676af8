"""Row 13: the lengths, and that moves take away waits that placement left."""

from benchmarks.reproduce.row_13_migration import System, draw_requests, serve

STAYS, MOVES = (System(policy="round_robin", moves=moves) for moves in (False, True))


def test_lengths_follow_a_power_law_between_their_ends() -> None:
    lengths = sorted(r.prompt_tokens for r in draw_requests(1, 8000, 1.0))
    assert 64 <= lengths[0] < 70
    assert 3000 < lengths[-1] <= 4096
    above = [sum(length > limit for length in lengths) for limit in (128, 256)]
    assert 2.1 < above[0] / above[1] < 2.4  # 2 to the 1.1, and the cut


def test_moves_shorten_the_waits_and_leave_less_memory_in_pieces() -> None:
    stays, moves = (serve(system, 40.0, 0, 2000) for system in (STAYS, MOVES))
    assert stays.moves == 0.0
    assert moves.moves > 0.0
    assert moves.pause_p99_s < 0.5 * stays.pause_p99_s
    assert moves.fragmented < 0.5 * stays.fragmented
    assert 0.02 <= moves.moved_s < 0.5
