"""How many server connections a blocking bus and its worker hold, whatever the number of threads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from commandbus import Command, CommandStatus, HandlerRegistry
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncRuntime, SyncWorker
from tests.bus.support import DOMAIN, Connection, one

BUS = 6  # 4 for sends, 2 for what else there is, a worker's claims and completions among it
WORKER = 2  # the renewal of leases, and LISTEN

SESSIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""


def test_64_senders_and_32_handlers_keep_to_the_budget(
    runtime: SyncRuntime, dsn: str, db: Connection, request: pytest.FixtureRequest
) -> None:
    seconds = 30 if request.config.getoption("--long") else 3
    seen: Counter[int] = Counter()
    registry = HandlerRegistry()
    over = threading.Event()

    @registry.handler(DOMAIN, "Debit")
    def send_on(command: Command, context: SyncHandlerContext) -> None:
        if command.data != "last":
            context.bus.send(DOMAIN, "Debit", "last", priority=1)

    def sender() -> int:
        sent = 0
        while not over.is_set():
            bus.send(DOMAIN, "Debit", sent)
            sent += 1
        return sent

    with (
        SyncCommandBus(dsn, runtime=runtime) as bus,
        SyncWorker(bus, DOMAIN, registry, thread_pool_size=32, grace=timedelta(0)),
        ThreadPoolExecutor(64) as threads,
    ):
        senders = [threads.submit(sender) for _ in range(64)]
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                seen[one(db, SESSIONS)] += 1
        finally:
            over.set()
        assert min(sending.result() for sending in senders) > 0
        assert bus.count(status=CommandStatus.COMPLETED) > 0
    assert WORKER < max(seen) <= BUS + WORKER, seen
