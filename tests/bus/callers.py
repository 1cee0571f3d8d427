"""Every kind of connection that a caller may bring, driven alike: psycopg's, SQLAlchemy's, Django's."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import asyncpg
import django
import psycopg
import psycopg2
import sqlalchemy
from django.conf import settings
from django.db import connection as django_connection
from django.db import connections, transaction
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import NullPool
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from commandbus import CommandBus, Receipt, SendRequest
from commandbus._connections import run_on

KINDS = [
    "psycopg Connection",
    "psycopg AsyncConnection",
    "psycopg SQLAlchemy Connection",
    "psycopg SQLAlchemy Session",
    "psycopg SQLAlchemy scoped_session",
    "psycopg SQLAlchemy AsyncConnection",
    "psycopg SQLAlchemy AsyncSession",
    "psycopg SQLAlchemy async_scoped_session",
    "psycopg2 SQLAlchemy Connection",
    "psycopg2 SQLAlchemy Session",
    "asyncpg SQLAlchemy AsyncConnection",
    "asyncpg SQLAlchemy AsyncSession",
    "psycopg Django",
]


class Caller:
    """A connection and the transaction on it. What blocks is done in a thread of its own, if there is one."""

    def __init__(self, connection: Any, thread: ThreadPoolExecutor | None) -> None:  # noqa: ANN401 - any kind
        self.connection = connection
        self._thread = thread

    async def call(self, function: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401 - any result
        """Call a method of the connection, awaiting what it answers where it is async."""
        if self._thread is not None:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
        answer = function(*args)
        return await answer if inspect.isawaitable(answer) else answer

    async def send(self, bus: CommandBus, request: SendRequest) -> Receipt:
        """Send one on the connection: through the loop, or in the thread, where none runs."""
        given = {name: getattr(request, name) for name in ("domain", "command_type", "data", "command_id")}
        if self._thread is None:
            return await bus.send(**given, connection=self.connection)
        if blocking := getattr(bus, "blocking", None):
            return await self.call(lambda: blocking.send(**given, connection=self.connection))  # type: ignore[no-any-return]
        (receipt,) = await self.call(lambda: run_on(self.connection, bus.sending([request])))
        return receipt  # type: ignore[no-any-return]

    async def send_batch(self, bus: CommandBus, requests: Sequence[SendRequest]) -> list[Receipt]:
        """Send a batch, likewise."""
        if self._thread is None:
            return await bus.send_batch(requests, connection=self.connection)
        if blocking := getattr(bus, "blocking", None):
            return await self.call(lambda: blocking.send_batch(requests, connection=self.connection))  # type: ignore[no-any-return]
        work = bus.sending(requests, all_or_none=True)
        return await self.call(lambda: run_on(self.connection, work))  # type: ignore[no-any-return]

    async def do(self, statement: str) -> None:
        """Execute a statement in the transaction."""
        await self.call(self.connection.execute, statement)

    async def commit(self) -> None:
        await self.call(self.connection.commit)

    async def rollback(self) -> None:
        await self.call(self.connection.rollback)

    @contextlib.asynccontextmanager
    async def savepoint(self, *, keep: bool) -> AsyncIterator[None]:
        """Make a savepoint, in the kind's own way, that is released or rolled back at the end."""
        await self.do("SAVEPOINT callers_own")
        yield
        await self.do("RELEASE SAVEPOINT callers_own" if keep else "ROLLBACK TO SAVEPOINT callers_own")


class SqlAlchemyCaller(Caller):
    async def do(self, statement: str) -> None:
        await self.call(self.connection.execute, sqlalchemy.text(statement))

    @contextlib.asynccontextmanager
    async def savepoint(self, *, keep: bool) -> AsyncIterator[None]:
        nested = await self.call(self.connection.begin_nested)
        yield
        await self.call(nested.commit if keep else nested.rollback)


