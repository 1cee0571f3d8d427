"""The database goes away and comes back: commands keep flowing, and the worker never ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest

from commandbus import (
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    HandlerRegistry,
    OutcomeUnknownError,
    Receipt,
    SendRequest,
    Worker,
)
from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrate
from tests.bus.support import DOMAIN, until
from tests.pgbouncer import pgbouncer
from tests.support import Route, crash, halt
from tests.worker.support import all_settled, echo, registry_of, running, settled


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A server of this test's own, to be killed."""
    with EmbeddedPostgres(tmp_path / "data", settings={"fsync": "off", "full_page_writes": "off"}) as server:
        migrate(server.dsn())
        yield server


@pytest.fixture(params=["direct", "pooled"])
def own_route(request: pytest.FixtureRequest, own_server: EmbeddedPostgres) -> Iterator[Route]:
    """How the bus comes to that server."""
    if request.param == "direct":
        yield {"dsn": own_server.dsn()}
        return
    with pgbouncer(own_server.dsn()) as through:
        yield {"dsn": through, "transaction_pooler": True}


async def test_a_worker_that_starts_when_the_database_is_away_waits_for_it(
    own_server: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "commandbus.worker")
    registry = HandlerRegistry()
    registry.handler(DOMAIN, "Debit", transactional=True)(echo)
    async with CommandBus(own_server.dsn()) as bus:
        halt(own_server)
        async with running(Worker(bus, DOMAIN, registry)) as task:
            await until(lambda: task.done() or "starts: domains" in caplog.text, "the start")
            own_server.start()
            assert (await settled(bus, await bus.send(DOMAIN, "Debit", 1))).result == 1


async def test_a_database_restarted_in_mid_run_loses_nothing(own_server: EmbeddedPostgres, own_route: Route) -> None:
    runs: Counter[int] = Counter()
    numbers = iter(range(1_000_000))
    sent: list[Receipt] = []
    unknown: list[OutcomeUnknownError] = []
    over = asyncio.Event()

    async def work(command: Command, context: HandlerContext) -> int:
        runs[command.data] += 1
        await asyncio.sleep(0.02)
        return int(command.data)

    async def sender(bus: CommandBus) -> None:
        while not over.is_set():
            try:
                sent.append(await bus.send(DOMAIN, "Debit", next(numbers)))
            except OutcomeUnknownError as error:
                unknown.append(error)
            await asyncio.sleep(0.002)

    async with CommandBus(**own_route) as bus:
        worker = Worker(bus, DOMAIN, registry_of(Debit=work), lease=timedelta(seconds=2), concurrency=20)
        async with running(worker) as task:
            senders = [asyncio.create_task(sender(bus)) for _ in range(4)]
            for _ in range(2):
                await settled(bus, await bus.send(DOMAIN, "Debit", next(numbers)))
                await asyncio.to_thread(crash, own_server)
                assert not task.done()
                await settled(bus, await bus.send(DOMAIN, "Debit", next(numbers)), timeout=60)
            over.set()
            await asyncio.gather(*senders)
            commands = await all_settled(bus, sent, timeout=60)
            again = await settled(bus, await bus.send(DOMAIN, "Debit", next(numbers)))
        assert again.status == CommandStatus.COMPLETED
        assert {command.status for command in commands} == {CommandStatus.COMPLETED}
        assert all(command.result == command.data and command.attempts == 1 for command in commands)
        assert {receipt.command_id for receipt in sent}.isdisjoint(error.command_id for error in unknown)
        assert await bus.count() >= len(sent)
    assert len(sent) > 50
    assert set(runs) >= {command.data for command in commands}


@pytest.mark.parametrize("moment", ["before it", "before its commit", "after its commit"])
async def test_a_crash_at_the_completion_that_ends_a_batch_changes_no_count(
    moment: str, own_server: EmbeddedPostgres
) -> None:
    crashed = asyncio.Event()

    async def reach(here: str) -> None:
        if here == moment and not crashed.is_set():
            await asyncio.to_thread(crash, own_server)
            crashed.set()

    async def last(command: Command, context: HandlerContext) -> None:
        await reach("before it")
        async with await psycopg.AsyncConnection.connect(own_server.dsn()) as own:
            await context.complete_on(own, None)
            await reach("before its commit")
        await reach("after its commit")

    async with CommandBus(own_server.dsn()) as bus:
        requests = [SendRequest(DOMAIN, name, {}) for name in ("Debit", "Debit", "Last")]
        batch = await bus.create_batch(DOMAIN, requests, on_complete=SendRequest(DOMAIN, "Debit", "all"))
        async with running(Worker(bus, DOMAIN, registry_of(Debit=echo, Last=last))):
            await crashed.wait()
            async for now in bus.watch_batch(DOMAIN, batch.batch_id, interval=timedelta(milliseconds=20)):
                batch = now
            assert batch.on_complete is not None
            assert (await settled(bus, batch.on_complete)).result == "all"
        assert (batch.total, batch.completed, batch.done) == (3, 3, True)
        assert await bus.count(domain=DOMAIN) == 4
