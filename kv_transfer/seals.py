"""Seals: a word of the owner's memory per finished lease, which its reader reads after the blocks.

A one-sided read asks nobody, so what it brought is believed only when the owner says that it held
the blocks meanwhile. An owner that is busy answers late: its event loop and its engine share one
interpreter. But the same kind of read can ask memory instead. The owner sets a seal before it
announces the last blocks, and breaks it before it lets any block of the lease go; a reader that
finds it whole after its last read has ended has read what was held. (One-sided reads that are
validated by another: FaRM, NSDI'14; Pilaf, ATC'13.)

    set -> announce -> ... -> break -> blocks may be reused
                        ^ read the blocks, then the seal: it is whole, so the blocks were held

A broken seal says nothing: then the closing question decides, as without one.
"""

import secrets

import numpy as np
import numpy.typing as npt

from kv_transfer.messages import Seal

_SLOTS = 4096
_BITS = 62


class Seals:
    """Those of one worker's life. No word is used twice, so one that is found is the lease's."""

    def __init__(self, slots: int = _SLOTS) -> None:
        self.words: npt.NDArray[np.uint64] = np.zeros(slots, dtype=np.uint64)
        self._free = list(range(slots - 1, -1, -1))
        self._next = secrets.randbits(_BITS) + 1  # of another life at this address no word is equal

    @property
    def address(self) -> int:
        """Of slot 0; a slot has 8 bytes."""
        return self.words.ctypes.data

    def set_one(self) -> Seal | None:
        """A seal that is whole from now on; None where all slots are taken."""
        if not self._free:
            return None
        seal = Seal(slot=self._free.pop(), word=self._next)
        self._next += 1
        self.words[seal.slot] = seal.word
        return seal

    def break_one(self, seal: Seal) -> None:
        """To be called once, before any block that it stands for is let go."""
        self.words[seal.slot] = 0
        self._free.append(seal.slot)

    def is_whole(self, seal: Seal) -> bool:
        """As a reader in this process sees it."""
        return 0 <= seal.slot < len(self.words) and int(self.words[seal.slot]) == seal.word
