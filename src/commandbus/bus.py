"""The command bus: sends commands, reads them, cancels them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Self
from uuid import UUID

import psycopg

from commandbus import _calls, _desk_calls, _queries
from commandbus._calls import Outgoing
from commandbus._chunks import chunks, receipt, sending, settle
from commandbus._connections import Work, arun_on
from commandbus._database import Database, pooled_by_default
from commandbus._hints import Hints
from commandbus._ids import new_id
from commandbus._limits import MAX_BYTES
from commandbus._send_buffer import SendBuffer
from commandbus._waits import Patience, Waits
from commandbus.batches import Batches
from commandbus.errors import (
    ClosedError,
    CommandBusError,
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidCommandError,
    PartialSendError,
    PermissionDeniedError,
    SchemaError,
    WrongLoopError,
)
from commandbus.migrate import explain_mismatch
from commandbus.model import (
    Json,
    OnParked,
    Receipt,
    Reply,
    SendRequest,
)
from commandbus.reading import Reading, key_of
from commandbus.tracing import NoTracing, Tracing


class CommandBus(Reading, Batches):
    """Sends commands to a database and looks after them. Open it with `async with`, on one event loop.

    `dsn`: a libpq connection string or URI; default: `$COMMAND_BUS_DSN`, read now. `send_timeout`: how long a send may
    take before it is withdrawn. `flush_connections`: how many connections carry concurrent sends; a few commit as much
    as many would. A bus holds up to `flush_connections` + 2 connections, one more to listen once somebody waits, and a
    worker on it two more. `tracing`: carries the trace context from sender to handler, see `commandbus.tracing`.
    `transaction_pooler`: the DSN leads to a pooler in transaction mode, such as PgBouncer: no prepared statements and
    no LISTEN; default: `$COMMAND_BUS_TRANSACTION_POOLER` is 1.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        send_timeout: timedelta = timedelta(seconds=30),
        flush_connections: int = 4,
        tracing: Tracing | None = None,
        transaction_pooler: bool | None = None,
        application_name: str = "commandbus",
    ) -> None:
        if flush_connections < 1:
            raise ConfigurationError(f"flush_connections is {flush_connections}: it must be at least 1")
        if send_timeout <= timedelta(0):
            raise ConfigurationError("send_timeout must be above zero")
        self._fresh = partial(
            CommandBus,
            dsn,
            send_timeout=send_timeout,
            flush_connections=flush_connections,
            tracing=tracing,
            transaction_pooler=transaction_pooler,
            application_name=application_name,
        )
        self.tracing: Tracing = tracing or NoTracing()
        self._send_timeout = send_timeout.total_seconds()
        self._database = Database(
            dsn,
            connections=flush_connections + 2,
            application_name=application_name,
            transaction_pooler=pooled_by_default() if transaction_pooler is None else transaction_pooler,
        )
        self._hints = Hints(self._database)
        self._buffer = SendBuffer(self._database, self._hints, connections=flush_connections)
        self._waits = Waits(self._database)
        self.max_data_bytes = MAX_BYTES  # the most that a database can allow; `open` learns what this one does
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def open(self) -> None:
        """Connect and check the schema.

        Raises `DatabaseUnavailableError`, `SchemaError` that says what to run, or `PermissionDeniedError`.
        """
        if self._closed:
            raise ClosedError("this bus was closed: make a new one")
        if self._loop is not None:
            raise ConfigurationError("this bus is open already")
        self._loop = asyncio.get_running_loop()
        try:
            await self._database.open()
            await self._check_schema()
            await self._database.repeat(_calls.make_partitions())
            self.max_data_bytes = await self._database.repeat(_queries.max_data_bytes())
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let the sends that are under way end, then close the connections. Closing twice is allowed."""
        if self._loop is not None and not self._closed:
            self._closed = True
            try:
                await self._waits.close()
                await self._buffer.drain()
            finally:
                self._hints.close()
                await self._database.close()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def database(self) -> Database:
        """The connections of this bus, for the other parts of the library. Raises what `_check_open` does."""
        self._check_open()
        return self._database

    def _check_open(self) -> None:
        if self._loop is None or self._closed:
            raise ClosedError("the bus is not open: use `async with CommandBus(...) as bus`")
        if asyncio.get_running_loop() is not self._loop:
            raise WrongLoopError("this bus was opened on another event loop: open one for each loop")

    # -- sending -------------------------------------------------------------------------------------------------------

    async def send(
        self,
        domain: str,
        command_type: str,
        data: Json,
        *,
        command_id: UUID | None = None,
        correlation_id: str | None = None,
        reply_to: str | None = None,
        max_attempts: int | None = None,
        delay: timedelta | None = None,
        priority: int = 0,
        headers: Mapping[str, str] | None = None,
        connection: object = None,
    ) -> Receipt:
        """Send one command: `PENDING`, or `SCHEDULED` with a `delay` (at most ten years).

        Durable when this returns. With `connection`, the command is part of your transaction there and durable when
        that commits: a connection of psycopg, or a Connection or Session of SQLAlchemy, each async or blocking, or a
        connection of Django. Your commit wakes the workers, but psycopg does not tell of it: call `wake` after that.
        Concurrent sends without it share statements and commits.

        `data` is JSON, by default of at most 256 KiB. `command_id` makes the send idempotent: the same id with the same
        type and data again is a receipt with `duplicate=True`, with others a `CommandIdConflictError`. `max_attempts`
        goes before the handler's policy. `priority` is -100 to 100, higher first.

        Raises `InvalidCommandError`, `CommandIdConflictError`, `SendTimeoutError` (not sent), `OutcomeUnknownError`
        (may have been sent: send again with its id). When the task is cancelled, a note on the CancelledError says
        whether the command may have been sent.
        """
        request = SendRequest(
            domain,
            command_type,
            data,
            command_id=command_id,
            correlation_id=correlation_id,
            reply_to=reply_to,
            max_attempts=max_attempts,
            delay=delay,
            priority=priority,
            headers=headers,
        )
        if connection is not None:
            (sent,) = await arun_on(connection, self.sending([request]))
            return sent
        outgoing = self._outgoing(request)
        self._check_open()
        return receipt(outgoing, *await self._buffer.send([outgoing], self._send_timeout))

    async def send_batch(self, requests: Sequence[SendRequest], *, connection: object = None) -> list[Receipt]:
        """Send any number of commands; returns their receipts in order. Raises what `send` raises.

        All are checked before the first is sent. With `connection`, as in `send`, all or none. Otherwise in
        chunks of up to 1,000 commands or 1 MiB, each durable on its own: when one fails after others,
        `PartialSendError` carries the receipts of what is durable.
        """
        if connection is not None:
            return await arun_on(connection, self.sending(requests, all_or_none=True))
        everything = [self._outgoing(request) for request in requests]
        return await self._send_chunks(everything)

    async def _send_chunks(self, everything: list[Outgoing]) -> list[Receipt]:
        self._check_open()
        receipts: list[Receipt] = []
        for chunk in chunks(everything):
            try:
                settle(chunk, await self._buffer.send(chunk, self._send_timeout), receipts)
            except asyncio.CancelledError as error:
                error.add_note(f"{len(receipts)} of the {len(everything)} commands of the batch are durable before it")
                raise
            except (CommandBusError, psycopg.Error) as error:
                if not receipts:
                    raise
                raise PartialSendError(
                    f"{len(receipts)} of {len(everything)} commands are durable; then: {error}", receipts
                ) from error
        return receipts

    def sending(self, requests: Sequence[SendRequest], *, all_or_none: bool = False) -> Work[list[Receipt]]:
        """Return what sends these on a connection of the caller's, for the other parts of the library."""
        everything = [self._outgoing(request) for request in requests]
        domains = frozenset(outgoing.domain for outgoing in everything)
        return Work(sending(everything, all_or_none=all_or_none), self._wake_soon, domains, all_or_none)

    async def wake(self, *domains: str) -> None:
        """Hint to the workers of these domains that there is work, for instance after your transaction committed.

        Only a hint: workers poll as well, so it does not raise when the database cannot be reached or refuses it.
        """
        database = self.database
        with contextlib.suppress(psycopg.Error, DatabaseUnavailableError, PermissionDeniedError, SchemaError):
            await database.run(_calls.wake(domains))

    def _wake_soon(self, domains: Collection[str], *, committed: bool = False) -> None:
        """Do what `wake` does, soon, or at once if `committed`; any thread may, without waiting or raising."""
        if self._loop is not None and not self._closed:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(partial(self._hints.owe, frozenset(domains), committed=committed))

    def _outgoing(self, request: SendRequest) -> Outgoing:
        given: object = request
        if not isinstance(given, SendRequest):
            raise InvalidCommandError(f"a {type(given).__name__} is no command: give a SendRequest")
        try:
            headers = dict(request.headers or {})
        except (TypeError, ValueError):
            raise InvalidCommandError("headers must map strings to strings") from None
        self.tracing.inject(headers)
        return _calls.outgoing(request, headers, new_id(), self.max_data_bytes)

    # -- waiting -------------------------------------------------------------------------------------------------------

    async def wait(
        self,
        command: Receipt | str,
        command_id: UUID | None = None,
        *,
        timeout: timedelta | None,
        on_parked: OnParked = "wait",
    ) -> Reply:
        """Wait until a command has ended, by its receipt or by domain and id; return how. Any process may.

        An end without success is a `Reply` as well. A parked command has not ended; `on_parked="raise"` raises
        `CommandParkedError` then. All waits of a bus share a statement and a connection, which is not one of the pool.
        Of a command that `call` did not send it is known within a second that it ended.

        Raises `ReplyTimeoutError` after the timeout, None being for ever: the command may still end, and you may wait
        again. Raises `CommandNotFoundError`, also of what you sent on a `connection` and did not commit.
        """
        key = key_of(command, command_id)
        _calls.checked_name("domain", key[0], f"command {key[1]}")
        self._check_open()
        with self._waits.expecting(key, Patience(timeout, on_parked)) as wait:
            return await self._waits.reply(wait)

    async def call(
        self,
        domain: str,
        command_type: str,
        data: Json,
        *,
        timeout: timedelta | None,
        on_parked: OnParked = "wait",
        command_id: UUID | None = None,
        correlation_id: str | None = None,
        max_attempts: int | None = None,
        delay: timedelta | None = None,
        priority: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send one command and wait until it has ended: `send` and `wait` in one, and the end is told at once.

        The timeout is for both. Raises what they raise; after `ReplyTimeoutError` the command is there all the same,
        and `wait` takes the error's `domain` and `command_id`.
        """
        request = SendRequest(
            domain,
            command_type,
            data,
            command_id=command_id,
            correlation_id=correlation_id,
            max_attempts=max_attempts,
            delay=delay,
            priority=priority,
            headers=headers,
        )
        return await self._ask(self._outgoing(request), timeout, on_parked)

    async def _ask(self, outgoing: Outgoing, timeout: timedelta | None, on_parked: OnParked) -> Reply:
        self._check_open()
        patience = Patience(timeout, on_parked)
        outgoing = outgoing.asking(self._waits.address)
        with self._waits.expecting((outgoing.domain, outgoing.command_id), patience) as wait:
            sent = receipt(outgoing, *await self._buffer.send([outgoing], patience.bounded(self._send_timeout)))
            return await self._waits.reply(wait, at_once=sent.duplicate)

    # -- ending --------------------------------------------------------------------------------------------------------

    async def cancel(
        self,
        command: Receipt | str,
        command_id: UUID | None = None,
        *,
        operator: str | None = None,
        reason: str | None = None,
    ) -> None:
        """End an unfinished command as `CANCELED`; one that runs loses its lease, and what it wrote in a
        transactional handler is rolled back. Durable when this returns.

        Raises `CommandNotFoundError`, or `CommandStateError` when it is finished already.
        """  # noqa: D205
        domain, command_id = key_of(command, command_id)
        await self.database.run(_desk_calls.cancel(domain, command_id, operator, reason))

    async def _check_schema(self) -> None:
        try:
            found: tuple[int | None, int | None] = await self._database.repeat(_queries.schema())
        except SchemaError:
            found = None, None
        problem = explain_mismatch(*found)
        if problem is not None:
            raise SchemaError(problem)
