"""Runs a `Call` on a connection of the bus's pool.

A connection is held for one statement, or one transaction of the library's own statements; asking for a second one
meanwhile raises at once, where it would sooner or later wait for itself (20 threads on a pool of 10: 2 calls done, 38
timeouts).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import select
import socket
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import tuple_row
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout

from commandbus import _calls
from commandbus._calls import Call, Row
from commandbus._connections import Steps, drive, execute_async
from commandbus._failures import brief, is_connection_lost, is_unavailable, unavailable
from commandbus.errors import ClosedError, CommandBusError, ConfigurationError, DatabaseUnavailableError

T = TypeVar("T")

logger = logging.getLogger("commandbus.database")

CALL_SECONDS = 10.0
"""The deadline of one statement of the library's own, and of getting a connection for it; read at each call."""

_RECONNECT_SECONDS = 1.0

_OPTIONS = " ".join(
    f"-c {name}={value}"
    for name, value in {
        # What the functions and psycopg count on, whatever the defaults of the database are.
        "default_transaction_isolation": r"read\ committed",
        "datestyle": "ISO",
        # A client that froze with an answer under way keeps its transaction, and its locks, until the server notices.
        "tcp_user_timeout": 10_000,
        "tcp_keepalives_idle": 30,
        "tcp_keepalives_interval": 10,
        "tcp_keepalives_count": 3,
    }.items()
)
_DEFAULTS = {
    "connect_timeout": "10",
    "client_encoding": "UTF8",
    # A peer that vanished with data under way: noticed after 4.2 s with 4000, never by keepalives alone.
    "tcp_user_timeout": "10000",
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
}

_REFUSED_OPTIONS = "unsupported startup parameter"  # PgBouncer's words
_HOW_TO_POOL = "open the bus with transaction_pooler=True, or set COMMAND_BUS_TRANSACTION_POOLER=1"

_holding: ContextVar[bool] = ContextVar("commandbus_holding_a_connection", default=False)


class DeadlineError(psycopg.OperationalError):
    """A call was severed at its deadline: like any whose connection broke, it may or may not have happened."""


