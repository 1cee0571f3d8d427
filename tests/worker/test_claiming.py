"""What a worker takes, in which order, and how many at once."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import psycopg
import pytest

from commandbus import (
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    SendRequest,
    Worker,
)
from commandbus.worker.claimer import Claimer
from tests.bus.support import DOMAIN, Connect, Connection, one, terminate, until
from tests.support import direct_only
from tests.worker.support import (
    HOUR,
    Watched,
    all_settled,
    counter,
    echo,
    registry_of,
    running,
    settled,
)


async def test_types_without_a_handler_stay(bus: CommandBus) -> None:
    unknown = await bus.send_batch([SendRequest(DOMAIN, "Unknown", n) for n in range(300)])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        for n in range(5):
            assert (await settled(bus, await bus.send(DOMAIN, "Debit", n))).result == n
    assert await bus.count(command_type="Unknown", status=CommandStatus.PENDING) == len(unknown)
    assert {command.delivery for command in await bus.query_commands(command_type="Unknown", limit=300)} == {0}


async def test_one_worker_serves_several_domains(bus: CommandBus) -> None:
    registry = registry_of(Debit=echo)
    registry.handler("shipping", "Ship")(echo)
    registry.handler("other", "Ship")(echo)
    away = await bus.send("other", "Ship", 0)
    async with running(Worker(bus, [DOMAIN, "shipping"], registry)):
        sent = await bus.send_batch(
            [SendRequest(DOMAIN, "Debit", n) for n in range(20)]
            + [SendRequest("shipping", "Ship", n) for n in range(20)]
        )
        assert {command.status for command in await all_settled(bus, sent)} == {CommandStatus.COMPLETED}
    assert (await bus.get_command(away)).status == CommandStatus.PENDING


async def test_two_workers_share_and_run_nothing_twice(bus: CommandBus) -> None:
    ran: list[int] = []

    async def note(command: Command, context: HandlerContext) -> None:
        ran.append(command.data)
        await asyncio.sleep(0.001)

    sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(300)])
    registry = registry_of(Debit=note)
    async with (
        running(Worker(bus, DOMAIN, registry, concurrency=5)) as _,
        running(Worker(bus, DOMAIN, registry, concurrency=5)),
    ):
        commands = await all_settled(bus, sent)
    assert sorted(ran) == list(range(300))
    assert len({command.worker for command in commands}) == 2


@pytest.mark.parametrize("concurrency", [1, 20])
async def test_higher_priorities_go_first(bus: CommandBus, concurrency: int) -> None:
    order: list[int] = []

    async def note(command: Command, context: HandlerContext) -> None:
        order.append(command.priority)

    priorities = [0, -100, 5, 100, 0, -5, 99, 5]
    await bus.send_batch([SendRequest(DOMAIN, "Debit", {}, priority=priority) for priority in priorities])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=note), concurrency=concurrency)):
        await until(lambda: len(order) == len(priorities), "all of them")
    assert order == sorted(priorities, reverse=True)


async def test_equals_go_in_the_order_they_were_sent(bus: CommandBus) -> None:
    order: list[int] = []

    async def note(command: Command, context: HandlerContext) -> None:
        order.append(command.data)

    await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(50)])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=note), concurrency=1)):
        await until(lambda: len(order) == 50, "all of them")
    assert order == list(range(50))


async def test_concurrency_is_used_and_never_exceeded(bus: CommandBus) -> None:
    now = most = 0

    async def count(command: Command, context: HandlerContext) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.005)
        now -= 1

    registry = registry_of(Debit=count)
    registry.handler("shipping", "Ship")(count)
    sent = await bus.send_batch(
        [SendRequest(*kind, n) for n in range(150) for kind in ((DOMAIN, "Debit"), ("shipping", "Ship"))]
    )
    async with running(Worker(bus, [DOMAIN, "shipping"], registry, concurrency=7)):
        await all_settled(bus, sent)
    assert most == 7


async def test_only_what_can_start_is_claimed(bus: CommandBus) -> None:
    watched = Watched()
    sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(10)])
    async with running(Worker(bus, DOMAIN, registry_of(Debit=watched.handler), concurrency=3)):
        await watched.started(3)
        assert await bus.count(status=CommandStatus.IN_PROGRESS) == 3
        watched.go_on.set()
        await all_settled(bus, sent)


# ---------------------------------------------------------------------------------- in time, unhurried


async def test_a_scheduled_command_runs_when_it_is_due(bus: CommandBus, monkeypatch: pytest.MonkeyPatch) -> None:
    claims: list[object] = []
    monkeypatch.setattr(Claimer, "_work", counter(Claimer._work, claims))
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        receipt = await bus.send(DOMAIN, "Debit", 1, delay=timedelta(seconds=1.5))
        later = await bus.send(DOMAIN, "Debit", 2, delay=HOUR)
        command = await settled(bus, receipt)
        assert (await bus.get_command(later)).status == CommandStatus.SCHEDULED
    assert command.not_before is not None
    assert command.claimed_at is not None
    assert command.claimed_at >= command.not_before
    assert len(claims) < 100  # a busy loop makes thousands


async def test_a_locked_due_command_is_no_reason_to_hurry(
    bus: CommandBus, db: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = await bus.send(DOMAIN, "Debit", 1, delay=timedelta(milliseconds=1))
    blocker = connect()
    blocker.execute("SELECT FROM commandbus.command FOR UPDATE")
    claims: list[object] = []
    monkeypatch.setattr(Claimer, "_work", counter(Claimer._work, claims))
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo, Other=echo))):
        await settled(bus, await bus.send(DOMAIN, "Other", 1))
        await asyncio.sleep(1)  # not to wait for anything: how many claims are made in that time?
        assert len(claims) < 100
        blocker.rollback()
        assert (await settled(bus, receipt)).result == 1


async def test_what_comes_without_a_hint_is_found(bus: CommandBus, dsn: str) -> None:
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        await settled(bus, await bus.send(DOMAIN, "Debit", 0))
        with psycopg.connect(dsn) as connection:
            receipt = await bus.send(DOMAIN, "Debit", 1, connection=connection)
        assert (await settled(bus, receipt)).result == 1


async def test_a_worker_without_listen_polls(dsn: str, db: Connection) -> None:
    async with (
        CommandBus(dsn, transaction_pooler=True) as bus,
        running(Worker(bus, DOMAIN, registry_of(Debit=echo))),
    ):
        assert (await settled(bus, await bus.send(DOMAIN, "Debit", 1))).result == 1
        assert one(db, "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'") == 0


@direct_only
async def test_a_killed_listener_comes_back(bus: CommandBus, db: Connection) -> None:
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        for n in range(2):
            (pid,) = await until(lambda: terminate(db, "LISTEN"), "a connection that listens")
            assert (await settled(bus, await bus.send(DOMAIN, "Debit", n))).result == n
            assert pid not in terminate(db, "no such query")
        await until(lambda: terminate(db, "LISTEN"), "another connection that listens")


async def test_the_lost_connections_of_a_claimer_are_replaced(bus: CommandBus, db: Connection) -> None:
    async with running(Worker(bus, DOMAIN, registry_of(Debit=echo))):
        for n in range(3):
            await until(lambda: terminate(db, "work_v1"), "a connection that claims")
            assert (await settled(bus, await bus.send(DOMAIN, "Debit", n))).delivery >= 1
