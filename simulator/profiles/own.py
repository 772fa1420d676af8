"""Our own format, which `baton profile` writes: JSON, whole steps in seconds.

{"format": "baton-profile-1", "model": ..., "device": ..., "tp": 1, "kv_tokens": 60000,
 "prefill": [{"start": 0, "end": 512, "seconds": 0.0113}, ...],
 "decode": [{"sequences": 8, "context_tokens": 4096, "seconds": 0.0064}, ...]}
"""

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from core.config import Settings
from core.errors import plain
from simulator.profiles.types import BadProfile, DecodePoint, Measured, PrefillPoint

FORMAT = "baton-profile-1"


class PrefillRow(Settings):
    """Positions [start, end) of one prompt, computed alone."""

    start: int = Field(ge=0)
    end: int = Field(ge=1)
    seconds: float = Field(gt=0)

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Self:
        if self.start >= self.end:
            raise PydanticCustomError("no_tokens", "a step must end behind its start")
        return self


class DecodeRow(Settings):
    """One step of so many sequences of so much context together."""

    sequences: int = Field(ge=1)
    context_tokens: int = Field(ge=1)
    seconds: float = Field(gt=0)


class OwnProfile(Settings):
    """A file of this format."""

    format: str = FORMAT
    model: str
    device: str
    tp: int = Field(1, ge=1)
    kv_tokens: int | None = Field(None, ge=1)
    prefill: tuple[PrefillRow, ...]
    decode: tuple[DecodeRow, ...]

    @property
    def measured(self) -> Measured:
        """The steps alone."""
        return Measured(
            prefill=tuple(PrefillPoint(row.start, row.end, row.seconds) for row in self.prefill),
            decode=tuple(
                DecodePoint(row.sequences, row.context_tokens, row.seconds) for row in self.decode
            ),
        )


def read_own(file: Path) -> OwnProfile:
    """Raises BadProfile naming the field that is wrong."""
    try:
        profile = OwnProfile.model_validate_json(file.read_bytes())
    except OSError as error:
        raise BadProfile(f"cannot read {file}: {plain(error)}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        where = f"{place}: " if place else ""
        raise BadProfile(f"{file} is no profile: {where}{first['msg']}") from error
    if profile.format != FORMAT:
        raise BadProfile(f"{file} is of format {profile.format!r}; this version reads {FORMAT!r}")
    return profile


def own_text(profile: OwnProfile) -> str:
    """What such a file holds."""
    return profile.model_dump_json(indent=1) + "\n"
