"""One action on many commands, batch by batch, each durable on its own."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from itertools import islice
from math import inf
from typing import Protocol, TypeAlias

from commandbus import _desk_calls, _queries
from commandbus._calls import Answers, Call
from commandbus._database import Database
from commandbus._desk_calls import Parked
from commandbus._failures import is_connection_lost, refusals_of
from commandbus.errors import InvalidCommandError
from commandbus.model import BulkResult, TroubleshootingFilter

OnProgress: TypeAlias = Callable[[BulkResult], bool | Awaitable[bool | None] | None]

LONG_SECONDS = 60.0
"""For what may walk over all that is parked, of which 100,000 are grouped in 1.5 s; and for a batch."""

MAX_BATCH = 200
_MAX_BYTES = 8 << 20  # of data or results that are written anew; 176 ms for one of 1 MiB
_BATCHES_PER_SECOND = 10
_BUSY_PAUSES = (0.1, 0.4, 1.6)  # seconds before each further look at what is locked


class _Bus(Protocol):
    """What is needed of a bus."""

    @property
    def database(self) -> Database: ...

    async def wake(self, *domains: str) -> None: ...


async def parked(database: Database, which: TroubleshootingFilter) -> list[Parked]:
    """Return what the filter finds by now, the longest parked first."""
    until = await database.repeat(_queries.clock())
    found, end = await database.repeat(_desk_calls.parked_page(which, until, None), LONG_SECONDS, long=True)
    while end is not None:
        page, end = await database.repeat(_desk_calls.parked_page(which, until, end), LONG_SECONDS, long=True)
        found += page
    return found


class Pace:
    """At most so many a second, evenly: what came late is not caught up with a burst."""

    def __init__(self, per_second: float | None, bytes_each: int = 0) -> None:
        if per_second is not None and not per_second > 0:
            raise InvalidCommandError(f"per_second is {per_second}: it must be above 0")
        self._per_second = per_second or inf
        self._free_at = 0.0
        fitting = _MAX_BYTES // max(1, bytes_each)
        self.batch = max(1, round(min(MAX_BATCH, fitting, self._per_second / _BATCHES_PER_SECOND)))

    def pause(self, count: int, now: float) -> float:
        """Return how many seconds from now the next `count` may begin."""
        begin = max(self._free_at, now)
        self._free_at = begin + count / self._per_second
        return begin - now


class Bulk:
    """One action on many commands, batch by batch, and how far it came."""

    def __init__(
        self,
        bus: _Bus,
        act: Callable[[list[Parked]], Call[Answers]],
        pace: Pace,
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
        call = asyncio.ensure_future(self._bus.database.run(self._act(batch), LONG_SECONDS, long=True))
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
