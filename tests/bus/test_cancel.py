"""`cancel` ends whatever is unfinished."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

import pytest

from commandbus import CommandBus, CommandNotFoundError, CommandStateError, CommandStatus
from tests.bus.support import DOMAIN, Connection, bring, complete, lease


@pytest.mark.parametrize("status", ["PENDING", "SCHEDULED", "IN_TROUBLESHOOTING_QUEUE"])
async def test_what_waits_is_canceled(bus: CommandBus, db: Connection, status: str) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    bring(db, "Debit", status)
    await bus.cancel(receipt, operator="ana", reason="not wanted")
    command = await bus.get_command(receipt)
    assert command.status == CommandStatus.CANCELED
    assert command.finished_at is not None
    last = (await bus.get_audit_trail(receipt))[-1]
    assert (last.event, last.from_status, last.to_status) == ("CANCELED", status, "CANCELED")
    assert (last.operator, last.reason) == ("ana", "not wanted")


async def test_what_runs_loses_its_lease(bus: CommandBus, db: Connection) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    item = lease(db, "Debit")
    await bus.cancel(DOMAIN, receipt.command_id)
    assert complete(db, item, "late") == "lost"
    command = await bus.get_command(receipt)
    assert (command.status, command.result) == (CommandStatus.CANCELED, None)


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "CANCELED"])
async def test_what_is_finished_stays_as_it_is(bus: CommandBus, db: Connection, status: str) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {})
    bring(db, "Debit", status)
    before = await bus.get_command(receipt)
    with pytest.raises(CommandStateError, match=status):
        await bus.cancel(receipt)
    assert await bus.get_command(receipt) == before


async def test_a_scheduled_send_can_be_canceled(bus: CommandBus) -> None:
    receipt = await bus.send(DOMAIN, "Debit", {}, delay=timedelta(days=1))
    await bus.cancel(receipt)
    assert (await bus.get_command(receipt)).status == CommandStatus.CANCELED


async def test_an_unknown_id_is_not_found(bus: CommandBus) -> None:
    with pytest.raises(CommandNotFoundError):
        await bus.cancel(DOMAIN, uuid4())
