"""A lease lasts as long as its worker, is lost to nobody else, and nothing is written after it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from commandbus import Command, CommandBus, CommandStatus, HandlerContext, Receipt, SendRequest, Worker
from tests.bus.support import (
    DOMAIN,
    Connect,
    Connection,
    complete,
    expire,
    in_progress,
    lease,
    lock_table,
    terminate,
    until,
)
from tests.worker.support import (
    HOUR,
    LEASE,
    Watched,
    all_settled,
    echo,
    has_status,
    registry_of,
    running,
    settled,
    story,
)

MINUTE = timedelta(minutes=1)


def innocent(command: Command) -> None:
    """Completed by its first delivery."""
    assert (command.status, command.delivery, command.crashes) == (CommandStatus.COMPLETED, 1, 0)


async def test_a_handler_may_take_longer_than_its_lease(bus: CommandBus) -> None:
    async def on_the_loop(command: Command, context: HandlerContext) -> bool:
        await asyncio.sleep(2.2)
        return context.cancelled

    def in_a_thread(command: Command, context: HandlerContext) -> bool:
        time.sleep(2.2)
        return context.cancelled

    async with running(Worker(bus, DOMAIN, registry_of(Async=on_the_loop, Def=in_a_thread), lease=LEASE)):
        sent = [await bus.send(DOMAIN, command_type, {}) for command_type in ("Async", "Def")]
        for command in await all_settled(bus, sent):
            innocent(command)
            assert command.result is False


async def test_a_handler_that_blocks_the_loop_for_two_leases_keeps_its_own_and_its_neighbours(
    bus: CommandBus,
) -> None:
    watched = Watched()

    async def block(command: Command, context: HandlerContext) -> bool:
        time.sleep(2.2)  # noqa: ASYNC251 - that is what is tried
        return context.cancelled

    async with running(Worker(bus, DOMAIN, registry_of(Wait=watched.handler, Block=block), lease=LEASE)):
        neighbours = await bus.send_batch([SendRequest(DOMAIN, "Wait", n) for n in range(20)])
        await watched.started(20)
        blocked = await settled(bus, await bus.send(DOMAIN, "Block", {}))
        innocent(blocked)
        assert blocked.result is False
        watched.go_on.set()
        for command in await all_settled(bus, neighbours):
            innocent(command)
    assert watched.cancelled == 0


async def test_a_killed_renewal_connection_costs_no_lease(bus: CommandBus, db: Connection) -> None:
    watched = Watched()
    async with running(Worker(bus, DOMAIN, registry_of(Debit=watched.handler), lease=LEASE)):
        receipt = await bus.send(DOMAIN, "Debit", {})
        for _ in range(3):
            await until(lambda: terminate(db, "renew_v1"), "a connection that renews")
        before = (await bus.get_command(receipt)).lease_until
        assert before is not None

        async def renewed() -> bool:
            after = (await bus.get_command(receipt)).lease_until
            return after is not None and after > before

        for _ in range(3):
            await _wait(renewed)
        watched.go_on.set()
        innocent(await settled(bus, receipt))


async def _wait(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():  # noqa: ASYNC110 - a state of the database
            await asyncio.sleep(0.05)


async def test_an_operators_open_transaction_on_one_row_costs_no_neighbour_its_lease(
    bus: CommandBus, db: Connection, connect: Connect
) -> None:
    watched = Watched()
    async with running(Worker(bus, DOMAIN, registry_of(Debit=watched.handler), lease=LEASE)):
        sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(10)])
        await watched.started(10)
        operator = connect()
        operator.execute("SELECT commandbus.cancel_v1(%s, %s, 'ana', 'why')", [DOMAIN, sent[0].command_id])
        # Its own lease cannot be renewed: the handler is told, by the clock of this process.
        await until(lambda: watched.cancelled, "the cancellation of the locked one")
        await asyncio.sleep(2)  # two leases more, with the row still locked
        operator.commit()
        watched.go_on.set()
        canceled, *others = await all_settled(bus, sent)
        assert (canceled.status, canceled.result) == (CommandStatus.CANCELED, None)
        for command in others:
            innocent(command)
        innocent(await settled(bus, await bus.send(DOMAIN, "Debit", {})))
    assert watched.cancelled == 1


async def test_a_locked_row_is_completed_when_it_is_free(bus: CommandBus, connect: Connect) -> None:
    watched = Watched()
    async with running(Worker(bus, DOMAIN, registry_of(Debit=watched.handler), lease=MINUTE)):
        sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(10)])
        await watched.started(10)
        operator = connect()
        operator.execute("SELECT FROM commandbus.command WHERE command_id = %s FOR UPDATE", [sent[0].command_id])
        watched.go_on.set()
        for command in await all_settled(bus, sent[1:]):
            innocent(command)
        assert (await bus.get_command(sent[0])).status == CommandStatus.IN_PROGRESS
        operator.rollback()
        innocent(await settled(bus, sent[0]))


# ------------------------------------------------------------------------------------- after the lease


async def test_a_late_completion_changes_nothing(bus: CommandBus, db: Connection) -> None:
    """Another worker took over and has finished: what the first one says is not written."""
    watched = Watched()
    async with running(Worker(bus, DOMAIN, registry_of(Debit=watched.handler), lease=HOUR)):
        receipt = await bus.send(DOMAIN, "Debit", {})
        await watched.started()
        with db.transaction():  # or the worker itself might be the next owner
            expire(db, receipt.command_id)
            owner = lease(db, "Debit")
        assert complete(db, owner, "by its owner") == "done"
        before = await bus.get_command(receipt), await bus.get_audit_trail(receipt)
        watched.go_on.set()
        innocent(await settled(bus, await bus.send(DOMAIN, "Debit", {})))  # recorded together, or later
    assert (await bus.get_command(receipt), await bus.get_audit_trail(receipt)) == before
    assert before[0].result == "by its owner"
    assert await story(bus, receipt) == ["SENT", "CLAIMED", "CRASHED", "CLAIMED", "COMPLETED"]


@pytest.mark.parametrize("ending", ["returns", "fails"])
async def test_a_late_ending_does_not_touch_the_new_owners_lease(bus: CommandBus, db: Connection, ending: str) -> None:
    watched = Watched()

    async def handle(command: Command, context: HandlerContext) -> Any:  # noqa: ANN401 - any JSON
        result = await watched(command, context)
        if ending == "fails":
            raise ValueError("late")
        return result

    async with running(Worker(bus, DOMAIN, registry_of(Debit=handle), lease=HOUR)):
        receipt = await bus.send(DOMAIN, "Debit", {})
        await watched.started()
        with db.transaction():
            expire(db, receipt.command_id)
            owner = lease(db, "Debit", seconds=3600)
        watched.go_on.set()
        async with asyncio.timeout(20):
            await settled(bus, await bus.send(DOMAIN, "Debit", {}, max_attempts=1))
        command = await bus.get_command(receipt)
        assert (command.status, command.delivery, command.attempts) == (CommandStatus.IN_PROGRESS, 2, 0)
        assert complete(db, owner, "by its owner") == "done"


async def test_a_worker_that_finds_its_lease_taken_stops_the_handler(bus: CommandBus, db: Connection) -> None:
    watched = Watched()
    go_on = threading.Event()
    contexts: list[HandlerContext] = []

    def blocking(command: Command, context: HandlerContext) -> str:
        contexts.append(context)
        go_on.wait(60)
        return "late"

    registry = registry_of(Async=watched.handler, Def=blocking)
    try:
        async with running(Worker(bus, DOMAIN, registry, lease=LEASE)):
            sent = [await bus.send(DOMAIN, command_type, {}) for command_type in ("Async", "Def")]
            await watched.started()
            await until(lambda: contexts, "the def handler")
            for receipt in sent:
                await bus.cancel(receipt)
            await until(lambda: watched.cancelled and contexts[0].cancelled, "the end of both leases")
            go_on.set()
        assert [(await bus.get_command(receipt)).result for receipt in sent] == [None, None]
        assert {(await bus.get_command(receipt)).status for receipt in sent} == {CommandStatus.CANCELED}
    finally:
        go_on.set()


async def test_renewals_that_cannot_get_through_end_the_leases_by_the_clock(
    bus: CommandBus, db: Connection, connect: Connect
) -> None:
    """Nobody tells the worker: the table is locked. It must not believe in leases that others may hold by now."""
    watched = Watched()
    go_on = threading.Event()
    contexts: list[HandlerContext] = []

    def blocking(command: Command, context: HandlerContext) -> int:
        contexts.append(context)
        if context.delivery == 1:
            go_on.wait(60)
        return context.delivery

    registry = registry_of(Async=watched.handler, Def=blocking)
    blocker = connect()
    try:
        async with running(Worker(bus, DOMAIN, registry, lease=LEASE, thread_pool_size=4)):
            sent = [await bus.send(DOMAIN, command_type, {}) for command_type in ("Async", "Def")]
            await watched.started()
            await until(lambda: contexts, "the def handler")
            lock_table(blocker, "command")
            await until(lambda: watched.cancelled and contexts[0].cancelled, "the end of both leases")
            go_on.set()
            watched.go_on.set()
            blocker.rollback()
            for command in await all_settled(bus, sent):
                assert (command.status, command.delivery, command.crashes) == ("COMPLETED", 2, 1)
                assert command.result in {2, "delivery 2"}
    finally:
        go_on.set()


# ---------------------------------------------------------- two leases of one command in one worker


async def test_a_worker_that_takes_its_own_command_over_records_the_newer_delivery(
    bus: CommandBus, db: Connection
) -> None:
    """Outcomes could not be recorded for longer than the lease: two deliveries wait for it, and neighbours."""
    runs: list[int] = []

    async def note(command: Command, context: HandlerContext) -> str:
        runs.append(context.delivery)
        return f"delivery {context.delivery}"

    db.execute(
        "CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = 'object_in_use'; END $$"
    )
    db.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON commandbus.command_history"
        " FOR EACH ROW EXECUTE FUNCTION public.refuse()"
    )
    async with running(Worker(bus, DOMAIN, registry_of(Debit=note, Echo=echo), lease=MINUTE)):
        twice = await bus.send(DOMAIN, "Debit", {})
        await until(lambda: runs == [1], "the first delivery")
        expire(db, twice.command_id)
        await bus.wake(DOMAIN)
        await until(lambda: runs == [1, 2], "the second delivery")
        neighbours = await bus.send_batch([SendRequest(DOMAIN, "Echo", n) for n in range(20)])
        await until(lambda: in_progress(db) == 21, "all handlers")
        db.execute("DROP TRIGGER refuse ON commandbus.command_history")
        for command in await all_settled(bus, neighbours):
            innocent(command)
        command = await settled(bus, twice)
    assert (command.status, command.result, command.delivery) == ("COMPLETED", "delivery 2", 2)


async def test_a_command_taken_over_by_its_own_worker_costs_no_neighbour_its_lease(
    bus: CommandBus, db: Connection
) -> None:
    watched = Watched()
    async with running(Worker(bus, DOMAIN, registry_of(Debit=watched.handler), lease=LEASE)):
        sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(5)])
        await watched.started(5)
        twice: Receipt = sent[0]
        expire(db, twice.command_id)
        await bus.wake(DOMAIN)
        await watched.started(6)
        await until(lambda: watched.cancelled, "the end of the first delivery")
        await asyncio.sleep(2)  # two leases, in which both deliveries could get in each other's way
        await has_status(bus, twice, CommandStatus.IN_PROGRESS)
        watched.go_on.set()
        first, *others = await all_settled(bus, sent)
        assert (first.result, first.delivery) == ("delivery 2", 2)
        for command in others:
            innocent(command)
    assert watched.cancelled == 1
