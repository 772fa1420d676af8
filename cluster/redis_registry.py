"""The Registry in Redis, for workers and routers on several machines.

Of a cluster NAME, all in one slot by the braces:

    {baton:NAME}:worker:ID   a record as JSON, which expires with its lease
    {baton:NAME}:workers     the ids that were registered; some may have expired since
    {baton:NAME}:changed     a channel: the id of each record that changed

A message on the channel says only "read again", and is not needed: watches read again anyway.
While Redis is away they say nothing: nobody learns of a worker that left or came. Of a Redis that
comes back empty they say that it is empty, and then what the workers register again.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar, cast
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError

from core.errors import Unavailable
from core.ids import Incarnation, WorkerId
from core.registry import MAX_TTL_S, WorkerRecord

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 2.0
_REREAD_S = 1.0
_CALM_S = 0.05
_MAX_TOGETHER = 10_000
_RECONNECT_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_MAX_CONNECTIONS = 16

T = TypeVar("T")
Records = tuple[WorkerRecord, ...]

_RECORD = TypeAdapter(WorkerRecord)

_REGISTER = """
local before = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
if before ~= ARGV[2] then redis.call('PUBLISH', KEYS[3], ARGV[1]) end
"""

_DEREGISTER = """
local present = redis.call('GET', KEYS[1])
if present and cjson.decode(present)['incarnation'] == ARGV[2] then
    redis.call('DEL', KEYS[1])
    redis.call('SREM', KEYS[2], ARGV[1])
    redis.call('PUBLISH', KEYS[3], ARGV[1])
end
"""

_FORGET = """
for i, id in ipairs(ARGV) do
    if redis.call('EXISTS', KEYS[i + 1]) == 0 then redis.call('SREM', KEYS[1], id) end
