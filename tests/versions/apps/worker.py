"""A worker: `python worker.py DSN KIND NAME LEASE_SECONDS`, with KIND async or sync. Prints a line when it starts.

Written for 0.1.0 and for what came later. The async one has `async def` handlers, the sync one `def`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from commandbus import (
    BusinessRuleError,
    Command,
    CommandBus,
    HandlerRegistry,
    PermanentCommandError,
    RetryPolicy,
    TransientCommandError,
    Worker,
)

DOMAIN = "payments"
BOOK = "INSERT INTO public.booking (command_id, worker) VALUES (%s, %s)"


def decide(command: Command, attempt: int, name: str) -> object:
    """Return the result, or raise what this type and this attempt ask for."""
    match command.command_type:
        case "Retry" if attempt == 1:
            raise TransientCommandError("BUSY", "try again")
        case "Park" if not command.data.get("mended"):
            raise PermanentCommandError("BAD_DATA", "it takes a person")
        case "Refuse":
            raise BusinessRuleError("NO_FUNDS", "no")
    return {"n": command.data["n"], "by": name}


def waits(command: Command) -> bool:
    """Say whether the file is still missing that lets this delivery go on; another one says that it runs."""
    file = f"{command.data['file']}.{command.delivery}"
    Path(f"{file}.begun").touch()
    return not Path(file).exists()


def async_handlers(name: str, handler: Callable[..., Any]) -> None:
    """Register the handlers of an async worker."""

    async def decided(command: Command, context: Any) -> object:  # noqa: ANN401 - of either version
        return decide(command, context.attempt, name)

    async def book(command: Command, context: Any) -> object:  # noqa: ANN401 - as above
        await context.connection.execute(BOOK, [command.command_id, name])
        return decide(command, context.attempt, name)

    async def wait_for_file(command: Command, context: Any) -> object:  # noqa: ANN401 - as above
        while waits(command):  # noqa: ASYNC110 - nobody else can tell it
            await asyncio.sleep(0.01)
        return decide(command, context.attempt, name)

    register(handler, decided, book, wait_for_file)


def sync_handlers(name: str, handler: Callable[..., Any]) -> None:
    """Register the handlers of a sync worker."""

    def decided(command: Command, context: Any) -> object:  # noqa: ANN401 - of either version
        return decide(command, context.attempt, name)

    def book(command: Command, context: Any) -> object:  # noqa: ANN401 - as above
        context.connection.execute(BOOK, [command.command_id, name])
        return decide(command, context.attempt, name)

    def wait_for_file(command: Command, context: Any) -> object:  # noqa: ANN401 - as above
        while waits(command) and not context.cancelled:
            time.sleep(0.01)
        return decide(command, context.attempt, name)

    register(handler, decided, book, wait_for_file)


def register(handler: Callable[..., Any], decided: object, book: object, wait_for_file: object) -> None:
    """Give each type its function."""
    at_once = RetryPolicy(max_attempts=3, backoff=[timedelta(milliseconds=5)])
    for command_type in ("Echo", "Retry", "Park", "Refuse"):
        handler(DOMAIN, command_type, retry=at_once)(decided)
    handler(DOMAIN, "Book", transactional=True)(book)
    handler(DOMAIN, "Wait")(wait_for_file)


def started() -> None:
    """Tell that it has."""
    sys.stdout.write("started\n")
    sys.stdout.flush()


async def work(dsn: str, name: str, lease: timedelta) -> None:
    """Work until SIGTERM."""
    registry = HandlerRegistry()
    async_handlers(name, registry.handler)
    async with CommandBus(dsn) as bus:
        started()
        await Worker(bus, DOMAIN, registry, lease=lease).run()


def work_blocking(dsn: str, name: str, lease: timedelta) -> None:
    """Work until SIGTERM."""
    from commandbus.sync import SyncCommandBus, SyncWorker  # 0.1.0 does not have it

    registry = HandlerRegistry()
    sync_handlers(name, registry.handler)
    with SyncCommandBus(dsn) as bus:
        started()
        SyncWorker(bus, DOMAIN, registry, lease=lease).run()


def main(dsn: str, kind: str, name: str, lease: str) -> None:
    """Work as the one or the other."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s %(message)s")
    if kind == "async":
        asyncio.run(work(dsn, name, timedelta(seconds=float(lease))))
    else:
        work_blocking(dsn, name, timedelta(seconds=float(lease)))


if __name__ == "__main__":
    main(*sys.argv[1:])
