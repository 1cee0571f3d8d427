"""Runs calls on a connection of the caller's, in the caller's transaction: psycopg's, SQLAlchemy's or Django's.

What is to be done is `Work`, around a generator without I/O: it yields calls, gets their answers, and returns a result.
`run_on` does it in the calling thread and needs no event loop; `arun_on` awaits it where the connection is async.

SQLAlchemy and Django are known by their shape and never imported: who has such a connection has imported them.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import re
import sys
import warnings
from collections.abc import Awaitable, Callable, Collection, Generator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from commandbus._calls import Call, Row
from commandbus._failures import translated
from commandbus.errors import ConfigurationError

T = TypeVar("T")
Steps: TypeAlias = Generator[Any, Any, T]
Wake: TypeAlias = Callable[[Collection[str]], None]
"""Wakes the workers of these domains; from any thread, without waiting, without raising."""


class Own(Protocol):
    """A connection of the caller's, of either colour."""

    @property
    def kind(self) -> str:
        """Whose it is."""

    def autocommit(self) -> bool:
        """Whether what is executed now commits by itself."""

    def after_commit(self, wake: Wake, domains: Collection[str]) -> None:
        """Call `wake` once when the open transaction commits, if somebody tells us of that."""


class Blocking(Own, Protocol):
    """One that is used in the thread that has it."""

    def execute(self, call: Call[T]) -> T:
        """Run a call. Raises the library's errors for its SQLSTATEs, else what the driver or its wrapper raises."""


@dataclass(frozen=True, slots=True)
class Work(Generic[T]):
    """Steps to take on a connection of the caller's, and whose workers to wake once they are durable.

    `all_or_none`: when a step fails, the caller's transaction is as it was before the first.
    """

    steps: Steps[T]
    wake: Wake = lambda _: None
    domains: frozenset[str] = frozenset()
    all_or_none: bool = False

    def on(self, own: Own) -> Steps[T]:
        """Return the steps as they are taken on this connection."""
        autocommit = own.autocommit()
        if autocommit:
            _warn_of_autocommit(own.kind)
        result = yield from (_all_or_none(self.steps, autocommit=autocommit) if self.all_or_none else self.steps)
        if autocommit:
            self.wake(self.domains)
        else:
            own.after_commit(self.wake, self.domains)
        return result


def run_on(connection: object, work: Work[T]) -> T:
    """Do it on a blocking connection, in this thread. Raises `ConfigurationError` for an async one."""
    own = adopt(connection)
    return drive_blocking(work.on(own), own.execute)


async def arun_on(connection: Any, work: Work[T]) -> T:  # noqa: ANN401 - whatever the caller has
    """Do it on a connection of either colour; a blocking one holds up the event loop for the time."""
    connection = _unscoped(connection)
    if isinstance(connection, psycopg.AsyncConnection):
        # One after the other: a batch that is taken back to its savepoint would take what came between with it.
        async with _turns.setdefault(connection, asyncio.Lock()):
            return await drive(work.on(_Psycopg(connection)), lambda call: execute_async(connection, call))
    if _is_async(connection):  # SQLAlchemy's, which lends its blocking twin and awaits where that would block
        done: T = await connection.run_sync(run_on, work)
        return done
    return run_on(connection, work)


_turns: WeakKeyDictionary[Any, asyncio.Lock] = WeakKeyDictionary()
"""Whose turn it is on these async connections."""


