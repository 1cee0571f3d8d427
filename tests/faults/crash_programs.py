"""The programs that meet the faults of `crash_points.py`, each in a process of its own; they do as the documents say.

What a call raises tells them what to do: `OutcomeUnknownError` to send again with its id, `DatabaseUnavailableError`
and a broken connection to look and try again. Each may be killed anywhere, and is then started again.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from uuid import NAMESPACE_OID, UUID, uuid5

import psycopg

import commandbus
from commandbus import (
    BusinessRuleError,
    Command,
    CommandStateError,
    DatabaseUnavailableError,
    HandlerContext,
    HandlerRegistry,
    OutcomeUnknownError,
    PermanentCommandError,
    Process,
    Reply,
    RetryPolicy,
    Send,
    SendRequest,
    SendTimeoutError,
    TransientCommandError,
    TroubleshootingFilter,
    _bulk,
    _chunks,
    _database,
    _hints,
    _listener,
    troubleshooting,
)
from commandbus.migrate import migrate as migrate_database
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncWorker
from commandbus.worker import heartbeat, renewer
from tests import blocking

T = TypeVar("T")

LEASE = timedelta(seconds=2)
HANDLER = timedelta(seconds=3)
DEADLINE = 1.0  # seconds, in place of 10 for a call of the library's own
WHO = {"operator": "ann", "reason": "looked at it"}
_AT_ONCE = RetryPolicy(max_attempts=10, backoff=[timedelta(milliseconds=5)])
_AGAIN = 0.05  # seconds
_EFFECT = "INSERT INTO public.effect VALUES (%s, %s)"


@dataclass(frozen=True)
class Part:
    """What a program is told. `start`: how often it was started; `folder`: where it and the test leave marks."""

    mode: str
    dsn: str
    domain: str
    folder: Path
    start: int

    def id(self, number: int) -> UUID:
        """An id that the program knows again after it was killed."""
        return uuid5(NAMESPACE_OID, f"{self.domain} {number}")


def run(program: str, part: Part) -> None:
    """Run a program of this module to its end."""
    logging.basicConfig(filename=part.folder / "log", level=logging.INFO, force=True)
    _shorten()
    threading.Thread(target=_end_with_the_test, daemon=True).start()
    asyncio.run(globals()[program](part)) if program in _PEOPLE else work(program, part)


def _end_with_the_test() -> None:
    """End this process when that of the test is gone: killed, it ends nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _shorten() -> None:
    """Let this process give up what hangs after a second, and send and act on few commands at a time."""
    _database.CALL_SECONDS = renewer._CALL_SECONDS = DEADLINE
    _hints._DEADLINE = heartbeat._ANSWER_SECONDS = _listener._ANSWER_SECONDS = DEADLINE
    _bulk.LONG_SECONDS = troubleshooting.LONG_SECONDS = DEADLINE  # type: ignore[attr-defined]
    _bulk.MAX_BATCH = _chunks.MAX_ROWS = 2  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------- people's programs


async def _with_bus(part: Part, program: Callable[[Any], Awaitable[None]], **options: Any) -> None:
    """Open a bus, again until it succeeds, and use it."""
    while True:
        bus = blocking.kinds(part.mode).CommandBus(part.dsn, **options)
        try:
            await bus.open()
        except DatabaseUnavailableError:
            await asyncio.sleep(_AGAIN)
            continue
        await program(bus)
        await bus.close()
        return


async def _until_known(send: Callable[[UUID | None], Awaitable[T]], command_id: UUID | None = None) -> T:
    """Send until it is known that it was sent."""
    while True:
        try:
            return await send(command_id)
        except OutcomeUnknownError as error:
            command_id = error.command_id
        except (SendTimeoutError, DatabaseUnavailableError):
            await asyncio.sleep(_AGAIN)


async def _until_done(act: Callable[[], Awaitable[T]]) -> T | None:
    """Act until it is known that it was done: by this call, or by one whose answer was lost."""
    while True:
        try:
            return await act()
        except CommandStateError:
            return None
        except (DatabaseUnavailableError, psycopg.OperationalError):
            await asyncio.sleep(_AGAIN)


