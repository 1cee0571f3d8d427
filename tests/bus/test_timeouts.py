"""A caller that gives up: withdrawn, or unknown; and what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest

from commandbus import CommandBus, CommandBusError, OutcomeUnknownError, Receipt, SendRequest, SendTimeoutError
from commandbus import _send_buffer as send_buffer
from tests.bus.support import DOMAIN, Connect, Connection, Gate, ids, lock_table, until
from tests.support import Route, async_only

SECOND = timedelta(seconds=1)


@pytest.fixture
def gate(db: Connection) -> Gate:
    """A gate that is shut for commands of type Slow."""
    gate = Gate(db)
    gate.shut("Slow")
    return gate


async def outcome_of(send: Coroutine[Any, Any, Receipt]) -> Receipt | BaseException:
    """What became of this send."""
    try:
        return await send
    except CommandBusError as error:
        return error


async def test_what_is_in_flight_has_an_unknown_outcome_and_what_waits_is_withdrawn(
    route: Route, db: Connection, gate: Gate
) -> None:
    slow, quick = uuid4(), uuid4()
    async with CommandBus(**route, flush_connections=1, send_timeout=SECOND) as bus:
        first = asyncio.create_task(outcome_of(bus.send(DOMAIN, "Slow", {}, command_id=slow)))
        await gate.reached()
        second = await outcome_of(bus.send(DOMAIN, "Debit", {}, command_id=quick))
        unknown = await first
        assert isinstance(unknown, OutcomeUnknownError)
        assert unknown.command_id == slow
        assert str(slow) in str(unknown)
        assert isinstance(second, SendTimeoutError)
        assert second.command_id == quick
        assert "not sent" in str(second)
        gate.open()
    assert ids(db) == [slow]


async def test_an_unknown_outcome_is_settled_by_sending_the_id_again(route: Route, db: Connection, gate: Gate) -> None:
    async with CommandBus(**route, send_timeout=SECOND) as bus:
        with pytest.raises(OutcomeUnknownError) as caught:
            await bus.send(DOMAIN, "Slow", {"n": 1})
        gate.open()
        again = await bus.send(DOMAIN, "Slow", {"n": 1}, command_id=caught.value.command_id)
        assert again.command_id == caught.value.command_id
    assert ids(db) == [again.command_id]


@async_only("cancels a task")
async def test_a_cancelled_send_says_what_it_knows(route: Route, db: Connection, gate: Gate) -> None:
    slow, quick = uuid4(), uuid4()
    async with CommandBus(**route, flush_connections=1) as bus:
        in_flight = asyncio.create_task(bus.send(DOMAIN, "Slow", {}, command_id=slow))
        await gate.reached()
        waiting = asyncio.create_task(bus.send(DOMAIN, "Debit", {}, command_id=quick))
        await asyncio.sleep(0)  # it is in the queue
        for task, note in ((waiting, f"{quick} was withdrawn"), (in_flight, f"{slow} may have been sent")):
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as caught:
                await task
            assert [note in text for text in caught.value.__notes__] == [True]
        gate.open()
    assert ids(db) == [slow]


@async_only("cancels a task")
async def test_a_scope_that_times_out_withdraws(route: Route, db: Connection, gate: Gate) -> None:
    async with CommandBus(**route, flush_connections=1) as bus:
        slow = asyncio.create_task(bus.send(DOMAIN, "Slow", {}))
        await gate.reached()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await bus.send(DOMAIN, "Debit", {})
        gate.open()
        assert [(await slow).command_id] == ids(db)
        assert (await bus.send(DOMAIN, "Debit", {})).command_id in ids(db)


async def test_a_locked_table_leaves_nobody_in_doubt(route: Route, db: Connection, connect: Connect) -> None:
    blocker = connect()
    lock_table(blocker, "command")
    own = [uuid4() for _ in range(20)]
    async with CommandBus(**route, send_timeout=SECOND) as bus:
        sends = (bus.send(DOMAIN, "Debit", {}, command_id=one) for one in own)
        outcomes = await asyncio.gather(*sends, return_exceptions=True)
        blocker.rollback()
    assert {type(outcome) for outcome in outcomes} <= {OutcomeUnknownError, SendTimeoutError}
    assert [outcome.command_id for outcome in outcomes] == own  # type: ignore[union-attr]
    withdrawn = {one for one, outcome in zip(own, outcomes, strict=True) if isinstance(outcome, SendTimeoutError)}
    assert withdrawn & set(ids(db)) == set()


async def test_a_locked_table_is_waited_for(
    bus: CommandBus, db: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of tries, each cut short by the lock timeout: the last one counts."""
    tries = 0
    execute = send_buffer.execute  # type: ignore[attr-defined]

    async def counting(*args: Any) -> Any:  # noqa: ANN401 - passes on
        nonlocal tries
        tries += 1
        return await execute(*args)

    monkeypatch.setattr(send_buffer, "LOCK_TIMEOUT_MS", 1)
    monkeypatch.setattr(send_buffer, "_PAUSE", 0.001)
    monkeypatch.setattr(send_buffer, "execute", counting)
    blocker = connect()
    lock_table(blocker, "command")
    sends = asyncio.gather(*(bus.send(DOMAIN, "Debit", n) for n in range(3)), return_exceptions=True)
    await until(lambda: sends.done() or tries > 400, "400 tries")
    blocker.rollback()
    receipts = await sends
    assert sorted(ids(db)) == sorted(r.command_id for r in receipts if isinstance(r, Receipt))
    assert len(ids(db)) == 3


async def test_a_batch_whose_outcome_is_unknown_says_so(route: Route, db: Connection, gate: Gate) -> None:
    async with CommandBus(**route, send_timeout=timedelta(seconds=0.1)) as bus:
        with pytest.raises(OutcomeUnknownError):
            await bus.send_batch([SendRequest(DOMAIN, "Slow", n) for n in range(3)])
        gate.open()