def drive_blocking(steps: Steps[T], perform: Callable[[Any], Any]) -> T:
    """Take the steps in this thread, performing what they yield."""
    try:
        wanted = next(steps)
        while True:
            try:
                answer = perform(wanted)
            except BaseException as error:  # noqa: BLE001 - the steps decide
                wanted = steps.throw(error)
            else:
                wanted = steps.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def drive(steps: Steps[T], perform: Callable[[Any], Awaitable[Any]]) -> T:
    """Take the steps, awaiting what they yield."""
    try:
        wanted = next(steps)
        while True:
            try:
                answer = await perform(wanted)
            except BaseException as error:  # noqa: BLE001 - the steps decide
                wanted = steps.throw(error)
            else:
                wanted = steps.send(answer)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def _all_or_none(steps: Steps[T], *, autocommit: bool) -> Steps[T]:
    """Put a savepoint around the steps; where no transaction is open, one of their own.

    As plain statements, which do the same through every driver and leave no trace in a wrapper's state: SQLAlchemy's
    Session would flush, and psycopg's `transaction()` commits when it is the first thing on a connection.
    """
    begin, keep, *undo = (
        ("BEGIN", "COMMIT", "ROLLBACK")
        if autocommit
        else (
            "SAVEPOINT commandbus",
            "RELEASE SAVEPOINT commandbus",
            "ROLLBACK TO SAVEPOINT commandbus",
            "RELEASE SAVEPOINT commandbus",
        )
    )
    yield _statement(begin)
    try:
        result = yield from steps
    except BaseException:
        with contextlib.suppress(Exception):  # the connection is lost: what failed first says more
            for sql in undo:
                yield _statement(sql)
        raise
    yield _statement(keep)
    return result


def _statement(sql: str) -> Call[None]:
    return Call(sql, (), lambda _: None)


# -- what the caller may have ------------------------------------------------------------------------------------------


def _unscoped(given: Any) -> Any:  # noqa: ANN401 - whatever the caller has
    """Return the session of SQLAlchemy's scoped_session or async_scoped_session, anything else as it is."""
    scoped = hasattr(given, "session_factory") and hasattr(given, "registry")
    return given.registry() if scoped else given


def _is_async(given: object) -> bool:
    """Whether this is an async connection: of psycopg, or SQLAlchemy's AsyncConnection or AsyncSession."""
    return isinstance(given, psycopg.AsyncConnection) or (
        hasattr(given, "run_sync") and (hasattr(given, "get_bind") or hasattr(given, "exec_driver_sql"))
    )


def adopt(given: Any) -> Blocking:  # noqa: ANN401 - whatever the caller has
    """Return a blocking connection of the caller's as we use it. Raises `ConfigurationError` for anything else."""
    given = _unscoped(given)
    if isinstance(given, psycopg.Connection):
        return _BlockingPsycopg(given)
    if _is_async(given):
        raise ConfigurationError(
            f"connection is an async one ({type(given).__name__}): give a blocking one here, or send with CommandBus"
        )
    if hasattr(given, "get_bind") and hasattr(given, "connection"):  # a Session
        given = given.connection()  # that of its transaction, which it begins
    if hasattr(given, "exec_driver_sql") and hasattr(given, "dialect"):
        return _SqlAlchemy(given)
    if hasattr(given, "on_commit") and hasattr(given, "vendor"):
        return _Django(given)
    raise ConfigurationError(
        f"connection is a {type(given).__name__}: give a connection of psycopg, a Connection or Session of SQLAlchemy, "
        "each blocking or async, or a connection of Django"
    )


