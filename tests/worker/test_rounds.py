"""A round: completions that a claim takes along, and what becomes of those that it cannot record."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from commandbus import Command, CommandBus, CommandStatus, LeaseLostError, SendRequest, Worker
from commandbus._calls import Claimed
from commandbus._limits import MAX_BYTES
from commandbus.worker.claimer import Claimer, Lane
from commandbus.worker.endings import Completed, Ending
from commandbus.worker.finisher import Finisher
from commandbus.worker.leases import Lease, Leases
from commandbus.worker.runner import Runner
from commandbus.worker.transactions import handle
from tests.bus.support import DOMAIN, Connect, Connection, expire, lease
from tests.support import async_only
from tests.worker.support import HOUR, Watched, echo, has_status, registry_of, running, settled, story

REGISTRY = registry_of(Debit=echo, Other=echo)


class Round:
    """A claimer and a finisher that do only what a test asks for."""

    def __init__(self, bus: CommandBus, free: int) -> None:
        self.leases = Leases("tester", HOUR)
        self.finisher = Finisher(bus.database, self.leases, lambda: None, lambda _: None)
        self.lane = Lane(DOMAIN, ["Debit"], lambda: free)
        self.claimed: list[Claimed] = []
        self.claimer = Claimer(
            bus.database, [self.lane], self.finisher, most=1, worker="tester", lease=HOUR,
            start=lambda commands, _: self.claimed.extend(commands), idle=lambda: True,
        )  # fmt: skip
        self.finisher.carry(carried=True)

    def complete(self, db: Connection, command_type: str, ending: Completed = Completed("1")) -> Lease:  # noqa: B008
        """Lease a command of this type, and let its completion wait for the claimer."""
        item = lease(db, command_type)
        held = Lease(claimed(item), REGISTRY.find(DOMAIN, command_type), float("inf"))
        self.leases.add(held)
        self.finisher.put(held, ending)
        return held


def claimed(item: dict[str, Any]) -> Claimed:
    row = [None] * (len(Claimed._fields) - 1)
    return Claimed(DOMAIN, *row)._replace(**item)  # type: ignore[arg-type] # only its lease is looked at


async def test_a_completion_whose_row_was_locked_is_recorded_though_all_slots_are_taken(
    bus: CommandBus, connect: Connect
) -> None:
    first, second = Watched(), Watched()
    registry = registry_of(First=first.handler, Second=second.handler)
    async with running(Worker(bus, DOMAIN, registry, concurrency=1)):
        locked = await bus.send(DOMAIN, "First", 1)
        await first.started()
        await bus.send(DOMAIN, "Second", 2)
        operator = connect()
        operator.execute("SELECT FROM commandbus.command WHERE command_id = %s FOR UPDATE", [locked.command_id])
        first.go_on.set()
        await second.started()  # by the call that has found the first one's row locked
        operator.rollback()
        assert (await settled(bus, locked, timeout=10)).status == CommandStatus.COMPLETED
        assert second.cancelled == 0
        second.go_on.set()


@async_only("asks the claimer itself")
async def test_a_call_that_claims_nothing_puts_no_scan_off(bus: CommandBus, db: Connection) -> None:
    await bus.send(DOMAIN, "Debit", 1)
    round_ = Round(bus, free=0)
    round_.complete(db, "Debit")
    await round_.claimer._claim_all()
    assert len(round_.leases) == 0
    assert round_.lane.scan_at == 0


@async_only("asks the claimer itself")
async def test_what_one_statement_cannot_carry_is_carried_by_the_next(bus: CommandBus, db: Connection) -> None:
    await bus.send_batch([SendRequest(DOMAIN, "Debit", n) for n in range(2)])
    round_ = Round(bus, free=0)
    large = Completed(f'"{"x" * MAX_BYTES}"')
    first, second = (round_.complete(db, "Debit", large) for _ in range(2))
    round_.lane.ahead = lambda: 1  # nothing is free: the claimer would wait for a handler to end
    assert await round_.claimer._claim_all() == (1, True)
    assert [one.held for one in (first, second)] == [False, True]
    await round_.claimer._claim_all()
    assert not second.held


@async_only("asks the claimer itself")
async def test_nothing_is_run_alone_where_no_slot_is_free(bus: CommandBus, db: Connection) -> None:
    suspect = await bus.send(DOMAIN, "Debit", 1)
    for _ in range(2):
        lease(db, "Debit")
        expire(db, suspect.command_id)
    db.execute("UPDATE commandbus.command SET alone_since = alone_since - interval '1 h'")
    await bus.send(DOMAIN, "Other", 2)
    round_ = Round(bus, free=0)
    round_.complete(db, "Other")
    await round_.claimer._claim_all()
    assert round_.claimed == []
    await has_status(bus, suspect, CommandStatus.PENDING)


@async_only("asks the runner itself")
async def test_what_is_given_up_before_it_began_tells_of_its_end(bus: CommandBus, db: Connection) -> None:
    ended: list[Ending] = []
    runner = Runner(
        worker="tester", bus=bus, threads=cast("Any", None), transactions=None, context=cast("Any", None),
        middleware=(), finish=lambda _, ending: ended.append(ending), freed=lambda: None,
    )  # fmt: skip
    receipt = await bus.send(DOMAIN, "Debit", 1)
    held = Lease(claimed(lease(db, "Debit")), REGISTRY.find(DOMAIN, "Debit"), float("inf"))
    held.claimed = held.claimed._replace(data="1", headers="{}", attempts=0)
    runner.start([held])
    await asyncio.create_task(runner.give_up())  # its first step comes between that of `start` and the handler's
    assert ended == [Completed("1")]
    assert runner.running == 0
    assert await story(bus, receipt) == ["SENT", "CLAIMED"]


def test_a_transactional_handler_whose_lease_is_gone_does_not_begin() -> None:
    gone = Lease(claimed({}), REGISTRY.find(DOMAIN, "Debit"), float("inf"))
    steps = handle(gone, lambda result, _: Completed(str(result)))
    next(steps)
    gone.cancelled = True
    with pytest.raises(LeaseLostError):
        steps.send("the id of the transaction")


async def test_a_handler_ends_under_an_eager_task_factory(bus: CommandBus) -> None:
    factory = getattr(asyncio, "eager_task_factory", None)  # since Python 3.12
    asyncio.get_running_loop().set_task_factory(factory)

    async def at_once(command: Command, context: object) -> object:
        return command.data

    async with running(Worker(bus, DOMAIN, registry_of(Debit=at_once))):
        assert (await settled(bus, await bus.send(DOMAIN, "Debit", 1))).result == 1
