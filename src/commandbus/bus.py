"""The command bus: sends commands, reads them, cancels them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar
from uuid import UUID

import psycopg

from commandbus import _calls, _queries
from commandbus._calls import Outgoing
from commandbus._database import Database, execute_on, savepoint_on
from commandbus._failures import is_connection_lost, is_unavailable, refusals_of
from commandbus._hints import Hints
from commandbus._ids import new_id
from commandbus._limits import MAX_BYTES
from commandbus._send_buffer import MAX_ROWS, SendBuffer
from commandbus.errors import (
    ClosedError,
    CommandBusError,
    CommandIdConflictError,
    CommandNotFoundError,
    ConfigurationError,
    DatabaseUnavailableError,
    InvalidCommandError,
    OutcomeUnknownError,
    PartialSendError,
    SchemaError,
    WrongLoopError,
)
from commandbus.migrate import explain_mismatch
from commandbus.model import AuditEvent, Command, CommandStatus, Json, Page, Receipt, SendRequest, Stat
from commandbus.tracing import NoTracing, Tracing

T = TypeVar("T")


class CommandBus:
    """Sends commands to a database and looks after them. Open it with `async with`, on one event loop.

    `dsn`: a libpq connection string or URI; default: `$COMMAND_BUS_DSN`, read now. `send_timeout`: how long a send may
    take before it is withdrawn. `flush_connections`: how many connections carry concurrent sends; a few commit as much
    as many would. A bus holds up to `flush_connections` + 2 connections, a worker on it two more. `tracing`: carries
    the trace context from sender to handler, see `commandbus.tracing`. `transaction_pooler`: the DSN leads to a pooler
    in transaction mode, such as PgBouncer: no prepared statements and no LISTEN.
    """

    def __init__(
        self,
        dsn: str | None = None,
        *,
        send_timeout: timedelta = timedelta(seconds=30),
        flush_connections: int = 4,
        tracing: Tracing | None = None,
        transaction_pooler: bool = False,
        application_name: str = "commandbus",
    ) -> None:
        if flush_connections < 1:
            raise ConfigurationError(f"flush_connections is {flush_connections}: it must be at least 1")
        if send_timeout <= timedelta(0):
            raise ConfigurationError("send_timeout must be above zero")
        self.tracing: Tracing = tracing or NoTracing()
        self._send_timeout = send_timeout.total_seconds()
        self._database = Database(
            dsn,
            connections=flush_connections + 2,
            application_name=application_name,
            transaction_pooler=transaction_pooler,
        )
        self._hints = Hints(self._database)
        self._buffer = SendBuffer(self._database, self._hints, connections=flush_connections)
        self.max_data_bytes = MAX_BYTES  # the most that a database can allow; `open` learns what this one does
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def open(self) -> None:
        """Connect and check the schema. Raises `DatabaseUnavailableError`, or `SchemaError` that says what to run."""
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

        Durable when this returns. With `connection`, an open psycopg connection (async or blocking) of yours, the
        command is part of your transaction and durable when that commits; workers are not told of it before they poll,
        unless you call `wake` after the commit. Concurrent sends share statements and commits.

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
        outgoing = self._outgoing(request)
        if connection is not None:
            row = outgoing.row(minted=outgoing.minted)
            with refusals_of(f"command {outgoing.command_id}"):
                (outcome,) = await execute_on(connection, _calls.send([row]))
        else:
            self._check_open()
            outcome = await self._buffer.send(outgoing, self._send_timeout)
        return _receipt(outgoing, outcome)

    async def send_batch(self, requests: Sequence[SendRequest], *, connection: object = None) -> list[Receipt]:
        """Send any number of commands; returns their receipts in order. Raises what `send` raises.

        All are checked before the first is sent. With `connection` all or none, in your transaction. Otherwise in
        chunks of up to 1,000 commands or 1 MiB, each durable on its own: when one fails after others,
        `PartialSendError` carries the receipts of what is durable.
        """
        everything = [self._outgoing(request) for request in requests]
        receipts: list[Receipt] = []
        if connection is not None:
            with refusals_of("the batch"):
                async with savepoint_on(connection):
                    for chunk in _chunks(everything):
                        rows = [outgoing.row(minted=outgoing.minted) for outgoing in chunk]
                        _settle(chunk, await execute_on(connection, _calls.send(rows)), receipts)
            return receipts
        for chunk in _chunks(everything):
            try:
                _settle(chunk, await self._send_durably(chunk), receipts)
            except (CommandBusError, psycopg.Error) as error:
                if not receipts:
                    raise
                raise PartialSendError(
                    f"{len(receipts)} of {len(everything)} commands are durable; then: {error}", receipts
                ) from error
        if receipts:
            await self.wake(*{receipt.domain for receipt in receipts})
        return receipts

    async def wake(self, *domains: str) -> None:
        """Hint to the workers of these domains that there is work, for instance after your transaction committed.

        Only a hint: workers poll as well, so it does not raise when the database cannot be reached.
        """
        database = self.database
        with contextlib.suppress(psycopg.Error, DatabaseUnavailableError, SchemaError):
            await database.run(_calls.wake(domains))

    def _outgoing(self, request: SendRequest) -> Outgoing:
        given: object = request
        if not isinstance(given, SendRequest):
            raise InvalidCommandError(f"a {type(given).__name__} is no command: give a SendRequest")
        headers = dict(request.headers or {})
        self.tracing.inject(headers)
        return _calls.outgoing(request, headers, new_id(), self.max_data_bytes)

    async def _send_durably(self, chunk: list[Outgoing]) -> list[str]:
        """Send a chunk; when its connection breaks, send the same ids again until the time is up."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._send_timeout
        maybe_sent = False
        while True:
            rows = [outgoing.row(minted=outgoing.minted and not maybe_sent) for outgoing in chunk]
            try:
                with refusals_of("a chunk of the batch"):
                    return await self.database.run(_calls.send(rows))
            except (CommandBusError, psycopg.Error) as error:
                maybe_sent = maybe_sent or is_connection_lost(error)
                if not is_unavailable(error):
                    raise
                if loop.time() > end:
                    if not maybe_sent:
                        raise
                    raise OutcomeUnknownError(
                        f"commands {chunk[0].command_id} to {chunk[-1].command_id} of a batch may or may not have "
                        "been sent",
                        chunk[0].command_id,
                    ) from error
            await asyncio.sleep(0.1)

    # -- reading -------------------------------------------------------------------------------------------------------

    async def get_command(self, command: Receipt | str, command_id: UUID | None = None) -> Command:
        """Return a command, by its receipt or by domain and id. Raises `CommandNotFoundError`."""
        domain, command_id = _key(command, command_id)
        found = await self.database.repeat(_queries.get_command(domain, command_id))
        if found is None:
            raise CommandNotFoundError(f'no command {command_id} in domain "{domain}"')
        return found

    async def query_commands(
        self,
        *,
        domain: str | None = None,
        status: CommandStatus | None = None,
        command_type: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Command]:
        """Return a page of commands, unfinished and finished, newest first within a domain. `limit`: 1 to 1,000."""
        return await self.database.repeat(
            _queries.query_commands(domain=domain, status=status, command_type=command_type, limit=limit, cursor=cursor)
        )

    async def get_audit_trail(self, command: Receipt | str, command_id: UUID | None = None) -> list[AuditEvent]:
        """Return all steps in the life of a command, in order. Raises `CommandNotFoundError`."""
        domain, command_id = _key(command, command_id)
        events = await self.database.repeat(_queries.audit_trail(domain, command_id))
        if not events:
            raise CommandNotFoundError(f'no command {command_id} in domain "{domain}"')
        return events

    async def count(
        self,
        *,
        domain: str | None = None,
        status: CommandStatus | None = None,
        command_type: str | None = None,
    ) -> int:
        """Count the commands that are kept, finished ones included."""
        return await self.database.repeat(_queries.count(domain, status, command_type))

    async def stats(self, *, domain: str | None = None) -> list[Stat]:
        """Count what is unfinished, by domain, type and status, each with the time its oldest was sent."""
        return await self.database.repeat(_queries.stats(domain))

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
        domain, command_id = _key(command, command_id)
        await self.database.run(_calls.cancel(domain, command_id, operator, reason))

    async def _check_schema(self) -> None:
        try:
            found: tuple[int | None, int | None] = await self._database.repeat(_queries.schema())
        except SchemaError:
            found = None, None
        problem = explain_mismatch(*found)
        if problem is not None:
            raise SchemaError(problem)


