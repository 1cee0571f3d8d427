"""A handler's writes and its completion in one transaction: what is said to the database, for both colours.

Each protocol is a generator without I/O. It yields the calls to execute, `RUN` where the handler is to be called, and
`PAUSE` where another try should wait; `drive` and `drive_blocking` execute them on an async or a blocking connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from enum import Enum
from functools import partial
from typing import Any, TypeAlias, TypeVar

import psycopg

from commandbus import _calls
from commandbus._calls import Call
from commandbus._database import Database, execute_on, execute_on_blocking, reset_blocking
from commandbus._failures import is_refusal
from commandbus.errors import LeaseLostError, PermanentCommandError, TransientCommandError
from commandbus.model import Json
from commandbus.worker.endings import completed, unstorable
from commandbus.worker.leases import Lease


class Step(Enum):
    """What a protocol wants besides a call."""

    RUN = "call the handler; its result comes back"
    PAUSE = "wait a moment"


RUN, PAUSE = Step.RUN, Step.PAUSE
T = TypeVar("T")
Protocol: TypeAlias = Generator[Call[Any] | Step, Any, T]

_BUSY_TRIES = 40
_BUSY_PAUSE = 0.05  # seconds


def handle(lease: Lease) -> Protocol[None]:
    """Run the handler, and complete its command as the last statement of the open transaction.

    The completion comes last, so that its row locks are held for one commit only.
    """
    before = yield _calls.transaction()
    result = yield RUN
    if before != (yield _calls.transaction(last=True)):
        raise PermanentCommandError(
            "TRANSACTION_ENDED", "the handler ended the transaction by itself: what it wrote may be committed"
        )
    yield from complete(lease, result)


def complete(lease: Lease, result: Json) -> Protocol[None]:
    """Complete the lease's command in the open transaction. Raises `LeaseLostError`: the caller has to roll back."""
    item = lease.item(f',"result":{completed(result).result}')
    lease.completing = True
    for _ in range(_BUSY_TRIES):
        if lease.cancelled:
            break
        try:
            answers = yield _calls.complete(lease.claimed.domain, [item])
        except psycopg.Error as error:
            if not is_refusal(error):
                raise
            raise unstorable(error) from None
        match answers[lease.claimed.command_id]:
            case "done":
                return
            case "lost":
                break
        yield PAUSE
    else:
        raise TransientCommandError("BUSY", "the command's row stayed locked by somebody else")
    raise LeaseLostError(f"command {lease.claimed.command_id}: the lease is lost; roll back what belongs to it")


async def drive(
    protocol: Protocol[T],
    run: Callable[[Call[Any]], Awaitable[Any]],
    handler: Callable[[], Awaitable[Json]] | None = None,
) -> T:
    """Execute a protocol, awaiting its calls."""
    outcome: Any = None
    failure: BaseException | None = None
    try:
        while True:
            wanted = protocol.send(outcome) if failure is None else protocol.throw(failure)
            outcome = failure = None
            try:
                if isinstance(wanted, Call):
                    outcome = await run(wanted)
                elif wanted is RUN and handler is not None:
                    outcome = await handler()
                else:
                    await asyncio.sleep(_BUSY_PAUSE)
            except BaseException as error:  # noqa: BLE001 - the protocol decides
                failure = error
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def drive_blocking(
    protocol: Protocol[T], run: Callable[[Call[Any]], Any], handler: Callable[[], Json] | None = None
) -> T:
    """Execute a protocol in this thread."""
    outcome: Any = None
    failure: BaseException | None = None
    try:
        while True:
            wanted = protocol.send(outcome) if failure is None else protocol.throw(failure)
            outcome = failure = None
            try:
                if isinstance(wanted, Call):
                    outcome = run(wanted)
                elif wanted is RUN and handler is not None:
                    outcome = handler()
                else:
                    time.sleep(_BUSY_PAUSE)
            except BaseException as error:  # noqa: BLE001 - the protocol decides
                failure = error
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def complete_on(lease: Lease, connection: object, result: Json) -> None:
    """Complete the lease's command in the caller's transaction; see `HandlerContext.complete_on`."""
    await drive(complete(lease, result), partial(execute_on, connection))


def complete_on_blocking(lease: Lease, connection: object, result: Json) -> None:
    """The same, in this thread."""
    drive_blocking(complete(lease, result), partial(execute_on_blocking, connection))


class BlockingConnections:
    """Connections for transactional `def` handlers, kept for the next one. The worker bounds how many run.

    Not psycopg's blocking pool: it has threads of its own, which cannot be started when the interpreter exits.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._idle: list[psycopg.Connection[Any]] = []
        self._closed = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[psycopg.Connection[Any]]:
        """Lend a connection inside a transaction, which ends as the block does."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is None or connection.closed:
            connection = self._database.connect_blocking()
        try:
            with connection.transaction():
                yield connection
            reset_blocking(connection)
        except BaseException:
            connection.close()  # a failed handler's session is not worth an effort
            raise
        with self._lock:
            if not self._closed:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close what is idle; what is in use is closed when it comes back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
