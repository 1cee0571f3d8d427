"""The part of a bus that reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import timedelta
from uuid import UUID

from commandbus import _queries
from commandbus._database import Database
from commandbus._limits import shown
from commandbus.errors import CommandNotFoundError, InvalidCommandError
from commandbus.model import AuditEvent, Command, CommandStatus, Page, Receipt, Stat, Violation, Waiting


class Reading(ABC):
    """The part of `CommandBus` that reads."""

    @property
    @abstractmethod
    def database(self) -> Database:
        """The connections of this bus, for the other parts of the library."""

    async def get_command(self, command: Receipt | str, command_id: UUID | None = None) -> Command:
        """Return a command, by its receipt or by domain and id. Raises `CommandNotFoundError`."""
        domain, command_id = key_of(command, command_id)
        found = await self.database.repeat(_queries.get_command(domain, command_id))
        if found is None:
            raise CommandNotFoundError(f'no command {command_id} in domain "{domain}"')
        return found

    async def query_commands(
        self,
        *,
        domain: str | None = None,
        status: CommandStatus | None = None,
        command_type: str | None = None,
        since: timedelta | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[Command]:
        """Return a page of commands, unfinished and finished, newest first within a domain.

        `since`: only those sent at most so long ago. `limit`: 1 to 1,000.
        """
        return await self.database.repeat(
            _queries.query_commands(
                domain=domain, status=status, command_type=command_type, since=since, limit=limit, cursor=cursor
            )
        )

    async def explain(self, command: Receipt | str, command_id: UUID | None = None) -> Waiting | None:
        """Say why an unfinished command is where it is; None when it is finished. Raises `CommandNotFoundError`."""
        return await self.database.repeat(_queries.explain(*key_of(command, command_id)))

    async def get_audit_trail(self, command: Receipt | str, command_id: UUID | None = None) -> list[AuditEvent]:
        """Return all steps in the life of a command, in order. Raises `CommandNotFoundError`."""
        domain, command_id = key_of(command, command_id)
        events = await self.database.repeat(_queries.audit_trail(domain, command_id))
        if not events:
            raise CommandNotFoundError(f'no command {command_id} in domain "{domain}"')
        return events

    async def count(
        self,
        *,
        domain: str | None = None,
        status: CommandStatus | None = None,
        command_type: str | None = None,
    ) -> int:
        """Count the commands that are kept, finished ones included."""
        return await self.database.repeat(_queries.count(domain, status, command_type))

    async def stats(self, *, domain: str | None = None) -> list[Stat]:
        """Count what is unfinished, by domain, type and status, each with the time its oldest was sent."""
        return await self.database.repeat(_queries.stats(domain))

    async def verify(self, *, timeout: timedelta = timedelta(minutes=10)) -> list[Violation]:
        """Compare all commands and audit events that are kept with what the library can have written.

        Reads one snapshot and writes nothing, so it may run beside workers; 100,000 commands take about 3 s. Empty when
        all is well; else ordered by domain and id.
        Raises `CommandBusError` when it has not come to its end within the timeout; PostgreSQL has stopped then, too.
        """
        return await self.database.run(_queries.verify(), timeout.total_seconds(), long=True)


def key_of(command: Receipt | str, command_id: UUID | None) -> tuple[str, UUID]:
    """Return domain and id; for the other parts of the library."""
    if isinstance(command, Receipt):
        return command.domain, command.command_id
    if command_id is None:
        raise TypeError("give a receipt, or a domain and a command id")
    given: object = command_id
    if not isinstance(given, UUID):
        raise InvalidCommandError(f"command_id is {shown(given)}: it must be a uuid.UUID")
    return command, command_id
