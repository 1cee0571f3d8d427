"""The troubleshooting queue: where commands wait that only a person can put right."""

from __future__ import annotations

from uuid import UUID

from commandbus import _calls, _queries
from commandbus._limits import encode
from commandbus.bus import CommandBus
from commandbus.model import Command, CommandStatus, Json, Page


class TroubleshootingQueue:
    """An operator's view of the commands that are parked, and the three things to do with one.

    Each action is one conditional step, durable when it returns, with `operator` and `reason` in the audit trail. Of
    two at once one wins; the other raises `CommandStateError` and changes nothing. An unknown id is a
    `CommandNotFoundError`.
    """

    def __init__(self, bus: CommandBus) -> None:
        self._bus = bus

    async def list_troubleshooting(
        self, domain: str, *, command_type: str | None = None, limit: int = 100, cursor: str | None = None
    ) -> Page[Command]:
        """Return a page of parked commands with their errors, the longest parked first. `limit`: 1 to 1,000."""
        call = _queries.list_troubleshooting(domain=domain, command_type=command_type, limit=limit, cursor=cursor)
        return await self._bus.database.repeat(call)

    async def count_troubleshooting(self, domain: str | None = None, *, command_type: str | None = None) -> int:
        """Count the parked commands, of one domain or of all."""
        call = _queries.count(domain, CommandStatus.IN_TROUBLESHOOTING_QUEUE, command_type)
        return await self._bus.database.repeat(call)

    async def operator_retry(
        self, domain: str, command_id: UUID, *, data: Json = None, operator: str, reason: str | None = None
    ) -> None:
        """Put it back: `IN_TROUBLESHOOTING_QUEUE -> PENDING`, with a full budget of attempts.

        `data`, unless None, replaces the command's data; the audit trail keeps both.
        """
        text = None if data is None else encode(data, f"command {command_id}: data", self._bus.max_data_bytes)
        await self._bus.database.run(_calls.operator_retry(domain, command_id, operator, reason, text))
        await self._bus.wake(domain)

    async def operator_cancel(self, domain: str, command_id: UUID, *, operator: str, reason: str) -> None:
        """Give it up: `IN_TROUBLESHOOTING_QUEUE -> CANCELED`."""
        await self._bus.database.run(_calls.operator_cancel(domain, command_id, operator, reason))

    async def operator_complete(
        self, domain: str, command_id: UUID, *, result_data: Json = None, operator: str, reason: str
    ) -> None:
        """Note that the work was done by hand: `IN_TROUBLESHOOTING_QUEUE -> COMPLETED`, with this result."""
        text = None if result_data is None else encode(result_data, f"command {command_id}: result_data")
        await self._bus.database.run(_calls.operator_complete(domain, command_id, operator, reason, text))
