"""Processes that die: killed from outside, or by what they handle."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path

from commandbus import (
    Command,
    CommandBus,
    CommandStatus,
    HandlerContext,
    SendRequest,
    TroubleshootingQueue,
    Worker,
)
from tests.bus.support import DOMAIN, Connection, expire, in_progress, lease, one, until
from tests.support import Route, aeventually
from tests.worker.support import (
    LEASE,
    PARKED,
    all_settled,
    events,
    has_status,
    process,
    registry_of,
    running,
    settled,
    story,
)


async def test_a_killed_worker_is_taken_over(bus: CommandBus, route: Route, db: Connection, tmp_path: Path) -> None:
    async def next_one(command: Command, context: HandlerContext) -> str:
        return f"delivery {context.delivery}"

    with process("worker_app.py", route, "1", "10") as found:
        sent = await bus.send_batch([SendRequest(DOMAIN, "UntilFile", str(tmp_path / "never"))] * 5)
        await until(lambda: in_progress(db) == 5, "all of them at work")
        killed_at = one(db, "SELECT clock_timestamp()")
        found.kill()
        async with running(Worker(bus, DOMAIN, registry_of(UntilFile=next_one), lease=LEASE)):
            commands = await all_settled(bus, sent)
    for receipt, command in zip(sent, commands, strict=True):
        assert (command.status, command.result, command.delivery) == ("COMPLETED", "delivery 2", 2)
        assert (command.attempts, command.crashes) == (1, 1)
        assert await story(bus, receipt) == ["SENT", "CLAIMED", "CRASHED", "CLAIMED", "COMPLETED"]
        (crash,) = await events(bus, receipt, "CRASHED")
        # Lease, sweep and one second more; three times that, because the machine may be busy.
        assert timedelta(0) < crash.occurred_at - killed_at < 3 * (LEASE + timedelta(seconds=1) * 2)


async def test_a_stopped_process_that_goes_on_later_changes_nothing(
    bus: CommandBus, route: Route, db: Connection, tmp_path: Path
) -> None:
    """A pause of the machine, a debugger: it wakes up with a lease that is another's by now, and finishes."""

    async def next_one(command: Command, context: HandlerContext) -> str:
        return "by the second"

    gate = tmp_path / "gate"
    with process("worker_app.py", route, "1", "10") as found:
        receipt = await bus.send(DOMAIN, "UntilFile", str(gate))
        await has_status(bus, receipt, CommandStatus.IN_PROGRESS)
        found.stop()
        async with running(Worker(bus, DOMAIN, registry_of(UntilFile=next_one), lease=LEASE)):
            command = await settled(bus, receipt)
        before = await bus.get_audit_trail(receipt)
        gate.touch()
        other = await bus.send(DOMAIN, "UntilFile", str(gate))
        found.go_on()
        assert (await settled(bus, other)).result == "delivery 1"
    assert command.result == "by the second"
    assert await bus.get_command(receipt) == command
    assert await bus.get_audit_trail(receipt) == before


async def test_a_handler_that_kills_its_process_takes_no_neighbour_along(bus: CommandBus, route: Route) -> None:
    """Three processes die of it, the last one while it ran alone; then it is parked."""
    poison = await bus.send(DOMAIN, "Poison", 5)
    neighbours = await bus.send_batch([SendRequest(DOMAIN, "Neighbour", n) for n in range(8)])
    with process("worker_app.py", route, "1", "20") as found:

        async def parked() -> bool:
            found.restart_if_dead()
            return (await bus.get_command(poison)).status == PARKED

        await aeventually(parked, timeout=60, what="the end of the poison")
        for command in await all_settled(bus, neighbours, timeout=60):
            found.restart_if_dead()
            assert command.status == CommandStatus.COMPLETED
            assert command.crashes <= 2
            assert command.attempts == 1
    assert found.starts == 4
    command = await bus.get_command(poison)
    assert (command.crashes, command.delivery, command.attempts) == (3, 3, 0)
    assert command.error is not None
    assert command.error.code == "CRASHED"
    assert [(await events(bus, poison, "CRASHED"))[n].to_status for n in range(3)] == ["PENDING", "PENDING", PARKED]
    queue = TroubleshootingQueue(bus)
    assert await queue.count_troubleshooting() == 1
    (listed,) = await queue.list_troubleshooting(DOMAIN)
    assert listed.command_id == poison.command_id


