"""Cut the runs of a plan into chunks of bounded size; copy a chunk out of an arena, or into it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engine.arena import Arena

Int64s = npt.NDArray[np.int64]

_LONG_RUN_BYTES = 128 << 10  # from here on a copy per run costs less than an index
_SHORT_UNIT_BYTES = 64  # below, an index is larger than what it saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Parts of an arena in order: byte offsets and lengths, `[n]` each, n at least 1.

    All of them are multiples of `unit`, a power of two.
    """

    offsets: Int64s
    lengths: Int64s
    unit: int

    @property
    def nbytes(self) -> int:
        return int(self.lengths.sum())

    @property
    def long(self) -> bool:
        """Better copied run by run than unit by unit."""
        few = self.nbytes >= _LONG_RUN_BYTES * len(self.lengths)
        return few or self.unit < _SHORT_UNIT_BYTES

    def units(self) -> Int64s:
        """The index of every unit, in order."""
        counts = self.lengths // self.unit
        before = np.cumsum(counts) - counts
        shift = np.repeat(self.offsets // self.unit - before, counts)
        return shift + np.arange(len(shift))


class Runs:
    """Runs of an arena, seen as one string of bytes that is cut every `chunk_bytes`.

    `chunk_bytes` is a power of two, and no length is 0.
    """

    def __init__(self, offsets: Int64s, lengths: Int64s, chunk_bytes: int) -> None:
        self._offsets, self._lengths = offsets, lengths
        self._ends = np.cumsum(lengths)
        self._chunk_bytes = chunk_bytes
        bits = int(np.bitwise_or.reduce(offsets | lengths, initial=chunk_bytes))
        self._unit = bits & -bits
        self.nbytes = int(self._ends[-1]) if len(lengths) else 0

    def __iter__(self) -> Iterator[Pieces]:
        return (self._cut(number) for number in range(self.chunks))

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.nbytes // self._chunk_bytes)

    def size(self, number: int) -> int:
        """Bytes of one chunk; only the last one may be short."""
        return min(self._chunk_bytes, self.nbytes - number * self._chunk_bytes)

    def _cut(self, number: int) -> Pieces:
        start = number * self._chunk_bytes
        stop = start + self.size(number)
        first = int(np.searchsorted(self._ends, start, side="right"))
        last = int(np.searchsorted(self._ends, stop, side="left"))
        offsets, lengths = (a[first : last + 1].copy() for a in (self._offsets, self._lengths))
        skipped = start - int(self._ends[first] - self._lengths[first])
        offsets[0] += skipped
        lengths[0] -= skipped
        lengths[-1] -= int(self._ends[last]) - stop
        return Pieces(offsets=offsets, lengths=lengths, unit=self._unit)


class ArenaBytes:
    """An arena as bytes. `read` and `write` return when the bytes are there.

    On the CPU numpy copies: it stays on the calling thread, where torch would start a team of
    threads for each thread that copies.
    """

    def __init__(self, arena: Arena) -> None:
        self._flat = arena.data.view(-1).view(torch.uint8)
        self._array = None if self._flat.is_cuda else self._flat.numpy()
        self.nbytes = len(self._flat)
        self.device = self._flat.device

    def one_run(self, pieces: Pieces) -> torch.Tensor | None:
        """The bytes themselves, not a copy, where the pieces are a single run."""
        if len(pieces.offsets) > 1:
            return None
        start = int(pieces.offsets[0])
        return self._flat[start : start + pieces.nbytes]

    def read(self, pieces: Pieces, out: torch.Tensor) -> None:
        """Copy the pieces into `out`, `[nbytes]` uint8 on the CPU or this arena's device."""
        if self._array is not None:
            self._read_here(pieces, out.numpy())
        elif pieces.long:
            for place, there in _places(pieces, out):
                there.copy_(self._flat[place])
        else:
            index = torch.from_numpy(pieces.units()).to(self.device)
            rows = self._flat[: self.nbytes // pieces.unit * pieces.unit].view(-1, pieces.unit)
            out.copy_(rows.index_select(0, index).view(-1))
        self._finish()

    def write(self, pieces: Pieces, source: torch.Tensor) -> None:
        """Copy `source`, `[nbytes]` uint8 on the CPU or this arena's device, into the pieces."""
        if self._array is not None:
            self._write_here(pieces, source.numpy())
        elif pieces.long:
            for place, there in _places(pieces, source):
                self._flat[place].copy_(there)
        else:
            index = torch.from_numpy(pieces.units()).to(self.device)
            rows = self._flat[: self.nbytes // pieces.unit * pieces.unit].view(-1, pieces.unit)
            rows.index_copy_(0, index, source.to(self.device).view(-1, pieces.unit))
        self._finish()

    def _read_here(self, pieces: Pieces, out: npt.NDArray[np.uint8]) -> None:
        assert self._array is not None
        if not pieces.long:
            rows = _words(self._array, pieces.unit)
            # "clip" writes straight into `out`; the indices were checked with the plan
            np.take(rows, pieces.units(), axis=0, out=_words(out, pieces.unit), mode="clip")
            return
        at = 0
        for offset, nbytes in zip(pieces.offsets.tolist(), pieces.lengths.tolist(), strict=True):
            out[at : at + nbytes] = self._array[offset : offset + nbytes]
            at += nbytes

    def _write_here(self, pieces: Pieces, source: npt.NDArray[np.uint8]) -> None:
        assert self._array is not None
        if not pieces.long:
            _words(self._array, pieces.unit)[pieces.units()] = _words(source, pieces.unit)
            return
        at = 0
        for offset, nbytes in zip(pieces.offsets.tolist(), pieces.lengths.tolist(), strict=True):
            self._array[offset : offset + nbytes] = source[at : at + nbytes]
            at += nbytes

    def _finish(self) -> None:
        if self._array is None:
            torch.cuda.current_stream(self.device).synchronize()


def _words(data: npt.NDArray[np.uint8], unit: int) -> npt.NDArray[np.int64]:
    """`[n, unit / 8]`, without a last part that is no whole unit."""
    return data[: len(data) // unit * unit].view(np.int64).reshape(-1, unit // 8)


def _places(pieces: Pieces, side: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    lengths = pieces.lengths.tolist()
    starts = pieces.offsets.tolist()
    return [
        (slice(start, start + nbytes), part)
        for start, nbytes, part in zip(starts, lengths, torch.split(side, lengths), strict=True)
    ]
