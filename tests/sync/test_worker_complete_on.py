"""`context.complete_on`: a handler completes its command in a transaction of its own, of whatever kind."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any

import psycopg
import pytest
import sqlalchemy
from django.db import connection as django_connection
from django.db import transaction
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from commandbus import Command, CommandBus, CommandStatus, HandlerContext, LeaseLostError, Worker
from commandbus.handlers import BlockingContext
from commandbus.sync import SyncCommandBus, SyncHandlerContext
from tests.bus.callers import _configure_django as configure_django
from tests.bus.support import DOMAIN, Connection, complete, expire, lease, one
from tests.support import eventually
from tests.sync.support_worker import HOUR, LEASE, PARKED, registry_of, settled, story, working
from tests.worker.support import running
from tests.worker.support import settled as asettled

Execute = Callable[[str], Any]
Transaction = Callable[[], AbstractContextManager[tuple[Any, Execute]]]
AsyncTransaction = Callable[[], AbstractAsyncContextManager[tuple[Any, Execute]]]
WRITE = "INSERT INTO ledger VALUES (1)"


class RolledBackError(Exception):
    """What a handler raises in its transaction, and catches."""


@pytest.fixture(autouse=True)
def _ledger(db: Connection) -> None:
    db.execute("CREATE TABLE ledger (n int)")


def ledger(db: Connection) -> int:
    return int(one(db, "SELECT count(*) FROM ledger"))


@pytest.fixture(params=["psycopg", "SQLAlchemy", "Django"])
def own(request: pytest.FixtureRequest, dsn: str) -> Transaction:
    """Begins a transaction of a blocking kind, committed at the end: gives its connection, and what executes on it."""

    @contextlib.contextmanager
    def own_psycopg() -> Iterator[tuple[Any, Execute]]:
        with psycopg.connect(dsn) as connection:
            yield connection, lambda sql: connection.execute(sql.encode())

    @contextlib.contextmanager
    def own_sqlalchemy() -> Iterator[tuple[Any, Execute]]:
        engine = sqlalchemy.create_engine(
            "postgresql+psycopg://", creator=lambda: psycopg.connect(dsn), poolclass=NullPool
        )
        with Session(engine) as session, session.begin():
            yield session, lambda sql: session.execute(sqlalchemy.text(sql))

    @contextlib.contextmanager
    def own_django() -> Iterator[tuple[Any, Execute]]:
        def execute(sql: str) -> None:
            with django_connection.cursor() as cursor:
                cursor.execute(sql)

        try:
            with transaction.atomic():
                yield django_connection, execute
        finally:
            django_connection.close()

    configure_django(dsn)
    kinds: dict[str, Transaction] = {"psycopg": own_psycopg, "SQLAlchemy": own_sqlalchemy, "Django": own_django}
    return kinds[request.param]


@pytest.fixture(params=["psycopg", "SQLAlchemy"])
def async_own(request: pytest.FixtureRequest, dsn: str) -> AsyncTransaction:
    """The same of an async kind."""

    @contextlib.asynccontextmanager
    async def own_psycopg() -> AsyncIterator[tuple[Any, Execute]]:
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            yield connection, lambda sql: connection.execute(sql.encode())

    @contextlib.asynccontextmanager
    async def own_sqlalchemy() -> AsyncIterator[tuple[Any, Execute]]:
        async def connect() -> psycopg.AsyncConnection[Any]:
            return await psycopg.AsyncConnection.connect(dsn)

        engine = create_async_engine("postgresql+psycopg://", async_creator=connect, poolclass=NullPool)
        async with AsyncSession(engine) as session, session.begin():
            yield session, lambda sql: session.execute(sqlalchemy.text(sql))
        await engine.dispose()

    return {"psycopg": own_psycopg, "SQLAlchemy": own_sqlalchemy}[request.param]


# ---------------------------------------------------------------------------------------- def handlers


def test_the_commit_completes_it_once_with_that_result(bus: SyncCommandBus, db: Connection, own: Transaction) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> str:
        with own() as (connection, execute):
            execute(WRITE)
            context.complete_on(connection, {"balance": 30})
            assert bus.get_command(DOMAIN, command.command_id).status == CommandStatus.IN_PROGRESS
        assert bus.get_command(DOMAIN, command.command_id).status == CommandStatus.COMPLETED
        return "not looked at"

    with working(bus, registry_of(Debit=debit)):
        receipt = bus.send(DOMAIN, "Debit", {})
        settled(bus, receipt)
    command = bus.get_command(receipt)
    assert (command.status, command.result, command.attempts) == (CommandStatus.COMPLETED, {"balance": 30}, 1)
    assert story(bus, receipt) == ["SENT", "CLAIMED", "COMPLETED"]
    assert ledger(db) == 1


def test_a_connection_that_answers_in_bytes_is_one_like_any(bus: SyncCommandBus, own: Transaction) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        with own() as (connection, execute):
            execute("SET client_encoding = 'SQL_ASCII'")
            context.complete_on(connection, "kept")

    with working(bus, registry_of(Debit=debit)):
        assert settled(bus, bus.send(DOMAIN, "Debit", {}, max_attempts=1)).result == "kept"


def test_a_rollback_is_a_failed_attempt(bus: SyncCommandBus, db: Connection, own: Transaction) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> str:
        with contextlib.suppress(RolledBackError), own() as (connection, execute):
            execute(WRITE)
            context.complete_on(connection, "never")
            raise RolledBackError
        return "not looked at"

    with working(bus, registry_of(Debit=debit)):
        command = settled(bus, bus.send(DOMAIN, "Debit", {}, max_attempts=2))
    assert (command.status, command.attempts, command.result) == (PARKED, 2, None)
    assert command.error is not None
    assert command.error.code == "ROLLED_BACK"
    assert ledger(db) == 0


def test_a_lost_lease_ends_the_transaction(bus: SyncCommandBus, db: Connection, own: Transaction) -> None:
    owners: list[dict[str, Any]] = []
    errors: list[LeaseLostError] = []

    def debit(command: Command, context: SyncHandlerContext) -> None:
        with db.transaction():
            expire(db, command.command_id)
            owners.append(lease(db, "Debit", seconds=3600))
        try:
            with own() as (connection, execute):
                execute(WRITE)
                context.complete_on(connection, "by the loser")
        except LeaseLostError as error:
            errors.append(error)
            raise

    with working(bus, registry_of(Debit=debit), lease=HOUR):
        receipt = bus.send(DOMAIN, "Debit", {})
        eventually(lambda: errors, what="the handler to be told")
    assert (len(errors), ledger(db)) == (1, 0)
    assert str(receipt.command_id) in str(errors[0])
    assert complete(db, owners[0], "by its owner") == "done"
    assert bus.get_command(receipt).result == "by its owner"


def test_an_error_after_the_commit_changes_nothing(bus: SyncCommandBus, db: Connection, own: Transaction) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        with own() as (connection, execute):
            execute(WRITE)
            context.complete_on(connection, "kept")
        raise LookupError("too late to matter")

    with working(bus, registry_of(Debit=debit)) as worker:
        receipt = bus.send(DOMAIN, "Debit", {})
        settled(bus, receipt)
        worker.stop()  # it has recorded all there is
    assert bus.get_command(receipt).result == "kept"
    assert story(bus, receipt) == ["SENT", "CLAIMED", "COMPLETED"]
    assert ledger(db) == 1


def test_a_result_that_the_database_refuses_parks_it(bus: SyncCommandBus, db: Connection, own: Transaction) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        with own() as (connection, execute):
            execute(WRITE)
            context.complete_on(connection, "refused")

    db.execute("ALTER TABLE commandbus.command_history ADD CHECK (result <> '\"refused\"')")
    with working(bus, registry_of(Debit=debit)):
        command = settled(bus, bus.send(DOMAIN, "Debit", {}))
    assert (command.status, command.attempts, command.error and command.error.code) == (PARKED, 1, "UNSTORABLE")
    assert ledger(db) == 0


def test_the_next_command_is_sent_if_this_one_completes(bus: SyncCommandBus, own: Transaction) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        with contextlib.suppress(RolledBackError), own() as (connection, _):
            context.bus.send(DOMAIN, "Next", context.attempt, connection=connection)
            context.complete_on(connection)
            if context.attempt == 1:
                raise RolledBackError

    with working(bus, registry_of(Debit=debit)):
        assert settled(bus, bus.send(DOMAIN, "Debit", {})).status == CommandStatus.COMPLETED
    assert [command.data for command in bus.query_commands(command_type="Next").items] == [2]


async def test_def_handlers_of_the_async_worker_do_it_as_well(dsn: str, db: Connection, own: Transaction) -> None:
    def debit(command: Command, context: BlockingContext[CommandBus]) -> None:
        with own() as (connection, execute):
            execute(WRITE)
            context.complete_on(connection, "kept")

    async with CommandBus(dsn) as bus, running(Worker(bus, DOMAIN, registry_of(Debit=debit))):
        assert (await asettled(bus, await bus.send(DOMAIN, "Debit", {}))).result == "kept"
    assert ledger(db) == 1


def test_a_stricter_isolation_and_a_renewal_are_a_failed_attempt(bus: SyncCommandBus, dsn: str, db: Connection) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        with psycopg.connect(dsn) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.execute(WRITE.encode())  # from here on it sees the lease as it is now
            if context.attempt == 1:
                before = one(db, "SELECT lease_until FROM commandbus.command")
                eventually(lambda: one(db, "SELECT lease_until FROM commandbus.command") > before, what="a renewal")
            context.complete_on(connection, context.attempt)

    with working(bus, registry_of(Debit=debit), lease=LEASE):
        command = settled(bus, bus.send(DOMAIN, "Debit", {}))
    assert (command.status, command.result, command.crashes) == (CommandStatus.COMPLETED, 2, 0)
    assert ledger(db) == 1


def test_an_async_connection_is_refused_by_name(bus: SyncCommandBus, dsn: str) -> None:
    def debit(command: Command, context: SyncHandlerContext) -> None:
        context.complete_on(object.__new__(psycopg.AsyncConnection))

    with working(bus, registry_of(Debit=debit)):
        command = settled(bus, bus.send(DOMAIN, "Debit", {}, max_attempts=1))
    assert command.error is not None
    assert command.error.code == "ConfigurationError"
    assert "AsyncConnection" in command.error.message


# -------------------------------------------------------------------------------------- async handlers


def on_an_async_connection(async_own: AsyncTransaction) -> Callable[[Command, HandlerContext], Any]:
    async def debit(command: Command, context: HandlerContext) -> str:
        async with async_own() as (connection, execute):
            await execute(WRITE)
            await context.complete_on(connection, "kept")
            if command.data == "raise inside":
                raise LookupError("it rolls back")
        if command.data == "raise after":
            raise LookupError("too late to matter")
        return "not looked at"

    return debit


def expect(commands: list[Command], db: Connection) -> None:
    """See what became of the three."""
    assert [command.result for command in commands] == ["kept", "kept", None]
    bad = commands[-1]
    assert (bad.status, bad.attempts, bad.error and bad.error.code) == (PARKED, 1, "LookupError")
    assert ledger(db) == 2


THREE = ["good", "raise after", "raise inside"]


async def test_an_async_handler_does_it_on_an_async_connection(
    dsn: str, db: Connection, async_own: AsyncTransaction
) -> None:
    registry = registry_of(Debit=on_an_async_connection(async_own))
    async with CommandBus(dsn) as bus, running(Worker(bus, DOMAIN, registry)):
        sent = [await bus.send(DOMAIN, "Debit", data, max_attempts=1) for data in THREE]
        expect([await asettled(bus, receipt) for receipt in sent], db)


def test_an_async_handler_of_the_blocking_worker_does_it_as_well(
    bus: SyncCommandBus, db: Connection, async_own: AsyncTransaction
) -> None:
    with working(bus, registry_of(Debit=on_an_async_connection(async_own))):
        sent = [bus.send(DOMAIN, "Debit", data, max_attempts=1) for data in THREE]
        expect([settled(bus, receipt) for receipt in sent], db)