async def send(part: Part, **options: Any) -> None:
    """Send a command, and let the library choose its id."""

    async def program(bus: Any) -> None:  # noqa: ANN401 - of either half
        await _until_known(lambda known: bus.send(part.domain, "Note", 1, command_id=known))

    await _with_bus(part, program, **options)


async def send_impatiently(part: Part) -> None:
    """The same, and give up before the call does."""
    await send(part, send_timeout=timedelta(seconds=DEADLINE / 3))


async def send_with_id(part: Part) -> None:
    """Send a command with an id."""

    async def program(bus: Any) -> None:  # noqa: ANN401 - of either half
        receipt = await _until_known(lambda known: bus.send(part.domain, "Note", 1, command_id=known), part.id(1))
        assert receipt.command_id == part.id(1)

    await _with_bus(part, program)


async def send_batch(part: Part) -> None:
    """Send five commands in three chunks, all of them again when something came between."""
    requests = [SendRequest(part.domain, "Note", n, command_id=part.id(n)) for n in range(5)]

    async def program(bus: Any) -> None:  # noqa: ANN401 - of either half
        while True:
            try:
                receipts = await bus.send_batch(requests)
            except commandbus.CommandBusError:
                await asyncio.sleep(_AGAIN)
                continue
            assert [receipt.command_id for receipt in receipts] == [request.command_id for request in requests]
            return

    await _with_bus(part, program, send_timeout=timedelta(seconds=DEADLINE / 3))


async def send_in_transaction(part: Part) -> None:
    """Write a row and send three commands in a transaction of the program's own, unless the row is there already."""

    async def program(bus: Any) -> None:  # noqa: ANN401 - of either half
        await _until_done(lambda: (_transaction if part.mode == "async" else _blocking_transaction)(part, bus))

    await _with_bus(part, program)


_ROW = "INSERT INTO public.effect SELECT %s, %s WHERE NOT EXISTS (SELECT FROM public.effect WHERE domain = %s)"


async def _transaction(part: Part, bus: Any) -> None:  # noqa: ANN401 - of either half
    async with await psycopg.AsyncConnection.connect(part.dsn) as own:
        if (await own.execute(_ROW, (part.domain, part.id(0), part.domain))).rowcount:
            await bus.send(part.domain, "Note", 0, connection=own)
            await bus.send_batch([SendRequest(part.domain, "Note", n) for n in (1, 2)], connection=own)


async def _blocking_transaction(part: Part, bus: Any) -> None:  # noqa: ANN401 - of either half
    with psycopg.connect(part.dsn) as own:
        if own.execute(_ROW, (part.domain, part.id(0), part.domain)).rowcount:
            await bus.send(part.domain, "Note", 0, connection=own)
            await bus.send_batch([SendRequest(part.domain, "Note", n) for n in (1, 2)], connection=own)


async def start_process(part: Part) -> None:
    """Start a process with an id."""

    async def program(bus: Any) -> None:  # noqa: ANN401 - of either half
        processes, kind = blocking.kinds(part.mode).Processes(bus), three_steps(part.domain)
        await _until_known(lambda known: processes.start_process(kind, Course(), process_id=known), part.id(1))

    await _with_bus(part, program)


async def cancel(part: Part) -> None:
    """Cancel a command."""

    async def program(bus: Any) -> None:  # noqa: ANN401 - of either half
        await _until_done(lambda: bus.cancel(part.domain, part.id(0), **WHO))

    await _with_bus(part, program)


async def operate(part: Part) -> None:
    """Retry one parked command, cancel another, and complete a third."""

    async def program(bus: Any) -> None:  # noqa: ANN401 - of either half
        queue = blocking.kinds(part.mode).TroubleshootingQueue(bus)
        await _until_done(lambda: queue.operator_retry(part.domain, part.id(0), data="new", **WHO))
        await _until_done(lambda: queue.operator_cancel(part.domain, part.id(1), **WHO))
        await _until_done(lambda: queue.operator_complete(part.domain, part.id(2), result_data="by hand", **WHO))

    await _with_bus(part, program)


