"""What once lost a connection, a pool or a send: cancels at the wrong moment, odd databases, locks, hints that fail."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from commandbus import (
    BusinessRuleError,
    Command,
    CommandBus,
    CommandIdConflictError,
    CommandStateError,
    CommandStatus,
    HandlerContext,
    HandlerRegistry,
    InvalidCommandError,
    PermanentCommandError,
    RetryPolicy,
    SendRequest,
    TransientCommandError,
    TroubleshootingQueue,
    Worker,
)
from tests.bus.support import DOMAIN, Connect, Connection, Gate, bring, ids, one, rows, until
from tests.support import Route, aeventually, async_only, direct_only
from tests.worker.support import running, settled

# ----------------------------------------------------------------------------------------------- cancelled


@async_only("cancels a task")
async def test_a_call_cancelled_on_its_connections_way_back_does_not_lose_it(
    bus: CommandBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = bus.database._pool
    putconn, arrived, go_on = pool.putconn, asyncio.Event(), asyncio.Event()

    async def slowly(connection: psycopg.AsyncConnection[Any]) -> None:
        arrived.set()
        await go_on.wait()
        await putconn(connection)

    with monkeypatch.context() as patch:
        patch.setattr(pool, "putconn", slowly)
        for _ in range(pool.max_size):
            task = asyncio.create_task(bus.count())
            await arrived.wait()
            arrived.clear()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    go_on.set()

    met = asyncio.Barrier(pool.max_size)

    async def use() -> int:
        async with bus.database.connection() as connection:
            await met.wait()  # all of them at once
            ((found,),) = await (await connection.execute("SELECT 1")).fetchall()
            return int(found)

    assert await asyncio.wait_for(asyncio.gather(*(use() for _ in range(pool.max_size))), 30) == [1] * pool.max_size


@async_only("cancels a task", pooled=False)
async def test_a_cancelled_close_closes_the_connections(route: Route, db: Connection) -> None:
    gate = Gate(db)
    gate.shut("Debit")
    bus = CommandBus(**route, application_name="closing")
    await bus.open()
    pool = bus.database._pool
    sending = asyncio.create_task(bus.send(DOMAIN, "Debit", {}))
    await gate.reached()
    closing = asyncio.create_task(bus.close())
    await until(lambda: bus._closed, "the beginning of the end")
    assert not closing.done()
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert pool.closed
    gate.open()
    await asyncio.wait_for(asyncio.gather(sending, return_exceptions=True), 20)
    await bus.close()
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
    await until(lambda: one(db, sessions, "closing") == 0, "the end of the sessions")


# -------------------------------------------------------------------------------------------- odd databases

ODD_SETTINGS = {
    "datestyle": "German",
    "default_transaction_isolation": "serializable",
    "timezone": "Asia/Kolkata",
    "intervalstyle": "sql_standard",
    "extra_float_digits": "-3",
    "bytea_output": "escape",
    "client_encoding": "LATIN1",
    "search_path": "nowhere",
    "row_security": "off",
    "synchronous_commit": "off",
    "plan_cache_mode": "force_custom_plan",
    "standard_conforming_strings": "off",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "default_transaction_deferrable": "on",
}


WEEKS = "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent::regclass::text ~ '^commandbus.*_history$'"
BOUNDS = "SELECT pg_get_expr(relpartbound, oid) FROM pg_class WHERE relispartition AND relkind = 'r'"
CASES = [
    ("Debit", "now", "COMPLETED"),
    ("Debit", "later", "COMPLETED"),
    ("Debit", "end", "FAILED"),
    ("Debit", "park", "IN_TROUBLESHOOTING_QUEUE"),
    ("Together", "now", "COMPLETED"),
    ("Together", "end", "FAILED"),
    ("Together", "park", "IN_TROUBLESHOOTING_QUEUE"),
]


async def as_told(command: Command, context: HandlerContext) -> str:
    """Do what the data says; return what it was told of time."""
    if command.data == "later" and context.attempt == 1:
        raise TransientCommandError("LATER")
    if command.data == "park":
        raise PermanentCommandError("PARK")
    if command.data == "end":
        raise BusinessRuleError("END")
    return command.sent_at.isoformat()


@pytest.fixture
def odd_route(route: Route, dsn: str, db: Connection) -> Route:
    """The way to a database whose settings are not the usual ones, and whose weeks are not made yet."""
    name = Identifier(one(db, "SELECT current_database()"))
    for setting, value in ODD_SETTINGS.items():
        db.execute(SQL("ALTER DATABASE {} SET {} = {}").format(name, SQL(setting), value))
    for (table,) in rows(db, WEEKS):
        db.execute(f"DROP TABLE {table}".encode())
    with psycopg.connect(dsn) as odd:
        assert one(odd, "SELECT current_setting('datestyle') || current_setting('timezone')").endswith("Asia/Kolkata")
    return route


@direct_only
async def test_a_databases_own_settings_change_nothing(odd_route: Route, db: Connection) -> None:
    registry = HandlerRegistry()
    registry.handler(DOMAIN, "Debit", retry=RetryPolicy(2, [timedelta(0)]))(as_told)
    registry.handler(DOMAIN, "Together", transactional=True)(as_told)
    began = datetime.now(UTC)
    async with CommandBus(**odd_route) as bus, running(Worker(bus, DOMAIN, registry)):
        for command_type, data, status in CASES:
            command_id = uuid4()
            command = await settled(bus, await bus.send(DOMAIN, command_type, data, command_id=command_id))
            assert (command.status, command.crashes) == (status, 0)
            assert timedelta(minutes=-1) < command.sent_at - began < timedelta(minutes=5)
            assert command.result == (command.sent_at.isoformat() if status == "COMPLETED" else None)
            assert (await bus.send(DOMAIN, command_type, data, command_id=command_id)).duplicate
            with pytest.raises(CommandIdConflictError):
                await bus.send(DOMAIN, command_type, "other", command_id=command_id)
        queue = TroubleshootingQueue(bus)
        first = await queue.list_troubleshooting(DOMAIN, limit=1)
        (parked,) = await queue.list_troubleshooting(DOMAIN, limit=1, cursor=first.next_cursor)
        await queue.operator_complete(DOMAIN, parked.command_id, operator="ana", reason="by hand")
        assert (await bus.get_command(DOMAIN, parked.command_id)).status == CommandStatus.COMPLETED
    db.execute("SET TimeZone = 'UTC'")
    found = [row[0] for row in rows(db, BOUNDS)]
    assert len(found) == 10
    assert [bound for bound in found if bound.count(" 00:00:00+00") != 2] == []


# -------------------------------------------------------------------------------------------------- people

VERBS = ["cancel", "operator_retry", "operator_cancel", "operator_complete"]


@pytest.mark.parametrize("verb", VERBS)
async def test_a_verb_does_not_wait_long_for_a_row_that_somebody_keeps(
    bus: CommandBus, db: Connection, connect: Connect, verb: str
) -> None:
    """Waiting for longer than its caller, it would act after the caller has been told that it failed."""
    sql = "SELECT oid::regprocedure::text, proconfig FROM pg_proc WHERE proname = %s"
    ((function, settings),) = rows(db, sql, f"{verb}_v1")
    assert "lock_timeout=5s" in settings
    db.execute(f"ALTER FUNCTION {function} SET lock_timeout = '100ms'".encode())
    receipt = await bus.send(DOMAIN, "Debit", {})
    bring(db, "Debit", "IN_TROUBLESHOOTING_QUEUE")
    before = await bus.get_command(receipt), await bus.get_audit_trail(receipt)
    queue, key = TroubleshootingQueue(bus), (DOMAIN, receipt.command_id)

    async def act() -> None:
        if verb == "cancel":
            await bus.cancel(receipt)
        elif verb == "operator_retry":
            await queue.operator_retry(*key, data={"n": 2}, operator="ana")
        elif verb == "operator_cancel":
            await queue.operator_cancel(*key, operator="ana", reason="why")
        else:
            await queue.operator_complete(*key, operator="ana", reason="why")

    rival = connect()
    rival.execute("SELECT FROM commandbus.command FOR UPDATE")
    with pytest.raises(CommandStateError, match=f"{receipt.command_id} is locked by another transaction"):
        await act()
    rival.rollback()
    assert (await bus.get_command(receipt), await bus.get_audit_trail(receipt)) == before
    await act()
    assert (await bus.get_command(receipt)).status != before[0].status


# --------------------------------------------------------------------------------------------------- hints


async def test_a_hint_that_fails_is_nobodys_failure(
    bus: CommandBus, db: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    db.execute("DROP FUNCTION commandbus.wake_v1")

    async def tried() -> bool:  # after the receipt is out
        return any(record.name == "commandbus.hints" for record in caplog.records)

    with caplog.at_level(logging.DEBUG):
        receipts = await asyncio.gather(*(bus.send(DOMAIN, "Debit", n) for n in range(50)))
        receipts.append(await bus.send(DOMAIN, "Debit", 50, command_id=uuid4()))
        await aeventually(tried, what="a hint that fails")
    assert sorted(ids(db)) == sorted(receipt.command_id for receipt in receipts)
    assert not any(receipt.duplicate for receipt in receipts)
    loud = [r for r in caplog.records if r.name.startswith("commandbus") and r.levelno > logging.DEBUG]
    assert loud == []


async def test_a_hint_that_fails_takes_no_receipts_from_a_batch(bus: CommandBus, db: Connection) -> None:
    db.execute("DROP FUNCTION commandbus.wake_v1")
    receipts = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(3)])
    assert sorted(ids(db)) == sorted(receipt.command_id for receipt in receipts)


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("delay", 5),
        ("delay", timedelta(seconds=-1)),
        ("delay", timedelta(days=3651)),
        ("correlation_id", 5),
        ("reply_to", 5),
        ("reply_to", "no space"),
        ("command_id", "5"),
        ("headers", {"a": 5}),
        ("headers", {5: "a"}),
        ("headers", 5),
        ("headers", "text"),
        pytest.param("priority", 10**5000, id="priority of many digits"),
        pytest.param("command_id", 10**5000, id="command_id of many digits"),
        ("priority", "high"),
        ("priority", True),
        ("max_attempts", 0),
        ("max_attempts", 2.5),
    ],
)
async def test_a_field_of_the_wrong_kind_is_named(bus: CommandBus, db: Connection, field: str, wrong: object) -> None:
    options: dict[str, Any] = {field: wrong}
    with pytest.raises(InvalidCommandError, match=field):
        await bus.send(DOMAIN, "Debit", {}, **options)
    with pytest.raises(InvalidCommandError, match=field):
        await bus.send_batch([SendRequest(DOMAIN, "Debit", {}), SendRequest(DOMAIN, "Debit", {}, **options)])
    assert ids(db) == []


@pytest.mark.parametrize("field", ["domain", "command_type"])
async def test_a_name_of_the_wrong_kind_is_named(bus: CommandBus, db: Connection, field: str) -> None:
    for wrong in (5, 10**5000, "x" * 10**6):
        names: dict[str, Any] = {"domain": DOMAIN, "command_type": "Debit", field: wrong}
        with pytest.raises(InvalidCommandError, match=field) as caught:
            await bus.send(names["domain"], names["command_type"], {})
        assert len(str(caught.value)) < 300
    assert ids(db) == []


async def test_a_batch_is_of_requests(bus: CommandBus, db: Connection) -> None:
    requests: list[Any] = [SendRequest(DOMAIN, "Debit", {}), {"domain": DOMAIN, "command_type": "Debit", "data": {}}]
    with pytest.raises(InvalidCommandError, match="dict is no command: give a SendRequest"):
        await bus.send_batch(requests)
    assert ids(db) == []