def _settle(chunk: list[Outgoing], outcomes: list[str], receipts: list[Receipt]) -> None:
    """Add the receipts of a chunk; then raises the first conflict in it."""
    conflicts = []
    for outgoing, outcome in zip(chunk, outcomes, strict=True):
        try:
            receipts.append(_receipt(outgoing, outcome))
        except CommandIdConflictError as conflict:
            conflicts.append(conflict)
    if conflicts:
        raise conflicts[0]


def _receipt(outgoing: Outgoing, outcome: str) -> Receipt:
    if outcome == "conflict" and not outgoing.minted:
        raise CommandIdConflictError(
            f'command {outgoing.command_id} was sent to "{outgoing.domain}" before, with another type or other data: '
            "nothing was written; use a new id",
            outgoing.command_id,
        )
    # An id made for this send is known already only when this very send was repeated on a new connection.
    return Receipt(outgoing.domain, outgoing.command_id, not outgoing.minted and outcome == "duplicate")


def _key(command: Receipt | str, command_id: UUID | None) -> tuple[str, UUID]:
    if isinstance(command, Receipt):
        return command.domain, command.command_id
    if command_id is None:
        raise TypeError("give a receipt, or a domain and a command id")
    return command, command_id


def _chunks(everything: Collection[Outgoing]) -> list[list[Outgoing]]:
    chunks: list[list[Outgoing]] = []
    size = MAX_BYTES
    for outgoing in everything:
        if size >= MAX_BYTES or len(chunks[-1]) >= MAX_ROWS:
            chunks.append([])
            size = 0
        chunks[-1].append(outgoing)
        size += len(outgoing.text)
    return chunks
