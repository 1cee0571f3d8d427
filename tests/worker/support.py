"""What the tests of the worker share: a worker that runs, handlers to watch, workers that are processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from commandbus import (
    AuditEvent,
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    HandlerRegistry,
    Receipt,
    RetryPolicy,
    StopReport,
    Worker,
)
from tests.bus.support import DOMAIN, Connection, Row, one, rows, until
from tests.support import Route, aeventually

LEASE = timedelta(seconds=1)  # the shortest there is
HOUR = timedelta(hours=1)
AT_ONCE = RetryPolicy(max_attempts=3, backoff=[timedelta(milliseconds=5)])
PARKED = CommandStatus.IN_TROUBLESHOOTING_QUEUE

Function = Callable[[Command, HandlerContext], Any]


def registry_of(domain: str = DOMAIN, /, retry: RetryPolicy | None = AT_ONCE, **handlers: Function) -> HandlerRegistry:
    """A registry with these functions: `registry_of(Debit=debit)`."""
    registry = HandlerRegistry()
    for command_type, function in handlers.items():
        registry.handler(domain, command_type, retry=retry)(function)
    return registry


async def echo(command: Command, context: HandlerContext) -> Any:  # noqa: ANN401 - any JSON
    """A handler that returns its data."""
    return command.data


@contextlib.asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[asyncio.Task[StopReport]]:
    """Run a worker; stop it at the end, and see that it does stop."""
    task = asyncio.create_task(worker.run())
    try:
        yield task
        assert not task.done(), "the worker has ended by itself"
    finally:
        worker.stop()
        await asyncio.wait_for(task, 40)


class Watched:
    """An async handler that tells when it runs, and returns what it is told to."""

    def __init__(self) -> None:
        self.contexts: list[HandlerContext] = []
        self.cancelled = 0
        self.go_on = asyncio.Event()

    async def __call__(self, command: Command, context: HandlerContext) -> object:
        self.contexts.append(context)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return f"delivery {context.delivery}"

    async def handler(self, command: Command, context: HandlerContext) -> object:
        """The same, as a coroutine function."""
        return await self(command, context)

    async def started(self, count: int = 1) -> None:
        """Come back when it was called so many times."""
        await until(lambda: len(self.contexts) >= count, f"{count} calls of the handler")


async def settled(bus: CommandBus, receipt: Receipt, timeout: float = 30) -> Command:
    """The command, once it is finished or parked."""

    async def look() -> Command | None:
        command = await bus.get_command(receipt)
        return command if command.status.terminal or command.status == PARKED else None

    found = await aeventually(look, timeout=timeout, what=f"the end of {receipt.command_id}")
    assert found is not None
    return found


async def all_settled(bus: CommandBus, receipts: Iterable[Receipt], timeout: float = 30) -> list[Command]:
    """The commands, once all are finished or parked."""
    return [await settled(bus, receipt, timeout) for receipt in receipts]


async def has_status(bus: CommandBus, receipt: Receipt, status: CommandStatus, timeout: float = 20) -> Command:
    """The command, once it has this status."""

    async def look() -> Command | None:
        command = await bus.get_command(receipt)
        return command if command.status == status else None

    found = await aeventually(look, timeout=timeout, what=f"{receipt.command_id} to be {status}")
    assert found is not None
    return found


async def story(bus: CommandBus, receipt: Receipt) -> list[str]:
    """The events of a command, in order."""
    return [event.event for event in await bus.get_audit_trail(receipt)]


async def events(bus: CommandBus, receipt: Receipt, name: str) -> list[AuditEvent]:
    """The events of this name."""
    return [event for event in await bus.get_audit_trail(receipt) if event.event == name]


def charged(db: Connection) -> list[Row]:
    """What each command was charged: deliveries, attempts, crashes; each combination once."""
    return rows(db, "SELECT DISTINCT delivery, attempts, crashes FROM commandbus.commands WHERE domain = %s", DOMAIN)


async def renewed(db: Connection, times: int = 1) -> None:
    """Come back when all leases that there are have been renewed so often."""
    earliest = "SELECT min(lease_until) FROM commandbus.command WHERE status = 'IN_PROGRESS'"
    for _ in range(times):
        before = one(db, earliest)
        await until(lambda before=before: (one(db, earliest) or before) > before, "a renewal")  # type: ignore[misc]


def counter(function: Callable[..., Awaitable[Any]], calls: list[Any]) -> Callable[..., Awaitable[Any]]:
    """The function, noting each of its calls."""

    async def counted(*args: Any, **more: Any) -> Any:  # noqa: ANN401 - passes on
        calls.append(args)
        return await function(*args, **more)

    return counted


class Process:
    """A worker that is a process: one of `apps/`."""

    def __init__(self, app: str, route: Route, *more: str) -> None:
        self.arguments = [sys.executable, str(Path(__file__).with_name("apps") / app), json.dumps(route), *more]
        self.starts = 0
        self.popen = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        return subprocess.Popen(self.arguments, stdin=subprocess.DEVNULL)

    def restart_if_dead(self) -> None:
        """Do what a supervisor does."""
        if self.popen.poll() is not None:
            self.popen = self._start()

    def stop(self) -> None:
        """SIGSTOP: it stands still, and does not know."""
        self.popen.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self.popen.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        self.popen.kill()
        self.popen.wait()


@contextlib.contextmanager
def process(app: str, route: Route, *more: str) -> Iterator[Process]:
    """A worker process that is gone afterwards."""
    found = Process(app, route, *more)
    try:
        yield found
    finally:
        found.kill()
