"""What a worker does beside its work: what is past its retention goes, however much it is."""

from __future__ import annotations

from commandbus import CommandBus, Worker
from tests.bus.support import DOMAIN, Connection, one, until
from tests.sql.batch_support import ended_long_ago
from tests.support import direct_only
from tests.worker.support import echo, registry_of, running


@direct_only  # the same calls behind a pooler
async def test_a_batch_of_several_portions_leaves_in_one_go(bus: CommandBus, db: Connection) -> None:
    ended_long_ago(db, 25_000)
    async with running(Worker(bus, DOMAIN, registry_of(Echo=echo))):
        await until(lambda: one(db, "SELECT count(*) = 0 FROM commandbus.batch"), "the end of the batch")
    assert one(db, "SELECT count(*) FROM commandbus.batch_command") == 0
