"""Settings of the prefill role."""

from pydantic import Field

from core.config import Settings


class PrefillConfig(Settings):
    """Admission of prompts."""

    max_queued_tokens: int = Field(1_000_000, gt=0)
    """Uncached prompt tokens accepted and waiting; above it submits are rejected, and the router
    asks the next worker. A few thousand pay where several routers share the workers and prompts
    share little."""
    max_legs: int = Field(4096, gt=0)
    """Prompts held at once, from the yes to the end of the lease: short ones and cached ones, which
    hardly count above, take memory and time of the event loop too."""
