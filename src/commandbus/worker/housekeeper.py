"""Keeps the history in order: makes weeks ahead, drops those whose retention is over."""

from __future__ import annotations

import asyncio
import logging

import psycopg

from commandbus import _calls
from commandbus._database import Database
from commandbus._failures import brief
from commandbus.errors import CommandBusError

logger = logging.getLogger("commandbus.worker")

_PAUSE = 600.0  # seconds
_PAUSE_WHEN_BLOCKED = 60.0
_PAUSE_BETWEEN_PORTIONS = 0.1


class Housekeeper:
    """Looks at the weeks of the history every ten minutes; any number of workers may."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def run(self) -> None:
        """Keep house until cancelled."""
        while True:
            try:
                pause = await self._look()
            except (CommandBusError, psycopg.Error) as error:
                logger.warning("housekeeping is put off: %s", brief(error))
                pause = _PAUSE_WHEN_BLOCKED
            await asyncio.sleep(pause)

    async def _look(self) -> float:
        """Make and drop weeks, drop batches and processes; returns when to look again, in seconds."""
        await self._database.run(_calls.make_partitions())
        pause = _PAUSE
        for week, blocked_by in await self._database.run(_calls.drop_expired()):
            if blocked_by is None:
                logger.info("the finished commands of %s were dropped: their retention is over", week)
            else:
                logger.warning("the finished commands of %s cannot be dropped: sessions %s hold them", week, blocked_by)
                pause = _PAUSE_WHEN_BLOCKED
        while await self._database.run(_calls.drop_finished()):  # noqa: ASYNC110 - so that others get at the disk
            await asyncio.sleep(_PAUSE_BETWEEN_PORTIONS)
        return pause