class Database:
    """A pool of connections to one database, and the ways to run a call on them."""

    def __init__(
        self,
        dsn: str | None,
        *,
        connections: int,
        application_name: str,
        transaction_pooler: bool = False,
        for_user_code: bool = False,
    ) -> None:
        self.transaction_pooler = transaction_pooler
        self._conninfo = conninfo(dsn, application_name)
        self._application_name = application_name
        self._for_user_code = for_user_code
        self._pool: AsyncConnectionPool[psycopg.AsyncConnection[Row]] = AsyncConnectionPool(
            self._conninfo,
            kwargs=self._settings,
            min_size=1,
            max_size=connections,
            open=False,
            # An attempt belongs to a call, not to a back-off of the pool's: after an outage of a minute that would
            # wait half a minute more.
            reconnect_timeout=_RECONNECT_SECONDS,
            # Behind a pooler it would meet another session than the one that the handler had.
            reset=_reset if for_user_code and not transaction_pooler else None,
        )

    @property
    def _settings(self) -> dict[str, Any]:
        if self.transaction_pooler:
            # It gives each transaction another session, which does not know the statement: 80 of 480 calls failed.
            # Nor does it take options.
            return {"autocommit": True, "prepare_threshold": None}
        given = conninfo_to_dict(self._conninfo).get("options") or ""
        threshold = 5 if self._for_user_code else 0  # psycopg's own default, and ours: we say the same few things
        return {"autocommit": True, "prepare_threshold": threshold, "options": f"{given} {_OPTIONS}".strip()}

    def for_user_code(self, connections: int) -> Database:
        """Return another pool to the same database, not open yet, whose connections handlers may hold.

        While they do they may use the bus; what they leave behind in the session is reset, but not behind a pooler.
        """
        return Database(
            self._conninfo,
            connections=connections,
            application_name=self._application_name,
            transaction_pooler=self.transaction_pooler,
            for_user_code=True,
        )

    async def open(self) -> None:
        """Open the pool. Raises `DatabaseUnavailableError` that says why there is no connection.

        Raises `ConfigurationError` if the sessions that the DSN leads to are not what the library counts on. One for
        user code opens without a look: the bus whose DSN it has did look, and who waits for a connection can wait.
        """
        if not self._for_user_code:
            try:
                async with await self.connect() as connection:  # the pool would try for long, and not say what is wrong
                    await self._check_sessions(connection)
            except psycopg.OperationalError as error:
                if _REFUSED_OPTIONS in str(error) and not self.transaction_pooler:
                    raise ConfigurationError(f"a pooler refuses the options of this bus: {_HOW_TO_POOL}") from None
                raise unavailable(error) from None
        await self._pool.open()

    async def _check_sessions(self, connection: psycopg.AsyncConnection[Row]) -> None:
        """See what stands between this connection and the server, and whether our settings came through."""
        connection.prepare_threshold = None  # behind a pooler the statement would stay in somebody's session
        session = await execute(connection, _calls.session())
        if session.isolation != "read committed" or not session.datestyle.startswith("ISO"):
            raise ConfigurationError(
                f"behind this pooler sessions begin with default_transaction_isolation {session.isolation} and "
                f"DateStyle {session.datestyle}: ALTER ROLE ... SET them to 'read committed' and 'ISO'"
            )
        if self.transaction_pooler or session.pid == connection.info.backend_pid:
            return
        # A pooler: it makes up a number of its own. It works in transactions if two clients have the same session;
        # one that is idle hands out the session used last, so that a busy one only may go unnoticed.
        async with await self.connect() as other:
            other.prepare_threshold = None
            if (await execute(other, _calls.session())).pid == session.pid:
                raise ConfigurationError(f"a pooler in transaction mode is in the way: {_HOW_TO_POOL}")
        logger.warning("a pooler is in the way, in session mode as it seems; if not: %s", _HOW_TO_POOL)

    async def close(self) -> None:
        """Close the pool; connections in use are closed when they come back."""
        await self._pool.close()

    @contextlib.asynccontextmanager
    async def connection(self, timeout: float | None = None) -> AsyncIterator[psycopg.AsyncConnection[Row]]:
        """Lend a connection of the pool for one statement or one transaction of the library's own.

        Raises `DatabaseUnavailableError` if none can be had.
        """
        if _holding.get() and not self._for_user_code:
            raise RuntimeError("commandbus holds a connection already in this context: a second could wait for it")
        connection = await self._acquire(_seconds(timeout))
        token = _holding.set(not self._for_user_code)
        try:
            yield connection
        except psycopg.errors.ReadOnlySqlTransaction:
            # A standby, or a primary that is being handed over. Kept, it would fail every write for ever, when behind
            # the same address there is a primary long since.
            await connection.close()
            raise
        finally:
            _holding.reset(token)
            await asyncio.shield(self._pool.putconn(connection))  # cancelled on its way back it would be lost for good

    async def _acquire(self, timeout: float) -> psycopg.AsyncConnection[Row]:
        """Get a connection, asking anew each second: the pool connects when it is asked, not while somebody waits.

        After a restart of the server every connection in the pool is dead; those that show it are thrown away here,
        where otherwise each would cost a call and its back-off.
        """
        end = asyncio.get_running_loop().time() + timeout
        task, dead = asyncio.current_task(), 0
        cancels = 0 if task is None else task.cancelling()
        while True:
            try:
                connection = await self._pool.getconn(_RECONNECT_SECONDS)
            except PoolClosed:
                raise ClosedError("the bus is closed") from None
            except PoolTimeout:
                if asyncio.get_running_loop().time() >= end:
                    raise DatabaseUnavailableError(f"no connection to PostgreSQL within {timeout:.0f} s") from None
                continue
            if task is not None and task.cancelling() > cancels:  # Python 3.11's wait_for, in the pool, may swallow it
                await asyncio.shield(self._pool.putconn(connection))
                raise asyncio.CancelledError
            if dead >= self._pool.max_size or not hung_up(connection):
                return connection
            dead += 1
            await connection.close()
            await self._pool.putconn(connection)

    async def run(self, call: Call[T], timeout: float | None = None, *, long: bool = False) -> T:
        """Run a call once on a pooled connection. See `execute` for what it raises, `execute_long` for a `long` one.

        But `DatabaseUnavailableError` when PostgreSQL could not do it and has left nothing of it: no room, no time.
        """
        try:
            return await self._run(call, _seconds(timeout), long=long)
        except psycopg.Error as error:
            if is_connection_lost(error) or not is_unavailable(error):
                raise
            raise DatabaseUnavailableError(f"PostgreSQL cannot do it now, nothing was done: {brief(error)}") from None

    async def _run(self, call: Call[T], timeout: float, *, long: bool) -> T:
        async with self.connection(None if long else timeout) as connection:
            return await _cancellable(connection, (execute_long if long else execute)(connection, call, timeout))

    async def run_steps(self, steps: Steps[T]) -> T:
        """Take these steps in one transaction on a pooled connection. The whole may take long, each has its deadline.

        Raises what `execute` raises.
        """
        async with self.connection() as connection, transaction(connection):
            return await drive(steps, lambda call: _cancellable(connection, execute(connection, call)))

    async def repeat(self, call: Call[T], timeout: float | None = None, *, long: bool = False) -> T:
        """Run a call that may run twice, such as a reading one; again when a connection turns out to be dead.

        Not when it was too slow: what is severed goes on in the server, and would have company.
        """
        for _ in range(self._pool.max_size):
            try:
                return await self.run(call, timeout, long=long)
            except DeadlineError as error:
                raise DatabaseUnavailableError(str(error)) from None
            except psycopg.Error as error:
                if not is_connection_lost(error):
                    raise
        raise DatabaseUnavailableError("the connections to PostgreSQL keep breaking")

    async def connect(self) -> psycopg.AsyncConnection[Row]:
        """Open a connection outside the pool, for a task that keeps one."""
        return await psycopg.AsyncConnection.connect(self._conninfo, row_factory=tuple_row, **self._settings)

    def connect_blocking(self) -> psycopg.Connection[Row]:
        """Open a blocking connection outside the pool. Raises `DatabaseUnavailableError`."""
        try:
            return psycopg.connect(self._conninfo, row_factory=tuple_row, **self._settings)
        except psycopg.OperationalError as error:
            raise unavailable(error) from None


