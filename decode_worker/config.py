"""Settings of the decode role."""

from pydantic import Field

from core.config import Settings


class DecodeConfig(Settings):
    """Admission of sequences."""

    max_sequences: int = Field(1024, gt=0)
    """Sequences held at once: pulling, waiting and running."""
    migration_stop_s: float = Field(2.0, gt=0)
    """A sequence stopped for its last blocks runs on here if no other worker has it by then."""
