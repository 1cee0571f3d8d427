"""The primary is lost and the standby takes over, while commands flow: the same buses and workers carry on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from commandbus import (
    Command,
    CommandBus,
    CommandNotFoundError,
    DatabaseUnavailableError,
    HandlerContext,
    HandlerRegistry,
    OutcomeUnknownError,
    RetryPolicy,
    SendRequest,
    SendTimeoutError,
    Worker,
)
from commandbus.embedded import EmbeddedPostgres
from commandbus.handlers import BlockingContext
from tests import blocking
from tests.bus.support import DOMAIN, complete, lease, rows, until
from tests.faults.cluster import Address, Cluster, ask, cluster, freeze
from tests.support import halt
from tests.worker.support import running

LEASE = timedelta(seconds=2)
PATIENT = RetryPolicy(max_attempts=20, backoff=[timedelta(milliseconds=20)])
EFFECT = "INSERT INTO effect VALUES (%s, %s)"
WAITING = "SELECT array_agg(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
CONNECTED = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'commandbus'"
pytestmark = pytest.mark.timeout(600)  # more than its waits can come to
SAMPLE_OF_20 = [pytest.param(n, marks=[pytest.mark.long] if n else []) for n in range(20)]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, quiet_loop: None) -> Iterator[Cluster]:
    """A primary and a standby of this test's own, to be lost."""
    monkeypatch.setattr(blocking, "make_runtime", blocking.own_runtime)
    with tempfile.TemporaryDirectory(prefix="commandbus-") as folder, cluster(Path(folder)) as pair:
        ask(pair.primary, "CREATE TABLE effect (command_id uuid, delivery bigint)")
        yield pair
    blocking.shutdown()


class Flow:
    """Senders and workers of both halves, and what they were told. `sent` has the number of each command."""

    def __init__(self) -> None:
        self.sent: dict[UUID, int] = {}
        self.acknowledged: list[UUID] = []
        self.unknown: set[UUID] = set()
        self._numbers = itertools.count()
        self._over = asyncio.Event()

    async def some(self, bus: CommandBus, count: int) -> list[UUID]:
        """Send so many commands, one after another; returns the ids of those that were acknowledged."""
        ids = [uuid4() for _ in range(count)]
        for command_id in ids:
            self.sent[command_id] = next(self._numbers)
            try:
                await bus.send(DOMAIN, "Debit", self.sent[command_id], command_id=command_id)
                self.acknowledged.append(command_id)
            except OutcomeUnknownError as error:
                self.unknown.add(error.command_id)
        return [command_id for command_id in ids if command_id not in self.unknown]

    async def more(self, count: int = 40) -> None:
        """Come back when so many more were acknowledged, whoever sent them."""
        enough = len(self.acknowledged) + count
        await until(lambda: len(self.acknowledged) >= enough, f"{count} more commands to be acknowledged", timeout=60)

    async def _send(self, bus: CommandBus) -> None:
        while not self._over.is_set():
            await self.some(bus, 1)

    async def stop(self) -> None:
        """Send no more."""
        self._over.set()
        await asyncio.gather(*self._senders)

    @contextlib.asynccontextmanager
    async def on(self, dsn: str) -> AsyncIterator[CommandBus]:
        """Let commands flow by way of this DSN; yields the async one of the two buses."""
        blocking_worker: Any = blocking.Worker
        async with (
            CommandBus(dsn) as bus,
            blocking.CommandBus(dsn) as twin,
            running(Worker(bus, DOMAIN, registry(debit), lease=LEASE)),
            running(blocking_worker(twin, DOMAIN, registry(debit_blocking), lease=LEASE)),
        ):
            buses: Any = (bus, bus, twin, twin)
            self._senders = [asyncio.create_task(self._send(one)) for one in buses]
            try:
                yield bus
            finally:
                await self.stop()


def registry(function: Any) -> HandlerRegistry:  # noqa: ANN401 - a handler of either colour
    found = HandlerRegistry()
    found.handler(DOMAIN, "Debit", transactional=True, retry=PATIENT)(function)
    return found


async def debit(command: Command, context: HandlerContext) -> Any:  # noqa: ANN401 - any JSON
    assert context.connection is not None
    await context.connection.execute(EFFECT, [command.command_id, context.delivery])
    return command.data


def debit_blocking(command: Command, context: BlockingContext[Any]) -> Any:  # noqa: ANN401 - any JSON
    assert context.connection is not None
    context.connection.execute(EFFECT, [command.command_id, context.delivery])
    return command.data


async def all_completed(server: EmbeddedPostgres) -> set[UUID]:
    """Wait for the end of all commands on this server, and see that all is as it should be; returns their ids."""
    unfinished = "SELECT count(*) FROM commandbus.commands WHERE finished_at IS NULL AND command_type = 'Debit'"
    await until(lambda: ask(server, unfinished) == 0, "the end of all commands", timeout=60)
    with psycopg.connect(server.dsn(), autocommit=True) as db:
        found = rows(db, "SELECT command_id, status FROM commandbus.commands WHERE command_type = 'Debit'")
        assert {status for _, status in found} == {"COMPLETED"}
        assert sorted(rows(db, "SELECT command_id FROM effect")) == sorted((command_id,) for command_id, _ in found)
        assert rows(db, "SELECT * FROM commandbus.verify_v1()") == []
    return {command_id for command_id, _ in found}


@pytest.mark.parametrize("failover", SAMPLE_OF_20)
async def test_with_a_synchronous_standby_nothing_acknowledged_is_lost(pair: Cluster, failover: int) -> None:
    pair.make_synchronous()
    flow = Flow()
    async with flow.on(pair.dsn):
        await flow.more()
        if failover % 2 == 0:  # the network goes first: commits that nobody will ever hear of
            pair.replication.freeze()
            await until(lambda: ask(pair.primary, WAITING), "commits that wait for the standby")
        await asyncio.to_thread(halt, pair.primary)
        await asyncio.to_thread(pair.promote)
        await flow.more()
        await flow.stop()
        present = await all_completed(pair.standby)
    assert set(flow.acknowledged) <= present <= set(flow.acknowledged) | flow.unknown


