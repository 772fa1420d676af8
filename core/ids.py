"""Identities. One word per thing; a NewType per word, so mypy tells a lease from a block.

The unit of decode, lease and fencing is a sequence: one choice of one request, at one attempt.
A retry raises `attempt`; whatever still speaks of the old attempt is stale and is ignored.
"""

import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import NewType

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
ModelId = NewType("ModelId", str)
LeaseId = NewType("LeaseId", int)
BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)
Incarnation = NewType("Incarnation", str)
ShardId = NewType("ShardId", str)


class Role(StrEnum):
    """What a worker does now. A label on the running process, not a property of its memory."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, order=True)
class SequenceId:
    """One choice of one request at one attempt."""

    request_id: RequestId
    choice: int = 0
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.request_id}/{self.choice}.{self.attempt}"


def shard_id(incarnation: Incarnation, tp_rank: int) -> ShardId:
    """The arena of one tensor-parallel rank of one life of a worker."""
    return ShardId(f"{incarnation}/{tp_rank}")


def new_request_id() -> RequestId:
    """A fresh request id: unguessable, so that nobody can name another client's request."""
    return RequestId("req-" + secrets.token_hex(12))


def new_incarnation() -> Incarnation:
    """A fresh name for one life of one worker process; a restart on the same port gets another."""
    return Incarnation(secrets.token_hex(8))
