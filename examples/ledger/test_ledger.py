"""Tests of the handler with real transactions, on a database of each test's own: `python -m pytest`."""

from __future__ import annotations

from datetime import timedelta

import psycopg
import pytest
from ledger import registry
from load import open_accounts, send

from commandbus import CommandStatus, TroubleshootingQueue
from commandbus.testing import Harness

ACCOUNTS = [{"account_id": "ana", "opening_cents": "100"}, {"account_id": "ben", "opening_cents": "0"}]
TRANSFER = {"transfer_id": "t1", "source": "ana", "target": "ben", "cents": "70"}


def balances(dsn: str) -> dict[str, int]:
    """Return how much each account has."""
    with psycopg.connect(dsn) as connection:
        return dict(connection.execute("SELECT account_id, balance_cents FROM ledger.account").fetchall())


@pytest.mark.asyncio
async def test_a_transfer_is_booked_once(commandbus_dsn: str) -> None:
    open_accounts(commandbus_dsn, ACCOUNTS)
    assert [await send(commandbus_dsn, [TRANSFER]) for _ in range(2)] == [1, 0]
    async with Harness(commandbus_dsn, registry) as harness:
        (command,) = (await harness.run_until_idle()).commands
    assert command.result == {"cents": 70, "source_balance": 30}
    assert balances(commandbus_dsn) == {"ana": 30, "ben": 70}


@pytest.mark.asyncio
async def test_what_is_not_covered_fails(commandbus_dsn: str) -> None:
    open_accounts(commandbus_dsn, ACCOUNTS)
    await send(commandbus_dsn, [TRANSFER | {"cents": "101"}])
    async with Harness(commandbus_dsn, registry) as harness:
        (command,) = (await harness.run_until_idle()).commands
    assert command.status == CommandStatus.FAILED
    assert balances(commandbus_dsn) == {"ana": 100, "ben": 0}


@pytest.mark.asyncio
async def test_an_operator_corrects_an_amount(commandbus_dsn: str) -> None:
    open_accounts(commandbus_dsn, ACCOUNTS)
    await send(commandbus_dsn, [TRANSFER | {"cents": "7o"}])
    async with Harness(commandbus_dsn, registry) as harness:
        (command,) = (await harness.run_until_idle()).commands
        assert command.status == CommandStatus.IN_TROUBLESHOOTING_QUEUE
        queue = TroubleshootingQueue(harness.bus)
        await queue.operator_retry("ledger", command.command_id, data=TRANSFER, operator="cleo", reason="o is 0")
        await harness.run_until_idle()
    assert balances(commandbus_dsn) == {"ana": 30, "ben": 70}


@pytest.mark.asyncio
async def test_while_the_tables_are_missing_it_is_tried_again(commandbus_dsn: str) -> None:
    await send(commandbus_dsn, [TRANSFER])
    async with Harness(commandbus_dsn, registry) as harness:
        (command,) = (await harness.run_until_idle()).commands
        assert command.status == CommandStatus.SCHEDULED
        open_accounts(commandbus_dsn, ACCOUNTS)
        await harness.advance(timedelta(minutes=1))
        (command,) = (await harness.run_until_idle()).commands
    assert (command.status, command.attempts) == (CommandStatus.COMPLETED, 2)
