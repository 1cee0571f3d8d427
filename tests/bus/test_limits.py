"""What a bus learns of the limits, and that it never refuses what the database accepts."""

from __future__ import annotations

from uuid import uuid4

import psycopg
import pytest

from commandbus import CommandBus, InvalidCommandError, SendRequest, TroubleshootingQueue
from tests.bus.support import DOMAIN, Connection, ids

MIB = 1 << 20


def allow(db: Connection, size: int) -> None:
    db.execute("UPDATE commandbus.setting SET value = %s WHERE name = 'max_data_bytes'", [str(size)])


@pytest.mark.parametrize("size", [1024, 262_144, MIB])
async def test_a_bus_learns_the_limit_when_it_opens(dsn: str, db: Connection, size: int) -> None:
    allow(db, size)
    async with CommandBus(dsn) as bus:
        receipt = await bus.send(DOMAIN, "Debit", "ü" * ((size - 2) // 2))
        too_large = "x" * (size - 1)
        said = f"data has {size + 1:,} bytes as JSON text, at most {size:,} are allowed"
        with pytest.raises(InvalidCommandError, match=said):
            await bus.send(DOMAIN, "Debit", too_large)
        with pytest.raises(InvalidCommandError, match=said):
            await bus.send_batch([SendRequest(DOMAIN, "Debit", 1), SendRequest(DOMAIN, "Debit", too_large)])
        with pytest.raises(InvalidCommandError, match=said):
            await TroubleshootingQueue(bus).operator_retry(DOMAIN, uuid4(), data=too_large, operator="ana")
    assert ids(db) == [receipt.command_id]


async def test_a_bus_that_is_not_open_leaves_the_limit_to_the_database(dsn: str, db: Connection) -> None:
    bus = CommandBus(dsn)
    with psycopg.connect(dsn) as connection:
        with pytest.raises(InvalidCommandError, match=r"data is missing or out of bounds.*max_data_bytes \(262144\)"):
            await bus.send(DOMAIN, "Debit", "x" * 262_143, connection=connection)
        connection.rollback()
        allow(db, MIB)
        receipt = await bus.send(DOMAIN, "Debit", "x" * (MIB - 2), connection=connection)
        with pytest.raises(InvalidCommandError, match="at most 1,048,576 are allowed"):
            await bus.send(DOMAIN, "Debit", "x" * (MIB - 1), connection=connection)
    assert ids(db) == [receipt.command_id]


async def test_a_result_of_an_operator_may_have_1_mib(bus: CommandBus) -> None:
    with pytest.raises(InvalidCommandError, match="result_data has 1,048,577 bytes"):
        await TroubleshootingQueue(bus).operator_complete(
            DOMAIN, uuid4(), result_data="x" * (MIB - 1), operator="ana", reason="by hand"
        )
