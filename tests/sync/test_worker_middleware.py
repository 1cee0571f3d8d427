"""Middleware is entered around each `def` handler, in its own thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import psycopg
import pytest
import sqlalchemy
from django.db import connection as django_connection
from django.db import connections
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from commandbus import BusinessRuleError, Command, CommandBus, CommandStatus, HandlerContext, Worker
from commandbus.handlers import Middleware
from commandbus.sync import SyncCommandBus, SyncHandlerContext, django_connections
from commandbus.sync import scoped_session as removing
from tests.bus.callers import _configure_django as configure_django
from tests.bus.support import DOMAIN, Connection, terminate
from tests.support import eventually
from tests.sync.support_worker import PARKED, echo, registry_of, settled, working
from tests.worker.support import running
from tests.worker.support import settled as asettled


class Diary:
    """Notes what happened, and in which thread."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self.threads: set[int] = set()

    def note(self, entry: str) -> None:
        self.entries.append(entry)
        self.threads.add(threading.get_ident())

    def middleware(self, name: str) -> Middleware:
        """Middleware that notes its ends."""

        @contextmanager
        def around(command: Command, context: SyncHandlerContext) -> Iterator[None]:
            self.note(f"{name} in, {command.data}, attempt {context.attempt}")
            try:
                yield
            except Exception as error:
                self.note(f"{name} sees {error!r}")
                raise
            self.note(f"{name} out")

        return around


def test_the_first_is_the_outermost_and_all_run_in_the_handlers_thread(bus: SyncCommandBus) -> None:
    diary = Diary()

    def debit(command: Command, context: SyncHandlerContext) -> None:
        diary.note("handler")

    with working(bus, registry_of(Debit=debit), middleware=[diary.middleware("one"), diary.middleware("two")]):
        settled(bus, bus.send(DOMAIN, "Debit", 7))
    assert diary.entries == ["one in, 7, attempt 1", "two in, 7, attempt 1", "handler", "two out", "one out"]
    assert len(diary.threads) == 1
    assert threading.get_ident() not in diary.threads


def test_an_error_of_the_handler_passes_through(bus: SyncCommandBus) -> None:
    diary = Diary()

    def debit(command: Command, context: SyncHandlerContext) -> None:
        raise BusinessRuleError("NO_MONEY")

    with working(bus, registry_of(Debit=debit), middleware=[diary.middleware("one"), diary.middleware("two")]):
        command = settled(bus, bus.send(DOMAIN, "Debit", 7))
    assert (command.status, command.error and command.error.code) == (CommandStatus.FAILED, "NO_MONEY")
    assert [entry.partition("(")[0] for entry in diary.entries[2:]] == [
        "two sees BusinessRuleError",
        "one sees BusinessRuleError",
    ]


@contextmanager
def fails_before(command: Command, context: object) -> Iterator[None]:
    if command.data:
        raise LookupError("in the middleware")
    yield


@contextmanager
def fails_after(command: Command, context: object) -> Iterator[None]:
    yield
    raise LookupError("in the middleware")


def fails_at_once(command: Command, context: object) -> AbstractContextManager[object]:
    raise LookupError("in the middleware")


@pytest.mark.parametrize("broken", [fails_before, fails_after, fails_at_once])
def test_an_error_of_the_middleware_is_a_failed_attempt(bus: SyncCommandBus, broken: Middleware) -> None:
    with working(bus, registry_of(Debit=echo), middleware=[broken]):
        command = settled(bus, bus.send(DOMAIN, "Debit", 7, max_attempts=1))
    assert (command.status, command.error and command.error.code) == (PARKED, "LookupError")


def test_what_middleware_swallows_is_a_failed_attempt_all_the_same(bus: SyncCommandBus) -> None:
    @contextmanager
    def swallow(command: Command, context: object) -> Iterator[None]:
        with suppress(LookupError):
            yield

    def debit(command: Command, context: SyncHandlerContext) -> None:
        raise LookupError("the third shelf")

    with working(bus, registry_of(Debit=debit), middleware=[swallow]):
        command = settled(bus, bus.send(DOMAIN, "Debit", 7, max_attempts=1))
    assert command.status == PARKED
    assert command.error is not None
    assert command.error.message == "a middleware has suppressed what the handler raised"


