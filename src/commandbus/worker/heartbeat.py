"""Tells the database that this worker is there, for people who ask why a command waits. Nothing depends on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

import psycopg

from commandbus import _calls
from commandbus._calls import Call
from commandbus._database import Database
from commandbus._failures import brief
from commandbus.errors import CommandBusError

logger = logging.getLogger("commandbus.worker")

_PAUSE = 10.0  # seconds; who was not seen for 30 does not count as alive
_ANSWER_SECONDS = 2.0


class Heartbeat:
    """Announces a worker every ten seconds, with the command types that it knows in each domain."""

    def __init__(self, database: Database, name: str, types: Mapping[str, Sequence[str]], concurrency: int) -> None:
        self._database = database
        self._name = name
        self._announcements = [_calls.announce(name, domain, types[domain], concurrency) for domain in types]

    async def run(self) -> None:
        """Announce the worker until cancelled; then say that it has gone, which takes a few seconds at most."""
        try:
            while True:
                for announcement in self._announcements:
                    await self._say(announcement)
                await asyncio.sleep(_PAUSE)
        finally:
            await self._say(_calls.leave(self._name))

    async def _say(self, call: Call[None]) -> None:
        try:
            await self._database.run(call, _ANSWER_SECONDS)
        except (CommandBusError, psycopg.Error) as error:
            logger.debug("a heartbeat is left out: %s", brief(error))
