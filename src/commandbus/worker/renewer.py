"""Renews leases from a thread with an event loop and a connection of its own.

A handler that blocks the worker's loop, or a pool that is used up, must not cost it its leases. Code in C that holds
the interpreter lock does stop this thread too (a catastrophic regular expression: 3.6 s); the fence in the database
is what protects then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import psycopg

from commandbus import _calls
from commandbus._database import Database, execute, hung_up
from commandbus._failures import brief
from commandbus.errors import CommandBusError
from commandbus.worker.leases import Lease, Leases

logger = logging.getLogger("commandbus.worker")

_CALL_SECONDS = 5.0
_BUSY_PAUSE = 0.05


class Renewer:
    """Renews every third of the lease.

    In its thread it calls `lost` for a lease that cannot be trusted any more, `connected` when it is, and `failed`
    should it break down.
    """

    def __init__(
        self,
        database: Database,
        leases: Leases,
        lost: Callable[[Lease], None],
        connected: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self.is_connected = False  # without a connection what is claimed now could not be renewed later
        self._database = database
        self._leases = leases
        self._lost = lost
        self._connected = connected
        self._failed = failed
        self._thread = threading.Thread(target=self._serve, name=f"{leases.worker}-renewer", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = threading.Event()
        self._stopped = asyncio.Event()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def ask_to_stop(self) -> None:
        """Ask the thread to end; does not wait."""
        self._stop.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended already
                self._loop.call_soon_threadsafe(self._stopped.set)

    async def stop(self, seconds: float) -> None:
        """Ask the thread to end, and wait so long for it; not in a thread, none can be started at exit."""
        self.ask_to_stop()
        end = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < end:  # noqa: ASYNC110 - a thread sets no asyncio.Event
            await asyncio.sleep(0.01)

    def _serve(self) -> None:
        try:
            with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
                runner.run(self._run())
        except BaseException as error:  # noqa: BLE001 - without renewals the worker must not go on
            self._failed(error)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        watch = asyncio.create_task(self._watch())
        try:
            await self._renew_until_stopped()
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        """Fence this process off by itself when renewals do not come through in time."""
        while True:
            for lease in self._leases.overdue():
                logger.error(
                    "the lease could not be renewed in time and is given up",
                    extra=lease.log_extra(self._leases.worker),
                )
                self._lost(lease)
            await asyncio.sleep(min(1.0, self._leases.duration.total_seconds() / 50))

    async def _renew_until_stopped(self) -> None:
        connection: psycopg.AsyncConnection[Any] | None = None
        interval = self._leases.duration.total_seconds() / 3
        pause = 0.0
        try:
            while not self._stop.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._stopped.wait()
                    break
                try:
                    if connection is not None and hung_up(connection):  # perhaps it was idle for too long
                        await connection.close()
                        connection = None
                    connection = connection or await self._database.connect()
                    if not self.is_connected:
                        self.is_connected = True
                        self._connected()
                    await self._renew(connection)
                    pause = interval
                except (CommandBusError, psycopg.Error, OSError) as error:
                    self.is_connected = False
                    pause = min(1.0, interval / 4)
                    level = logging.WARNING if len(self._leases) else logging.DEBUG
                    logger.log(level, "leases could not be renewed, again in %.1f s: %s", pause, brief(error))
                    if connection is not None:
                        await connection.close()
                    connection = None
        finally:
            if connection is not None:
                await connection.close()

    async def _renew(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Renew all leases held, one statement a domain; a row that somebody has locked is tried again alone."""
        by_domain: defaultdict[str, list[Lease]] = defaultdict(list)
        for lease in self._leases:
            if not lease.lost:
                by_domain[lease.claimed.domain].append(lease)
        for domain, leases in by_domain.items():
            busy = await self._renew_some(connection, domain, leases)
            end = time.monotonic() + self._leases.duration.total_seconds() / 6  # half the way to the next round
            while busy and time.monotonic() < end:
                await asyncio.sleep(_BUSY_PAUSE)
                busy = await self._renew_some(connection, domain, busy)

    async def _renew_some(
        self, connection: psycopg.AsyncConnection[Any], domain: str, leases: list[Lease]
    ) -> list[Lease]:
        asked_at = time.monotonic()  # before the call leaves: what it costs is not trusted
        call = _calls.renew(domain, [lease.item() for lease in leases], self._leases.duration)
        answers = await execute(connection, call, _CALL_SECONDS)
        busy = []
        for lease in leases:
            match answers.get(lease.claimed.command_id):
                case "done":
                    lease.deadline = self._leases.deadline(asked_at)
                case "busy":
                    busy.append(lease)
                case _:
                    self._lost(lease)
        return busy
