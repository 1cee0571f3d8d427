"""`connection=`: a send in the caller's own transaction, on a connection of either colour."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from commandbus import (
    CommandBus,
    CommandIdConflictError,
    ConfigurationError,
    InvalidCommandError,
    Receipt,
    SendRequest,
)
from tests.bus.support import DOMAIN, Connection, connect_caller, ids, one, poisonous, until
from tests.support import async_only, by_route

AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]


class Caller:
    """The caller's connection: blocking or async, driven alike."""

    def __init__(self, connection: AnyConnection) -> None:
        self.connection = connection

    async def do(self, statement: str) -> None:
        """Execute a statement, COMMIT and ROLLBACK among them."""
        if isinstance(self.connection, psycopg.AsyncConnection):
            await self.connection.execute(statement.encode())
        else:
            self.connection.execute(statement.encode())


every_caller = by_route("caller", ["async", "blocking"], sync=["blocking"], indirect=True)


@pytest.fixture
async def caller(request: pytest.FixtureRequest, dsn: str) -> AsyncIterator[Caller]:
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "async":
            yield Caller(await stack.enter_async_context(await psycopg.AsyncConnection.connect(dsn)))
        else:
            yield Caller(stack.enter_context(psycopg.connect(dsn)))


@every_caller
async def test_a_commit_sends(bus: CommandBus, db: Connection, caller: Caller) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {"n": 1}, connection=caller.connection)
    assert ids(db) == []
    await caller.do("COMMIT")
    assert ids(db) == [receipt.command_id]


@every_caller
async def test_a_rollback_does_not(bus: CommandBus, db: Connection, caller: Caller) -> None:
    await bus.send(DOMAIN, "Debit", {"n": 1}, connection=caller.connection)
    await caller.do("ROLLBACK")
    assert ids(db) == []


@every_caller
async def test_a_savepoint_takes_its_own_sends_back(bus: CommandBus, db: Connection, caller: Caller) -> None:
    kept = await bus.send(DOMAIN, "Debit", 1, connection=caller.connection)
    await caller.do("SAVEPOINT here")
    await bus.send(DOMAIN, "Debit", 2, connection=caller.connection)
    await caller.do("ROLLBACK TO SAVEPOINT here")
    await caller.do("COMMIT")
    assert ids(db) == [kept.command_id]


@every_caller
async def test_with_autocommit_it_is_sent_at_once(bus: CommandBus, db: Connection, caller: Caller) -> None:
    if isinstance(caller.connection, psycopg.AsyncConnection):
        await caller.connection.set_autocommit(True)
    else:
        caller.connection.autocommit = True
    with pytest.warns(UserWarning, match="autocommit"):
        receipt = await bus.send(DOMAIN, "Debit", {}, connection=caller.connection)
    assert ids(db) == [receipt.command_id]


@async_only("cancels a task")
async def test_a_batch_that_is_cancelled_leaves_the_transaction_usable(
    bus: CommandBus, db: Connection, dsn: str
) -> None:
    own = uuid4()
    async with connect_caller(dsn) as rival, connect_caller(dsn) as connection:
        await bus.send(DOMAIN, "Debit", 1, command_id=own, connection=rival)
        kept = await bus.send(DOMAIN, "Debit", 2, connection=connection)
        batch = [SendRequest(DOMAIN, "Debit", 3), SendRequest(DOMAIN, "Debit", 1, command_id=own)]
        waiting = asyncio.create_task(bus.send_batch(batch, connection=connection))
        await until(lambda: one(db, "SELECT count(*) FROM pg_locks WHERE NOT granted"), "the wait for the rival")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await rival.rollback()
    assert ids(db) == [kept.command_id]


@async_only("has an async connection")
async def test_it_can_be_part_of_a_pipeline(bus: CommandBus, db: Connection, dsn: str) -> None:
    async with connect_caller(dsn) as connection, connection.pipeline():
        await bus.send(DOMAIN, "Debit", 1, connection=connection)
        await bus.send_batch([SendRequest(DOMAIN, "Debit", 2)], connection=connection)
    assert len(ids(db)) == 2


@every_caller
async def test_the_callers_row_factory_is_left_alone(bus: CommandBus, caller: Caller) -> None:
    caller.connection.row_factory = dict_row
    own = uuid4()
    assert not (await bus.send(DOMAIN, "Debit", {}, command_id=own, connection=caller.connection)).duplicate
    assert (await bus.send(DOMAIN, "Debit", {}, command_id=own, connection=caller.connection)).duplicate
    batch = [SendRequest(DOMAIN, "Debit", n) for n in range(3)]
    assert len(await bus.send_batch(batch, connection=caller.connection)) == 3
    assert caller.connection.row_factory is dict_row


