"""Options of every gRPC channel and server of the cluster.

No keepalive pings: the library answers them while the process's event loop hangs. Streams that must
notice a silent peer carry heartbeats of their own (router/client.py).
"""

import asyncio

import grpc

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # Workers are reached directly, whatever proxy the environment names.
    ("grpc.enable_http_proxy", 0),
    # Every stream has its own connection state; a reconnect must not inherit a long backoff.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # Two servers on one port would share its connections at random.
    ("grpc.so_reuseport", 0),
)


def heed_cancel() -> None:
    """Raise the CancelledError that a TaskGroup has hidden.

    In Python 3.11, when a task is cancelled and its group's children fail at the same moment, as
    the writer of a stream that is torn down does, the group raises only the children's errors.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def describe_break(errors: BaseExceptionGroup[BaseException]) -> str:
    """Why a stream broke, in one line, from the first error of its tasks."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, TimeoutError):
        return "no hello in time"
    return str(error) or type(error).__name__