@pytest.mark.long
async def test_a_primary_that_hangs_holds_up_nobody_for_ever(pair: Cluster) -> None:
    pair.make_synchronous()
    flow = Flow()
    async with flow.on(pair.dsn):
        await flow.more()
        hanging = freeze(pair.primary)
        try:
            await asyncio.to_thread(pair.promote)
            await flow.more()
        finally:
            for pid in hanging:  # the operator's part: it must not come back as a primary
                os.kill(pid, signal.SIGKILL)
        await flow.stop()
        present = await all_completed(pair.standby)
    assert set(flow.acknowledged) <= present <= set(flow.acknowledged) | flow.unknown


async def test_what_an_asynchronous_standby_lacks_is_told_and_made_good_by_sending_again(pair: Cluster) -> None:
    flow = Flow()
    async with flow.on(pair.dsn) as bus:
        await flow.more()
        safe = list(flow.acknowledged)
        await asyncio.to_thread(pair.catch_up)
        pair.replication.freeze()
        unsafe = await flow.some(bus, 10)
        await asyncio.to_thread(halt, pair.primary)
        await asyncio.to_thread(pair.promote)
        before = list(flow.acknowledged)  # by now the last answers of the primary have been read, too
        await flow.more()

        lost = {command_id for command_id in before if not await exists(bus, command_id)}
        assert set(unsafe) <= lost
        assert lost.isdisjoint(safe)

        again = [SendRequest(DOMAIN, "Debit", flow.sent[command_id], command_id=command_id) for command_id in before]
        receipts = await bus.send_batch(again)
        assert {receipt.command_id for receipt in receipts if not receipt.duplicate} == lost
        await flow.stop()
        present = await all_completed(pair.standby)
    assert set(flow.acknowledged) <= present <= set(flow.acknowledged) | flow.unknown


async def exists(bus: CommandBus, command_id: UUID) -> bool:
    try:
        await bus.get_command(DOMAIN, command_id)
    except CommandNotFoundError:
        return False
    return True


async def test_a_lease_that_the_standby_never_saw_changes_nothing(pair: Cluster) -> None:
    """It has the number of a delivery that another worker gets: only the token tells them apart."""
    async with CommandBus(pair.dsn) as bus:
        receipt = await bus.send(DOMAIN, "Credit", {})
        pair.catch_up()
        pair.replication.freeze()
        with psycopg.connect(pair.primary.dsn(), autocommit=True) as db:
            stale = lease(db, "Credit")
        halt(pair.primary)
        pair.promote()
        with psycopg.connect(pair.standby.dsn(), autocommit=True) as db:
            assert complete(db, stale, "never claimed here") == "lost"
            valid = lease(db, "Credit")
            assert valid["delivery"] == stale["delivery"]
            assert complete(db, stale, "claimed by another") == "lost"
            assert complete(db, valid, "right") == "done"
            assert rows(db, "SELECT * FROM commandbus.verify_v1()") == []
        assert (await bus.get_command(receipt)).result == "right"


async def test_a_command_sent_again_is_not_acknowledged_before_the_standby_has_it(pair: Cluster) -> None:
    pair.make_synchronous()
    async with CommandBus(pair.dsn) as bus:
        pair.replication.freeze()
        send = asyncio.create_task(bus.send(DOMAIN, "Debit", {}))
        (first,) = await until(lambda: ask(pair.primary, WAITING), "a commit that waits for the standby")
        ask(
            pair.primary, f"SELECT pg_terminate_backend({first}, 10000)"
        )  # it is committed here, and there is no answer
        await until(lambda: send.done() or ask(pair.primary, WAITING), "the library to send it again")
        assert not send.done()
        pair.replication.thaw()
        receipt = await send
        halt(pair.primary)
        pair.promote()
        assert await exists(bus, receipt.command_id)


# ------------------------------------------------------------------------------------- what takes no writes


async def test_a_standby_is_read_and_waited_for(pair: Cluster) -> None:
    brief = CommandBus(pair.standby.dsn(), send_timeout=timedelta(milliseconds=200))
    async with brief, CommandBus(pair.standby.dsn()) as patient:
        with pytest.raises(SendTimeoutError, match="it was not sent"):
            await brief.send(DOMAIN, "Debit", {})
        with pytest.raises(DatabaseUnavailableError, match=r"cannot do it now.*in a read-only"):
            await brief.cancel(DOMAIN, uuid4())
        assert await brief.count() == 0
        send = asyncio.create_task(patient.send(DOMAIN, "Debit", {}))
        halt(pair.primary)
        pair.promote()
        await send
        assert await patient.count() == 1


async def test_nobody_stays_with_a_primary_that_has_become_a_standby(pair: Cluster, tmp_path: Path) -> None:
    """One address, as of a name or a proxy, which leads to the new primary later than the old one is a standby."""
    flow = Flow()
    with Address() as address:
        address.leads_to(pair.primary)
        async with flow.on(address.dsn):
            await flow.more()
            with pair.switched_over():
                await until(lambda: ask(pair.primary, CONNECTED), "connections to what is a standby now")
                address.leads_to(pair.standby)
                await flow.more()
                await until(lambda: not ask(pair.primary, CONNECTED), "no more connections to the standby", timeout=60)
                await flow.stop()
                present = await all_completed(pair.standby)
    assert set(flow.acknowledged) <= present <= set(flow.acknowledged) | flow.unknown
