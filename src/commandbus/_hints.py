"""Hints to workers that there is work: NOTIFY after the commit, at most ten a second for a domain under load.

Not in the sender's transaction: NOTIFY serialises commits, 48 clients fall from 9,793 to 1,536 commits/s with it.
Nothing depends on a hint; workers poll.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from math import inf
from typing import Any

import psycopg

from commandbus import _calls
from commandbus._calls import Call
from commandbus._database import Database, execute
from commandbus._failures import brief
from commandbus.errors import CommandBusError

logger = logging.getLogger("commandbus.hints")

LIGHT, LOADED = 0.01, 0.1
"""Seconds between two hints for a domain, and under load."""
_MANY = 100.0  # flushes a second for a domain are load: its workers are busy anyway
_COMMITTING = 0.05
_DEADLINE = 5.0
_MAX_DOMAINS = 10_000  # whose last hint is remembered


class Hints:
    """Gives the first hint for a domain at once, and what comes within 10 ms, under load 100 ms, as one more."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._given: dict[str, tuple[float, float]] = {}  # when, and for how long there is none after it
        self._owed: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf  # uvloop's handle of what is due within a millisecond has no `when()`
        self._task: asyncio.Task[None] | None = None

    async def give(
        self, connection: psycopg.AsyncConnection[Any], domains: Collection[str], awaited: Collection[str] = ()
    ) -> None:
        """Hint to the workers of these domains, on a connection that the caller holds.

        To those of `awaited` at once: who calls in a loop sends too seldom to keep a worker busy, and would wait for
        its next poll each time, 40 ms instead of 3.
        """
        self._owed.update(domains)
        for domain in awaited:
            self._given.pop(domain, None)
        await self._give_due(lambda call: execute(connection, call, _DEADLINE))

    def owe(self, domains: Collection[str], *, committed: bool = False) -> None:
        """Hint to the workers of these domains; soon, if somebody else's transaction is only about to commit.

        In 50 ms, what a busy worker waits between two polls: SQLAlchemy tells of a commit just before it.
        """
        self._owed.update(domains)
        self._start_timer(0.0 if committed else _COMMITTING)

    def close(self) -> None:
        """Drop the hints that are owed."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            self._task.cancel()

    def _take_due(self) -> list[str]:
        """Take the owed domains whose last hint is long enough ago; for the rest there is a timer."""
        now = asyncio.get_running_loop().time()
        if len(self._given) > _MAX_DOMAINS:
            self._given.clear()
        due, later = [], []
        for domain, times in self._owed.items():
            given_at, interval = self._given.get(domain, (-inf, LIGHT))
            if now - given_at < interval:
                later.append(given_at + interval - now)
                continue
            due.append(domain)
            self._given[domain] = now, LOADED if times > _MANY * (now - given_at) else LIGHT
        for domain in due:
            del self._owed[domain]
        if later:
            self._start_timer(min(later))
        return due

    def _start_timer(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        at = loop.time() + seconds
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        # An empty context: the hint is for everybody, and holds no connection of the caller.
        self._timer = loop.call_later(seconds, self._settle, context=contextvars.Context())

    def _settle(self) -> None:
        self._timer = None
        self._task = asyncio.get_running_loop().create_task(
            self._give_due(lambda call: self._database.run(call, _DEADLINE))
        )

    async def _give_due(self, run: Callable[[Call[None]], Awaitable[None]]) -> None:
        """Give what is due; that it fails is nobody's failure."""
        due = self._take_due()
        try:
            if due:
                await run(_calls.wake(due))
        except (CommandBusError, psycopg.Error) as error:
            logger.debug("a hint was not given: %s", brief(error))
