"""The blocking command bus."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from threading import Thread
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar
from uuid import UUID

import psycopg

from commandbus._connections import Work, run_on
from commandbus.bus import CommandBus
from commandbus.errors import ClosedError, CommandBusError, WrongLoopError
from commandbus.model import (
    AuditEvent,
    Command,
    CommandStatus,
    Json,
    OnParked,
    Page,
    Receipt,
    Reply,
    SendRequest,
    Stat,
    Violation,
    Waiting,
)
from commandbus.reading import key_of
from commandbus.sync.batches import SyncBatches
from commandbus.sync.call import Call
from commandbus.sync.defaults import default_runtime
from commandbus.sync.runtime import Closer, SyncRuntime
from commandbus.sync.sender import Sender
from commandbus.tracing import Tracing
from commandbus.worker.threads import waiting_here

P = ParamSpec("P")
T = TypeVar("T")


class SyncCommandBus(SyncBatches):
    """The same bus as `CommandBus`, for code without an event loop. Any number of threads may share one.

    `dsn` and the options are those of `CommandBus`; instead of a DSN it takes a `CommandBus`, which nobody has opened
    unless on the loop of `runtime`. It connects when it is first used, in each process anew: make one at import, and
    use it before or after a fork. `runtime`: default, the one that all blocking parts of the process share.

    Concurrent sends of all threads share statements and commits, on one of the flush connections, which they keep, and
    on the others when that one is slow. Ctrl-C and other exceptions from
    outside pass through a call unchanged, with a note that says what is known of a command that was being sent.
    Raises `SyncInAsyncError` in a thread in which an event loop runs.
    """

    def __init__(
        self,
        dsn: str | CommandBus | None = None,
        *,
        runtime: SyncRuntime | None = None,
        send_timeout: timedelta = timedelta(seconds=30),
        flush_connections: int = 4,
        tracing: Tracing | None = None,
        transaction_pooler: bool | None = None,
        application_name: str = "commandbus",
    ) -> None:
        self.runtime = runtime or default_runtime()
        if isinstance(dsn, CommandBus):
            self._bus = dsn
        else:
            self._bus = CommandBus(
                dsn,
                send_timeout=send_timeout,
                flush_connections=flush_connections,
                tracing=tracing,
                transaction_pooler=transaction_pooler,
                application_name=application_name,
            )
        self._closer: Closer | None = None  # what closes the bus at the shutdown; None: it is not ours to close
        self._made_in = self.runtime.generation  # of forks, in which `_bus` was made
        self._open_in: int | None = None  # and in which it was opened
        self._closed = False

    @property
    def max_data_bytes(self) -> int:
        """How many bytes the data of a command may have; see `CommandBus`."""
        return self._bus.max_data_bytes

    def open(self) -> None:
        """Connect and check the schema, as the first call would.

        Raises `DatabaseUnavailableError`, or `SchemaError` that says what to run.
        """
        self.runtime.check("CommandBus.open")
        self.opened()

    def close(self) -> None:
        """Let the sends that are under way end, then close the connections. Closing twice is allowed."""
        self.runtime.check("CommandBus.close")
        with self.runtime.opening:
            self._closed = True
            opened_here = self._open_in == self.runtime.generation and not self.runtime.closed
            self._open_in = None  # who sends from now on is refused, and does not hold up the end
            if self._closer is not None and opened_here:
                self.runtime.disown(self._closer)
                self.runtime.join(Call(self._bus.close))

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def opened(self) -> CommandBus:
        """Return the async bus, open on the runtime's loop; for the other parts of the library."""
        if self._open_in == self.runtime.generation and not self.runtime.closed:
            return self._bus
        with self.runtime.opening:
            if self._open_in != self.runtime.generation or self.runtime.closed:
                self._open()
            return self._bus

    def _open(self) -> None:
        if self._closed:
            raise ClosedError("this bus was closed: make a new one")
        loop = self.runtime.start()
        bus = self._local()
        if bus._loop is None:
            self._closer = partial(_close, bus)
            self.runtime.adopt(self._closer)  # before: Ctrl-C may come when it has just been opened
            try:
                self.runtime.join(Call(bus.open))
            except Exception:
                self.runtime.disown(self._closer)
                raise
        elif bus._loop is not loop:
            raise WrongLoopError("this bus was opened on another event loop: give SyncRuntime.of(loop) as runtime")
        self._sender = Sender(
            self.runtime, bus._buffer, bus._hints, transaction_pooler=bus._database.transaction_pooler
        )
        self.runtime.submit(partial(bus._buffer.lend_to, self._sender), lambda _: None)
        self._open_in = self.runtime.generation

    def _local(self) -> CommandBus:
        """Return the async bus, open or not; another one after a fork, which leaves the parent's as it is."""
        with self.runtime.opening:
            if self._made_in != self.runtime.generation or self._bus._closed:
                self._bus, self._made_in = self._bus._fresh(), self.runtime.generation
            return self._bus

    def _call(
        self, function: Callable[Concatenate[CommandBus, P], Coroutine[Any, Any, T]], *args: P.args, **more: P.kwargs
    ) -> T:
        self.runtime.check(f"CommandBus.{function.__name__}")
        done: T = self.runtime.join(Call(partial(function, self.opened(), *args, **more)))
        return done

    # -- sending -------------------------------------------------------------------------------------------------------

    def send(
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
        """Send one command; see `CommandBus.send`. Durable when this returns.

        With `connection`, a blocking connection of psycopg, SQLAlchemy or Django, it is sent in this thread, without
        the event loop, as part of your transaction. When an exception from outside interrupts the call, a note on it
        says whether the command may have been sent.
        """
        self.runtime.check("CommandBus.send")
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
            return run_on(connection, self._sending([request]))[0]
        bus = self.opened()
        return self._sender.send(bus._outgoing(request), bus._send_timeout)

    def send_batch(self, requests: Sequence[SendRequest], *, connection: object = None) -> list[Receipt]:
        """Send any number of commands; see `CommandBus.send_batch`."""
        self.runtime.check("CommandBus.send_batch")
        if connection is not None:
            return run_on(connection, self._sending(requests, all_or_none=True))
        bus = self.opened()
        receipts: list[Receipt] = self.runtime.join(
            Call(partial(bus._send_chunks, [bus._outgoing(request) for request in requests]))
        )
        return receipts

    def _sending(self, requests: Sequence[SendRequest], *, all_or_none: bool = False) -> Work[list[Receipt]]:
        return replace(self._local().sending(requests, all_or_none=all_or_none), wake=self._wake_soon)

    def _wake_soon(self, domains: Collection[str]) -> None:
        """Do what `wake` does, soon; from any thread, without waiting, without raising.

        Who sends on connections of his own only has never opened this bus. The first commit in a process opens it, in
        a thread: nobody waits for the connecting, least of all SQLAlchemy, which tells of a commit before it. That
        thread is no daemon, so that a program that ends at once does not cut the connecting off.
        """
        if self._open_in == self.runtime.generation:
            self._bus._wake_soon(domains)
        elif not self._closed:
            with contextlib.suppress(RuntimeError):  # the interpreter is ending
                Thread(target=self._open_and_wake, args=(domains,), name="commandbus-open", daemon=False).start()

    def _open_and_wake(self, domains: Collection[str]) -> None:
        with contextlib.suppress(CommandBusError, psycopg.Error):  # they poll as well
            self.opened()._wake_soon(domains)

    def wake(self, *domains: str) -> None:
        """Hint to the workers of these domains that there is work; see `CommandBus.wake`."""
        self._call(CommandBus.wake, *domains)

    # -- waiting -------------------------------------------------------------------------------------------------------

    def wait(
        self,
        command: Receipt | str,
        command_id: UUID | None = None,
        *,
        timeout: timedelta | None,
        on_parked: OnParked = "wait",
    ) -> Reply:
        """Wait until a command has ended, by its receipt or by domain and id; see `CommandBus.wait`.

        In a handler it holds a thread: a worker all of whose threads wait for commands of its own domains warns of it.
        """
        with waiting_here(*key_of(command, command_id)):
            return self._call(CommandBus.wait, command, command_id, timeout=timeout, on_parked=on_parked)

    def call(
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
        """Send one command and wait until it has ended; see `CommandBus.call`, and `wait` for calls in a handler."""
        self.runtime.check("CommandBus.call")
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
        outgoing = self.opened()._outgoing(request)
        with waiting_here(outgoing.domain, outgoing.command_id):
            return self._call(CommandBus._ask, outgoing, timeout, on_parked)

    # -- reading -------------------------------------------------------------------------------------------------------

    def get_command(self, command: Receipt | str, command_id: UUID | None = None) -> Command:
        """Return a command, by its receipt or by domain and id. Raises `CommandNotFoundError`."""
        return self._call(CommandBus.get_command, command, command_id)

    def query_commands(
        self,
        *,
        domain: str | None = None,
        status: CommandStatus | None = None,
        command_type: str | None = None,
        since: timedelta | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Command]:
        """Return a page of commands, unfinished and finished; see `CommandBus.query_commands`."""
        return self._call(
            CommandBus.query_commands,
            domain=domain,
            status=status,
            command_type=command_type,
            since=since,
            limit=limit,
            cursor=cursor,
        )

    def explain(self, command: Receipt | str, command_id: UUID | None = None) -> Waiting | None:
        """Say why an unfinished command is where it is; None when it is finished. Raises `CommandNotFoundError`."""
        return self._call(CommandBus.explain, command, command_id)

    def get_audit_trail(self, command: Receipt | str, command_id: UUID | None = None) -> list[AuditEvent]:
        """Return all steps in the life of a command, in order. Raises `CommandNotFoundError`."""
        return self._call(CommandBus.get_audit_trail, command, command_id)

    def count(
        self,
        *,
        domain: str | None = None,
        status: CommandStatus | None = None,
        command_type: str | None = None,
    ) -> int:
        """Count the commands that are kept, finished ones included."""
        return self._call(CommandBus.count, domain=domain, status=status, command_type=command_type)

    def stats(self, *, domain: str | None = None) -> list[Stat]:
        """Count what is unfinished, by domain, type and status, each with the time its oldest was sent."""
        return self._call(CommandBus.stats, domain=domain)

    def verify(self, *, timeout: timedelta = timedelta(minutes=10)) -> list[Violation]:
        """Compare all commands and audit events with what the library can have written; see `CommandBus.verify`."""
        return self._call(CommandBus.verify, timeout=timeout)

    # -- ending --------------------------------------------------------------------------------------------------------

    def cancel(
        self,
        command: Receipt | str,
        command_id: UUID | None = None,
        *,
        operator: str | None = None,
        reason: str | None = None,
    ) -> None:
        """End an unfinished command as `CANCELED`; see `CommandBus.cancel`. Durable when this returns."""
        self._call(CommandBus.cancel, command, command_id, operator=operator, reason=reason)


async def _close(bus: CommandBus, seconds: float) -> None:
    del seconds  # each of its connections has a deadline of its own
    await bus.close()
