"""Claims commands as slots become free, and takes completions along."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import psycopg

from commandbus import _calls
from commandbus._calls import Claimed, Round
from commandbus._database import Database
from commandbus._failures import brief
from commandbus.errors import CommandBusError
from commandbus.worker.finisher import Finisher, Outcome
from commandbus.worker.trail import Trail

logger = logging.getLogger("commandbus.worker")

_FIRST_PAUSE, _LAST_PAUSE = 0.05, 1.0  # seconds between polls that find nothing: when busy, when idle
_SCAN_SHARE = 0.05  # of the time may go into claims from the start of the queue
_MAX_TROUBLE_PAUSE = 2.0


class Lane:
    """The command types of one domain that share their slots.

    `free()` says how many could start at once, `ahead()` how many more may be claimed to wait for a slot.
    """

    def __init__(
        self, domain: str, command_types: Sequence[str], free: Callable[[], int], ahead: Callable[[], int] = lambda: 0
    ) -> None:
        self.domain = domain
        self.free = free
        self.ahead = ahead
        self.trail = Trail(command_types)
        self.scan_at = 0.0
        self.due_at = float("inf")


class Claimer:
    """Claims for all lanes in turn; `start` is called with each claim's commands and the time it was asked for.

    A claim brings at most `most`, less than a worker has slots: the next one is under way while handlers run.
    """

    def __init__(
        self,
        database: Database,
        lanes: Sequence[Lane],
        finisher: Finisher,
        *,
        most: int,
        worker: str,
        lease: timedelta,
        start: Callable[[list[Claimed], float], None],
        idle: Callable[[], bool],
    ) -> None:
        self._database = database
        self._lanes = deque(lanes)
        self._finisher = finisher
        self._most = most
        self._worker = worker
        self._lease = lease
        self._sweep_seconds = lease.total_seconds() / 6
        self._start = start
        self._idle = idle
        self._patience = lease.total_seconds()
        self._alone_at = 0.0
        self._woken = asyncio.Event()
        self._stopping = False

    def wake(self) -> None:
        """There may be work, or a free slot."""
        self._woken.set()

    def stop(self) -> None:
        """Claim nothing more; `run` returns."""
        self._stopping = True
        self._woken.set()

    async def run(self) -> None:
        """Claim until stopped. Lasts through any trouble with the database."""
        with self._carrying(carried=True):
            await self._run()

    @contextlib.contextmanager
    def _carrying(self, *, carried: bool) -> Iterator[None]:
        """Take completions along within this block, or leave them to the finisher."""
        self._finisher.carry(carried=carried)
        try:
            yield
        finally:
            self._finisher.carry(carried=not carried)

    async def _run(self) -> None:
        pause = trouble = _FIRST_PAUSE
        while not self._stopping:
            self._woken.clear()
            try:
                found, more = await self._claim_all()
            except (CommandBusError, psycopg.Error) as error:
                logger.warning("nothing could be claimed, again in %.1f s: %s", trouble, brief(error))
                with self._carrying(carried=False):
                    await self._sleep(trouble)
                trouble = min(_MAX_TROUBLE_PAUSE, trouble * 2)
                continue
            if trouble > _FIRST_PAUSE:
                logger.info("commands can be claimed again")
            trouble = _FIRST_PAUSE
            if found:
                pause = _FIRST_PAUSE
            if more:
                continue
            if any(lane.free() > 0 for lane in self._lanes):
                woken = await self._sleep(self._next(pause * random.uniform(0.8, 1.2)))  # noqa: S311 - spread
                pause = _FIRST_PAUSE if woken else min(_LAST_PAUSE, pause * 2)
            else:
                await self._woken.wait()

    async def _claim_all(self) -> tuple[int, bool]:
        """Call once for every lane with a free slot or completions.

        Returns how many commands that was about, and whether to go on at once: some lane got all that it asked for, or
        not all of its completions went along, so more may wait. Of a command sent to an idle worker that makes two
        calls instead of three, and the next hint finds it free to follow.
        """
        found, more = 0, False
        self._lanes.rotate(-1)  # another lane is first each time
        for lane in self._lanes:
            if self._stopping:
                break
            free = max(lane.free(), 0)
            limit = min(free + max(lane.ahead(), 0), self._most)
            outcomes = self._finisher.take(lane.domain)
            if not limit and not outcomes:
                continue
            work = await self._work(lane, limit, max(0, limit - free), outcomes)
            found += len(work.commands) + len(outcomes)
            more |= len(work.commands) >= limit or self._finisher.carries(lane.domain)
            if free and work.alone_waiting and time.monotonic() >= self._alone_at and not self._stopping:
                alone = await self._run_alone(lane)
                found, more = found + alone, more or alone
        return found, more

    async def _work(self, lane: Lane, limit: int, ahead: int, outcomes: list[Outcome]) -> Round:
        """Claim behind the remembered places; now and then from the start, looking for expired leases as well.

        `ahead` of the `limit` would wait for a slot. The same call records these completions.
        """
        asked_at = time.monotonic()
        scan = limit > 0 and asked_at >= lane.scan_at
        segments = lane.trail.whole() if scan else lane.trail.rest()
        completions = [outcome.item for outcome in outcomes]
        call = _calls.work(
            lane.domain, segments, limit, self._worker, self._lease, completions=completions, sweep=scan, ahead=ahead
        )
        try:
            work = await self._database.run(call)
        except BaseException:
            self._finisher.give_back(outcomes)
            raise
        self._finisher.settle(outcomes, work.undone, unsaid="done")
        now = time.monotonic()
        if scan:
            share = (now - asked_at) / _SCAN_SHARE
            lane.scan_at = asked_at + min(max(1.0, share), self._sweep_seconds)
        lane.due_at = now + work.next_due.total_seconds() if work.next_due is not None else float("inf")
        lane.trail.saw(work.commands, now)
        if work.commands:
            self._start(sorted(work.commands, key=_by_place), asked_at)
        return work

    async def _run_alone(self, lane: Lane) -> bool:
        """Run a command that has crashed twice with nothing beside it: what kills the process takes nobody along.

        When the running handlers do not end in time, claiming goes on for as long, and the next try is more patient.
        """
        with self._carrying(carried=False):
            idle = await self._idle_within(self._patience)
        if not idle or lane.free() <= 0:
            self._alone_at = time.monotonic() + self._patience
            self._patience *= 2
            return False
        self._patience = self._lease.total_seconds()
        asked_at = time.monotonic()
        work = await self._database.run(
            _calls.work(lane.domain, lane.trail.whole(), 1, self._worker, self._lease, alone=True)
        )
        if work.commands:
            self._start(work.commands, asked_at)
            with self._carrying(carried=False):
                await self._idle_within(None)
        return bool(work.commands)

    async def _idle_within(self, seconds: float | None) -> bool:
        """Wait until no lease is held; False when that takes too long, or the worker stops."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not (self._idle() or self._stopping):
                    self._woken.clear()
                    await self._woken.wait()
        return self._idle() and not self._stopping

    def _next(self, pause: float) -> float:
        """Return how long to sleep: the pause, or less when a command is due or a scan is."""
        now = time.monotonic()
        moments = [moment - now for lane in self._lanes for moment in (lane.due_at, lane.scan_at)]
        # What is overdue already is locked by somebody, or its lane is full: the pause, not a busy loop.
        return min([pause, *(moment for moment in moments if moment > 0)])

    async def _sleep(self, seconds: float) -> bool:
        """Sleep, or less when woken; whether that was so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):  # not wait_for: in Python 3.11 it can swallow a cancellation
                return await self._woken.wait()
        return False


def _by_place(command: Claimed) -> int:
    return command.place or 0
