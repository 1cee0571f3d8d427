"""A connection of the loop's that a thread may use, one statement at a time.

psycopg's blocking connections know no deadline, and its async ones belong to the loop; what both stand on,
`psycopg.pq`, belongs to nobody.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import select
import time
from collections.abc import Callable, Generator
from itertools import count
from typing import Any, TypeVar, cast

import psycopg
from psycopg import pq

from commandbus import _database
from commandbus._calls import Call, Row
from commandbus._database import severed_after

T = TypeVar("T")

_PREPARED = b"commandbus_loan"


class Loan:
    """The connection, for statements of one text; `finish` is called on the loop to give it back."""

    def __init__(self, connection: psycopg.AsyncConnection[Row], finish: Callable[[], object]) -> None:
        self.connection = connection
        self.finish = finish
        self.prepared = False
        self.in_use = False  # by a thread
        self.broken = False  # not to be used again
        self._running: Generator[bool, None, Any] | None = None
        self._end = 0.0
        self._poll = select.poll() if hasattr(select, "poll") else None  # not on Windows
        if self._poll is not None:
            self._poll.register(connection.fileno(), select.POLLIN)

    async def prepare(self, call: Call[Any]) -> None:
        """Let the session know the statement, on the loop. Raises what psycopg raises."""
        self.connection.pgconn.send_prepare(_PREPARED, _numbered(call.sql))
        await self._drive(_answer(self.connection.pgconn), _database.CALL_SECONDS)
        self.prepared = True

    def execute(self, call: Call[T], timeout: float) -> T:
        """Run the call in this thread. Raises what psycopg raises.

        After `TimeoutError`, and after an exception from outside such as Ctrl-C, it still runs: see `complete`.
        """
        self._running = running = self._exchange(call)
        self._end = (began := time.monotonic()) + _database.CALL_SECONDS
        end = min(self._end, began + timeout)
        while True:
            try:
                write = next(running)
            except StopIteration as answer:
                return cast("T", answer.value)
            if not self._ready(end - time.monotonic(), write=write):
                raise TimeoutError

    async def complete(self) -> Any:  # noqa: ANN401 - what `execute` would have returned
        """Go on, on the loop, with the call that a thread has left. Raises what psycopg raises, and `DeadlineError`.

        Returns None if the answer was lost: the exception from outside came just when it was read.
        """
        seconds = max(0.0, self._end - time.monotonic())
        if self._running is None or inspect.getgeneratorstate(self._running) == inspect.GEN_CLOSED:
            await self._drive(_last_result(self.connection.pgconn), seconds)
            return None
        return await self._drive(self._running, seconds)

    async def _drive(self, running: Generator[bool, None, T], seconds: float) -> T:
        with severed_after(seconds, self.connection):
            while True:
                try:
                    write = next(running)
                except StopIteration as answer:
                    return cast("T", answer.value)
                await _readiness(self.connection.fileno(), write=write)

    def _exchange(self, call: Call[T]) -> Generator[bool, None, T]:
        """Run the call, without waiting: yields, until the socket can be read, or True, written."""
        pgconn = self.connection.pgconn
        params = [None if param is None else str(param).encode() for param in call.params]
        if self.prepared:
            pgconn.send_query_prepared(_PREPARED, params)
        else:
            pgconn.send_query_params(_numbered(call.sql), params)
        return call.read(_rows((yield from _answer(pgconn))))

    def _ready(self, seconds: float, *, write: bool) -> bool:
        """Wait until the socket has something to read, or room to write if that is asked."""
        seconds = max(0.0, seconds)
        if self._poll is None:
            descriptor = self.connection.fileno()
            return any(select.select([descriptor], [descriptor] if write else [], [], seconds))
        if write:
            self._poll.modify(self.connection.fileno(), select.POLLIN | select.POLLOUT)
        ready = self._poll.poll(seconds * 1000)
        if write:
            self._poll.modify(self.connection.fileno(), select.POLLIN)
        return bool(ready)


async def _readiness(descriptor: int, *, write: bool) -> None:
    """Do on the loop what `Loan._ready` does in a thread."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    if write:
        loop.add_writer(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)
        loop.remove_writer(descriptor)


def _answer(pgconn: pq.abc.PGconn) -> Generator[bool, None, pq.abc.PGresult]:
    """Return the result of what was sent, once the session is ready for more."""
    found = yield from _last_result(pgconn)
    if found is None:
        raise psycopg.OperationalError("the connection to PostgreSQL broke")
    if found.status not in {pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK}:
        raise _error(found)
    return found


def _last_result(pgconn: pq.abc.PGconn) -> Generator[bool, None, pq.abc.PGresult | None]:
    found = None
    while True:
        while (unsent := pgconn.flush()) or pgconn.is_busy():
            yield bool(unsent)
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            return found
        found = result


def _numbered(sql: str) -> bytes:
    """Return psycopg's placeholders as PostgreSQL's own."""
    numbers = count(1)
    return re.sub("%s", lambda _: f"${next(numbers)}", sql).encode()


def _rows(result: pq.abc.PGresult) -> list[Row]:
    def value(row: int, column: int) -> Any:  # noqa: ANN401 - of a row
        found = result.get_value(row, column)
        return None if found is None else found.decode()

    return [tuple(value(row, column) for column in range(result.nfields)) for row in range(result.ntuples)]


def _error(result: pq.abc.PGresult) -> psycopg.Error:
    """Return the error that PostgreSQL reports, of the class that psycopg has for it."""
    state = (result.error_field(pq.DiagnosticField.SQLSTATE) or b"").decode()
    message = (result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b"").decode(errors="replace")
    try:
        known: type[psycopg.Error] = psycopg.errors.lookup(state)
    except KeyError:
        known = psycopg.DatabaseError
    return known(message or "the connection to PostgreSQL broke")