def _seconds(timeout: float | None) -> float:
    return CALL_SECONDS if timeout is None else timeout


async def _cancellable(connection: psycopg.AsyncConnection[Any], running: Coroutine[Any, Any, T]) -> T:
    """Await a statement. Cancelling shuts the socket.

    psycopg alone would ask the server to cancel, and on a frozen connection wait 10 s more for its answer.
    """
    statement = asyncio.ensure_future(running)
    try:
        return await asyncio.shield(statement)
    except asyncio.CancelledError:
        sever(connection)
        await asyncio.gather(statement, return_exceptions=True)
        raise


async def execute(connection: psycopg.AsyncConnection[Any], call: Call[T], timeout: float | None = None) -> T:
    """Run a call on this connection of the library's own; at the deadline (seconds) its socket is shut.

    Raises the library's errors for its SQLSTATEs, else what psycopg raises.
    """
    with severed_after(_seconds(timeout), connection):
        return await execute_async(connection, call)


async def execute_long(connection: psycopg.AsyncConnection[Any], call: Call[T], timeout: float) -> T:
    """Run a call that may take long; at the deadline the server ends it, so that nothing of it goes on there.

    Raises `CommandBusError` then, and nothing was written.
    """
    try:
        with severed_after(timeout + CALL_SECONDS, connection):
            async with connection.transaction():
                await execute_async(connection, _calls.stop_after(timeout))
                return await execute_async(connection, call)
    except psycopg.errors.QueryCanceled:
        raise CommandBusError(
            f"PostgreSQL stopped the call: it took longer than {timeout:g} s, or an administrator cancelled it. "
            "Nothing was written; try again with more time, or when the database is less busy"
        ) from None


