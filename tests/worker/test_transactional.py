"""Transactional handlers: what they write and their completion are one transaction."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from commandbus import (
    BusinessRuleError,
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    HandlerRegistry,
    SendRequest,
    TransientCommandError,
    Worker,
)
from tests.bus.support import DOMAIN, Connection, complete, expire, lease, one, terminate, until
from tests.worker.support import (
    AT_ONCE,
    HOUR,
    LEASE,
    PARKED,
    Watched,
    all_settled,
    running,
    settled,
)

Function = Callable[[Command, HandlerContext], Awaitable[Any]]


@pytest.fixture(autouse=True)
def _ledger(db: Connection) -> None:
    db.execute("CREATE TABLE ledger (command_id uuid NOT NULL, delivery bigint NOT NULL, note text)")


def registry_of(**functions: Function) -> HandlerRegistry:
    registry = HandlerRegistry()
    for command_type, function in functions.items():
        registry.handler(DOMAIN, command_type, transactional=True, retry=AT_ONCE)(function)
    return registry


async def write(context: HandlerContext, note: str = "") -> psycopg.AsyncConnection[Any]:
    """Write to the ledger, in the handler's transaction."""
    assert context.connection is not None
    values = [context.command.command_id, context.delivery, note]
    await context.connection.execute("INSERT INTO ledger VALUES (%s, %s, %s)", values)
    return context.connection


def ledger(db: Connection) -> int:
    return int(one(db, "SELECT count(*) FROM ledger"))


async def test_effects_and_completion_commit_together(bus: CommandBus, db: Connection) -> None:
    async def debit(command: Command, context: HandlerContext) -> Any:  # noqa: ANN401 - any JSON
        connection = await write(context)
        assert ledger(db) == 0  # nobody sees it yet
        async with connection.transaction():
            await write(context, "in a savepoint")
        return command.data

    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit))):
        receipt = await bus.send(DOMAIN, "Debit", {"a": 1})
        command = await settled(bus, receipt)
    assert (command.status, command.result, command.attempts) == (CommandStatus.COMPLETED, {"a": 1}, 1)
    rows = "SELECT count(DISTINCT xmin::text) FROM (SELECT xmin FROM ledger UNION ALL SELECT xmin FROM {}) t"
    history = one(db, "SELECT tableoid::regclass::text FROM commandbus.command_history")
    assert one(db, rows.format(history)) in {1, 2}  # a savepoint has a transaction id of its own
    assert ledger(db) == 2


@pytest.mark.parametrize(
    ("error", "status", "attempts"),
    [
        (ValueError("broken"), PARKED, 3),
        (TransientCommandError("LATER"), PARKED, 3),
        (BusinessRuleError("NO_MONEY"), CommandStatus.FAILED, 1),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_error_rolls_the_effects_back(
    bus: CommandBus, db: Connection, error: Exception, status: CommandStatus, attempts: int
) -> None:
    async def debit(command: Command, context: HandlerContext) -> None:
        await write(context)
        raise error

    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit))):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", {}))
    assert (command.status, command.attempts) == (status, attempts)
    assert ledger(db) == 0


@pytest.mark.parametrize("result", ["\0", float("nan"), {1, 2}], ids=["NUL", "nan", "set"])
async def test_a_result_that_cannot_be_kept_leaves_the_effects(bus: CommandBus, db: Connection, result: object) -> None:
    async def debit(command: Command, context: HandlerContext) -> object:
        await write(context)
        return result

    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit))):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", {}))
    assert (command.status, command.result["commandbus"]) == (CommandStatus.COMPLETED, "result replaced")
    assert ledger(db) == 1


async def test_a_session_whose_encoding_the_handler_changes_completes(bus: CommandBus, db: Connection) -> None:
    """From then on psycopg answers in bytes."""

    async def debit(command: Command, context: HandlerContext) -> None:
        connection = await write(context)
        await connection.execute("SET LOCAL client_encoding = 'SQL_ASCII'")

    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit))):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", {}, max_attempts=1))
    assert command.status == CommandStatus.COMPLETED
    assert ledger(db) == 1


