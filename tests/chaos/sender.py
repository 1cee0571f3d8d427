"""A process that sends its share of a plan: `python -m tests.chaos.sender NUMBER DSN JOURNALS SEED COMMANDS FAULTS`.

It begins at the moment that the file `begin` names. Started again after a kill it goes on where its journal ends, and
repeats what it does not know the outcome of.
"""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from commandbus import (
    CommandBus,
    CommandBusError,
    CommandIdConflictError,
    DatabaseUnavailableError,
    OutcomeUnknownError,
    SendTimeoutError,
)
from tests import blocking
from tests.chaos import groups, plan
from tests.chaos.journal import Journal, read
from tests.chaos.plan import DOMAIN, TOLD, Planned

SETTLED = ("accepted", "duplicate", "withdrawn", "rolled back", "given up")
"""Outcomes after which a command is not sent again."""

BEGIN = "begin"

_PAUSE = 0.2  # seconds before an id is repeated


class Sender:
    """Sends commands at their moments, each in a task of its own, and notes what it is told."""

    def __init__(self, bus: Any, dsn: str, journal: Journal, drawn: plan.Plan) -> None:  # noqa: ANN401 - of either half
        self._bus = bus
        self._dsn = dsn
        self._journal = journal
        self._groups = drawn.groups

    async def send(self, planned: Planned, at: float) -> None:
        """Send one until its outcome is known. `at`: in seconds since the epoch."""
        await asyncio.sleep(max(0.0, at - time.time()))
        outcome = None
        while outcome not in SETTLED:
            if outcome is not None:
                await asyncio.sleep(_PAUSE)
            outcome = await self._try(planned)
        if outcome == "accepted" and planned.way == "again":
            await self._try(planned)
        if planned.way == "conflict" and outcome in ("accepted", "duplicate"):
            await self._try_conflict(planned)

    async def _try(self, planned: Planned) -> str:
        if planned.way == "rolled back":
            return await self._try_rolled_back(planned)
        own_id: UUID | None = planned.command_id
        if planned.way == "minted":
            self._note(planned, "given up", None)  # until it has an id, it cannot be repeated after a kill
            own_id = None
        while True:
            try:
                receipt_id, duplicate = await self._send_in_its_way(planned, own_id)
            except OutcomeUnknownError as error:
                own_id = error.command_id
                self._note(planned, "unknown", own_id)
                await asyncio.sleep(_PAUSE)
            except SendTimeoutError as error:
                return self._note(planned, "withdrawn", error.command_id)
            except (DatabaseUnavailableError, psycopg.OperationalError) as error:
                # In a transaction of one's own, psycopg says so when the connection breaks, also in the commit.
                return self._note(planned, "unavailable", planned.command_id, type(error).__name__)
            except (CommandBusError, psycopg.Error) as error:
                self._note(planned, "given up", planned.command_id)
                self._journal.note("blame", verb="sender_error", outcome=f"{type(error).__name__}: {error}")
                return "given up"
            else:
                return self._note(planned, "duplicate" if duplicate else "accepted", receipt_id)

    async def _send_in_its_way(self, planned: Planned, own_id: UUID | None) -> tuple[UUID, bool]:
        """Send one, or its group; returns the id of what was sent, and whether it was there already."""
        what = (DOMAIN, planned.kind, planned.data)
        match planned.way:
            case "committed":
                receipt = await self._in_transaction(planned, commit=True)
            case "called":
                reply = await groups.call(self._bus, *what, planned.command_id)
                self._journal.note("called", command_id=reply.command_id, outcome=reply.status)
                return reply.command_id, False  # of which nobody is told; it is noted once
            case "batch" | "process" if planned.group is not None:
                return await groups.SEND[planned.way](self._bus, planned.group, self._groups[planned.group])
            case way:
                reply_to = TOLD if way == "replied" else None
                receipt = await self._bus.send(*what, command_id=own_id, reply_to=reply_to)
        return receipt.command_id, receipt.duplicate

    async def _try_rolled_back(self, planned: Planned) -> str:
        try:
            await self._in_transaction(planned, commit=False)
        except (DatabaseUnavailableError, psycopg.OperationalError) as error:
            return self._note(planned, "rolled back", planned.command_id, type(error).__name__)
        return self._note(planned, "rolled back", planned.command_id)

    async def _try_conflict(self, planned: Planned) -> None:
        while True:
            try:
                await self._bus.send(DOMAIN, planned.kind, {"number": -1}, command_id=planned.command_id)
            except CommandIdConflictError:
                self._note(planned, "conflict", planned.command_id)
                return
            except (OutcomeUnknownError, SendTimeoutError, DatabaseUnavailableError):
                await asyncio.sleep(_PAUSE)
            else:
                self._journal.note("blame", verb="conflict_accepted", outcome=str(planned.command_id))
                return

    async def _in_transaction(self, planned: Planned, *, commit: bool) -> Any:  # noqa: ANN401 - a receipt
        """Send in a transaction of the caller's, of the colour of the bus."""
        what, command_id = (DOMAIN, planned.kind, planned.data), planned.command_id
        if isinstance(self._bus, CommandBus):
            async with await psycopg.AsyncConnection.connect(self._dsn) as connection:
                receipt = await self._bus.send(
                    DOMAIN, planned.kind, planned.data, command_id=command_id, connection=connection
                )
                await (connection.commit() if commit else connection.rollback())
                return receipt

        def in_thread() -> Any:  # noqa: ANN401 - as above
            with psycopg.connect(self._dsn) as connection:
                receipt = self._bus.blocking.send(*what, command_id=command_id, connection=connection)
                (connection.commit if commit else connection.rollback)()
                return receipt

        return await asyncio.to_thread(in_thread)

    def _note(self, planned: Planned, outcome: str, command_id: UUID | None, why: str | None = None) -> str:
        self._journal.note("sent", number=planned.number, command_id=command_id, outcome=outcome, verb=why)
        return outcome


