import asyncio

from core.outbox import Outbox
from tests.builders import soon


async def drain(outbox: Outbox[int]) -> list[int]:
    return [item async for item in outbox]


async def test_items_come_out_in_order() -> None:
    outbox: Outbox[int] = Outbox(10)
    for i in range(5):
        outbox.send(i)
    outbox.close()
    assert await soon(drain(outbox)) == [0, 1, 2, 3, 4]


async def test_a_waiting_reader_wakes_for_an_item() -> None:
    outbox: Outbox[int] = Outbox(10)
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(drain(outbox))
        await asyncio.sleep(0)
        outbox.send(7)
        await asyncio.sleep(0)
        outbox.close()
    assert reading.result() == [7]


async def test_what_is_sent_after_close_is_dropped() -> None:
    outbox: Outbox[int] = Outbox(10)
    outbox.send(1)
    outbox.close()
    outbox.send(2)
    assert await soon(drain(outbox)) == [1]


async def test_one_item_too_many_ends_it_and_empties_it() -> None:
    outbox: Outbox[int] = Outbox(2)
    for i in range(3):
        outbox.send(i)
    assert outbox.overflowed.is_set()
    assert await soon(drain(outbox)) == []


async def test_a_full_outbox_has_not_overflowed() -> None:
    outbox: Outbox[int] = Outbox(2)
    outbox.send(1)
    outbox.send(2)
    assert not outbox.overflowed.is_set()