async def test_a_result_that_the_database_refuses_rolls_the_effects_back(bus: CommandBus, db: Connection) -> None:
    async def debit(command: Command, context: HandlerContext) -> str:
        await write(context)
        return "refused"

    db.execute("ALTER TABLE commandbus.command_history ADD CHECK (result <> '\"refused\"')")
    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit))):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", {}))
    assert (command.status, command.attempts, command.error and command.error.code) == (PARKED, 1, "UNSTORABLE")
    assert ledger(db) == 0


async def test_a_statement_that_fails_is_the_handlers_failure(bus: CommandBus, db: Connection) -> None:
    async def swallow(command: Command, context: HandlerContext) -> None:
        connection = await write(context)
        try:
            await connection.execute("SELECT 1 / 0")
        except psycopg.Error:
            return  # and the transaction is dead

    async def refuse_at_commit(command: Command, context: HandlerContext) -> None:
        connection = await write(context)
        await connection.execute("INSERT INTO debt VALUES (%s)", [command.command_id])

    db.execute("CREATE TABLE known (id uuid PRIMARY KEY)")
    db.execute("CREATE TABLE debt (id uuid REFERENCES known DEFERRABLE INITIALLY DEFERRED)")
    registry = registry_of(Swallow=swallow, Commit=refuse_at_commit)
    async with running(Worker(bus, DOMAIN, registry)):
        sent = [await bus.send(DOMAIN, command_type, {}, max_attempts=2) for command_type in ("Swallow", "Commit")]
        commands = await all_settled(bus, sent)
    assert [(command.status, command.attempts) for command in commands] == [(PARKED, 2)] * 2
    assert [command.error and command.error.code for command in commands] == [
        "InFailedSqlTransaction",
        "ForeignKeyViolation",
    ]
    assert ledger(db) == 0


@pytest.mark.parametrize("statements", [["COMMIT"], ["ROLLBACK"], ["COMMIT", "BEGIN"]], ids=" ".join)
async def test_a_handler_that_ends_the_transaction_itself_is_parked(
    bus: CommandBus, db: Connection, statements: list[str]
) -> None:
    async def debit(command: Command, context: HandlerContext) -> str:
        connection = await write(context)
        for statement in statements:
            await connection.execute(statement.encode())
        return "done"

    async def good(command: Command, context: HandlerContext) -> str:
        await write(context)
        return "good"

    worker = Worker(bus, DOMAIN, registry_of(Debit=debit, Good=good), transactional_connections=1)
    async with running(worker):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", {}))
        assert (await settled(bus, await bus.send(DOMAIN, "Good", {}))).result == "good"
    assert (command.status, command.attempts, command.delivery) == (PARKED, 1, 1)
    assert command.error is not None
    assert command.error.code == "TRANSACTION_ENDED"


# ----------------------------------------------------------------------------------------- lost leases


@pytest.mark.parametrize("lease_of_the_first", [LEASE, HOUR], ids=["it notices", "the fence notices"])
async def test_a_lost_lease_rolls_the_effects_back(
    bus: CommandBus, db: Connection, lease_of_the_first: timedelta
) -> None:
    watched = Watched()

    async def debit(command: Command, context: HandlerContext) -> str:
        await write(context, "by the loser")
        return str(await watched(command, context))

    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit), lease=lease_of_the_first)):
        receipt = await bus.send(DOMAIN, "Debit", {})
        await watched.started()
        with db.transaction():  # the worker itself must not be the one that takes over
            expire(db, receipt.command_id)
            owner = lease(db, "Debit", seconds=3600)
        if lease_of_the_first == LEASE:
            await until(lambda: watched.cancelled, "the end of the handler")
        watched.go_on.set()
    assert (await bus.get_command(receipt)).status == CommandStatus.IN_PROGRESS
    assert complete(db, owner, "by its owner") == "done"
    assert (await bus.get_command(receipt)).result == "by its owner"
    assert ledger(db) == 0


