"""Connections that break in mid-send, and how many of them there are."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import psycopg
import pytest

from commandbus import CommandBus, CommandStatus, OutcomeUnknownError
from commandbus import _send_buffer as send_buffer
from tests.bus.support import DOMAIN, Connect, Connection, bring, ids, one, until
from tests.support import Route, async_only

MINE = "datname = current_database() AND application_name = 'under test'"


@contextmanager
def meanwhile(work: Callable[[], None], pause: float = 0.02) -> Iterator[None]:
    """Repeat `work` in a thread, with a short pause."""
    over = threading.Event()
    failed: list[BaseException] = []

    def repeat() -> None:
        try:
            while not over.wait(pause):
                work()
        except BaseException as error:  # noqa: BLE001 - raised below
            failed.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert failed == []


async def test_nothing_acknowledged_is_lost_when_backends_die(route: Route, db: Connection, connect: Connect) -> None:
    """Rows in the table: those acknowledged, and at most those reported as unknown. None is there twice."""
    killer = connect(autocommit=True)
    acknowledged: list[UUID] = []
    unknown: list[UUID] = []
    killed = 0

    def kill() -> None:
        nonlocal killed
        killed += killer.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {MINE}").rowcount

    async def sender(bus: CommandBus) -> None:
        while killed < 25:
            try:
                acknowledged.append((await bus.send(DOMAIN, "Debit", {})).command_id)
            except OutcomeUnknownError as error:
                unknown.append(error.command_id)

    async with CommandBus(**route, application_name="under test") as bus:
        with meanwhile(kill, pause=0.25):
            await asyncio.gather(*(sender(bus) for _ in range(16)))
    found = ids(db)
    assert len(found) == len(set(found))
    assert len(acknowledged) == len(set(acknowledged))
    assert set(acknowledged) <= set(found) <= set(acknowledged) | set(unknown)


async def test_what_was_finished_before_its_answer_came_is_not_accepted_again(
    bus: CommandBus, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit succeeds, the answer is lost, a worker is quick: the repeated send meets its id in history."""
    execute = send_buffer.execute  # type: ignore[attr-defined]
    tries = 0

    async def losing_the_first_answer(*args: Any) -> Any:  # noqa: ANN401 - passes on
        nonlocal tries
        tries += 1
        answer = await execute(*args)
        if tries == 1:
            bring(db, "Debit", "COMPLETED")
            raise psycopg.OperationalError("the connection is lost")
        return answer

    monkeypatch.setattr(send_buffer, "execute", losing_the_first_answer)
    receipt = await bus.send(DOMAIN, "Debit", {})
    assert tries == 2
    assert not receipt.duplicate
    assert ids(db) == [receipt.command_id]
    assert (await bus.get_command(receipt)).status == CommandStatus.COMPLETED


async def test_the_budget_of_connections_is_kept(route: Route, connect: Connect) -> None:
    watcher = connect(autocommit=True)
    seen: list[int] = []

    def count() -> None:
        seen.append(one(watcher, f"SELECT count(*) FROM pg_stat_activity WHERE {MINE}"))

    async with CommandBus(**route, application_name="under test", flush_connections=3) as bus:

        async def caller() -> None:
            for n in range(10):
                await bus.get_command(await bus.send(DOMAIN, "Debit", n))

        with meanwhile(count):
            await asyncio.gather(*(caller() for _ in range(64)))
        count()
    assert 2 <= max(seen) <= 3 + 2


@async_only("threads that send keep one", pooled=False)
async def test_a_session_that_ends_while_a_flush_keeps_it_fails_no_send(
    route: Route, db: Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hinted = f"SELECT count(*) FROM pg_stat_activity WHERE {MINE} AND state = 'idle' AND query LIKE '%wake_v1%'"
    monkeypatch.setattr(send_buffer, "_KEPT", 3600)  # so that the end of the bus shows that it does not wait for that
    async with CommandBus(**route, application_name="under test") as bus:
        await bus.send(DOMAIN, "Debit", {})
        await until(lambda: one(db, hinted) == 1, "the hint, after which the flush has nothing to send")
        db.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {MINE}".encode())
        await until(lambda: one(db, f"SELECT count(*) FROM pg_stat_activity WHERE {MINE}") == 0, "the end of all")
        await bus.send(DOMAIN, "Debit", {})
        await until(lambda: one(db, hinted) == 1, "the next hint")
    assert len(ids(db)) == 2
    assert "is repeated" not in caplog.text


@async_only("threads that send keep one", pooled=False)
async def test_a_flush_with_nothing_to_send_gives_its_connection_back(
    route: Route, db: Connection, connect: Connect
) -> None:
    blocker = connect()
    waiting = f"SELECT count(*) FROM pg_stat_activity WHERE {MINE} AND wait_event_type = 'Lock'"
    async with CommandBus(**route, flush_connections=1, application_name="under test") as bus:
        await bus.send(DOMAIN, "Debit", {})
        blocker.execute("LOCK TABLE commandbus.command IN ACCESS EXCLUSIVE MODE")
        counts = [asyncio.create_task(bus.count()) for _ in range(3)]
        try:
            await until(lambda: one(db, waiting) == 3, "a call on each connection of the pool")
        finally:
            blocker.rollback()
        assert await asyncio.gather(*counts) == [1, 1, 1]


@async_only("holds a connection of the pool")
async def test_one_connection_at_a_time(bus: CommandBus, db: Connection) -> None:
    async with bus.database.connection():
        with pytest.raises(RuntimeError, match="holds a connection already"):
            await bus.count()
        with pytest.raises(RuntimeError, match="holds a connection already"):
            await asyncio.create_task(bus.wake(DOMAIN))
        # A flush serves everybody: it does not run in the context of this caller.
        await bus.send(DOMAIN, "Debit", {})
    assert await bus.count() == len(ids(db)) == 1


@async_only("cancels a task")
async def test_a_cancelled_call_gives_its_connection_back(bus: CommandBus, db: Connection, connect: Connect) -> None:
    blocker = connect()
    blocker.execute("LOCK TABLE commandbus.command IN ACCESS EXCLUSIVE MODE")
    for _ in range(10):  # more than the pool has
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await bus.count()
    blocker.rollback()
    assert await bus.count() == 0
