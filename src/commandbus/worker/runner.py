"""Runs handlers: each delivery is a task that turns whatever happens into an ending."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from functools import partial
from math import inf
from typing import Any, TypeVar, cast

import psycopg

from commandbus import _database
from commandbus._connections import drive
from commandbus._database import Database, execute, transaction
from commandbus.bus import CommandBus
from commandbus.errors import TransientCommandError
from commandbus.handlers import AsyncFunction, HandlerContext, Middleware
from commandbus.model import Command, Json
from commandbus.worker.blocking import BlockingRunner, NewContext
from commandbus.worker.endings import Ending, Recorded, Released, unreadable
from commandbus.worker.leases import Lease
from commandbus.worker.threads import HandlerThreads
from commandbus.worker.transactions import RUN, complete_on, handle, rolled_back
from commandbus.worker.verdicts import TimedOutCommandError, Verdicts

T = TypeVar("T")


class Runner:
    """Starts a task for each lease; `finish` is called with its ending.

    `context` makes what a `def` handler is given; `middleware` is entered around it, the first outermost.
    """

    def __init__(
        self,
        *,
        worker: str,
        bus: CommandBus,
        threads: HandlerThreads,
        transactions: Database | None,
        context: NewContext,
        middleware: Sequence[Middleware],
        finish: Callable[[Lease, Ending], None],
        freed: Callable[[], None],
    ) -> None:
        self.ended: Counter[type[Ending]] = Counter()
        self._worker = worker
        self._bus = bus
        self._transactions = transactions
        self._finish = finish
        self._freed = freed
        self._on_loop = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._verdicts = Verdicts(worker, bus.tracing)
        self.blocking = BlockingRunner(
            worker=worker,
            threads=threads,
            transactions=transactions,
            context=context,
            middleware=middleware,
            verdicts=self._verdicts,
            end=self._end,
            freed=freed,
        )

    @property
    def running(self) -> int:
        """How many handlers run or are about to, without those that were given up."""
        return self._on_loop + len(self.blocking)

    def start(self, leases: list[Lease]) -> None:
        """Run the handlers of these leases; does not wait.

        They begin after what the caller does next on this loop: the next claim is sent, and then they run meanwhile.
        """
        on_loop = [lease for lease in leases if not lease.handler.blocking]
        in_threads = [lease for lease in leases if lease.handler.blocking]
        loop = asyncio.get_running_loop()
        if on_loop:
            self._on_loop += len(on_loop)
            loop.call_soon(self._begin, on_loop)
        if in_threads:
            self.blocking.take(in_threads)
            loop.call_soon(self.blocking.start, in_threads)

    def _begin(self, leases: list[Lease]) -> None:
        loop = asyncio.get_running_loop()
        for lease in leases:
            lease.task = loop.create_task(self._run(lease))
            if not lease.task.done():  # an eager one may be
                self._tasks.add(lease.task)

    def give_back(self, lease: Lease) -> None:
        """Release this lease, whose handler has not started."""
        self.ended[Released] += 1
        self._finish(lease, Released())

    async def wait(self, seconds: float) -> None:
        """Wait so long for all handlers to end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.blocking.wait()
                if self._tasks:
                    await asyncio.wait(self._tasks)

    def lose(self, lease: Lease) -> None:
        """Stop the delivery of a lease that is lost."""
        if lease.handler.blocking:
            self.blocking.give_up(lease)
        elif lease.task is not None:
            lease.task.cancel()

    async def give_up(self) -> None:
        """Stop waiting: cancel the async handlers, tell the blocking ones; their leases are released."""
        await asyncio.sleep(0)  # a task that is cancelled before its first step would never tell of its end
        self.blocking.give_up_all()
        for task in list(self._tasks):
            task.cancel()
        await self.wait(_database.CALL_SECONDS)

    def _end(self, lease: Lease, ending: Ending) -> None:
        lease.cancelled = True
        self.ended[type(ending)] += 1
        self._finish(lease, ending)

    async def _run(self, lease: Lease) -> None:
        try:
            ending = Recorded() if lease.lost else await self._ending(lease)
        except asyncio.CancelledError:
            # Not passed on: only this worker cancels these tasks, when a lease is lost or the grace is over.
            ending = Recorded() if lease.lost else Released()
        except BaseException as error:  # noqa: BLE001 - GeneratorExit out of a future closes what it passes through
            ending = self._verdicts.failed(error, lease)
        self._on_loop -= 1
        self._end(lease, ending)
        self._freed()
        if lease.task is not None:
            self._tasks.discard(lease.task)

    async def _ending(self, lease: Lease) -> Ending:
        """Run the handler; whatever happens is an ending, but for a cancellation from outside."""
        try:
            command = lease.claimed.command(self._worker)
        except (ValueError, RecursionError) as error:
            return self._verdicts.failed(unreadable(error), lease)
        with self._verdicts.under_trace(command, lease):
            try:
                if lease.handler.transactional:
                    await self._transact(lease, command)
                    return Recorded()
                result = await self._within_timeout(lease, self._call(lease, command))
                return rolled_back(lease) if lease.completing else self._verdicts.completed(result, lease)
            except asyncio.CancelledError:
                if lease.cancelled or _is_cancelling():
                    raise
                return self._verdicts.failed(
                    TransientCommandError("HANDLER_CANCELLED", "the handler was cancelled from inside"), lease
                )
            except BaseException as error:  # noqa: BLE001 - every ending of a handler is told
                return self._verdicts.raised(error, lease)

    def _within_timeout(self, lease: Lease, work: Awaitable[T]) -> Awaitable[T]:
        """Return what to await for the handler, bounded by its timeout if it has one."""
        timeout = lease.handler.timeout
        return work if timeout is None else self._bounded(lease, work, timeout)

    async def _bounded(self, lease: Lease, work: Awaitable[T], timeout: timedelta) -> T:
        scope = asyncio.timeout(timeout.total_seconds())
        try:
            async with scope:
                return await work
        except TimeoutError:
            if not scope.expired():
                raise
            lease.cancelled = True
            raise TimedOutCommandError(lease) from None

    def _call(
        self, lease: Lease, command: Command, connection: psycopg.AsyncConnection[Any] | None = None
    ) -> Awaitable[Json]:
        """Call the handler; returns what to await."""
        context = HandlerContext(command, lease, self._bus, connection, partial(complete_on, lease))
        return cast("AsyncFunction", lease.handler.function)(command, context)

    async def _transact(self, lease: Lease, command: Command) -> None:
        """Run the handler and record its completion in one transaction."""
        assert self._transactions is not None  # noqa: S101 - opened for every registry with such a handler
        async with self._transactions.connection(inf) as connection, transaction(connection):

            def perform(wanted: Any) -> Awaitable[Any]:  # noqa: ANN401 - a call, or RUN
                if wanted is RUN:
                    return self._within_timeout(lease, self._call(lease, command, connection))
                return execute(connection, wanted)

            await drive(handle(lease, self._verdicts.completed), perform)


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