class _Psycopg:
    """psycopg's own, of either colour. Nobody tells of its commit."""

    kind = "psycopg"

    def __init__(self, connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection

    def autocommit(self) -> bool:
        idle = self._connection.info.transaction_status == TransactionStatus.IDLE
        return self._connection.autocommit and idle  # it may be in a block of `transaction()`

    def after_commit(self, wake: Wake, domains: Collection[str]) -> None:
        """Do nothing."""


class _BlockingPsycopg(_Psycopg):
    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        super().__init__(connection)
        self._blocking = connection

    def execute(self, call: Call[T]) -> T:
        with translated(), psycopg.Cursor(self._blocking, row_factory=tuple_row) as cursor:
            cursor.execute(call.sql.encode(), call.params)
            return call.read(cursor.fetchall() if _brings_rows(cursor, call) else [])


async def execute_async(connection: psycopg.AsyncConnection[Any], call: Call[T]) -> T:
    """Run a call on psycopg's async connection. Raises as `Blocking.execute` does."""
    with translated():
        async with psycopg.AsyncCursor(connection, row_factory=tuple_row) as cursor:
            await cursor.execute(call.sql.encode(), call.params)
            return call.read(await cursor.fetchall() if _brings_rows(cursor, call) else [])


def _brings_rows(cursor: psycopg.Cursor[Row] | psycopg.AsyncCursor[Row], call: Call[Any]) -> bool:
    if cursor.pgresult is None:  # in the caller's pipeline, where nothing has come back yet
        return call.sql.startswith("SELECT")
    return cursor.description is not None


class _SqlAlchemy:
    """A Connection of SQLAlchemy, over any driver for PostgreSQL."""

    kind = "SQLAlchemy"

    def __init__(self, connection: Any) -> None:  # noqa: ANN401 - never imported
        _check_postgresql(connection.dialect.name)
        self._connection = connection

    def autocommit(self) -> bool:
        return bool(getattr(self._connection.connection, "autocommit", False))  # the driver's, by its isolation level

    def execute(self, call: Call[T]) -> T:
        sql = call.sql
        if self._connection.dialect.paramstyle == "numeric_dollar":  # asyncpg
            numbers = itertools.count(1)
            sql = re.sub("%s", lambda _: f"${next(numbers)}", sql)
        with translated():
            result = self._connection.exec_driver_sql(sql, call.params or None)
            rows: list[Row] = [tuple(row) for row in result] if result.returns_rows else []
            return call.read(rows)

    def after_commit(self, wake: Wake, domains: Collection[str]) -> None:
        """Listen on the Connection, once for its life: a Session gets another for each of its transactions.

        A savepoint of the caller's that is rolled back leaves its domains in: they are woken in vain.
        """
        waiting = _waiting.get(self._connection)
        if waiting is None:
            waiting = _waiting[self._connection] = {}
            listen = sys.modules["sqlalchemy.event"].listen
            listen(self._connection, "commit", _has_committed)
            listen(self._connection, "rollback", _has_rolled_back)
        waiting.setdefault(wake, set()).update(domains)


_waiting: WeakKeyDictionary[Any, dict[Wake, set[str]]] = WeakKeyDictionary()
"""Who is to be woken when these Connections of SQLAlchemy commit."""


def _has_committed(connection: object) -> None:
    for wake, domains in _waiting[connection].items():
        wake(domains)
    _waiting[connection] = {}


def _has_rolled_back(connection: object) -> None:
    _waiting[connection] = {}


class _Django:
    """A DatabaseWrapper of Django, or `django.db.connection` that stands for one."""

    kind = "Django"

    def __init__(self, connection: Any) -> None:  # noqa: ANN401 - never imported
        _check_postgresql(connection.vendor)
        self._connection = connection

    def autocommit(self) -> bool:
        return bool(self._connection.get_autocommit())  # off inside `atomic()`

    def execute(self, call: Call[T]) -> T:
        with translated(), self._connection.cursor() as cursor:
            cursor.execute(call.sql, call.params or None)
            return call.read(cursor.fetchall() if cursor.description else [])

    def after_commit(self, wake: Wake, domains: Collection[str]) -> None:
        if self._connection.in_atomic_block:  # else autocommit was turned off by hand, and Django tells nobody
            self._connection.on_commit(lambda: wake(domains))


def _check_postgresql(name: str) -> None:
    if name != "postgresql":
        raise ConfigurationError(f"connection leads to {name}: commands are kept in PostgreSQL")


_warned: set[str] = set()


def _warn_of_autocommit(kind: str) -> None:
    """Warn once for each kind, at the line that called the library."""
    if kind in _warned:
        return
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("commandbus."):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        f"this {kind} connection is in autocommit, outside a transaction: what is sent on it is durable at once, and "
        "is not taken back with what you do next; open a transaction first, or send without `connection`",
        stacklevel=level,
    )
    _warned.add(kind)