end
"""


@dataclass(frozen=True, slots=True)
class _Keys:
    cluster: str

    @property
    def workers(self) -> str:
        return f"{{baton:{self.cluster}}}:workers"

    @property
    def changed(self) -> str:
        return f"{{baton:{self.cluster}}}:changed"

    @property
    def check(self) -> str:
        return f"{{baton:{self.cluster}}}:check"

    def worker(self, worker_id: str) -> str:
        return f"{{baton:{self.cluster}}}:worker:{worker_id}"


class RedisRegistry:
    """The Registry of the cluster named `cluster` in the Redis at `url`.

    Use it as an async context manager, or call `aclose` once. Calls other than `watch` raise
    Unavailable when Redis refuses, or does not answer within `call_timeout_s`. Watches read again
    every `reread_s`: a lease that expired is noticed by then.
    """

    def __init__(
        self,
        url: str,
        cluster: str,
        *,
        call_timeout_s: float = _CALL_TIMEOUT_S,
        reread_s: float = _REREAD_S,
    ) -> None:
        self._place = without_password(url)
        self._keys = _Keys(cluster)
        self._timeout_s = call_timeout_s
        self._reread_s = reread_s
        self._decoded: dict[bytes, WorkerRecord | None] = {}
        self._redis = Redis.from_url(
            url,
            # The client's own limit is a wait_for, which in Python 3.11 loses a cancellation that
            # comes as it ends. `_call` bounds every wait instead.
            socket_timeout=None,
            socket_connect_timeout=call_timeout_s,
            # One more try, at once, takes the place of a connection that a restart has cut.
            retry=Retry(NoBackoff(), 1),
            max_connections=_MAX_CONNECTIONS,
        )
        self._register = self._redis.register_script(_REGISTER)
        self._deregister = self._redis.register_script(_DEREGISTER)
        self._forget = self._redis.register_script(_FORGET)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Drop the connections. End watches first."""
        await self._redis.aclose()

    async def check(self) -> None:
        """Write and read back what is written at a registration. Raises Unavailable."""
        await self._call(self._redis.set(self._keys.check, b"1", px=1000))
        await self.workers()

    async def register(self, record: WorkerRecord, ttl_s: float) -> None:
        """Raises ValueError for a TTL outside (0, MAX_TTL_S]."""
        if not 0 < ttl_s <= MAX_TTL_S:
            raise ValueError(f"ttl_s must be in (0, {MAX_TTL_S:g}]")
        text = _RECORD.dump_json(record)
        ttl_ms, index_ttl_ms = max(1, round(ttl_s * 1000)), round(MAX_TTL_S * 1000)
        arguments: list[str | bytes | int] = [record.worker_id, text, ttl_ms, index_ttl_ms]
        await self._call(self._register(self._of(record.worker_id), arguments))

    async def deregister(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        await self._call(self._deregister(self._of(worker_id), [worker_id, incarnation]))

    async def workers(self) -> Records:
        """Sorted by worker_id. Records that this version cannot read are left out."""
        answer = cast("Awaitable[set[bytes]]", self._redis.smembers(self._keys.workers))
        members = sorted(await self._call(answer))
        if not members:
            return ()
        # What is no UTF-8 was not written by a worker: it has no record, and is forgotten.
        keys = [self._keys.worker(member.decode(errors="replace")) for member in members]
        texts = await self._call(self._redis.mget(keys))
        if gone := [i for i, text in enumerate(texts) if text is None]:
            gone_keys = [self._keys.workers, *(keys[i] for i in gone)]
            await self._call(self._forget(gone_keys, [members[i] for i in gone]))
        present = [cast("bytes", text) for text in texts if text is not None]
        # Most reads bring what the last one did, and routers read while they serve.
        self._decoded = {text: self._decode(text) for text in present}
        return tuple(record for text in present if (record := self._decoded[text]) is not None)

    async def watch(self) -> AsyncGenerator[Records, None]:
        last: Records | None = None
        failures = 0
        while True:
            try:
                async with self._subscribed() as changes:
                    while True:
                        records = await self.workers()
                        if failures:
                            log.info("registry_back place=%s", self._place)
                        failures = 0
                        if records != last:
                            last = records
                            yield records
                        await self._change(changes)
            except Unavailable as error:
                if failures == 0:
                    log.warning("registry_lost reason=%r", error.message)
            await asyncio.sleep(_RECONNECT_S[min(failures, len(_RECONNECT_S) - 1)])
            failures += 1

    @asynccontextmanager
    async def _subscribed(self) -> AsyncIterator[PubSub]:
        changes = self._redis.pubsub(ignore_subscribe_messages=True)
        try:
            await self._call(changes.subscribe(self._keys.changed))
            yield changes
        finally:
            await changes.aclose()  # type: ignore[no-untyped-call]

    async def _change(self, changes: PubSub) -> None:
        """Return after a change, or after `reread_s`. Changes that come together count as one."""
        first = changes.get_message(timeout=self._reread_s)
        if await self._call(first, more_s=self._reread_s) is None:
            return
        await asyncio.sleep(_CALM_S)
        for _ in range(_MAX_TOGETHER):
            if await self._call(changes.get_message()) is None:
                return

    async def _call(self, answer: Awaitable[T], more_s: float = 0.0) -> T:
        limit_s = self._timeout_s + more_s
        try:
            async with asyncio.timeout(limit_s):
                return await answer
        except (ResponseError, AuthenticationError) as error:
            raise Unavailable(f"Redis at {self._place} refuses: {error}") from error
        except (RedisError, OSError, TimeoutError) as error:
            reason = str(error).rstrip(".") or f"nothing came within {limit_s:g} s"
            raise Unavailable(f"Redis at {self._place} does not answer: {reason}") from error

    def _of(self, worker_id: str) -> list[str]:
        return [self._keys.worker(worker_id), self._keys.workers, self._keys.changed]

    def _decode(self, text: bytes) -> WorkerRecord | None:
        if text in self._decoded:
            return self._decoded[text]
        try:
            return _RECORD.validate_json(text)
        except ValidationError as error:
            log.warning("registry_record_unreadable text=%r reason=%s", text, error.errors()[0])
            return None


def without_password(url: str) -> str:
    """The URL as messages and logs may show it."""
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    shown = parts._replace(netloc=f"***@{host}" if at else host, query="")
    return shown.geturl()
