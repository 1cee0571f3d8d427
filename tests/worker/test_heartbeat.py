"""A worker tells that it is there; whatever becomes of that disturbs nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import pytest

from commandbus import CommandBus, HandlerRegistry, WaitingReason, Worker
from commandbus.worker import heartbeat
from tests.bus.support import DOMAIN, Connect, Connection, lock_table, rows, until
from tests.support import async_only
from tests.worker.support import echo, registry_of, running, settled

ALL = "SELECT domain, worker, command_types, concurrency, alive FROM commandbus.workers ORDER BY domain"


def registry_of_two_domains() -> HandlerRegistry:
    registry = registry_of(Debit=echo, Credit=echo)
    registry.handler("stock", "Count")(echo)
    return registry


async def test_a_worker_is_listed_while_it_runs(bus: CommandBus, db: Connection) -> None:
    worker = Worker(bus, [DOMAIN, "stock"], registry_of_two_domains(), concurrency=7)
    async with running(worker):
        await until(lambda: len(rows(db, ALL)) == 2, "a row for each domain")
        assert [(domain, name, sorted(types), *rest) for domain, name, types, *rest in rows(db, ALL)] == [
            (DOMAIN, worker.name, ["Credit", "Debit"], 7, True),
            ("stock", worker.name, ["Count"], 7, True),
        ]
    assert rows(db, ALL) == []


async def test_it_says_so_again_and_again(bus: CommandBus, db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_PAUSE", 0.01)
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        await until(lambda: rows(db, ALL), "the first row")
        db.execute("DELETE FROM commandbus.worker")
        await until(lambda: rows(db, ALL), "the row again")


@async_only("cancels a task")
async def test_a_cancelled_worker_leaves_too(bus: CommandBus, db: Connection) -> None:
    task = asyncio.create_task(Worker(bus, DOMAIN, registry_of(Debit=echo)).run())
    await until(lambda: rows(db, ALL), "the row")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)
    assert rows(db, ALL) == []


def drop_functions(db: Connection) -> None:
    db.execute("DROP FUNCTION commandbus.announce_v1, commandbus.leave_v1")


def remove_table(db: Connection) -> None:
    db.execute("CREATE SCHEMA away; ALTER TABLE commandbus.worker SET SCHEMA away")


def keep_locked(db: Connection) -> None:
    db.execute("BEGIN")
    lock_table(db, "worker")


def freeze(db: Connection) -> None:
    db.execute(
        "CREATE OR REPLACE FUNCTION commandbus.announce_v1(p_worker text, p_domain text, p_command_types text[], "
        "p_concurrency integer) RETURNS void LANGUAGE sql AS 'SELECT pg_sleep(60)'"
    )


@pytest.mark.parametrize("trouble", [drop_functions, remove_table, keep_locked, freeze])
async def test_a_heartbeat_that_fails_disturbs_nothing(
    bus: CommandBus, connect: Connect, caplog: pytest.LogCaptureFixture, trouble: Callable[[Connection], None]
) -> None:
    caplog.set_level(logging.DEBUG, "commandbus.worker")
    trouble(connect(autocommit=True))
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        receipts = [await bus.send(DOMAIN, "Debit", n) for n in range(20)]
        assert [(await settled(bus, receipt)).result for receipt in receipts] == list(range(20))
        await until(lambda: "a heartbeat is left out" in caplog.text, "a heartbeat that failed")
    told = [r.getMessage() for r in caplog.records if r.name == "commandbus.worker" and r.levelno > logging.INFO]
    assert told == []


async def test_a_lock_that_is_kept_does_not_make_sessions_pile_up(
    bus: CommandBus, db: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that gives up leaves its session behind, waiting: the server must be the one that gives up."""
    monkeypatch.setattr(heartbeat, "_PAUSE", 0.01)
    caplog.set_level(logging.DEBUG, "commandbus.worker")
    keep_locked(connect(autocommit=True))
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'commandbus.worker'::regclass"
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        await until(lambda: caplog.text.count("a heartbeat is left out") >= 3, "three heartbeats that failed")
        assert rows(db, waiting)[0][0] <= 1
    told = {r.getMessage() for r in caplog.records if "heartbeat" in r.getMessage()}
    why = "PostgreSQL cannot do it now, nothing was done: canceling statement due to lock timeout"
    assert told == {f"a heartbeat is left out: {why}"}


async def test_why_a_command_waits(bus: CommandBus, db: Connection) -> None:
    receipt = await bus.send(DOMAIN, "Unknown", {})
    waiting = await bus.explain(receipt)
    assert waiting is not None
    assert (waiting.reason, waiting.workers) == (WaitingReason.NO_WORKER, 0)
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        await until(lambda: rows(db, ALL), "the row")
        waiting = await bus.explain(receipt.domain, receipt.command_id)
        assert waiting is not None
        assert waiting.reason == WaitingReason.NO_WORKER_FOR_TYPE
        done = await bus.send(DOMAIN, "Debit", {})
        await settled(bus, done)
        assert await bus.explain(done) is None
