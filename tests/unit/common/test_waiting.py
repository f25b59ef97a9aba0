"""A cancellation is never forgotten, also when it comes in the moment in which what is waited for is there."""

from __future__ import annotations

import asyncio

import pytest

from libs.common.waiting import end, happens

pytestmark = pytest.mark.unit


async def test_an_event_is_awaited_so_long_and_no_longer() -> None:
    event = asyncio.Event()
    assert not await happens(event, 0.01)
    event.set()
    assert await happens(event, 0.0)
    assert await happens(event, 60.0)


async def test_a_cancellation_in_the_moment_of_the_event_is_not_forgotten() -> None:
    event = asyncio.Event()
    turns = 0

    async def loop() -> None:
        nonlocal turns
        while turns < 3:
            turns += 1
            await happens(event, 60.0)
            event.clear()

    task = asyncio.create_task(loop())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    event.set()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert turns < 3


async def test_tasks_that_forget_their_cancellation_are_told_again() -> None:
    forgotten = 0

    async def forgetful() -> None:
        nonlocal forgotten
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                forgotten += 1
                if forgotten == 2:
                    raise

    async def broken() -> None:
        raise ValueError("before it was told")

    tasks = [asyncio.create_task(forgetful()), asyncio.create_task(broken())]
    await asyncio.sleep(0)
    await end(tasks, again_s=0.01)
    assert forgotten == 2
    assert all(task.done() for task in tasks)
    assert isinstance(tasks[1].exception(), ValueError)
