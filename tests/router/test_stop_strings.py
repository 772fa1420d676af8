"""The incremental matcher against a naive one that sees the whole text."""

import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.stop_strings import StopMatcher

FEW_LETTERS = st.text(alphabet="ab🎉", max_size=40)
STOPS = st.lists(st.text(alphabet="ab🎉", min_size=1, max_size=5), min_size=1, max_size=4)


def naive(text: str, stops: list[str]) -> tuple[str, bool]:
    """The first stop string to be complete, and of those the longest, cuts the text."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def naive_hold(text: str, stops: list[str]) -> int:
    """Length of the longest end of `text` that some stop string begins with."""
    fits = (
        size
        for size in range(len(text), 0, -1)
        if any(stop.startswith(text[-size:]) and size < len(stop) for stop in stops)
    )
    return next(fits, 0)


@given(pieces=st.lists(FEW_LETTERS, max_size=12), stops=STOPS)
@settings(max_examples=300, deadline=None, database=None)
@example(pieces=["xabx"], stops=["bx", "abx"])
@example(pieces=["aab", "aabaaa"], stops=["aabaaa"])
def test_cuts_where_the_naive_one_does_and_holds_no_more_than_it_must(pieces, stops):
    matcher, given_out = StopMatcher(stops), ""
    for i, piece in enumerate(pieces):
        given_out += matcher.push(piece)
        so_far = "".join(pieces[: i + 1])
        expected, matched = naive(so_far, stops)
        assert matcher.matched == matched
        if matched:
            assert given_out == expected
        else:
            assert given_out == so_far[: len(so_far) - naive_hold(so_far, stops)]
    assert given_out + matcher.flush() == naive("".join(pieces), stops)[0]


@pytest.mark.parametrize("stop", ["a" * 20_000 + "b", "ab" * 10_000 + "c"])
def test_crafted_stop_string_costs_no_more_per_character(stop):
    matcher, text = StopMatcher([stop]), stop[:-1] * 3
    started_s = time.perf_counter()
    for start in range(0, len(text), 4):
        matcher.push(text[start : start + 4])
    assert time.perf_counter() - started_s < 5
    assert not matcher.matched