async def test_what_only_waited_for_a_thread_is_not_charged_for_the_death_of_its_process(
    bus: CommandBus, route: Route
) -> None:
    with process("ahead_app.py", route, "1") as found:
        await settled(bus, await bus.send(DOMAIN, "Short", 0))  # from now on it looks ahead
        requests = [SendRequest(DOMAIN, "Poison", 1), *[SendRequest(DOMAIN, "Short", n) for n in range(8)]]
        poison, *neighbours = await bus.send_batch(requests)

        async def parked() -> bool:
            found.restart_if_dead()
            return (await bus.get_command(poison)).status == PARKED

        await aeventually(parked, timeout=60, what="the end of the poison")
        for command in await all_settled(bus, neighbours, timeout=60):
            found.restart_if_dead()
            assert (command.status, command.crashes, command.attempts) == (CommandStatus.COMPLETED, 0, 1)
    assert found.starts == 4
    assert ["SENT", "CLAIMED", "EXPIRED", "CLAIMED", "COMPLETED"] in [await story(bus, one) for one in neighbours]
    assert (await bus.get_command(poison)).crashes == 3


async def test_what_crashed_twice_runs_alone(bus: CommandBus, db: Connection) -> None:
    at_work: set[str] = set()
    beside: list[set[str]] = []
    order: list[str] = []

    async def lonely(command: Command, context: HandlerContext) -> None:
        order.append("lonely")
        beside.append(set(at_work))
        at_work.add("lonely")
        for _ in range(20):
            await asyncio.sleep(0.01)
            beside.append(at_work - {"lonely"})
        at_work.discard("lonely")

    async def neighbour(command: Command, context: HandlerContext) -> None:
        order.append("neighbour")
        at_work.add(str(command.data))
        await asyncio.sleep(0.01)
        at_work.discard(str(command.data))

    receipt = await bus.send(DOMAIN, "Lonely", {})
    for _ in range(2):
        lease(db, "Lonely")
        expire(db, receipt.command_id)
    registry = registry_of(Lonely=lonely, Neighbour=neighbour)
    registry.handler("shipping", "Neighbour")(neighbour)
    sent = [
        *await bus.send_batch([SendRequest(DOMAIN, "Neighbour", n) for n in range(600)]),
        *await bus.send_batch([SendRequest("shipping", "Neighbour", n) for n in range(600, 1200)]),
    ]
    async with running(Worker(bus, [DOMAIN, "shipping"], registry, concurrency=5)):
        assert (await settled(bus, receipt)).crashes == 2
        for command in await all_settled(bus, sent):
            assert (command.status, command.delivery) == (CommandStatus.COMPLETED, 1)
    assert len(beside) == 21
    assert set().union(*beside) == set()
    at = order.index("lonely")
    assert 0 < at < len(order) - 1, "there were no neighbours to run beside"


async def test_a_first_crash_is_no_reason_to_run_alone(bus: CommandBus, db: Connection) -> None:
    """A killed worker's hundred leases do not become a hundred lonely runs."""
    met = asyncio.Barrier(10)

    async def meet(command: Command, context: HandlerContext) -> int:
        async with asyncio.timeout(20):
            await met.wait()
        return context.delivery

    sent = await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(10)])
    for _ in sent:
        lease(db, "Debit")
    for receipt in sent:
        expire(db, receipt.command_id)
    async with running(Worker(bus, DOMAIN, registry_of(Debit=meet))):
        assert [command.result for command in await all_settled(bus, sent)] == [2] * 10
