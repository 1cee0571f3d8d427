"""Runs plain `def` handlers in threads, without a task or a future for each.

The thread itself turns whatever happens into an ending, and takes the next delivery without asking the loop. Endings
reach the loop in bursts: one wake-up of the loop for all that have ended until it looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, TypeAlias, cast

import psycopg

from commandbus._connections import adopt, drive_blocking
from commandbus._database import Database
from commandbus.handlers import BlockingContext, BlockingFunction, Middleware
from commandbus.model import Command, Json
from commandbus.worker.endings import Ending, Recorded, Released, unreadable
from commandbus.worker.leases import Lease
from commandbus.worker.threads import HandlerThreads
from commandbus.worker.transactions import RUN, BlockingConnections, handle, rolled_back
from commandbus.worker.verdicts import TimedOutCommandError, Verdicts

logger = logging.getLogger("commandbus.worker")

_AHEAD_SECONDS = 0.01  # of work for all threads may wait: a claim takes 2 to 4 ms on a busy machine
_PATIENCE = 1.0  # seconds that a command may wait here for a thread, while another worker may have one
_SMOOTH = 1 / 16

Returned: TypeAlias = tuple[Ending | None, float]
"""How a handler ended, and after how many seconds; None: it never began."""
NewContext: TypeAlias = Callable[[Command, Lease, psycopg.Connection[Any] | None], BlockingContext[Any]]


class BlockingRunner:
    """Runs leases in threads; `end` is called on the loop with each lease and its ending, then `freed` once.

    `context` makes what a handler is given; `middleware` is entered around it, the first outermost.
    """

    def __init__(
        self,
        *,
        worker: str,
        threads: HandlerThreads,
        transactions: Database | None,
        context: NewContext,
        middleware: Sequence[Middleware],
        verdicts: Verdicts,
        end: Callable[[Lease, Ending], None],
        freed: Callable[[], None],
    ) -> None:
        self.taken = 0  # threads with a handler in them, given up or not, and handlers that wait for one
        self._held: set[Lease] = set()  # has not ended yet
        self._none_held = asyncio.Event()
        self._none_held.set()
        self._worker = worker
        self._threads = threads
        self._connections = None if transactions is None else BlockingConnections(transactions)
        self._context = context
        self._middleware = middleware
        self._verdicts = verdicts
        self._end = end
        self._freed = freed
        self._loop = asyncio.get_running_loop()
        self._surroundings = contextvars.copy_context()
        self._returned: deque[tuple[Lease, Returned]] = deque()
        self._told = False
        self._seconds = inf  # that a handler takes, lately
        self._looking = False
        self._timers: dict[Lease, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._held)

    def take(self, leases: list[Lease]) -> None:
        """Count these as running: they are about to `start`."""
        self.taken += len(leases)
        self._held.update(leases)
        self._none_held.clear()

    def start(self, leases: list[Lease]) -> None:
        """Run the handlers of these leases; does not wait."""
        if not self._threads.submit(leases, self._run, self._tell, unfinished=self.taken):
            logger.error("no thread for a handler can be started, again in %.0f s", _PATIENCE)
            self._loop.call_later(_PATIENCE, self.start, [])
        if not self._looking and self.taken > self._threads.size:
            self._looking = True
            self._loop.call_later(_PATIENCE, self._look)

    def room(self) -> int:
        """How many more may be claimed to wait for a thread: none unless the handlers are short."""
        waiting = max(0, self.taken - self._threads.size)
        return int(self._threads.size * _AHEAD_SECONDS / max(self._seconds, 1e-6)) - waiting

    def give_back(self, before: float = inf) -> bool:
        """Release what was submitted before that and has not begun; whether there was anything."""
        waiting = self._threads.withdraw(before)
        self.taken -= len(waiting)
        for lease in waiting:
            self.give_up(lease)
        return bool(waiting)

    def _look(self) -> None:
        """Give back what has waited for too long, and look no further ahead until a handler has returned."""
        if self.give_back(time.monotonic() - _PATIENCE):
            self._seconds = inf
        self._looking = self.taken > self._threads.size
        if self._looking:
            self._loop.call_later(_PATIENCE, self._look)

    def give_up(self, lease: Lease) -> None:
        """End this lease. Its thread cannot be killed: it stays taken until the handler returns."""
        if lease in self._held:
            self._conclude(lease, Recorded() if lease.lost else Released())
            self._freed()

    def give_up_all(self) -> None:
        """End all leases."""
        for lease in list(self._held):
            self.give_up(lease)

    async def wait(self) -> None:
        """Wait until all have ended."""
        await self._none_held.wait()

    def close(self) -> None:
        """Close the connections of transactional handlers."""
        if self._connections is not None:
            self._connections.close()

    def _conclude(self, lease: Lease, ending: Ending) -> None:
        self._held.discard(lease)
        if not self._held:
            self._none_held.set()
        if self._timers and (timer := self._timers.pop(lease, None)) is not None:
            timer.cancel()
        lease.cancelled = True
        self._end(lease, ending)

    def _settle(self) -> None:
        self._told = False  # first: what returns from now on tells again
        while self._returned:
            lease, (ending, seconds) = self._returned.popleft()
            self.taken -= 1
            if ending is not None:
                lately = seconds if self._seconds == inf else self._seconds
                self._seconds = lately + (seconds - lately) * _SMOOTH
            if lease in self._held:
                self._conclude(lease, ending or Recorded())
            elif ending is not None:
                logger.warning("a handler ended after it was given up", extra=lease.log_extra(self._worker))
        self._freed()

    def _watch(self, lease: Lease, seconds: float) -> None:
        if lease in self._held:
            self._timers[lease] = self._loop.call_later(seconds, self._expire, lease)

    def _expire(self, lease: Lease) -> None:
        lease.cancelled = True
        self._conclude(lease, self._verdicts.raised(TimedOutCommandError(lease), lease))
        self._freed()

    # -- in a thread ---------------------------------------------------------------------------------------------------

    def _tell(self, lease: Lease, returned: Returned) -> None:
        """Tell the loop of an ending, unless it is about to look."""
        self._returned.append((lease, returned))
        if self._told:
            return
        self._told = True
        try:
            self._loop.call_soon_threadsafe(self._settle)
        except RuntimeError:
            self._told = False
            logger.warning("a handler ended after its worker", extra=lease.log_extra(self._worker))

    def _run(self, lease: Lease) -> Returned:
        began = time.monotonic()
        if lease.cancelled or began >= lease.deadline:  # this process may have stood still while it waited
            return None, 0.0
        if (timeout := lease.handler.timeout) is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._watch, lease, timeout.total_seconds())
        try:
            ending = self._surroundings.copy().run(self._ending, lease)
        except BaseException as error:  # noqa: BLE001 - every ending of a handler is told
            ending = self._verdicts.failed(error, lease)
        return ending, time.monotonic() - began

    def _ending(self, lease: Lease) -> Ending:
        """Run the handler; whatever happens is an ending. Nothing is logged of one that was given up meanwhile."""
        try:
            command = lease.claimed.command(self._worker)
        except (ValueError, RecursionError) as error:
            return self._verdicts.failed(unreadable(error), lease)
        with self._verdicts.under_trace(command, lease):
            try:
                if lease.handler.transactional:
                    self._transact(lease, command)
                    return Recorded()
                result = self._call(lease, command)
                return rolled_back(lease) if lease.completing else self._verdicts.completed(result, lease)
            except BaseException as error:  # noqa: BLE001 - every ending of a handler is told
                return Recorded() if lease.cancelled else self._verdicts.raised(error, lease)

    def _call(self, lease: Lease, command: Command, connection: psycopg.Connection[Any] | None = None) -> Json:
        context = self._context(command, lease, connection)
        function = cast("BlockingFunction", lease.handler.function)
        if not self._middleware:
            return function(command, context)
        with contextlib.ExitStack() as stack:
            for around in self._middleware:
                stack.enter_context(around(command, context))
            return function(command, context)
        raise RuntimeError("a middleware has suppressed what the handler raised")

    def _transact(self, lease: Lease, command: Command) -> None:
        """Run the handler and record its completion in one transaction."""
        assert self._connections is not None  # noqa: S101 - opened for every registry with such a handler
        connections = self._connections
        with connections.transaction(lease.wait) as connection:
            own = adopt(connection)

            def perform(wanted: Any) -> Any:  # noqa: ANN401 - a call, or RUN
                if wanted is RUN:
                    return self._call(lease, command, connection)
                with connections.deadline(connection):
                    return own.execute(wanted)

            drive_blocking(handle(lease, self._verdicts.completed), perform)