async def test_a_handler_that_rolls_back_has_failed(bus: CommandBus, db: Connection) -> None:
    async def roll_back(command: Command, context: HandlerContext) -> None:
        await write(context)
        raise psycopg.Rollback

    async with running(Worker(bus, DOMAIN, registry_of(Debit=roll_back))):
        command = await settled(bus, await bus.send(DOMAIN, "Debit", {}))
    assert (command.status, command.attempts, command.crashes) == (PARKED, 3, 0)
    assert command.error is not None
    assert command.error.code == "ROLLED_BACK"
    assert ledger(db) == 0


async def test_cancelling_a_running_command_rolls_back_what_it_wrote(bus: CommandBus, db: Connection) -> None:
    watched = Watched()

    async def debit(command: Command, context: HandlerContext) -> None:
        await write(context)
        await watched(command, context)

    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit), lease=HOUR)):
        receipt = await bus.send(DOMAIN, "Debit", {})
        await watched.started()
        await bus.cancel(receipt)
        watched.go_on.set()
    assert (await bus.get_command(receipt)).status == CommandStatus.CANCELED
    assert ledger(db) == 0


async def test_a_connection_lost_at_commit_leaves_the_effects_once(bus: CommandBus, db: Connection) -> None:
    """The outcome is unknown then: it is asked of the row, and the handler runs again only if nothing was kept."""
    db.execute("CREATE TABLE gate (shut int)")
    db.execute("INSERT INTO gate VALUES (1)")
    db.execute(
        "CREATE FUNCTION at_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "WHILE EXISTS (SELECT FROM gate) LOOP PERFORM pg_sleep(0.005); END LOOP; RETURN NULL; END $$"
    )
    db.execute(
        "CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON ledger DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION at_commit()"
    )

    async def debit(command: Command, context: HandlerContext) -> int:
        await write(context)
        return context.delivery

    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit))):
        receipt = await bus.send(DOMAIN, "Debit", {})
        await until(lambda: terminate(db, "COMMIT"), "the commit")
        db.execute("DELETE FROM gate")
        command = await settled(bus, receipt)
    assert (command.status, command.result, command.attempts) == (CommandStatus.COMPLETED, 2, 1)
    assert ledger(db) == 1


# ----------------------------------------------------------------------------------------- connections


async def test_not_more_at_once_than_there_are_connections(bus: CommandBus, db: Connection) -> None:
    now = most = 0

    async def debit(command: Command, context: HandlerContext) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await write(context)
        await asyncio.sleep(0.01)
        assert one(db, "SELECT count(*) FROM commandbus.command WHERE status = 'IN_PROGRESS'") <= 3
        now -= 1

    sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(40)])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit), transactional_connections=3)):
        for command in await all_settled(bus, sent):
            assert (command.status, command.delivery) == (CommandStatus.COMPLETED, 1)
    assert most == 3
    assert ledger(db) == 40


async def test_a_handler_may_use_the_bus_and_send_in_its_transaction(bus: CommandBus, db: Connection) -> None:
    async def debit(command: Command, context: HandlerContext) -> None:
        await context.bus.send(DOMAIN, "Inside", {}, connection=context.connection)
        await context.bus.send(DOMAIN, "Outside", {})
        assert await context.bus.count(command_type="Inside") == 0
        await write(context)
        if context.attempt == 1:
            raise TransientCommandError("LATER")

    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit))):
        assert (await settled(bus, await bus.send(DOMAIN, "Debit", {}))).attempts == 2
    assert await bus.count(command_type="Inside") == 1
    assert await bus.count(command_type="Outside") == 2
    assert ledger(db) == 1


async def test_a_connection_killed_in_mid_handler_costs_an_attempt_only(bus: CommandBus, db: Connection) -> None:
    watched = Watched()

    async def debit(command: Command, context: HandlerContext) -> int:
        await write(context)
        if context.attempt == 1:
            await watched(command, context)
        await write(context)
        return context.attempt

    async with running(Worker(bus, DOMAIN, registry_of(Debit=debit), transactional_connections=1)):
        receipt = await bus.send(DOMAIN, "Debit", {})
        await watched.started()
        assert terminate(db, "INSERT INTO ledger")
        watched.go_on.set()
        command = await settled(bus, receipt)
    assert (command.status, command.result) == (CommandStatus.COMPLETED, 2)
    assert ledger(db) == 2
