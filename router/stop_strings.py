"""Finds stop strings in a text that arrives in pieces.

    text so far   |---- given out ----|-- held: may be the start of a stop string --|

Only what could still become a stop string is held back. The first stop string to be complete ends
the text, and of two complete at the same character the longer one; so the answer does not depend on
where the pieces were cut.
"""

import re
from collections.abc import Sequence


class StopMatcher:
    """One text's matcher. Feed pieces to `push` until `matched`, then or at the end `flush`."""

    __slots__ = ("_automata", "_first", "_held", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` holds at least one string, none empty."""
        self.matched = False
        self._held = ""
        self._automata = [_Automaton(stop) for stop in stops]
        self._first = re.compile("|".join(re.escape(stop[0]) for stop in stops))

    def push(self, piece: str) -> str:
        """The text that `piece` makes certain; once matched, what stood before the match."""
        if self.matched:
            return ""
        if not self._held and self._first.search(piece) is None:
            return piece
        text = self._held + piece
        for at, char in enumerate(piece, start=len(self._held) + 1):
            complete = 0
            for automaton in self._automata:
                if automaton.step(char):
                    complete = max(complete, len(automaton.pattern))
            if complete:
                self.matched, self._held = True, ""
                return text[: at - complete]
        keep = max(automaton.state for automaton in self._automata)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, when the text ends without a match."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """Knuth-Morris-Pratt for one pattern: `state` characters of it are matched at the text's end.

    Amortised constant work per character, so a crafted stop string cannot slow the router.
    """

    __slots__ = ("_fallback", "pattern", "state")

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.state = 0
        self._fallback = [0] * len(pattern)
        matched = 0
        for i in range(1, len(pattern)):
            while matched and pattern[i] != pattern[matched]:
                matched = self._fallback[matched - 1]
            matched += pattern[i] == pattern[matched]
            self._fallback[i] = matched

    def step(self, char: str) -> bool:
        """Take one character; True when it completes the pattern."""
        state = self.state
        while state and self.pattern[state] != char:
            state = self._fallback[state - 1]
        state += self.pattern[state] == char
        self.state = state
        return state == len(self.pattern)
