"""The troubleshooting queue: where commands wait that only a person can put right."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from itertools import islice
from math import inf
from typing import TypeAlias
from uuid import UUID

from commandbus import _calls, _queries
from commandbus._calls import Answers, Call, Parked
from commandbus._failures import is_connection_lost, refusals_of
from commandbus._limits import encode
from commandbus.bus import CommandBus
from commandbus.errors import CommandStateError, InvalidCommandError
from commandbus.model import (
    BulkPreview,
    BulkResult,
    Command,
    CommandStatus,
    Json,
    Page,
    TroubleshootingFilter,
    TroubleshootingGroup,
)

OnProgress: TypeAlias = Callable[[BulkResult], bool | Awaitable[bool | None] | None]

_MAX_BATCH = 200
_MAX_BATCH_BYTES = 8 << 20  # of data or results that are written anew; 176 ms for one of 1 MiB
_BATCHES_PER_SECOND = 10
_BUSY_PAUSES = (0.1, 0.4, 1.6)  # seconds before each further look at what is locked
_LONG_SECONDS = 60.0  # for what may walk over all that is parked, of which 100,000 are grouped in 1.5 s; and a batch


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
        return await self._bus.database.repeat(_queries.list_troubleshooting(which, limit=limit, cursor=cursor))

    async def count_troubleshooting(self, domain: str | None = None, *, command_type: str | None = None) -> int:
        """Count the parked commands, of one domain or of all."""
        call = _queries.count(domain, CommandStatus.IN_TROUBLESHOOTING_QUEUE, command_type)
        return await self._bus.database.repeat(call)

    async def groups(
        self,
        domain: str,
        *,
        command_type: str | None = None,
        error_code: str | None = None,
        fingerprint: str | None = None,
        parked_for: timedelta | None = None,
        text: str | None = None,
    ) -> list[TroubleshootingGroup]:
        """Group parked commands by type, error code and fingerprint, the largest group first."""
        which = TroubleshootingFilter(
            domain,
            command_type=command_type,
            error_code=error_code,
            fingerprint=fingerprint,
            parked_for=parked_for,
            text=text,
        )
        return list((await self.preview(which)).groups)

    async def preview(self, which: TroubleshootingFilter) -> BulkPreview:
        """Tell what an action over this filter would act on, and change nothing."""
        groups = await self._bus.database.repeat(_queries.groups(which), _LONG_SECONDS, long=True)
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
        with refusals_of(f"command {command_id}"):
            await self._bus.database.run(_calls.operator_complete(domain, command_id, operator, reason, text))

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
        act = partial(_calls.operator_bulk, which.domain, "retry", operator=operator, reason=reason, value=text)
        pace = _Pace(per_second, 0 if patch is None else self._bus.max_data_bytes)
        bulk = _Bulk(self._bus, act, pace, on_progress, wake=which.domain)
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
        act = partial(_calls.operator_bulk, which.domain, "cancel", operator=operator, reason=reason, value=None)
        bulk = _Bulk(self._bus, act, _Pace(per_second), on_progress)
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
        act = partial(_calls.operator_bulk, which.domain, "complete", operator=operator, reason=reason, value=text)
        bulk = _Bulk(self._bus, act, _Pace(per_second, len(text or "")), on_progress)
        return await bulk.run(await self._fix(which, expected_count))

    async def _fix(self, which: TroubleshootingFilter, expected_count: int) -> list[Parked]:
        """Return what the filter finds, the longest parked first. What is parked from now on is another day's work."""
        database = self._bus.database
        until = await database.repeat(_queries.clock())
        found, end = await database.repeat(_queries.parked_page(which, until, None), _LONG_SECONDS, long=True)
        while end is not None:
            page, end = await database.repeat(_queries.parked_page(which, until, end), _LONG_SECONDS, long=True)
            found += page
        if len(found) != expected_count:
            raise CommandStateError(
                f'the filter finds {len(found):,} parked commands in "{which.domain}", not {expected_count:,}: nothing '
                "was done. Look again and decide anew."
            )
        return found


class _Pace:
    """At most so many a second, evenly: what came late is not caught up with a burst."""

    def __init__(self, per_second: float | None, bytes_each: int = 0) -> None:
        if per_second is not None and not per_second > 0:
            raise InvalidCommandError(f"per_second is {per_second}: it must be above 0")
        self._per_second = per_second or inf
        self._free_at = 0.0
        fitting = _MAX_BATCH_BYTES // max(1, bytes_each)
        self.batch = max(1, round(min(_MAX_BATCH, fitting, self._per_second / _BATCHES_PER_SECOND)))

    def pause(self, count: int, now: float) -> float:
        """Return how many seconds from now the next `count` may begin."""
        begin = max(self._free_at, now)
        self._free_at = begin + count / self._per_second
        return begin - now


class _Bulk:
    """One action on many parked commands, batch by batch, and how far it came."""

    def __init__(
        self,
        bus: CommandBus,
        act: Callable[[list[Parked]], Call[Answers]],
        pace: _Pace,
        on_progress: OnProgress | None,
        wake: str | None = None,
    ) -> None:
        self._bus = bus
        self._act = act
        self._pace = pace
        self._on_progress = on_progress or (lambda _: None)
        self._wake = wake
        self._outcomes = Counter[str]()
        self._left: deque[Parked] = deque()
        self._busy: list[Parked] = []
        self._unknown = 0  # how many were sent and are not answered yet
        self._stopped = False

    async def run(self, items: list[Parked]) -> BulkResult:
        """Act on these, then a few times on those that were busy."""
        self._busy = items
        try:
            for pause in (0.0, *_BUSY_PAUSES):
                await asyncio.sleep(pause)
                self._left, self._busy = deque(self._busy), []
                while self._left and not self._stopped:
                    await self._act_on_batch()
                if self._stopped or not self._busy:
                    break
        except BaseException as error:
            if not (isinstance(error, asyncio.CancelledError) or is_connection_lost(error)):
                self._unknown = 0  # PostgreSQL refused the batch whole, or never saw it
            error.add_note(self._so_far(len(items)))
            raise
        return self._result()

    async def _act_on_batch(self) -> None:
        batch = list(islice(self._left, self._pace.batch))
        await asyncio.sleep(self._pace.pause(len(batch), asyncio.get_running_loop().time()))
        self._unknown = len(batch)
        call = asyncio.ensure_future(self._bus.database.run(self._act(batch), _LONG_SECONDS, long=True))
        try:
            await asyncio.shield(call)
        finally:
            with refusals_of("a batch of commands"):
                # Also when this task is cancelled; when it is cancelled again, the call is.
                self._settle(batch, await call)
            verdict = self._on_progress(self._result())
            self._stopped = (await verdict if isinstance(verdict, Awaitable) else verdict) is False
        if self._wake is not None:
            await self._bus.wake(self._wake)

    def _settle(self, batch: list[Parked], answers: Answers) -> None:
        for item in batch:
            self._left.popleft()
            outcome = answers[item[0]]
            if outcome == "busy":
                self._busy.append(item)
            else:
                self._outcomes[outcome] += 1
        self._unknown = 0

    def _result(self) -> BulkResult:
        done, changed, refused = (self._outcomes[outcome] for outcome in ("done", "changed", "refused"))
        return BulkResult(done, changed, refused, len(self._busy), len(self._left))

    def _so_far(self, total: int) -> str:
        done = self._outcomes["done"]
        note = f"{done:,} of {total:,} commands are done, {total - done - self._unknown:,} are not"
        return f"{note}; of {self._unknown:,} more it is not known" if self._unknown else note