class DjangoCaller(Caller):
    """Its transaction is `atomic()`, entered as soon as something is done."""

    def __init__(self, connection: Any, thread: ThreadPoolExecutor, *, autocommit: bool) -> None:  # noqa: ANN401
        super().__init__(connection, thread)
        self._atomic: transaction.Atomic | None = None
        self._autocommit = autocommit

    async def call(self, function: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401 - any result
        if self._atomic is None and not self._autocommit:
            self._atomic = transaction.atomic()
            await super().call(self._atomic.__enter__)
        return await super().call(function, *args)

    async def do(self, statement: str) -> None:
        def execute() -> None:
            with self.connection.cursor() as cursor:
                cursor.execute(statement)

        await self.call(execute)

    async def commit(self) -> None:
        await self._end()

    async def rollback(self) -> None:
        if self._atomic is not None:
            await super().call(transaction.set_rollback, True)  # noqa: FBT003 - Django's own signature
            await self._end()

    async def _end(self) -> None:
        if self._atomic is not None:
            atomic, self._atomic = self._atomic, None
            await Caller.call(self, atomic.__exit__, None, None, None)

    @contextlib.asynccontextmanager
    async def savepoint(self, *, keep: bool) -> AsyncIterator[None]:
        inner = transaction.atomic()
        await self.call(inner.__enter__)
        yield
        if not keep:
            await self.call(transaction.set_rollback, True)  # noqa: FBT003 - Django's own signature
        await self.call(inner.__exit__, None, None, None)


@contextlib.asynccontextmanager
async def open_caller(kind: str, dsn: str, *, thread: bool, autocommit: bool = False) -> AsyncIterator[Caller]:
    """Open a connection of this kind; closed, with all that belongs to it, at the end."""
    driver, _, class_name = kind.partition(" ")
    async with contextlib.AsyncExitStack() as stack:
        executor = stack.enter_context(ThreadPoolExecutor(1)) if thread else None
        if class_name == "Django":
            assert executor is not None
            _configure_django(dsn)
            caller: Caller = DjangoCaller(django_connection, executor, autocommit=autocommit)
        elif class_name == "Connection":
            caller = Caller(psycopg.connect(dsn, autocommit=autocommit), executor)
        elif class_name == "AsyncConnection":
            caller = Caller(await psycopg.AsyncConnection.connect(dsn, autocommit=autocommit), None)
        else:
            options: dict[str, Any] = {"poolclass": NullPool} | (
                {"isolation_level": "AUTOCOMMIT"} if autocommit else {}
            )
            caller = await _open_sqlalchemy(
                driver, class_name.split()[1], dsn, options=options, executor=executor, stack=stack
            )
        yield caller
        await caller.rollback()
        await Caller.call(caller, lambda: caller.connection.close())  # noqa: PLW0108 - another thread has another


async def _open_sqlalchemy(
    driver: str,
    class_name: str,
    dsn: str,
    *,
    options: dict[str, Any],
    executor: ThreadPoolExecutor | None,
    stack: contextlib.AsyncExitStack,
) -> Caller:
    if class_name.lower().startswith("async"):
        parts = {{"dbname": "database"}.get(key, key): value for key, value in conninfo_to_dict(dsn).items()}
        creators: dict[str, Callable[[], Any]] = {
            "psycopg": lambda: psycopg.AsyncConnection.connect(dsn),
            "asyncpg": lambda: asyncpg.connect(**parts),
        }
        engine = create_async_engine(f"postgresql+{driver}://", async_creator=creators[driver], **options)
        stack.push_async_callback(engine.dispose)
        if class_name == "AsyncConnection":
            return SqlAlchemyCaller(await engine.connect(), None)
        session = async_scoped_session(async_sessionmaker(engine), scopefunc=lambda: None)
        return SqlAlchemyCaller(session() if class_name == "AsyncSession" else session, None)
    connect = psycopg.connect if driver == "psycopg" else psycopg2.connect
    blocking = sqlalchemy.create_engine(f"postgresql+{driver}://", creator=lambda: connect(dsn), **options)
    stack.callback(blocking.dispose)
    makers: dict[str, Callable[[], Any]] = {
        "Connection": blocking.connect,
        "Session": lambda: Session(blocking),
        "scoped_session": lambda: scoped_session(sessionmaker(blocking)),
    }
    return SqlAlchemyCaller(makers[class_name](), executor)


def _configure_django(dsn: str) -> None:
    """Let Django's default connection lead to this database, in threads that have not used it yet."""
    parts = conninfo_to_dict(dsn)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        **{name.upper(): str(parts.get(name, "")) for name in ("user", "password", "host", "port")},
        "NAME": str(parts["dbname"]),
    }
    if not settings.configured:
        settings.configure(DATABASES={"default": database})
        django.setup()
    connections.settings["default"].update(database)
