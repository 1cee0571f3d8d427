"""A handler's writes and its completion in one transaction: what is said to the database, for both colours."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import psycopg

from commandbus import _calls, _database
from commandbus._connections import Steps, Work, arun_on, run_on
from commandbus._database import Database, hung_up, reset_blocking, sever
from commandbus._failures import is_refusal
from commandbus.errors import DatabaseUnavailableError, LeaseLostError, PermanentCommandError, TransientCommandError
from commandbus.model import Json
from commandbus.worker.endings import Completed, Failed, completed, failed, unstorable
from commandbus.worker.leases import Lease

RUN: Final = object()
"""What the steps of `handle` yield where the handler is to be called; its result is the answer."""

_BUSY_TRIES, _BUSY_PAUSE = 40, 0.05  # seconds
_CONNECT_PAUSE = 1.0


def handle(lease: Lease, ending: Callable[[Json, Lease], Completed]) -> Steps[None]:
    """Run the handler, and complete its command as the last statement of the open transaction.

    The completion comes last, so that its row locks are held for one commit only.
    """
    before = yield _calls.transaction()
    if lease.cancelled:  # lost or given up while a connection was waited for
        lease.completing = True
        raise LeaseLostError(f"command {lease.claimed.command_id}: the lease is lost; its handler has not begun")
    lease.charged = True
    try:
        result = yield RUN
    except psycopg.Rollback:  # psycopg would swallow it at the end of the transaction
        raise TransientCommandError("ROLLED_BACK", "the handler rolled back its transaction") from None
    if before != (yield _calls.transaction(last=True)):
        raise PermanentCommandError(
            "TRANSACTION_ENDED", "the handler ended the transaction by itself: what it wrote may be committed"
        )
    lease.charged = False
    yield from complete(lease, ending(result, lease))
    lease.charged = True  # with what its constraints say to the commit


def complete(lease: Lease, ending: Completed) -> Steps[None]:
    """Complete the lease's command in the open transaction. Raises `LeaseLostError`: the caller has to roll back."""
    item = lease.item(f',"result":{ending.result}')
    lease.completing = True
    for _ in range(_BUSY_TRIES):
        if lease.cancelled:
            break
        try:
            answers = yield _calls.complete(lease.claimed.domain, [item])
        except Exception as error:
            if not is_refusal(error):
                raise
            lease.completing = False
            raise unstorable(error) from None
        match answers[lease.claimed.command_id]:
            case "done":
                return
            case "lost":
                break
        yield _calls.pause(_BUSY_PAUSE)
    else:
        raise TransientCommandError("BUSY", "the command's row stayed locked by somebody else")
    raise LeaseLostError(f"command {lease.claimed.command_id}: the lease is lost; roll back what belongs to it")


async def complete_on(lease: Lease, connection: object, result: Json) -> None:
    """Complete the lease's command in the caller's transaction; see `HandlerContext.complete_on`."""
    await arun_on(connection, _completing(lease, result))


def complete_on_blocking(lease: Lease, connection: object, result: Json) -> None:
    """The same, in this thread."""
    run_on(connection, _completing(lease, result))


def rolled_back(lease: Lease) -> Failed:
    """Return the ending of a handler that has completed its command in a transaction of its own.

    If that was committed, the fence takes this for a repeated call, and nothing is written.
    """
    error = TransientCommandError("ROLLED_BACK", "the handler rolled back the transaction with the completion in it")
    return failed(error, lease.handler, lease.claimed.attempts + 1)


def _completing(lease: Lease, result: Json) -> Work[None]:
    return Work(complete(lease, completed(result)))


def _sever_unless(over: threading.Event, connection: psycopg.Connection[Any]) -> None:
    if not over.is_set():
        sever(connection)


class BlockingConnections:
    """Connections for transactional `def` handlers, kept for the next one. The worker bounds how many run.

    Not psycopg's blocking pool: it has threads of its own, which cannot be started when the interpreter exits.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._loop = asyncio.get_running_loop()
        self._idle: list[psycopg.Connection[Any]] = []
        self._closed = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def transaction(self, wait: Callable[[float], bool]) -> Iterator[psycopg.Connection[Any]]:
        """Lend a connection inside a transaction, which ends as the block does.

        While there is none, `wait` is called with seconds; when it returns true, `DatabaseUnavailableError` is raised.
        """
        connection = self._connection(wait)
        try:
            with self._around(connection):
                yield connection
            if not self._database.transaction_pooler:  # behind one it would meet another session
                with self.deadline(connection):
                    reset_blocking(connection)
        except BaseException:
            connection.close()  # a failed handler's session is not worth an effort
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    @contextlib.contextmanager
    def _around(self, connection: psycopg.Connection[Any]) -> Iterator[None]:
        """A transaction around the block. Its beginning and its end have a deadline; the block has not."""
        block = connection.transaction()
        with self.deadline(connection):
            block.__enter__()
        try:
            yield
        except BaseException as error:
            with self.deadline(connection):
                if not block.__exit__(type(error), error, error.__traceback__):
                    raise
        else:
            with self.deadline(connection):
                block.__exit__(None, None, None)

    @contextlib.contextmanager
    def deadline(self, connection: psycopg.Connection[Any]) -> Iterator[None]:
        """Sever the connection when the block takes too long: psycopg would wait for its answer without end.

        The worker's loop keeps the time; a thread for it could not be started at exit.
        """
        timers: list[asyncio.TimerHandle] = []
        over = threading.Event()  # the loop may be late with the timer, and the connection somebody else's by then
        expire, seconds = partial(_sever_unless, over, connection), _database.CALL_SECONDS
        self._on_loop(lambda: timers.append(self._loop.call_later(seconds, expire)))
        try:
            yield
        finally:
            over.set()
            self._on_loop(lambda: timers.pop().cancel())

    def _on_loop(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function)

    def _connection(self, wait: Callable[[float], bool]) -> psycopg.Connection[Any]:
        """Take one that is idle, else connect. After a restart of the server those that are idle are dead."""
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                try:
                    return self._database.connect_blocking()
                except DatabaseUnavailableError:
                    if wait(_CONNECT_PAUSE):
                        raise
            elif not hung_up(connection):
                return connection
            else:
                connection.close()

    def close(self) -> None:
        """Close what is idle; what is in use is closed when it comes back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
