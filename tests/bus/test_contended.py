"""An own id whose uncommitted twin somebody holds waits in a lane of its own, and only it waits."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from commandbus import CommandBus, CommandIdConflictError, OutcomeUnknownError, Receipt, SendTimeoutError
from tests.bus.support import DOMAIN, Connect, Connection, ids
from tests.support import Route


async def rival_of(bus: CommandBus, connect: Connect, *own: UUID) -> Connection:
    """A connection that has sent these ids and not committed."""
    rival = connect()
    for command_id in own:
        await bus.send(DOMAIN, "Debit", {"n": 1}, command_id=command_id, connection=rival)
    return rival


async def test_the_others_are_sent_meanwhile(bus: CommandBus, db: Connection, connect: Connect) -> None:
    own = [uuid4() for _ in range(6)]  # more than there are flush connections
    rival = await rival_of(bus, connect, *own)
    twins = [asyncio.create_task(bus.send(DOMAIN, "Debit", {"n": 1}, command_id=one)) for one in own]
    async with asyncio.timeout(20):
        for _ in range(3):
            batch = (bus.send(DOMAIN, "Debit", n, command_id=uuid4() if n % 2 else None) for n in range(100))
            await asyncio.gather(*batch)
    assert len(ids(db)) == 300
    assert not any(twin.done() for twin in twins)
    rival.commit()
    assert await asyncio.gather(*twins) == [Receipt(DOMAIN, one, duplicate=True) for one in own]


@pytest.mark.parametrize("end", ["commit", "rollback"])
async def test_the_end_of_the_rival_decides(bus: CommandBus, db: Connection, connect: Connect, end: str) -> None:
    own, other = uuid4(), uuid4()
    rival = await rival_of(bus, connect, own, other)
    same = asyncio.create_task(bus.send(DOMAIN, "Debit", {"n": 1}, command_id=own))
    different = asyncio.create_task(bus.send(DOMAIN, "Debit", {"n": 2}, command_id=other))
    await bus.send(DOMAIN, "Debit", "a neighbour of the same flush")
    assert not same.done()
    getattr(rival, end)()
    assert await same == Receipt(DOMAIN, own, duplicate=end == "commit")
    if end == "commit":
        with pytest.raises(CommandIdConflictError):
            await different
    else:
        assert await different == Receipt(DOMAIN, other)
    assert len(ids(db)) == 3


async def test_a_sender_that_holds_the_twin_itself_is_told(route: Route, db: Connection, connect: Connect) -> None:
    own = uuid4()
    async with CommandBus(**route, send_timeout=timedelta(seconds=0.5)) as bus:
        rival = await rival_of(bus, connect, own)
        with pytest.raises((SendTimeoutError, OutcomeUnknownError)) as caught:
            await bus.send(DOMAIN, "Debit", {"n": 1}, command_id=own)
        assert str(own) in str(caught.value)
        rival.commit()
        assert (await bus.send(DOMAIN, "Debit", {"n": 1}, command_id=own)).duplicate
    assert ids(db) == [own]
