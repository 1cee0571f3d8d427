"""For tests of what uses commandbus: run what is due, move the clock, look at what was sent.

    async with Harness(dsn, registry) as harness:       # with SyncHarness(dsn, registry) as harness:
        await harness.bus.send("payments", "DebitAccount", {"amount": 10})
        ran = await harness.run_until_idle()

The pytest plugin `pytest_commandbus` has a DSN for each test: its fixture `commandbus_dsn`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeAlias, TypeVar

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from commandbus import _queries
from commandbus._calls import Call
from commandbus.bus import CommandBus
from commandbus.errors import ConfigurationError, PermissionDeniedError
from commandbus.handlers import HandlerRegistry
from commandbus.migrate import migrate
from commandbus.model import Command, Json
from commandbus.sync.bus import SyncCommandBus
from commandbus.sync.call import Call as BlockingCall
from commandbus.sync.worker import SyncWorker
from commandbus.worker.worker import Worker

__all__ = ["Harness", "Ran", "SyncHarness", "fresh_database", "open_clock", "template_database"]

P = ParamSpec("P")
T = TypeVar("T")
_Types: TypeAlias = tuple[list[str], list[str]]
"""Command types, as two columns: their domains and their names."""

_TIMEOUT = timedelta(seconds=30)
_POLL_SECONDS = 0.01
_NAMED = 10  # commands in a message
_LOOKS = 500  # for sessions that end

_BY_AGE = "ORDER BY sent_at, command_id"
_SENT = f"WHERE domain = coalesce(%s, domain) AND command_type = coalesce(%s, command_type) {_BY_AGE}"
_DUE = (
    "WHERE finished_at IS NULL AND (status IN ('PENDING', 'IN_PROGRESS') OR due_at <= (SELECT commandbus.clock())) "
    "AND (domain, command_type)"
)
_HANDLED = "IN (SELECT * FROM unnest(%s::text[], %s::text[]))"
_NEXT = f"{_DUE} {_HANDLED} LIMIT 1"
_LEFT = f"{_DUE} {_HANDLED} {_BY_AGE}"
_UNHANDLED = f"{_DUE} NOT {_HANDLED} AND domain = ANY (coalesce(%s, ARRAY[domain])) {_BY_AGE}"
_RUN_BY = (
    "JOIN (SELECT domain, command_id, min(occurred_at) AS first FROM commandbus.audit_trail "
    "WHERE event = 'CLAIMED' AND worker = %s GROUP BY 1, 2) claimed USING (domain, command_id) "
    "ORDER BY first, sent_at, command_id"
)

# The offset becomes a setting of the function clock() itself: so every session of every driver goes by it, from its
# next transaction on. Without a test clock clock() refuses it, and nothing is changed.
_ADVANCE = """
DO $$ BEGIN
    EXECUTE 'ALTER FUNCTION commandbus.clock() SET commandbus.clock_offset = '
        || quote_literal(commandbus.clock() - clock_timestamp() + interval '{seconds:f} seconds');
    PERFORM commandbus.clock();