@contextlib.asynccontextmanager
async def transaction(connection: psycopg.AsyncConnection[Any]) -> AsyncIterator[None]:
    """A transaction around the block. Its beginning and its end have a deadline; the block has not."""
    block = connection.transaction()
    with severed_after(CALL_SECONDS, connection):
        await block.__aenter__()
    try:
        yield
    except BaseException as error:
        with severed_after(CALL_SECONDS, connection):
            if not await block.__aexit__(type(error), error, error.__traceback__):
                raise
    else:
        with severed_after(CALL_SECONDS, connection):
            await block.__aexit__(None, None, None)


@contextlib.contextmanager
def severed_after(timeout: float, connection: psycopg.AsyncConnection[Any]) -> Iterator[None]:
    """Give what is done on the connection in the block so many seconds. Raises `DeadlineError`."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout
    timer = loop.call_at(end, sever, connection)
    try:
        yield
    except psycopg.Error as error:
        if loop.time() >= end and is_connection_lost(error):
            raise DeadlineError(f"PostgreSQL did not answer within {timeout:g} s") from None
        raise
    finally:
        timer.cancel()


_RESET = "RESET SESSION AUTHORIZATION; RESET ALL; SELECT pg_advisory_unlock_all()"


async def _reset(connection: psycopg.AsyncConnection[Any]) -> None:
    with severed_after(CALL_SECONDS, connection):
        await connection.execute(_RESET, prepare=False)


def reset_blocking(connection: psycopg.Connection[Any]) -> None:
    """Undo what a handler has left behind in the session."""
    connection.execute(_RESET, prepare=False)


def hung_up(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Whether it is closed, or the server says something though nothing was asked: in general, that it is going."""
    if connection.closed:
        return True
    if not hasattr(select, "poll"):  # Windows
        return bool(select.select([connection.fileno()], [], [], 0)[0])
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def sever(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Shut the connection's socket, so that whoever waits on it fails now."""
    with (
        contextlib.suppress(psycopg.Error, OSError),
        socket.socket(fileno=os.dup(connection.fileno())) as twin,
    ):
        twin.shutdown(socket.SHUT_RDWR)


def pooled_by_default() -> bool:
    """Return whether `$COMMAND_BUS_TRANSACTION_POOLER` says that the DSN leads to a pooler in transaction mode."""
    text = os.environ.get("COMMAND_BUS_TRANSACTION_POOLER", "0")
    if text not in {"0", "1"}:
        raise ConfigurationError(f"COMMAND_BUS_TRANSACTION_POOLER is {text!r}: it must be 0 or 1")
    return text == "1"


def conninfo(dsn: str | None, application_name: str) -> str:
    """Return the DSN, by default `$COMMAND_BUS_DSN`, with our defaults for what it leaves open.

    Raises `ConfigurationError`, which does not quote it: it may hold a password.
    """
    dsn = dsn or os.environ.get("COMMAND_BUS_DSN")
    if not dsn:
        raise ConfigurationError("no DSN: set COMMAND_BUS_DSN, or give one")
    try:
        given = {key: str(value) for key, value in conninfo_to_dict(dsn).items()}
        int(float(given.get("connect_timeout", "0")))  # as psycopg will, which does not say it is the DSN
    except (psycopg.ProgrammingError, ValueError, OverflowError):
        raise ConfigurationError("the DSN is not a PostgreSQL connection string") from None
    # libpq cuts a URI at the first of these, and would call the rest of the password a host, a port or a database.
    cut = any("@" in given.get(part, "") for part in ("host", "port", "dbname"))
    if cut or not re.fullmatch(r"[0-9,]*", given.get("port", "")):
        raise ConfigurationError("the DSN cannot be right: write % @ / in a password as %25 %40 %2F")
    return make_conninfo("", **(_DEFAULTS | {"application_name": application_name} | given))