@every_caller
async def test_a_conflict_leaves_the_transaction_usable(bus: CommandBus, db: Connection, caller: Caller) -> None:
    own = uuid4()
    await bus.send(DOMAIN, "Debit", 1, command_id=own, connection=caller.connection)
    with pytest.raises(CommandIdConflictError):
        await bus.send(DOMAIN, "Debit", 2, command_id=own, connection=caller.connection)
    await caller.do("COMMIT")
    assert ids(db) == [own]


@every_caller
async def test_data_that_postgresql_refuses_is_an_invalid_command(
    bus: CommandBus, db: Connection, caller: Caller
) -> None:
    poison = poisonous(db)
    with pytest.raises(InvalidCommandError, match="max_data_bytes"):
        await bus.send(DOMAIN, "Debit", poison, connection=caller.connection)


@every_caller
async def test_a_batch_is_part_of_the_transaction(bus: CommandBus, db: Connection, caller: Caller) -> None:
    requests = [SendRequest(DOMAIN, "Debit", n) for n in range(1200)]
    receipts = await bus.send_batch(requests, connection=caller.connection)
    assert ids(db) == []
    await caller.do("COMMIT")
    assert sorted(ids(db)) == [receipt.command_id for receipt in receipts]


@every_caller
async def test_an_own_id_needs_read_committed(bus: CommandBus, db: Connection, caller: Caller) -> None:
    await caller.do("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    await bus.send(DOMAIN, "Debit", 1, connection=caller.connection)
    with pytest.raises(ConfigurationError, match="READ COMMITTED"):
        await bus.send(DOMAIN, "Debit", 2, command_id=uuid4(), connection=caller.connection)
    await caller.do("ROLLBACK")
    assert ids(db) == []


@every_caller
async def test_what_the_caller_wrote_goes_with_it(bus: CommandBus, db: Connection, caller: Caller) -> None:
    db.execute("CREATE TABLE account (n int)")
    for end, count in (("ROLLBACK", 0), ("COMMIT", 1)):
        await caller.do("INSERT INTO account VALUES (1)")
        await bus.send(DOMAIN, "Debit", {}, connection=caller.connection)
        await caller.do(end)
        assert db.execute("SELECT count(*) FROM account").fetchone() == (count,)
        assert len(ids(db)) == count


@pytest.mark.parametrize("wrong", ["host=localhost", 5, object()])
async def test_anything_else_is_no_connection(bus: CommandBus, db: Connection, wrong: object) -> None:
    with pytest.raises(ConfigurationError, match=type(wrong).__name__):
        await bus.send(DOMAIN, "Debit", {}, connection=wrong)
    with pytest.raises(ConfigurationError, match=type(wrong).__name__):
        await bus.send_batch([SendRequest(DOMAIN, "Debit", {})], connection=wrong)
    assert ids(db) == []


@async_only("has an async connection")
async def test_a_batch_that_fails_takes_no_send_of_another_task_with_it(
    bus: CommandBus, db: Connection, dsn: str
) -> None:
    poison = poisonous(db)
    async with connect_caller(dsn) as caller:
        batch = [*(SendRequest(DOMAIN, "Debit", n) for n in range(50)), SendRequest(DOMAIN, "Debit", poison)]
        sends = [bus.send(DOMAIN, "Debit", n, connection=caller) for n in range(20)]
        refused, *receipts = await asyncio.gather(
            bus.send_batch(batch, connection=caller), *sends, return_exceptions=True
        )
    assert isinstance(refused, InvalidCommandError)
    assert sorted(ids(db)) == sorted(receipt.command_id for receipt in receipts if isinstance(receipt, Receipt))
    assert len(receipts) == 20


@every_caller
async def test_a_connection_that_answers_in_bytes_is_one_like_any(
    bus: CommandBus, db: Connection, caller: Caller
) -> None:
    """As psycopg does for text where the client encoding is SQL_ASCII."""
    await caller.do("SET client_encoding = 'SQL_ASCII'")
    receipt = await bus.send(DOMAIN, "Debit", 1, command_id=uuid4(), connection=caller.connection)
    command = SendRequest(DOMAIN, "Debit", 2)
    batch = await bus.create_batch(
        DOMAIN, [command], name="Zoë", on_complete=SendRequest("reports", "Mail", 1), connection=caller.connection
    )
    with pytest.raises(CommandIdConflictError, match=str(receipt.command_id)):
        await bus.create_batch(
            DOMAIN, [SendRequest(DOMAIN, "Debit", 3, command_id=receipt.command_id)], connection=caller.connection
        )
    await caller.do("COMMIT")
    assert len(ids(db)) == 2
    assert await bus.get_batch(DOMAIN, batch.batch_id) == batch
    assert (batch.total, batch.name) == (1, "Zoë")