def kind_of_bus(number: int) -> Any:  # noqa: ANN401 - a class of either half
    """The bus of the sender or operator with this number: every second one is the blocking one."""
    return blocking.CommandBus if number % 2 else CommandBus


async def open_bus(number: int, dsn: str) -> Any:  # noqa: ANN401 - as above
    """An open bus, once there is a database."""
    while True:
        bus = kind_of_bus(number)(dsn, send_timeout=timedelta(seconds=3))
        try:
            await bus.open()
        except DatabaseUnavailableError:
            await asyncio.sleep(_PAUSE)
        else:
            return bus


async def main(number: int, dsn: str, journals: Path, drawn: plan.Plan) -> None:
    """Send what this sender has to send and has not sent."""
    who = f"sender-{number}"
    known = {note["number"] for note in read(journals, who) if note.get("outcome") in SETTLED}
    mine = [each for each in drawn.commands if number in each.senders and each.number not in known
            and (each.group is None or drawn.groups[each.group][0] is each)]  # fmt: skip
    journal = Journal(journals, who)
    bus = await open_bus(number, dsn)
    journal.note("started")
    begin = journals / BEGIN
    while not await asyncio.to_thread(begin.exists):  # noqa: ASYNC110 - another process makes it
        await asyncio.sleep(_PAUSE)
    began = float(await asyncio.to_thread(begin.read_text))
    for planned in mine:
        if began + planned.at < time.time():  # the one before may have sent it, and was killed
            journal.note("sent", number=planned.number, command_id=planned.command_id, outcome="unknown")
    sender = Sender(bus, dsn, journal, drawn)
    try:
        await asyncio.gather(*(sender.send(planned, began + planned.at) for planned in mine))
    finally:
        await bus.close()


if __name__ == "__main__":
    number, dsn, journals, *drawn = sys.argv[1:]
    asyncio.run(main(int(number), dsn, Path(journals), plan.make(*map(int, drawn))))
