"""What the callback of a bulk action raises: the caller's own, and the action ends with the batch."""

from __future__ import annotations

import pytest

from commandbus import BulkResult, CommandBus, TroubleshootingFilter, TroubleshootingQueue
from tests.bus.support import DOMAIN, Connection, bring, rows

PARKED = "IN_TROUBLESHOOTING_QUEUE"


async def test_what_on_progress_raises_ends_it_and_says_how_far_it_came(bus: CommandBus, db: Connection) -> None:
    for command_type in ("A", "B", "C"):
        await bus.send(DOMAIN, command_type, {})
        bring(db, command_type, PARKED)

    def give_up(so_far: BulkResult) -> None:
        raise LookupError(f"after {so_far.done}")

    with pytest.raises(LookupError, match="after 1") as caught:
        await TroubleshootingQueue(bus).operator_cancel_many(
            TroubleshootingFilter(DOMAIN),
            expected_count=3,
            per_second=0.5,
            on_progress=give_up,
            operator="ana",
            reason="why",
        )
    assert caught.value.__notes__ == ["1 of 3 commands are done, 2 are not"]
    assert sorted(rows(db, "SELECT status FROM commandbus.commands")) == [("CANCELED",), (PARKED,), (PARKED,)]