async def operate_many(part: Part) -> None:
    """Cancel all that is parked, in batches of two; count again when something came between."""
    which = TroubleshootingFilter(part.domain)

    async def program(bus: Any) -> None:  # noqa: ANN401 - of either half
        queue = blocking.kinds(part.mode).TroubleshootingQueue(bus)

        async def cancel_rest() -> bool:
            count: int = (await queue.preview(which)).count
            await queue.operator_cancel_many(which, expected_count=count, **WHO)
            return count == 0

        while not await _until_done(cancel_rest):
            pass

    await _with_bus(part, program)


async def read(part: Part) -> None:
    """Read what there is in every way; a fault is not to be seen."""

    async def program(bus: Any) -> None:  # noqa: ANN401 - of either half
        key = part.domain, part.id(0)
        command = await _until_done(lambda: bus.get_command(*key))
        page = await _until_done(lambda: bus.query_commands(domain=part.domain))
        assert page is not None
        assert page.items == (command,)
        assert await _until_done(lambda: bus.count(domain=part.domain)) == 1
        assert [stat.count for stat in await _until_done(lambda: bus.stats(domain=part.domain)) or ()] == [1]
        assert [event.event for event in await _until_done(lambda: bus.get_audit_trail(*key)) or ()] == ["SENT"]
        assert getattr(await _until_done(lambda: bus.explain(*key)), "reason", None) == "NO_WORKER"
        assert await _until_done(lambda: bus.verify(timeout=timedelta(seconds=20))) == []

    await _with_bus(part, program)


async def migrate(part: Part) -> None:
    """Bring the database to this version."""

    async def attempt() -> None:
        migrate_database(part.dsn)

    await _until_done(attempt)


_PEOPLE = {
    *("send", "send_impatiently", "send_with_id", "send_batch", "send_in_transaction", "start_process"),
    *("cancel", "operate", "operate_many", "read", "migrate"),
}

# ----------------------------------------------------------------------------------------------------------- workers


def work(program: str, part: Part) -> None:
    """Work with the handlers of this name until SIGTERM; begin anew when there is no database to begin with."""
    writes = program in {"transact", "complete_own"}
    timeout = HANDLER if writes else None  # a connection that the handler uses may hang, and nobody else looks after it
    registry = HandlerRegistry()
    transactional = program in {"transact", "transact_nothing"}
    register = registry.handler(part.domain, "Note", retry=_AT_ONCE, timeout=timeout, transactional=transactional)
    register((_blocking_handler if part.mode == "sync" else _handler)(program, part))
    registry.handler(part.domain, "Follow", retry=_AT_ONCE)(_handler("complete", part))
    _register_steps(registry, part)
    # All that a handler still does after the fault belongs to the run, also when the command has ended.
    grace = timedelta(seconds=0 if program == "stop" else 30)
    while True:
        try:
            return _work(part, registry, grace)
        except DatabaseUnavailableError:
            time.sleep(_AGAIN)


@dataclass
class Course:
    """The state of the process: the steps that have ended."""

    ended: str = ""


def three_steps(domain: str) -> type[Process[Course]]:
    """A process in this domain: A and B succeed, C is refused, so that B and A are undone."""

    class ThreeSteps(Process[Course], domain=domain):
        def start(self, state: Course) -> Send:
            return self._step("A")

        def on_a(self, state: Course, reply: Reply) -> Send:
            state.ended += "a"
            return self._step("B")

        def on_b(self, state: Course, reply: Reply) -> Send:
            state.ended += "b"
            return self._step("C")

        def _step(self, name: str) -> Send:
            return Send(domain, name, undo=(domain, f"Undo{name}", None), deadline=timedelta(hours=1))

    return ThreeSteps


