"""The blocking half behind the signatures of the async one, for tests that are written once for both.

Each call is made in a thread. A bus has a runtime of its own, with a loop in another thread. Tests of workers take the
test's own loop for that (`SyncRuntime.of`), because their async handlers wait for what the test does there.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any, Self

import commandbus
from commandbus import Batch
from commandbus._database import Database
from commandbus.sync import SyncCommandBus, SyncProcesses, SyncRuntime, SyncTroubleshootingQueue, SyncWorker
from commandbus.testing import SyncHarness

_threads = ThreadPoolExecutor(256, "test")  # as many as a test has calls at once: asyncio's own has 6 on two cores


runtimes: list[SyncRuntime] = []
"""Those that a test has made; the fixture `route` shuts them down, or `shutdown` does."""


def own_runtime() -> SyncRuntime:
    runtimes.append(SyncRuntime())
    return runtimes[-1]


def shutdown() -> None:
    """End the runtimes that a test has made."""
    while runtimes:
        runtimes.pop().shutdown()


def tests_loop() -> SyncRuntime:
    return SyncRuntime.of(asyncio.get_running_loop())


make_runtime: Callable[[], SyncRuntime] = own_runtime


class _Awaitable:
    """Turns each method of a blocking object into one to await."""

    def __init__(self, blocking: Any) -> None:  # noqa: ANN401 - one of three
        self.blocking = blocking

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self.blocking, name)
        assert callable(method), name

        async def call(*args: Any, **more: Any) -> Any:  # noqa: ANN401 - passes on
            context = contextvars.copy_context()
            function = partial(context.run, method, *args, **more)
            return await asyncio.get_running_loop().run_in_executor(_threads, function)

        return call


class CommandBus(_Awaitable):
    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(SyncCommandBus(*args, runtime=make_runtime(), **more))

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def watch_batch(self, *args: Any, **more: Any) -> AsyncIterator[Batch]:
        """Iterate in a thread."""
        seen = self.blocking.watch_batch(*args, **more)
        while (batch := await asyncio.get_running_loop().run_in_executor(_threads, next, seen, None)) is not None:
            yield batch

    @property
    def database(self) -> Database:
        """The connections, for a test that looks at them."""
        return self.blocking.opened().database  # type: ignore[no-any-return]


class TroubleshootingQueue(_Awaitable):
    def __init__(self, bus: CommandBus) -> None:
        super().__init__(SyncTroubleshootingQueue(bus.blocking))


class Processes(_Awaitable):
    def __init__(self, bus: CommandBus) -> None:
        super().__init__(SyncProcesses(bus.blocking))


class Worker(_Awaitable):
    def __init__(self, bus: CommandBus, *args: Any, **more: Any) -> None:
        super().__init__(SyncWorker(bus.blocking, *args, **more))
        self.name = self.blocking.name

    def stop(self, grace: timedelta | None = None) -> None:
        """Ask it to stop, as the async one does, whose `run` tells when it has."""
        _threads.submit(self.blocking.stop, grace)


class Harness(_Awaitable):
    def __init__(self, bus: CommandBus, *args: Any, **more: Any) -> None:
        super().__init__(SyncHarness(bus.blocking, *args, **more))


TWINS = {twin.__name__: twin for twin in (CommandBus, Harness, Processes, TroubleshootingQueue, Worker)}


def kinds(half: str) -> Any:  # noqa: ANN401 - one of two modules
    """Where the classes of this half are found: `kinds("sync").Worker`, and the async ones for any other word."""
    return sys.modules[__name__] if half == "sync" else commandbus
