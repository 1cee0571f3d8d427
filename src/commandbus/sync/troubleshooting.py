"""The blocking troubleshooting queue."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar
from uuid import UUID

from commandbus.model import Command, Json, Page
from commandbus.sync.bus import SyncCommandBus
from commandbus.sync.call import Call
from commandbus.troubleshooting import TroubleshootingQueue

P = ParamSpec("P")
T = TypeVar("T")


class SyncTroubleshootingQueue:
    """The same view and the same actions as `TroubleshootingQueue`, for code without an event loop."""

    def __init__(self, bus: SyncCommandBus) -> None:
        self._bus = bus

    def _call(
        self,
        function: Callable[Concatenate[TroubleshootingQueue, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **more: P.kwargs,
    ) -> T:
        self._bus.runtime.check(function.__qualname__)
        queue = TroubleshootingQueue(self._bus.opened())
        done: T = self._bus.runtime.join(Call(partial(function, queue, *args, **more)))
        return done

    def list_troubleshooting(
        self, domain: str, *, command_type: str | None = None, limit: int = 100, cursor: str | None = None
    ) -> Page[Command]:
        """Return a page of parked commands with their errors, the longest parked first. `limit`: 1 to 1,000."""
        return self._call(
            TroubleshootingQueue.list_troubleshooting, domain, command_type=command_type, limit=limit, cursor=cursor
        )

    def count_troubleshooting(self, domain: str | None = None, *, command_type: str | None = None) -> int:
        """Count the parked commands, of one domain or of all."""
        return self._call(TroubleshootingQueue.count_troubleshooting, domain, command_type=command_type)

    def operator_retry(
        self, domain: str, command_id: UUID, *, data: Json = None, operator: str, reason: str | None = None
    ) -> None:
        """Put it back: `IN_TROUBLESHOOTING_QUEUE -> PENDING`; see `TroubleshootingQueue.operator_retry`."""
        self._call(TroubleshootingQueue.operator_retry, domain, command_id, data=data, operator=operator, reason=reason)

    def operator_cancel(self, domain: str, command_id: UUID, *, operator: str, reason: str) -> None:
        """Give it up: `IN_TROUBLESHOOTING_QUEUE -> CANCELED`."""
        self._call(TroubleshootingQueue.operator_cancel, domain, command_id, operator=operator, reason=reason)

    def operator_complete(
        self, domain: str, command_id: UUID, *, result_data: Json = None, operator: str, reason: str
    ) -> None:
        """Note that the work was done by hand: `IN_TROUBLESHOOTING_QUEUE -> COMPLETED`, with this result."""
        self._call(
            TroubleshootingQueue.operator_complete,
            domain,
            command_id,
            result_data=result_data,
            operator=operator,
            reason=reason,
        )
