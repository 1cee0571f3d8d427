"""A worker process: `python -m tests.chaos.worker COLOUR DSN JOURNALS`."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from commandbus import (
    Command,
    CommandBus,
    DatabaseUnavailableError,
    HandlerContext,
    HandlerRegistry,
    Reply,
    RetryPolicy,
    Worker,
)
from commandbus.handlers import BlockingContext
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncWorker
from tests.chaos.behaviour import EFFECT, REPLY, Delivery
from tests.chaos.groups import ANNOUNCE, Chain
from tests.chaos.journal import Journal
from tests.chaos.plan import DOMAIN, EFFECTS, KINDS, LEASE, MAX_ATTEMPTS, TOLD, UNDO

NOT_STARTED = 75
"""The exit code of a worker that found no database at its start; it has not worked."""

_MEMORY = 4 << 30  # of addresses: a worker with its threads has 1 to 2 GiB
_RETRY = RetryPolicy(max_attempts=MAX_ATTEMPTS, backoff=[timedelta(milliseconds=50), timedelta(milliseconds=400)])
_OPTIONS: dict[str, Any] = {
    "lease": timedelta(seconds=LEASE),
    "grace": timedelta(seconds=LEASE),
    "transactional_connections": 6,
}
_TOLD = {
    "worker %s starts": "started",
    "the lease was lost": "refused",
    "the lease could not be renewed in time": "late",
}
"""What its log says, by how that begins, and what is noted then."""


def registry_of(journal: Journal, handle: Callable[..., Any], book: Callable[..., Any]) -> HandlerRegistry:
    """A handler for each kind, `book` for those that are transactional; and for who is told, and the processes."""
    registry = HandlerRegistry()
    for kind in (*KINDS, UNDO):
        function = book if kind in EFFECTS else handle
        registry.handler(DOMAIN, kind, transactional=kind in EFFECTS, retry=_RETRY)(function)

    @registry.handler(TOLD, "Reply", transactional=True, retry=_RETRY)
    def keep(command: Command, context: BlockingContext[Any]) -> None:
        reply = Reply.of(command)
        assert context.connection is not None
        context.connection.execute(REPLY, (reply.command_id, reply.status))

    @registry.handler(TOLD, ANNOUNCE, retry=_RETRY)
    def announce(command: Command, _context: BlockingContext[Any]) -> None:
        journal.note("announced", command_id=command.correlation_id)

    registry.register_process(Chain)
    return registry


def work_async(dsn: str, journal: Journal) -> None:
    """Work with `Worker`, until a signal."""

    async def handle(command: Command, context: HandlerContext) -> object:
        delivery = Delivery(context, journal)
        await asyncio.sleep(delivery.begin())
        return delivery.end()

    async def book(command: Command, context: HandlerContext) -> object:
        delivery = Delivery(context, journal)
        assert context.connection is not None
        await context.connection.execute(EFFECT, delivery.effect)
        await asyncio.sleep(delivery.begin())
        return delivery.end()

    async def work() -> None:
        async with CommandBus(dsn) as bus:
            registry = registry_of(journal, handle, book)
            await Worker(bus, registry.domains, registry, concurrency=12, **_OPTIONS).run()

    asyncio.run(work())


def work_sync(dsn: str, journal: Journal) -> None:
    """Work with `SyncWorker`, until a signal."""

    def handle(command: Command, context: SyncHandlerContext) -> object:
        delivery = Delivery(context, journal)
        time.sleep(delivery.begin())
        return delivery.end()

    def book(command: Command, context: SyncHandlerContext) -> object:
        delivery = Delivery(context, journal)
        assert context.connection is not None
        context.connection.execute(EFFECT, delivery.effect)
        time.sleep(delivery.begin())
        return delivery.end()

    with SyncCommandBus(dsn) as bus:
        registry = registry_of(journal, handle, book)
        SyncWorker(bus, registry.domains, registry, thread_pool_size=12, **_OPTIONS).run()


class _Watch(logging.Handler):
    """Notes when the worker has started, which outcomes the database refused, and which renewals came too late."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self.started = False
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        for beginning, what in _TOLD.items():
            if record.msg.startswith(beginning):
                self.started |= what == "started"
                about = {name: getattr(record, name, None) for name in ("command_id", "delivery")}
                self._journal.note(what, **about)


def main(colour: str, dsn: str, journals: str) -> int:
    """Work; returns the exit code."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    journal = Journal(journals, f"worker-{os.getpid()}")
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(process)d %(name)s %(message)s")
    watch = _Watch(journal)
    logger = logging.getLogger("commandbus.worker")
    logger.setLevel(logging.INFO)
    logger.addHandler(watch)
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.ERROR)
    try:
        (work_async if colour == "async" else work_sync)(dsn, journal)
    except DatabaseUnavailableError:
        if watch.started:
            raise
        return NOT_STARTED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
