"""The worker itself: composes claimer, runner, finisher, renewer, listener, housekeeper and heartbeat."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg

from commandbus._calls import Claimed
from commandbus._database import Database
from commandbus._listener import CHANNEL, Listener
from commandbus.bus import CommandBus
from commandbus.errors import ConfigurationError
from commandbus.handlers import BlockingContext, Handler, HandlerRegistry, Middleware
from commandbus.model import Command, StopReport
from commandbus.worker.claimer import Claimer, Lane
from commandbus.worker.endings import Ending, Released
from commandbus.worker.finisher import Finisher
from commandbus.worker.heartbeat import Heartbeat
from commandbus.worker.housekeeper import Housekeeper
from commandbus.worker.leases import Lease, Leases
from commandbus.worker.renewer import Renewer
from commandbus.worker.runner import Runner
from commandbus.worker.signals import stopping_on_signals
from commandbus.worker.threads import HandlerThreads, pool_size
from commandbus.worker.transactions import complete_on_blocking

logger = logging.getLogger("commandbus.worker")

_RECORD_SECONDS = 10.0
_RENEWER_SECONDS = 2.0
_HELPER_SECONDS = 3.0  # a heartbeat may take two to say that the worker has gone


class Worker:
    """Runs the commands of one or more domains: `await Worker(bus, "payments", registry).run()`.

    `concurrency`: how many handlers run at once, with those that wait some milliseconds for a thread.
    `thread_pool_size`: how many of them may be plain `def` functions, each in a thread; default
    `$COMMAND_BUS_SYNC_THREADS`, else `min(32, os.cpu_count() or 1)`. `lease`: how long a command stays this worker's
    without renewal; it renews every third of it. `grace`: how long `run` waits for running handlers when it stops.
    `transactional_connections`: how many transactional handlers run at once, each on a connection of a pool of its own
    that is opened only if the registry has one. `middleware`: context managers that are entered around each `def`
    handler in its own thread, see `Middleware`.
    """

    def __init__(
        self,
        bus: CommandBus,
        domain: str | Sequence[str],
        registry: HandlerRegistry,
        *,
        concurrency: int = 100,
        thread_pool_size: int | None = None,
        lease: timedelta = timedelta(seconds=60),
        grace: timedelta = timedelta(seconds=30),
        transactional_connections: int = 4,
        middleware: Sequence[Middleware] = (),
    ) -> None:
        given: object = bus
        if not isinstance(given, CommandBus):
            raise ConfigurationError(f"bus is a {type(given).__name__}: a Worker needs a CommandBus")
        if concurrency < 1 or transactional_connections < 1:
            raise ConfigurationError("concurrency and transactional_connections must be at least 1")
        if lease < timedelta(seconds=1):
            raise ConfigurationError(f"the lease is {lease}: it must be at least one second")
        if grace < timedelta(0):
            raise ConfigurationError(f"the grace is {grace}: it must not be below zero")
        self.domains = [domain] if isinstance(domain, str) else list(dict.fromkeys(domain))
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._handlers = registry.of_domains(self.domains)
        self._registry = registry
        self._bus = bus
        self._concurrency = concurrency
        self._thread_pool_size = pool_size(thread_pool_size)
        self._grace = grace.total_seconds()
        self._leases = Leases(self.name, lease)
        self._transactional_connections = transactional_connections
        self._middleware = middleware
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ran = False
        self._stops = 0
        self._ended_before: Counter[type[Ending]] | None = None
        self._hurry = asyncio.Event()
        self._threads = HandlerThreads(self.name, self._thread_pool_size, self.domains)
        self._failure: BaseException | None = None

    async def run(self) -> StopReport:
        """Work until `stop()`, SIGTERM or SIGINT; then let running handlers finish within the grace, and return.

        What has not ended by then is released, uncharged. A second signal ends the grace. Trouble with the database is
        logged and waited out. In a thread other than the main one, signals are left alone. A worker runs once.
        Rather stop it than cancel it: what a call that is cancelled has claimed runs out, which counts as a crash.
        """
        database = self._bus.database
        if self._ran:
            raise ConfigurationError("this worker has run: make a new one")
        self._ran = True
        async with self._transactions(database) as transactions:
            self._compose(database, transactions)
            self._loop = asyncio.get_running_loop()
            with stopping_on_signals(self.stop):
                logger.info(
                    "worker %s starts: domains %s, concurrency %d, threads %d",
                    self.name,
                    ", ".join(self.domains),
                    self._concurrency,
                    self._thread_pool_size,
                )
                await self._work(database)
            return self._report()

    def stop(self, grace: timedelta | None = None) -> None:
        """Stop claiming; `run` returns when the running handlers have ended. Any thread may call it.

        `grace`: instead of the one that the worker was made with. A second call ends the grace.
        """
        if grace is not None:
            self._grace = grace.total_seconds()
        if self._loop is None:
            self._stops += 1
            return
        if self._ended_before is None:  # not on the loop, where the handler that asks may have ended by then
            self._ended_before = self._runner.ended.copy()
        self._on_loop(self._stop)

    def _stop(self) -> None:
        self._stops += 1
        self._claimer.stop()
        self._runner.blocking.give_back()
        if self._stops > 1:
            self._hurry.set()

    # -- composing -----------------------------------------------------------------------------------------------------

    def _compose(self, database: Database, transactions: Database | None) -> None:
        wake = partial(self._bus._wake_soon, committed=True)  # noqa: SLF001 - as any part of the library does
        self._finisher = Finisher(database, self._leases, self._freed, wake)
        self._runner = Runner(
            worker=self.name,
            bus=self._bus,
            threads=self._threads,
            transactions=transactions,
            context=self._blocking_context,
            middleware=self._middleware,
            finish=self._finisher.put,
            freed=self._freed,
        )
        self._claimer = Claimer(
            database,
            self._lanes(),
            self._finisher,
            most=max(1, self._concurrency // 2),
            worker=self.name,
            lease=self._leases.duration,
            start=self._start,
            idle=lambda: not len(self._leases),
        )
        freed, failed = partial(self._on_loop, self._freed), partial(self._on_loop, self._fail)
        self._renewer = Renewer(database, self._leases, self._lose, freed, failed)

    def _blocking_context(
        self, command: Command, lease: Lease, connection: psycopg.Connection[Any] | None
    ) -> BlockingContext[Any]:
        """Return what a `def` handler is given; the blocking worker has its own."""
        return BlockingContext(command, lease, self._bus, connection, partial(complete_on_blocking, lease))

    def _lanes(self) -> list[Lane]:
        """One lane for each domain and kind of slot: loop, thread, transaction, or a thread with a transaction."""
        lanes: dict[tuple[str, str], list[str]] = {}
        for handler in self._handlers:
            lanes.setdefault((handler.domain, _kind(handler)), []).append(handler.command_type)
        free: dict[str, tuple[Callable[[], int], ...]] = {
            "loop": (self._free,),
            "thread": (self._free_threads, self._free_ahead),
            "transaction": (self._free_transactions,),
            "thread with a transaction": (lambda: min(self._free_threads(), self._free_transactions()),),
        }
        return [Lane(domain, types, *free[kind]) for (domain, kind), types in lanes.items()]

    def _heartbeat(self, database: Database) -> Heartbeat:
        types: dict[str, list[str]] = {}
        for handler in self._handlers:
            types.setdefault(handler.domain, []).append(handler.command_type)
        return Heartbeat(database, self.name, types, self._concurrency)

    def _free(self) -> int:
        if not self._renewer.is_connected:
            return 0
        # Endings wait to be recorded while the next handlers run, but not without bound.
        return min(self._concurrency - self._runner.running, 2 * self._concurrency - len(self._leases))

    def _free_threads(self) -> int:
        return min(self._free(), self._thread_pool_size - self._runner.blocking.taken)

    def _free_ahead(self) -> int:
        """How many commands may be claimed that wait for a thread. They count in the concurrency."""
        return min(self._free() - max(0, self._free_threads()), self._runner.blocking.room())

    def _free_transactions(self) -> int:
        running = sum(lease.handler.transactional for lease in self._leases)
        return min(self._free(), self._transactional_connections - running)

    @contextlib.asynccontextmanager
    async def _transactions(self, database: Database) -> AsyncIterator[Database | None]:
        if not any(handler.transactional for handler in self._handlers):
            yield None
            return
        transactions = database.for_user_code(self._transactional_connections)
        await transactions.open()
        try:
            yield transactions
        finally:
            await transactions.close()

    # -- working -------------------------------------------------------------------------------------------------------

    async def _work(self, database: Database) -> None:
        self._renewer.start()
        finishing = self._watch(self._finisher.run())
        helpers = [self._watch(Housekeeper(database).run()), self._watch(self._heartbeat(database).run())]
        if not database.transaction_pooler:
            listener = Listener(database, CHANNEL, self.name, self._hear, logger)
            helpers.append(self._watch(listener.run()))
        if self._stops:
            self._claimer.stop()
        try:
            try:
                await self._claimer.run()
                await self._wait_for_handlers()
            finally:
                await self._wind_up(finishing, helpers)
        finally:  # also when the winding up is cancelled: what is left runs out by itself
            self._renewer.ask_to_stop()
            for task in (finishing, *helpers):
                task.cancel()
        if self._failure is not None:
            raise self._failure

    def _watch(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a helper; should it die, the worker stops, and `run` raises why."""

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fail(error)

        task = asyncio.get_running_loop().create_task(coroutine)
        task.add_done_callback(ended)
        return task

    def _fail(self, error: BaseException) -> None:
        logger.critical("a part of worker %s has failed: it stops", self.name, exc_info=error)
        self._failure = self._failure or error
        self._claimer.stop()
        self._hurry.set()

    async def _wait_for_handlers(self) -> None:
        """Wait for the running handlers, until the grace is over or a second stop asks to hurry."""
        if self._runner.running:
            logger.info(
                "worker %s stops: %d handlers still run, for up to %.0f s; a second signal releases them",
                self.name,
                self._runner.running,
                self._grace,
            )
        hurry = asyncio.create_task(self._hurry.wait())
        ended = asyncio.create_task(self._runner.wait(self._grace))
        await asyncio.wait([hurry, ended], return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        ended.cancel()

    async def _wind_up(self, finishing: asyncio.Task[None], helpers: list[asyncio.Task[None]]) -> None:
        for task in helpers:
            task.cancel()
        await self._runner.give_up()
        self._finisher.close()
        await asyncio.wait([finishing], timeout=_RECORD_SECONDS)
        if not finishing.done():
            logger.error("%d leases are left to run out: their outcome could not be recorded", len(self._leases))
            finishing.cancel()
        await _ended({finishing, *helpers})
        self._threads.close()
        self._runner.blocking.close()
        await self._renewer.stop(_RENEWER_SECONDS)

    def _report(self) -> StopReport:
        ended = self._runner.ended - (self._ended_before or Counter())
        released = ended.pop(Released, 0)
        report = StopReport(ended.total(), released, self._threads.stuck())
        logger.info("worker %s has stopped: %d finished, %d released", self.name, report.finished, released)
        for handler in report.stuck:
            logger.warning(
                "the handler of %s command %s is stuck in its thread; nothing that it does is recorded any more\n%s",
                handler.command_type,
                handler.command_id,
                handler.stack,
            )
        return report

    def _hear(self, hint: str) -> None:
        if not hint or hint in self.domains:
            self._claimer.wake()

    def _on_loop(self, function: Callable[..., None], *args: object) -> None:
        """Call it on the worker's loop, from any thread; not at all before the worker runs, or after."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(function, *args)

    def _start(self, commands: list[Claimed], asked_at: float) -> None:
        deadline = self._leases.deadline(asked_at)
        leases = []
        for claimed in commands:
            lease = Lease(claimed, self._registry.find(claimed.domain, claimed.command_type), deadline)
            older = self._leases.add(lease)
            if older is not None:
                self._lose(older)
            if self._stops:  # claimed while the stop was asked for
                self._runner.give_back(lease)
            else:
                leases.append(lease)
        if leases:
            self._runner.start(leases)

    def _freed(self) -> None:
        self._claimer.wake()

    def _lose(self, lease: Lease) -> None:
        """Stop a delivery that does not own its command any more. Any thread may call it."""
        if lease.lost:
            return
        lease.lost = True
        if lease.cancelled:
            return  # the handler has ended: its outcome may be recorded, and the finisher is about to learn it
        lease.cancelled = True
        logger.warning("the lease is lost", extra=lease.log_extra(self.name))
        self._on_loop(self._runner.lose, lease)


async def _ended(tasks: set[asyncio.Task[None]]) -> None:
    """Await the end of tasks that were cancelled.

    In Python 3.11 `wait_for`, with which the pool waits, can swallow a cancellation: then they are cancelled again.
    """
    while tasks:
        _, tasks = await asyncio.wait(tasks, timeout=_HELPER_SECONDS)
        for task in tasks:
            task.cancel()


def _kind(handler: Handler) -> str:
    match handler.blocking, handler.transactional:
        case True, True:
            return "thread with a transaction"
        case True, False:
            return "thread"
        case _, True:
            return "transaction"
        case _:
            return "loop"
