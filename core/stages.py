"""The stages of a sequence, in order. Spans, metrics, logs and errors all use these names.

admit -> route -> prefill -> kv_transfer -> decode -> done
"""

from enum import IntEnum


class Stage(IntEnum):
    """Ordered: a later stage compares greater."""

    ADMIT = 0
    ROUTE = 1
    PREFILL = 2
    KV_TRANSFER = 3
    DECODE = 4
    DONE = 5

    @property
    def label(self) -> str:
        """The name in spans, metrics and logs."""
        return self.name.lower()
