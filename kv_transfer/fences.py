"""Fences: a word of the owner's memory per finished lease, which its reader reads after the blocks.

A one-sided read asks nobody, so what it brought is believed only when the owner says that it held
the blocks meanwhile. An owner that is busy answers late: its event loop and its engine share one
interpreter. But the same kind of read can ask memory instead. The owner raises a word before it
announces the last blocks, and drops it before it lets any block of the lease go; a reader that
finds it standing after its last read has ended has read what was held. (One-sided reads that are
validated by another: FaRM, NSDI'14; Pilaf, ATC'13.)

    raise -> announce -> ... -> drop -> blocks may be reused
                          ^ read the blocks, then the word: it stands, so the blocks were held

A word that does not stand says nothing: then the closing question decides, as without a fence.
"""

import secrets

import numpy as np
import numpy.typing as npt

from kv_transfer.messages import Fence

_SLOTS = 4096
_BITS = 62


class Fences:
    """The words of one worker's life. No word stands twice, so one that is found is the lease's."""

    def __init__(self, slots: int = _SLOTS) -> None:
        self.words: npt.NDArray[np.uint64] = np.zeros(slots, dtype=np.uint64)
        self._free = list(range(slots - 1, -1, -1))
        self._next = secrets.randbits(_BITS) + 1  # of another life at this address no word is equal

    @property
    def address(self) -> int:
        """Of slot 0; a slot has 8 bytes."""
        return self.words.ctypes.data

    @property
    def standing(self) -> int:
        """How many stand now."""
        return len(self.words) - len(self._free)

    def raise_one(self) -> Fence | None:
        """A fence that stands from now on; None where all slots are taken."""
        if not self._free:
            return None
        fence = Fence(slot=self._free.pop(), word=self._next)
        self._next += 1
        self.words[fence.slot] = fence.word
        return fence

    def drop(self, fence: Fence) -> None:
        """It stands no more. To be called once, before any block that it stood for is let go."""
        self.words[fence.slot] = 0
        self._free.append(fence.slot)

    def stands(self, fence: Fence) -> bool:
        """As a reader in this process sees it."""
        return 0 <= fence.slot < len(self.words) and int(self.words[fence.slot]) == fence.word