def _register_steps(registry: HandlerRegistry, part: Part) -> None:
    """Register the process, and a transactional handler for each of its steps."""
    registry.register_process(three_steps(part.domain))
    for name in ("A", "B", "C", "UndoA", "UndoB"):
        register = registry.handler(part.domain, name, retry=_AT_ONCE, timeout=HANDLER, transactional=True)
        register((_blocking_step if part.mode == "sync" else _step)(part))


def _step(part: Part) -> Callable[[Command, HandlerContext], Awaitable[None]]:
    async def step(command: Command, context: HandlerContext) -> None:
        assert context.connection is not None
        await context.connection.execute(_EFFECT, (part.domain, command.command_id))
        if command.command_type == "C":
            raise BusinessRuleError("NO", "not allowed")

    return step


def _blocking_step(part: Part) -> Callable[[Command, SyncHandlerContext], None]:
    def step(command: Command, context: SyncHandlerContext) -> None:
        assert context.connection is not None
        context.connection.execute(_EFFECT, (part.domain, command.command_id))
        if command.command_type == "C":
            raise BusinessRuleError("NO", "not allowed")

    return step


def _work(part: Part, registry: HandlerRegistry, grace: timedelta) -> None:
    options: dict[str, Any] = {"lease": LEASE, "grace": grace, "thread_pool_size": 4}
    if part.mode == "sync":
        with SyncCommandBus(part.dsn) as bus:
            SyncWorker(bus, part.domain, registry, **options).run()
        return

    async def main() -> None:
        async with commandbus.CommandBus(part.dsn) as bus:
            await commandbus.Worker(bus, part.domain, registry, **options).run()

    asyncio.run(main())


def _verdict(program: str, part: Part, command: Command, attempt: int) -> object:
    """Return or raise what the handler of this name does, if it needs no I/O."""
    match program:
        case "fail_once" if attempt == 1:
            raise TransientCommandError("LATER", "not now")
        case "park":
            raise PermanentCommandError("BROKEN", "never")
        case "refuse":
            raise BusinessRuleError("NO", "not allowed")
        case _:
            return command.data


def _waits(program: str, part: Part) -> bool:
    """Whether the handler is to wait still: until it is stopped once, or its lease was renewed."""
    match program:
        case "stop":
            (part.folder / "begun").touch()
            return part.start == 1
        case "renew":
            return not (part.folder / "renewed").exists()
        case _:
            return False


def _handler(program: str, part: Part) -> Callable[[Command, HandlerContext], Awaitable[object]]:
    async def handler(command: Command, context: HandlerContext) -> object:
        while _waits(program, part):  # noqa: ASYNC110 - for what another process does
            await asyncio.sleep(_AGAIN)
        row = (part.domain, command.command_id)
        if program == "transact":
            assert context.connection is not None
            await context.connection.execute(_EFFECT, row)
            await context.bus.send(part.domain, "Follow", command.data, connection=context.connection)
        elif program == "complete_own":
            async with await psycopg.AsyncConnection.connect(part.dsn) as own:
                await own.execute(_EFFECT, row)
                await context.complete_on(own, command.data)
        return _verdict(program, part, command, context.attempt)

    return handler


# Nobody can interrupt a thread that waits for its own frozen connection: the server has to let go of the command's row.
_OWN_OPTIONS = "-c idle_in_transaction_session_timeout=2s"


def _blocking_handler(program: str, part: Part) -> Callable[[Command, SyncHandlerContext], object]:
    def handler(command: Command, context: SyncHandlerContext) -> object:
        while _waits(program, part):
            context.raise_if_cancelled()
            time.sleep(_AGAIN)
        row = (part.domain, command.command_id)
        if program == "transact":
            assert context.connection is not None
            context.connection.execute(_EFFECT, row)
            context.bus.send(part.domain, "Follow", command.data, connection=context.connection)
        elif program == "complete_own":
            with psycopg.connect(part.dsn, options=_OWN_OPTIONS) as own:
                own.execute(_EFFECT, row)
                context.complete_on(own, command.data)
        return _verdict(program, part, command, context.attempt)

    return handler
