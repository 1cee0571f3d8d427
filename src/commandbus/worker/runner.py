"""Runs handlers: each delivery is a task that turns whatever happens into an ending."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from math import inf
from typing import Any, TypeAlias, TypeVar, cast

import psycopg

from commandbus import _database
from commandbus._connections import adopt, drive, drive_blocking
from commandbus._database import Database, execute, transaction
from commandbus._failures import brief, is_connection_lost, is_short_of, printable
from commandbus.bus import CommandBus
from commandbus.errors import DatabaseUnavailableError, LeaseLostError, TransientCommandError
from commandbus.handlers import AsyncFunction, BlockingContext, BlockingFunction, HandlerContext, Middleware
from commandbus.model import Command, Json
from commandbus.worker.endings import (
    Completed,
    Ending,
    Failed,
    Recorded,
    Released,
    code_of,
    completed,
    failed,
    storable,
    unreadable,
)
from commandbus.worker.leases import Lease
from commandbus.worker.threads import HandlerThreads
from commandbus.worker.transactions import RUN, BlockingConnections, complete_on, handle, rolled_back

logger = logging.getLogger("commandbus.worker")

T = TypeVar("T")
NewContext: TypeAlias = Callable[[Command, Lease, psycopg.Connection[Any] | None], BlockingContext[Any]]


class _TimedOutCommandError(TransientCommandError):
    """The handler's timeout is over."""


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
        self.running = 0
        self.in_threads = 0  # handlers that have a thread or are about to, and those given up that still run
        self.ended: Counter[type[Ending]] = Counter()
        self._worker = worker
        self._bus = bus
        self._threads = threads
        self._transactions = transactions
        self._connections = None if transactions is None else BlockingConnections(transactions)
        self._context = context
        self._middleware = middleware
        self._finish = finish
        self._freed = freed
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, leases: list[Lease]) -> None:
        """Run the handlers of these leases; does not wait.

        They begin after what the caller does next on this loop: the next claim is sent, and then they run meanwhile.
        """
        self.running += len(leases)
        self.in_threads += sum(lease.handler.blocking for lease in leases)
        asyncio.get_running_loop().call_soon(self._begin, leases)

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
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=seconds)

    async def give_up(self) -> None:
        """Stop waiting: cancel the async handlers, tell the blocking ones; their leases are released."""
        await asyncio.sleep(0)  # a task that is cancelled before its first step would never tell of its end
        for task in list(self._tasks):
            task.cancel()
        await self.wait(_database.CALL_SECONDS)

    def close(self) -> None:
        """Close the connections of transactional `def` handlers."""
        if self._connections is not None:
            self._connections.close()

    async def _run(self, lease: Lease) -> None:
        try:
            ending = Recorded() if lease.lost else await self._ending(lease)
        except asyncio.CancelledError:
            # Not passed on: only this worker cancels these tasks, when a lease is lost or the grace is over.
            ending = Recorded() if lease.lost else Released()
        except BaseException as error:  # noqa: BLE001 - GeneratorExit out of a future closes what it passes through
            ending = self._failed(error, lease)
        lease.cancelled = True
        self.ended[type(ending)] += 1
        self.running -= 1
        self.in_threads -= lease.handler.blocking
        self._finish(lease, ending)
        self._freed()
        if lease.task is not None:
            self._tasks.discard(lease.task)

    async def _ending(self, lease: Lease) -> Ending:
        """Run the handler; whatever happens is an ending, but for a cancellation from outside."""
        handler = lease.handler
        try:
            command = lease.claimed.command(self._worker)
        except (ValueError, RecursionError) as error:
            return self._failed(unreadable(error), lease)
        with self._under_trace(command, lease):
            try:
                if handler.transactional:
                    return await self._run_in_transaction(lease, command)
                result = await self._bounded(lease, self._call(lease, command))
                return rolled_back(lease) if lease.completing else self._completed(result, lease)
            except asyncio.CancelledError:
                if lease.cancelled or _is_cancelling():
                    raise
                return self._failed(
                    TransientCommandError("HANDLER_CANCELLED", "the handler was cancelled from inside"), lease
                )
            except BaseException as error:  # noqa: BLE001 - every ending of a handler is told
                return self._failed(error, lease)

    def _completed(self, result: Json, lease: Lease) -> Completed:
        ending = completed(result)
        if ending.replaced:
            logger.warning(
                "the result breaks a limit: what is recorded in its place says which",
                extra=lease.log_extra(self._worker),
            )
        return ending

    def _failed(self, error: BaseException, lease: Lease) -> Failed:
        """Return the ending of a handler that raised this, and log what follows from it.

        The message stays with the command: it may quote the payload.
        """
        attempt, limit = lease.claimed.attempts + 1, lease.claimed.max_attempts or lease.handler.retry.max_attempts
        ending = failed(error, lease.handler, attempt)
        match ending.kind:
            case "BUSINESS":
                level, then = logging.INFO, "it ends as FAILED"
            case "TRANSIENT" if attempt < limit:
                level, then = logging.WARNING, f"again in {ending.retry_in.total_seconds():.1f} s"
            case _:
                level, then = logging.ERROR, "it is parked in the troubleshooting queue"
        logger.log(
            level,
            "attempt %d failed with %s: %s",
            attempt,
            printable(code_of(error)),
            then,
            extra=lease.log_extra(self._worker),
        )
        return ending

    @contextlib.contextmanager
    def _under_trace(self, command: Command, lease: Lease) -> Iterator[None]:
        """Make the sender's trace context current. A hook that fails, or eats exceptions, changes no ending."""
        trace = None
        try:
            trace = self._bus.tracing.activate(command.headers)
            trace.__enter__()
        except Exception:
            logger.exception("the tracing hook failed", extra=lease.log_extra(self._worker))
            trace = None
        try:
            yield
        finally:
            try:
                if trace is not None:
                    trace.__exit__(None, None, None)
            except Exception:
                logger.exception("the tracing hook failed", extra=lease.log_extra(self._worker))

    async def _bounded(self, lease: Lease, work: Awaitable[T]) -> T:
        """Await the handler, bounded by its timeout."""
        timeout = lease.handler.timeout
        if timeout is None:
            return await work
        scope = asyncio.timeout(timeout.total_seconds())
        try:
            async with scope:
                return await work
        except TimeoutError:
            if not scope.expired():
                raise
            lease.cancelled = True
            raise _TimedOutCommandError("TIMEOUT", f"the handler exceeded its timeout of {timeout}") from None

    async def _call(
        self, lease: Lease, command: Command, connection: psycopg.AsyncConnection[Any] | None = None
    ) -> Json:
        """Call the handler, on this loop or in a thread."""
        if lease.handler.blocking:
            return await self._in_thread(lease, partial(self._call_blocking, lease, command))
        context = HandlerContext(command, lease, self._bus, connection, partial(complete_on, lease))
        return await cast("AsyncFunction", lease.handler.function)(command, context)

    def _call_blocking(self, lease: Lease, command: Command, connection: psycopg.Connection[Any] | None = None) -> Json:
        context = self._context(command, lease, connection)
        with contextlib.ExitStack() as stack:
            for around in self._middleware:
                stack.enter_context(around(command, context))
            return cast("BlockingFunction", lease.handler.function)(command, context)
        raise RuntimeError("a middleware has suppressed what the handler raised")

    async def _in_thread(self, lease: Lease, function: Callable[[], T]) -> T:
        """Run this in a thread, in the context of this task.

        On a timeout the future is given up, and the thread stays busy until the handler returns.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        surroundings = contextvars.copy_context()
        outcome: list[Any] = [None, None]

        def work() -> None:
            try:
                outcome[0] = surroundings.run(function)
            except BaseException as error:  # noqa: BLE001 - every ending of a handler is told
                outcome[1] = error

        def settle() -> None:
            if future.done():
                self.in_threads -= 1
                self._freed()
                logger.warning("a handler ended after it was given up", extra=lease.log_extra(self._worker))
            elif isinstance(outcome[1], StopIteration | GeneratorExit | KeyboardInterrupt | asyncio.CancelledError):
                future.set_exception(TransientCommandError(type(outcome[1]).__name__, storable(outcome[1])))
            elif outcome[1] is not None:
                future.set_exception(outcome[1])
            else:
                future.set_result(outcome[0])

        def then() -> None:
            try:
                loop.call_soon_threadsafe(settle)
            except RuntimeError:
                logger.warning("a handler ended after its worker", extra=lease.log_extra(self._worker))

        self._threads.submit(lease, work, then)
        try:
            return await future
        finally:
            # A thread cannot be killed: its slot stays taken until the handler returns.
            self.in_threads += future.cancelled()

    async def _run_in_transaction(self, lease: Lease, command: Command) -> Ending:
        """Run the handler and record its completion in one transaction.

        When the connection breaks at the end, the outcome is unknown and the lease is released: the fence lets that
        pass only if nothing was committed. So it is when the server cannot do, before and after the handler, what is
        the library's own: that is not the handler's failure.
        """
        try:
            if lease.handler.blocking:
                await self._bounded(lease, self._in_thread(lease, partial(self._transact_blocking, lease, command)))
            else:
                await self._transact(lease, command)
        except LeaseLostError:
            if not lease.completing:
                raise
            logger.warning(
                "the lease was lost; the handler's transaction is rolled back", extra=lease.log_extra(self._worker)
            )
        except (psycopg.Error, DatabaseUnavailableError, _TimedOutCommandError) as error:
            unknown = lease.completing and is_connection_lost(error)
            not_its_doing = not lease.charged and (is_short_of(error) or isinstance(error, _TimedOutCommandError))
            if not (unknown or not_its_doing):
                raise
            logger.warning(
                "the handler's transaction is rolled back and released: %s",
                brief(error),
                extra=lease.log_extra(self._worker),
            )
            return Released()
        if lease.wakes:
            self._bus._wake_soon(lease.wakes)  # noqa: SLF001 - a hint, as after any commit of ours
        return Recorded()

    async def _transact(self, lease: Lease, command: Command) -> None:
        assert self._transactions is not None  # noqa: S101 - opened for every registry with such a handler
        async with self._transactions.connection(inf) as connection, transaction(connection):

            def perform(wanted: Any) -> Awaitable[Any]:  # noqa: ANN401 - a call, or RUN
                if wanted is RUN:
                    return self._bounded(lease, self._call(lease, command, connection))
                return execute(connection, wanted)

            await drive(handle(lease, self._completed), perform)

    def _transact_blocking(self, lease: Lease, command: Command) -> None:
        assert self._connections is not None  # noqa: S101 - as above
        connections = self._connections
        with connections.transaction(lease.wait) as connection:
            own = adopt(connection)

            def perform(wanted: Any) -> Any:  # noqa: ANN401 - a call, or RUN
                if wanted is RUN:
                    return self._call_blocking(lease, command, connection)
                with connections.deadline(connection):
                    return own.execute(wanted)

            drive_blocking(handle(lease, self._completed), perform)


def _is_cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