def test_one_of_the_users_own_takes_five_lines(bus: SyncCommandBus) -> None:
    current = threading.local()

    @contextmanager
    def with_tenant(command: Command, context: SyncHandlerContext) -> Iterator[None]:
        current.tenant = context.headers["tenant"]
        yield
        del current.tenant

    with working(bus, registry_of(Debit=lambda _, __: current.tenant), middleware=[with_tenant]):
        receipts = [bus.send(DOMAIN, "Debit", {}, headers={"tenant": name}) for name in "abc"]
        assert [settled(bus, receipt).result for receipt in receipts] == ["a", "b", "c"]


def test_async_handlers_go_without(bus: SyncCommandBus) -> None:
    diary = Diary()

    async def debit(command: Command, context: HandlerContext) -> int:
        return 1

    with working(bus, registry_of(Debit=debit), middleware=[diary.middleware("one")]):
        assert settled(bus, bus.send(DOMAIN, "Debit", 7)).result == 1
    assert diary.entries == []


def test_it_is_entered_inside_the_transaction_of_a_transactional_handler(bus: SyncCommandBus, db: Connection) -> None:
    db.execute("CREATE TABLE ledger (note text)")

    @contextmanager
    def noted(command: Command, context: SyncHandlerContext) -> Iterator[None]:
        assert context.connection is not None
        context.connection.execute("INSERT INTO ledger VALUES ('before')")
        yield

    def refuse(command: Command, context: SyncHandlerContext) -> None:
        raise BusinessRuleError("NO")

    with working(bus, registry_of(transactional=True, Good=echo, Bad=refuse), middleware=[noted]):
        settled(bus, bus.send(DOMAIN, "Good", 7))
        settled(bus, bus.send(DOMAIN, "Bad", 7))
    assert db.execute("SELECT note FROM ledger").fetchall() == [("before",)]


async def test_the_async_worker_takes_it_as_well(dsn: str) -> None:
    diary = Diary()
    async with (
        CommandBus(dsn) as bus,
        running(Worker(bus, DOMAIN, registry_of(Debit=echo), middleware=[diary.middleware("one")])),
    ):
        await asettled(bus, await bus.send(DOMAIN, "Debit", 7))
    assert diary.entries == ["one in, 7, attempt 1", "one out"]
    assert threading.get_ident() not in diary.threads


# ---------------------------------------------------------------------------------------------- shipped


@pytest.fixture
def django(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Django's default connection leads to this test's database, is kept, and checked once a request."""
    configure_django(dsn)
    for name, value in {"CONN_MAX_AGE": None, "CONN_HEALTH_CHECKS": True}.items():
        monkeypatch.setitem(connections.settings["default"], name, value)


def session_of_django(command: Command, context: object) -> int:
    """A handler that uses Django's connection of its thread, and names the server's process."""
    with django_connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid() AS of_django")
        return int(cursor.fetchone()[0])


def close(command: Command, context: object) -> None:
    """A handler that closes that connection."""
    django_connection.close()


@pytest.mark.usefixtures("django")
def test_a_connection_of_djangos_that_the_server_has_closed_is_replaced(bus: SyncCommandBus, db: Connection) -> None:
    registry = registry_of(Look=session_of_django, Close=close)
    with working(bus, registry, thread_pool_size=1, middleware=[django_connections]):
        first, again = (settled(bus, bus.send(DOMAIN, "Look", n, max_attempts=1)).result for n in range(2))
        assert first == again  # it is kept
        assert terminate(db, "AS of_django") == [first]
        eventually(lambda: not terminate(db, "AS of_django"), what="the end of that session")
        command = settled(bus, bus.send(DOMAIN, "Look", {}, max_attempts=1))
        assert command.status == CommandStatus.COMPLETED
        assert command.result != first
        settled(bus, bus.send(DOMAIN, "Close", {}))


def test_what_a_handler_leaves_in_a_scoped_session_is_removed(bus: SyncCommandBus, dsn: str, db: Connection) -> None:
    db.execute("CREATE TABLE ledger (n int)")
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    sessions: scoped_session[Session] = scoped_session(sessionmaker(engine))
    seen: list[Any] = []

    def leave_it_open(command: Command, context: SyncHandlerContext) -> int:
        seen.append(sessions())
        sessions.execute(sqlalchemy.text("INSERT INTO ledger VALUES (1)"))
        return int(sessions.scalar(sqlalchemy.text("SELECT count(*) FROM ledger")) or 0)

    with working(bus, registry_of(Debit=leave_it_open), thread_pool_size=1, middleware=[removing(sessions)]):
        assert [settled(bus, bus.send(DOMAIN, "Debit", n)).result for n in range(2)] == [1, 1]
    engine.dispose()
    assert seen[0] is not seen[1]
