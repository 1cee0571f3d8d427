"""The troubleshooting queue: where commands wait that only a person can put right."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from uuid import UUID

from commandbus import _desk_calls, _queries
from commandbus._bulk import LONG_SECONDS, Bulk, OnProgress, Pace, parked
from commandbus._desk_calls import Parked
from commandbus._failures import refusals_of
from commandbus._limits import encode
from commandbus.bus import CommandBus
from commandbus.errors import CommandStateError
from commandbus.model import (
    BulkPreview,
    BulkResult,
    Command,
    CommandStatus,
    Json,
    Page,
    TroubleshootingFilter,
)


class TroubleshootingQueue:
    """An operator's view of the commands that are parked, and the three things to do with one, or with many.

    Each action on one is one conditional step, durable when it returns, with `operator` and `reason` in the audit
    trail. Of two at once one wins; the other raises `CommandStateError` and changes nothing. An unknown id is a
    `CommandNotFoundError`.

    The actions on many, `*_many`, fix the set once: what the filter finds that is parked by now. When that is not
    `expected_count`, which `preview` tells, they raise `CommandStateError` and do nothing. They act batch by batch,
    each durable on its own, `per_second` at most, and call `on_progress`, a `def` or an `async def` function, after
    each; when it returns False they stop.
    What another verb has taken meanwhile is left alone, also when it is parked anew. Cancelling lets the batch under
    way end. An exception that comes from one of them has a note that says how many are done.
    """

    def __init__(self, bus: CommandBus) -> None:
        self._bus = bus

    # -- looking -------------------------------------------------------------------------------------------------------

    async def list_troubleshooting(
        self,
        domain: str,
        *,
        command_type: str | None = None,
        error_code: str | None = None,
        fingerprint: str | None = None,
        parked_for: timedelta | None = None,
        text: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Command]:
        """Return a page of parked commands with their errors, the longest parked first. `limit`: 1 to 1,000.

        The other parameters are those of a `TroubleshootingFilter`.
        """
        which = TroubleshootingFilter(
            domain,
            command_type=command_type,
            error_code=error_code,
            fingerprint=fingerprint,
            parked_for=parked_for,
            text=text,
        )
        return await self._bus.database.repeat(_desk_calls.list_troubleshooting(which, limit=limit, cursor=cursor))

    async def count_troubleshooting(self, domain: str | None = None, *, command_type: str | None = None) -> int:
        """Count the parked commands, of one domain or of all."""
        call = _queries.count(domain, CommandStatus.IN_TROUBLESHOOTING_QUEUE, command_type)
        return await self._bus.database.repeat(call)

    async def preview(self, which: TroubleshootingFilter) -> BulkPreview:
        """Tell what an action over this filter would act on, and change nothing."""
        groups = await self._bus.database.repeat(_desk_calls.groups(which), LONG_SECONDS, long=True)
        return BulkPreview(
            sum(group.count for group in groups),
            min((group.oldest_parked_at for group in groups), default=None),
            max((group.newest_parked_at for group in groups), default=None),
            tuple(groups),
        )

    # -- acting on one -------------------------------------------------------------------------------------------------

    async def operator_retry(
        self, domain: str, command_id: UUID, *, data: Json = None, operator: str, reason: str | None = None
    ) -> None:
        """Put it back: `IN_TROUBLESHOOTING_QUEUE -> PENDING`, with a full budget of attempts.

        `data`, unless None, replaces the command's data; the audit trail keeps both.
        """
        text = None if data is None else encode(data, f"command {command_id}: data", self._bus.max_data_bytes)
        with refusals_of(f"command {command_id}"):
            await self._bus.database.run(_desk_calls.operator_retry(domain, command_id, operator, reason, text))
        await self._bus.wake(domain)

    async def operator_cancel(self, domain: str, command_id: UUID, *, operator: str, reason: str) -> None:
        """Give it up: `IN_TROUBLESHOOTING_QUEUE -> CANCELED`."""
        await self._bus.database.run(_desk_calls.operator_cancel(domain, command_id, operator, reason))

    async def operator_complete(
        self, domain: str, command_id: UUID, *, result_data: Json = None, operator: str, reason: str
    ) -> None:
        """Note that the work was done by hand: `IN_TROUBLESHOOTING_QUEUE -> COMPLETED`, with this result."""
        text = None if result_data is None else encode(result_data, f"command {command_id}: result_data")
        with refusals_of(f"command {command_id}"):
            await self._bus.database.run(_desk_calls.operator_complete(domain, command_id, operator, reason, text))

    # -- acting on many ------------------------------------------------------------------------------------------------

    async def operator_retry_many(
        self,
        which: TroubleshootingFilter,
        *,
        expected_count: int,
        patch: Json = None,
        operator: str,
        reason: str | None = None,
        per_second: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> BulkResult:
        """Put them back: `IN_TROUBLESHOOTING_QUEUE -> PENDING`, with a full budget of attempts.

        `patch`, unless None, is a JSON merge patch (RFC 7396) of the data of each; the audit trail keeps old and new.
        One whose data would break a limit then is left alone, and counted as `refused`.
        """
        text = None if patch is None else encode(patch, "patch")
        act = partial(_desk_calls.operator_bulk, which.domain, "retry", operator=operator, reason=reason, value=text)
        pace = Pace(per_second, 0 if patch is None else self._bus.max_data_bytes)
        bulk = Bulk(self._bus, act, pace, on_progress, wake=which.domain)
        return await bulk.run(await self._fix(which, expected_count))

    async def operator_cancel_many(
        self,
        which: TroubleshootingFilter,
        *,
        expected_count: int,
        operator: str,
        reason: str,
        per_second: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> BulkResult:
        """Give them up: `IN_TROUBLESHOOTING_QUEUE -> CANCELED`."""
        act = partial(_desk_calls.operator_bulk, which.domain, "cancel", operator=operator, reason=reason, value=None)
        bulk = Bulk(self._bus, act, Pace(per_second), on_progress)
        return await bulk.run(await self._fix(which, expected_count))

    async def operator_complete_many(
        self,
        which: TroubleshootingFilter,
        *,
        expected_count: int,
        result_data: Json = None,
        operator: str,
        reason: str,
        per_second: float | None = None,
        on_progress: OnProgress | None = None,
    ) -> BulkResult:
        """Note that the work was done by hand: `IN_TROUBLESHOOTING_QUEUE -> COMPLETED`, each with this result."""
        text = None if result_data is None else encode(result_data, "result_data")
        act = partial(_desk_calls.operator_bulk, which.domain, "complete", operator=operator, reason=reason, value=text)
        bulk = Bulk(self._bus, act, Pace(per_second, len(text or "")), on_progress)
        return await bulk.run(await self._fix(which, expected_count))

    async def _fix(self, which: TroubleshootingFilter, expected_count: int) -> list[Parked]:
        """Return what the filter finds, the longest parked first. What is parked from now on is another day's work."""
        found = await parked(self._bus.database, which)
        if len(found) != expected_count:
            raise CommandStateError(
                f'the filter finds {len(found):,} parked commands in "{which.domain}", not {expected_count:,}: nothing '
                "was done. Look again and decide anew."
            )
        return found
