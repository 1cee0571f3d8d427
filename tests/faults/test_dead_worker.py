"""The commands of a worker that is gone can be claimed again after its lease and a sixth of a living worker's."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace

import pytest

from commandbus import CommandBus
from commandbus._calls import Claimed
from commandbus.worker.claimer import Claimer, Lane
from commandbus.worker.finisher import Finisher
from commandbus.worker.leases import Leases
from tests.bus.support import DOMAIN, Connection, lease

LEASE = timedelta(seconds=60)


async def test_a_lease_that_ran_out_is_looked_for_every_sixth_of_a_lease(
    dsn: str, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("commandbus.worker.claimer.time", SimpleNamespace(monotonic=lambda: now))
    found: list[Claimed] = []
    lane = Lane(DOMAIN, ["Debit"], lambda: 1)
    async with CommandBus(dsn) as bus:
        claimer = Claimer(
            bus.database,
            [lane],
            Finisher(bus.database, Leases("living", LEASE), lambda: None, lambda _: None),
            most=1,
            worker="living",
            lease=LEASE,
            start=lambda commands, _: found.extend(commands),
            idle=lambda: True,
        )
        await bus.send(DOMAIN, "Debit", None)
        lease(db, "Debit", seconds=LEASE.total_seconds())
        await claimer._claim_all()
        assert found == []
        assert 0 < lane.scan_at - now <= LEASE.total_seconds() / 6
        db.execute("UPDATE commandbus.command SET lease_until = clock_timestamp()")  # it ran out just after that look
        now = lane.scan_at - 0.001
        assert claimer._next(1.0) <= 0.001 + 1e-9  # it wakes for the next one
        await claimer._claim_all()
        assert found == []
        now = lane.scan_at
        await claimer._claim_all()
        assert [(command.delivery, command.crashes) for command in found] == [(2, 1)]
