"""Listens for hints that there is work. Only a hint: without it the claimer polls."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection
from typing import Any

import psycopg

from commandbus import _calls
from commandbus._database import Database, execute
from commandbus._failures import brief
from commandbus.errors import CommandBusError

logger = logging.getLogger("commandbus.worker")

_PING_SECONDS = 30.0
_ANSWER_SECONDS = 5.0
_MAX_PAUSE = 5.0


class Listener:
    """Calls `wake` on a hint for one of these domains; reconnects when the connection breaks or falls silent."""

    def __init__(self, database: Database, domains: Collection[str], name: str, wake: Callable[[], None]) -> None:
        self._database = database
        self._domains = frozenset(domains)
        self._ping = f"?{name}"  # a "?" is in no domain's name
        self._wake = wake

    async def run(self) -> None:
        """Listen until cancelled, or until it shows that hints do not come through here."""
        pause = 0.1
        while True:
            try:
                async with await self._database.connect() as connection:
                    await execute(connection, _calls.listen(), _ANSWER_SECONDS)
                    self._wake()  # for what came before
                    pause = 0.1
                    if not await self._listen(connection):
                        logger.warning("LISTEN delivers nothing, perhaps behind a transaction pooler: polling only")
                        return
            except (CommandBusError, psycopg.Error, OSError) as error:
                logger.info("listening is interrupted, again in %.1f s: %s", pause, brief(error))
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - spread, not a secret
            pause = min(_MAX_PAUSE, pause * 2)

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> bool:
        """Pass hints on; False when not even the first ping came back."""
        answered = False
        while True:
            await self._pass_on(connection, _PING_SECONDS)
            await execute(connection, _calls.wake([self._ping]), _ANSWER_SECONDS)
            if await self._pass_on(connection, _ANSWER_SECONDS):
                answered = True
            elif not answered:
                return False
            else:
                raise psycopg.OperationalError("the ping through the listener was not answered")

    async def _pass_on(self, connection: psycopg.AsyncConnection[Any], seconds: float) -> bool:
        """Pass hints on for so long, or until the ping comes back; whether it did."""
        async for hint in connection.notifies(timeout=seconds):
            if hint.payload in self._domains:
                self._wake()
            elif hint.payload == self._ping:
                return True
        return False
