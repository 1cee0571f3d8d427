"""The operators, in one process: `python -m tests.chaos.operators DSN JOURNALS SEED`. Work until the file `stop`."""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import Any

import psycopg

from commandbus import Command, CommandBusError, CommandStateError, DatabaseUnavailableError, TroubleshootingQueue
from tests import blocking
from tests.chaos.journal import Journal
from tests.chaos.plan import DOMAIN, OPERATORS, POISONS, PROCESSES, TOLD
from tests.chaos.sender import open_bus

STOP = "stop"

_AT_ONCE = 20
_PAUSE = 0.1  # seconds


class Operator:
    """Empties the troubleshooting queue, beside others who look at the same page."""

    def __init__(self, queue: Any, journal: Journal, seed: int) -> None:  # noqa: ANN401 - of either half
        self._queue = queue
        self._journal = journal
        self._seed = seed

    async def work(self, until: Path) -> None:
        """Act on what is parked until this file exists."""
        while not await asyncio.to_thread(until.exists):
            for domain in (DOMAIN, TOLD, PROCESSES):
                try:
                    page = await self._queue.list_troubleshooting(domain, limit=_AT_ONCE)
                except (DatabaseUnavailableError, psycopg.OperationalError):
                    page = ()
                await asyncio.gather(*(self._act(command) for command in page))
            await asyncio.sleep(_PAUSE)

    async def _act(self, command: Command) -> None:
        # Each operator has an opinion of its own on each time that a command is parked.
        chance = random.Random(f"{self._seed} {self._journal.who} {command.command_id} {command.delivery}")
        verbs = ("cancel", "complete") if command.command_type in POISONS else ("retry", "retry", "cancel", "complete")
        verb = chance.choice(verbs) if command.domain == DOMAIN else "retry"  # replies: each is to be handled
        arguments: dict[str, Any] = {"operator": self._journal.who, "reason": "chaos"}
        if verb == "retry" and command.domain == DOMAIN:
            arguments["data"] = {**command.data, "mended": True}
        outcome = "won"
        try:
            await getattr(self._queue, f"operator_{verb}")(command.domain, command.command_id, **arguments)
        except CommandStateError:
            outcome = "lost"
        except (DatabaseUnavailableError, psycopg.OperationalError):
            outcome = "unknown"
        except (CommandBusError, psycopg.Error) as error:
            outcome = "unknown"
            self._journal.note("blame", verb="operator_error", outcome=f"{type(error).__name__}: {error}")
        self._journal.note("operator", command_id=command.command_id, verb=verb, outcome=outcome)


async def work(number: int, dsn: str, journals: str, seed: int) -> None:
    """Work as this operator: every second one with the blocking half."""
    journal = Journal(journals, f"operator-{number}")
    bus = await open_bus(number, dsn)
    journal.note("started")
    queue = blocking.TroubleshootingQueue(bus) if isinstance(bus, blocking.CommandBus) else TroubleshootingQueue(bus)
    try:
        await Operator(queue, journal, seed).work(Path(journals, STOP))
    finally:
        await bus.close()


async def main(dsn: str, journals: str, seed: int) -> None:
    """Work as all of them at once."""
    await asyncio.gather(*(work(number, dsn, journals, seed) for number in range(OPERATORS)))


if __name__ == "__main__":
    dsn, journals, seed = sys.argv[1:]
    asyncio.run(main(dsn, journals, int(seed)))
