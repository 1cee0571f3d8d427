"""The blocking worker."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any, Self

import psycopg

from commandbus.errors import ConfigurationError
from commandbus.handlers import BlockingContext, HandlerRegistry, Middleware
from commandbus.model import Command, StopReport
from commandbus.sync.bus import SyncCommandBus
from commandbus.sync.call import Call
from commandbus.sync.defaults import default_pool_size
from commandbus.worker.leases import Lease
from commandbus.worker.signals import stopping_on_signals
from commandbus.worker.transactions import complete_on_blocking
from commandbus.worker.worker import Worker

_RELEASE_SECONDS = 1.0  # of the time at exit: to release what has not ended


class SyncHandlerContext(BlockingContext[SyncCommandBus]):
    """What a `def` handler of a `SyncWorker` is told besides its command; see `HandlerContext`.

    `bus` is the worker's blocking bus, to send what comes next. `connection` is, in a transactional handler, the
    blocking psycopg connection whose open transaction the completion will join; otherwise None.
    """

    __slots__ = ()


class LoopWorker(Worker):
    """The worker on a loop, which gives `def` handlers the blocking bus."""

    blocking_bus: SyncCommandBus

    def on(self, bus: SyncCommandBus) -> None:
        """Work for this bus, which is open on the loop."""
        self.blocking_bus = bus
        self._bus = bus.opened()

    @property
    def called_by_handler(self) -> bool:
        """Whether the calling thread runs one of its handlers."""
        return self._threads.runs_here()

    def _blocking_context(
        self, command: Command, lease: Lease, connection: psycopg.Connection[Any] | None
    ) -> SyncHandlerContext:
        return SyncHandlerContext(command, lease, self.blocking_bus, connection, partial(complete_on_blocking, lease))


class SyncWorker:
    """Runs the commands of one or more domains, for programs without an event loop.

    The parameters are those of `Worker`. `def` handlers run in daemon threads of the worker's own, `async def`
    handlers on the runtime's loop. `thread_pool_size`: default, what `configure` was told, else
    `$COMMAND_BUS_SYNC_THREADS`, else `min(32, os.cpu_count() or 1)`. No more commands are leased than threads are
    free, and while handlers are short, within `concurrency`, what all threads get through in 10 ms. A thread is free
    when its handler has returned, whatever became of the lease.

    `run()` blocks; `start()` and `stop()`, or `with`, work in the background. A worker runs once.
    """

    def __init__(
        self,
        bus: SyncCommandBus,
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
        if not isinstance(given, SyncCommandBus):
            raise ConfigurationError(f"bus is a {type(given).__name__}: a SyncWorker needs a SyncCommandBus")
        self._bus = bus
        self._runtime = bus.runtime
        self._worker = LoopWorker(
            bus._bus,
            domain,
            registry,
            concurrency=concurrency,
            thread_pool_size=default_pool_size() if thread_pool_size is None else thread_pool_size,
            lease=lease,
            grace=grace,
            transactional_connections=transactional_connections,
            middleware=middleware,
        )
        self._call: Call | None = None
        self._generation = -1

    @property
    def name(self) -> str:
        """The worker's name in logs and in the audit trail."""
        return self._worker.name

    def run(self) -> StopReport:
        """Work until `stop()`, SIGTERM or SIGINT; then let running handlers finish within the grace, and return.

        What has not ended by then is released, uncharged. A second signal ends the grace. In a thread other than the
        main one, signals are left alone. A handler whose thread is stuck does not keep this from returning; the report
        has its stack.
        """
        with stopping_on_signals(self._worker.stop):
            self.start()
            return self._join()

    def start(self) -> None:
        """Work in the background until `stop()`, `SyncRuntime.shutdown()` or the exit of the interpreter.

        At exit 5 s are given. Raises what `SyncCommandBus.open` does.
        """
        self._runtime.check("Worker.run")
        if self._call is not None:
            raise ConfigurationError("this worker has run: make a new one")
        self._worker.on(self._bus)
        self._generation = self._runtime.generation
        self._call = self._runtime.begin(Call(self._worker.run))
        self._runtime.adopt(self._close)

    def stop(self, grace: timedelta | None = None) -> StopReport | None:
        """Stop claiming, wait until the running handlers have ended, and report how that went.

        `grace`: instead of the one that the worker was made with. From one of its own handlers, which it cannot wait
        for, this only asks, and returns None; so it does before the start, and in a process that was forked from the
        worker's. A second call ends the grace.
        """
        if self._call is not None and self._generation != self._runtime.generation:
            return None  # it would wake the loop of the parent, with which the child shares the waking socket
        self._worker.stop(grace)
        if self._call is None or self._worker.called_by_handler or self._runtime.is_here:
            return None
        return self._join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _join(self) -> StopReport:
        assert self._call is not None  # noqa: S101 - the callers have looked
        try:
            report: StopReport = self._runtime.join(self._call)
        finally:
            self._runtime.disown(self._close)
        return report

    async def _close(self, seconds: float) -> None:
        self._worker.stop(timedelta(seconds=max(0.0, seconds - _RELEASE_SECONDS)))
        if self._call is not None:
            await self._call.wait()
