"""Listens on a channel of PostgreSQL for hints. Only hints: whoever has a listener looks by itself as well."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import psycopg

from commandbus._calls import Call
from commandbus._database import Database, execute
from commandbus._failures import brief
from commandbus.errors import CommandBusError

CHANNEL = "commandbus"
"""Where workers are told the domains that have work; with the address of a bus behind it, where that bus is told the
ids of commands that have ended."""

_PING_SECONDS = 30.0
_ANSWER_SECONDS = 5.0
_MAX_PAUSE = 5.0


class Listener:
    """Calls `hear` with each hint; reconnects when the connection breaks or falls silent.

    `name` is that of who listens, and no hint says it. `hear` is called with an empty hint when listening has begun:
    what came before was missed.
    """

    def __init__(
        self, database: Database, channel: str, name: str, hear: Callable[[str], None], logger: logging.Logger
    ) -> None:
        self._database = database
        self._channel = channel
        self._ping = f"?{name}"  # a "?" is in no domain's name, and no id begins with it
        self._hear = hear
        self._logger = logger

    async def run(self) -> None:
        """Listen until cancelled, or until it shows that hints do not come through here."""
        pause = 0.1
        while True:
            try:
                async with await self._database.connect() as connection:
                    await execute(connection, _listen(self._channel), _ANSWER_SECONDS)
                    self._hear("")
                    pause = 0.1
                    if not await self._listen(connection):
                        self._logger.warning(
                            "LISTEN delivers nothing, perhaps behind a transaction pooler: polling only"
                        )
                        return
            except (CommandBusError, psycopg.Error, OSError) as error:
                self._logger.info("listening is interrupted, again in %.1f s: %s", pause, brief(error))
            await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - spread, not a secret
            pause = min(_MAX_PAUSE, pause * 2)

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> bool:
        """Pass hints on; False when not even the first ping came back."""
        answered = False
        while True:
            await self._pass_on(connection, _PING_SECONDS)
            await execute(connection, _notify(self._channel, self._ping), _ANSWER_SECONDS)
            if await self._pass_on(connection, _ANSWER_SECONDS):
                answered = True
            elif not answered:
                return False
            else:
                raise psycopg.OperationalError("the ping through the listener was not answered")

    async def _pass_on(self, connection: psycopg.AsyncConnection[Any], seconds: float) -> bool:
        """Pass hints on for so long, or until the ping comes back; whether it did."""
        async for hint in connection.notifies(timeout=seconds):
            if hint.payload == self._ping:
                return True
            self._hear(hint.payload)
        return False


def _listen(channel: str) -> Call[None]:
    return Call(f'LISTEN "{channel}"', (), lambda _: None)


def _notify(channel: str, payload: str) -> Call[None]:
    return Call("SELECT pg_notify(%s, %s)", (channel, payload), lambda _: None)
