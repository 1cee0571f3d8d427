"""Waits while the server goes, and endings that nobody can be told of."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from commandbus import CommandBus, ConfigurationError, ReplyTimeoutError, Worker
from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrate
from tests.bus.support import DOMAIN, complete, lease, one
from tests.support import crash
from tests.worker.support import echo, registry_of, running

LONG = timedelta(seconds=60)


@pytest.fixture
def own_server() -> Iterator[EmbeddedPostgres]:
    """A server of the test's own, with the shortest queue of notifications that there is: 64 pages of 8 KiB."""
    settings = {"max_notify_queue_pages": "64"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            server = EmbeddedPostgres(Path(folder, "data"), settings=settings).start()
        except ConfigurationError:
            pytest.skip("this PostgreSQL has a queue of 8 GB")
        try:
            migrate(server.dsn("postgres"))
            yield server
        finally:
            server.stop()


async def test_who_waits_while_the_server_crashes_is_told_afterwards(own_server: EmbeddedPostgres) -> None:
    dsn = own_server.dsn("postgres")
    async with CommandBus(dsn) as bus:
        call = asyncio.create_task(bus.call(DOMAIN, "Debit", 7, timeout=LONG))
        with pytest.raises(ReplyTimeoutError):
            await bus.call(DOMAIN, "Other", None, timeout=timedelta(milliseconds=200))
        await asyncio.to_thread(crash, own_server)
        async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
            assert (await call).data == 7


def fill_notifications(db: psycopg.Connection) -> None:
    """Say so much that the queue is full, which raises."""
    while True:
        db.execute("SELECT pg_notify('commandbus', repeat('x', 7000) || n) FROM generate_series(1, 20) n")


def test_a_full_queue_of_notifications_keeps_nothing_from_ending(own_server: EmbeddedPostgres) -> None:
    dsn = own_server.dsn("postgres")
    with psycopg.connect(dsn, autocommit=True) as db, psycopg.connect(dsn) as deaf:
        deaf.execute("LISTEN commandbus")
        deaf.commit()
        deaf.execute("SELECT 1")  # a transaction that does not end: what is said to it stays in the queue
        with pytest.raises(psycopg.errors.ProgramLimitExceeded):
            fill_notifications(db)
        sent = '[{"domain": "payments", "command_type": "Debit", "reply_to": "?%s"}]' % ("a" * 32)
        db.execute("SELECT commandbus.send_v1(%s)", [sent])
        assert one(db, "SELECT pg_notification_queue_usage() > 0.5")
        assert complete(db, lease(db, "Debit"), 7) == "done"
