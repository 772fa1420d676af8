"""What an owner's hello must say before anything of it is read."""

from core.errors import TransferCause, TransferFailed
from core.ids import Incarnation, ModelId
from core.messages import PROTOCOL_MAJOR
from kv_transfer.messages import FromOwner, PeerHello, Shard


def check_hello(
    hello: FromOwner | None, incarnation: Incarnation, model_id: ModelId
) -> tuple[Shard, ...]:
    """The owner's shards, by rank. Raises TransferFailed where it is not the one that was meant,
    or cannot be read from.
    """
    if not isinstance(hello, PeerHello) or not hello.shards:
        raise TransferFailed("the KV owner said no hello", cause=TransferCause.OTHER_PROTOCOL)
    if hello.protocol_major != PROTOCOL_MAJOR:
        raise TransferFailed(
            f"the KV owner speaks protocol {hello.protocol_major}",
            cause=TransferCause.OTHER_PROTOCOL,
        )
    if hello.incarnation != incarnation:
        raise TransferFailed(
            "the KV owner was restarted: its blocks are gone",
            cause=TransferCause.OWNER_RESTARTED,
        )
    if hello.model_id != model_id:
        raise TransferFailed(
            f"the KV owner serves another model, {hello.model_id}",
            cause=TransferCause.OTHER_MODEL,
        )
    for shard in hello.shards:
        _check_shard(shard)
    return hello.shards


def _check_shard(shard: Shard) -> None:
    try:
        shard.layout.check()
    except ValueError as error:
        raise TransferFailed(
            f"the KV owner's layout makes no sense: {error}", cause=TransferCause.NO_PLAN
        ) from error
    if not shard.memories:
        raise TransferFailed(
            "the KV owner offers no way to read it", cause=TransferCause.NO_TRANSPORT
        )