END $$"""


@dataclass(frozen=True, slots=True)
class Ran:
    """What `run_until_idle` has done.

    `commands` were run, the first claimed first, and are shown as they are now. `unhandled` are due, but of types
    without a handler: they were left.
    """

    commands: list[Command]
    unhandled: list[Command]


class Harness:
    """Runs the commands of a test, moves its clock, and shows what was sent.

    `bus`: one that is open, or a DSN; then it has a bus of its own, open within `async with`. `options`: those of
    `Worker`, for instance `middleware`.
    """

    def __init__(self, bus: CommandBus | str, registry: HandlerRegistry | None = None, **options: Any) -> None:
        self.bus = CommandBus(bus) if isinstance(bus, str) else bus
        self._closing = isinstance(bus, str)
        self._registry = registry or HandlerRegistry()
        self._options = {"grace": timedelta(0)} | options  # Ctrl-C is not to wait for handlers

    async def __aenter__(self) -> Self:
        if self._closing:
            await self.bus.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._closing:
            await self.bus.close()

    async def run_until_idle(self, domain: str | Sequence[str] | None = None, *, timeout: timedelta = _TIMEOUT) -> Ran:
        """Run what is due, and what that sends, with a real worker, until nothing is left; then stop the worker.

        `domain`: default, all. Parked commands and those whose moment has not come are left. Raises `TimeoutError` that
        names what is still due after the timeout, such as a command under the lease of a worker that has died.
        """
        domains = None if domain is None else [domain] if isinstance(domain, str) else list(domain)
        worker = self._worker(self._registry.domains if domains is None else domains)
        handled = [each.domain for each in worker._handlers], [each.command_type for each in worker._handlers]
        if await self._read(_NEXT, *handled):
            await self._run(worker, handled, timeout)
        return Ran(await self._read(_RUN_BY, worker.name), await self._read(_UNHANDLED, *handled, domains))

    async def advance(self, by: timedelta) -> None:
        """Move the clock of the whole database, in all its sessions, on by so much: delays, back-offs, leases.

        Raises `ConfigurationError` when the database has no test clock, or the bus may not move it.
        """
        if by < timedelta(0):
            raise ConfigurationError(f"the clock cannot go back, by {by}: take a fresh database")
        move = Call(_ADVANCE.format(seconds=by.total_seconds()), (), lambda _: None)
        try:
            await self.bus.database.run(move)
        except PermissionDeniedError:
            raise ConfigurationError("only a superuser can move the clock of a database: connect as one") from None
        except ConfigurationError:
            raise ConfigurationError(
                "this database has no test clock: take one of the fixture commandbus_dsn or, if no more than tests is "
                "in this one, open its clock with commandbus.testing.open_clock(dsn)"
            ) from None

    async def sent(self, domain: str | None = None, command_type: str | None = None) -> list[Command]:
        """Return the commands of this domain and type that are kept, finished ones too, the first sent first."""
        return await self._read(_SENT, domain, command_type)

    async def assert_sent(self, domain: str, command_type: str, data: Json = None) -> Command:
        """Return the first command of this type; with `data`, that has it, or each of its keys if it is an object.

        Raises `AssertionError` that shows what was sent to the domain instead.
        """
        __tracebackhide__ = True
        everything = await self.sent(domain)
        for command in everything:
            if command.command_type == command_type and (data is None or _has(command.data, data)):
                return command
        wanted = command_type if data is None else f"{command_type} with {json.dumps(data)}"
        instead = "".join(f"\n  {command.command_type} {json.dumps(command.data)}" for command in everything)
        raise AssertionError(f'no {wanted} was sent to "{domain}", but{instead or " nothing at all"}')

    # -- running -------------------------------------------------------------------------------------------------------

    def _worker(self, domains: Sequence[str]) -> Worker:
        return Worker(self.bus, domains, self._registry, **self._options)

    async def _run(self, worker: Worker, handled: _Types, timeout: timedelta) -> None:
        end = time.monotonic() + timeout.total_seconds()
        grace = timedelta(0)
        running = asyncio.create_task(worker.run())
        try:
            while await self._read(_NEXT, *handled):
                if running.done():
                    raise KeyboardInterrupt  # a signal has stopped it; what it raised itself goes before
                if time.monotonic() >= end:
                    raise TimeoutError(_still_due(await self._read(_LEFT, *handled), timeout))
                if worker._loop is not None:
                    worker._claimer.wake()  # of what comes by `connection=` nobody tells it, of the rest perhaps late
                await asyncio.wait([running], timeout=_POLL_SECONDS)
            grace = timeout  # a handler that has completed its command itself may still have something to do
        finally:
            worker.stop(grace)
            await running

    async def _read(self, rest: str, *params: object) -> list[Command]:
        return await self.bus.database.repeat(_queries.commands(rest, *params))


class SyncHarness:
    """The same as `Harness`, blocking, for a test without an event loop.

    `bus`: a `SyncCommandBus`, or a DSN; then it has a bus of its own, which the end of `with` closes. `options`: those
    of `SyncWorker`.
    """

    def __init__(self, bus: SyncCommandBus | str, registry: HandlerRegistry | None = None, **options: Any) -> None:
        self.bus = SyncCommandBus(bus) if isinstance(bus, str) else bus
        self._closing = isinstance(bus, str)
        self._registry = registry
        self._options = options

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._closing:
            self.bus.close()

    def run_until_idle(self, domain: str | Sequence[str] | None = None, *, timeout: timedelta = _TIMEOUT) -> Ran:
        """Run what is due, and what that sends, until nothing is left; see `Harness.run_until_idle`."""
        return self._call(Harness.run_until_idle, domain, timeout=timeout)

    def advance(self, by: timedelta) -> None:
        """Move the clock of the whole database on by so much; see `Harness.advance`."""
        self._call(Harness.advance, by)

    def sent(self, domain: str | None = None, command_type: str | None = None) -> list[Command]:
        """Return the commands of this domain and type that are kept, the first sent first."""
        return self._call(Harness.sent, domain, command_type)

    def assert_sent(self, domain: str, command_type: str, data: Json = None) -> Command:
        """Return the first command of this type, with this data; see `Harness.assert_sent`."""
        __tracebackhide__ = True
        return self._call(Harness.assert_sent, domain, command_type, data)

    def _call(
        self, function: Callable[Concatenate[Harness, P], Coroutine[Any, Any, T]], *args: P.args, **more: P.kwargs
    ) -> T:
        self.bus.runtime.check(function.__qualname__)
        harness = _OnLoop(self.bus, self._registry, self._options)
        done: T = self.bus.runtime.join(BlockingCall(partial(function, harness, *args, **more)))
        return done


class _OnLoop(Harness):
    """The async half of a `SyncHarness`, whose worker gives `def` handlers the blocking bus."""

    def __init__(self, bus: SyncCommandBus, registry: HandlerRegistry | None, options: dict[str, Any]) -> None:
        super().__init__(bus.opened(), registry, **options)
        self._blocking = bus

    def _worker(self, domains: Sequence[str]) -> Worker:
        worker = SyncWorker(self._blocking, domains, self._registry, **self._options)._worker
        worker.on(self._blocking)
        return worker


def _has(data: Json, wanted: Json) -> bool:
    if isinstance(data, dict) and isinstance(wanted, dict):
        return all(key in data and data[key] == value for key, value in wanted.items())
    return bool(data == wanted)


def _still_due(left: list[Command], timeout: timedelta) -> str:
    lines = [f"{each.domain}.{each.command_type} {each.command_id} is {each.status}" for each in left[:_NAMED]]
    if len(left) > _NAMED:
        lines.append(f"and {len(left) - _NAMED} more")
    return "\n  ".join([f"{len(left)} commands are still due after {timeout.total_seconds():g} s:", *lines])


# -- databases ---------------------------------------------------------------------------------------------------------


def open_clock(dsn: str) -> None:
    """Let the clock of this database be moved, for ever: it must hold nothing but tests."""
    with psycopg.connect(dsn) as owner:
        owner.execute("UPDATE commandbus.setting SET value = 'on' WHERE name = 'test_clock'")


@contextlib.contextmanager
def template_database(server: str) -> Iterator[str]:
    """Make a database with the schema and a test clock, to be copied by `fresh_database`; gives its name.

    `server`: the DSN of any database of a role that may create others.
    """
    with _new_database(server, "template0", "template") as (admin, name):
        dsn = make_conninfo(server, dbname=name)
        migrate(dsn)
        open_clock(dsn)
        admin.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(sql.Identifier(name)))
        yield name


@contextlib.contextmanager
def fresh_database(server: str, template: str) -> Iterator[str]:
    """Make a copy of this template, which takes 20 ms; gives its DSN. The end drops it, whoever is connected to it."""
    with _new_database(server, template, "test") as (_, name):
        yield make_conninfo(server, dbname=name)


@contextlib.contextmanager
def _new_database(server: str, template: str, kind: str) -> Iterator[tuple[psycopg.Connection, str]]:
    name = f"commandbus_{kind}_{uuid.uuid4().hex}"
    made, copied = sql.Identifier(name), sql.Identifier(template)
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(made, copied))
        try:
            yield admin, name
        finally:
            # A backend ends some milliseconds after its client. DROP DATABASE looks for it again after 100 ms only.
            end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
            for _ in range(_LOOKS):
                if not admin.execute(end, [name]).rowcount:
                    break
                time.sleep(_POLL_SECONDS)
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(made))
