"""The processes of a database: starts them, shows them, and lets an operator act on them."""

from __future__ import annotations

from typing import TypeVar
from uuid import UUID

from commandbus import _process_calls
from commandbus._connections import Steps, Work, arun_on, drive
from commandbus._failures import refusals_of
from commandbus._ids import new_id
from commandbus._limits import shown
from commandbus.batches import insist
from commandbus.bus import CommandBus
from commandbus.errors import CommandIdConflictError, CommandNotFoundError, InvalidCommandError
from commandbus.model import Page
from commandbus.process import Process, starting
from commandbus.process_model import ProcessReceipt, ProcessRecord, ProcessStatus, ProcessStep

S = TypeVar("S")


def beginning(
    bus: CommandBus, process: type[Process[S]], state: S, process_id: UUID | None
) -> tuple[UUID, Work[ProcessReceipt]]:
    """Return the id of a new process, and what starts it on a connection of any kind. Raises what its `start` does."""
    given: object = process_id
    if given is not None and not isinstance(given, UUID):
        raise InvalidCommandError(f"process_id is {shown(given)}: it must be a uuid.UUID")
    headers: dict[str, str] = {}
    bus.tracing.inject(headers)
    new = process_id or new_id()
    call, domains = starting(process, state, new, headers, bus.max_data_bytes)

    def steps() -> Steps[ProcessReceipt]:
        with refusals_of(f"process {new}"):
            outcome = yield call
        if outcome == "conflict":
            raise CommandIdConflictError(
                f'process {new} was started in "{process.domain}" before, with another class or state: nothing was '
                "written; use a new id",
                new,
            )
        return ProcessReceipt(process.domain, new, process_id is not None and outcome == "duplicate")

    return new, Work(steps(), bus._wake_soon, domains)  # noqa: SLF001 - as `CommandBus.sending` does


class Processes:
    """The processes of a bus. Each verb of an operator is one conditional step, durable when it returns.

    An unknown id is a `CommandNotFoundError`, a process that has gone on or ended a `CommandStateError`.
    """

    def __init__(self, bus: CommandBus) -> None:
        self._bus = bus

    async def start_process(
        self, process: type[Process[S]], state: S, *, process_id: UUID | None = None, connection: object = None
    ) -> ProcessReceipt:
        """Start a process, and send its first steps; its `start` is called here. Durable when this returns.

        With `connection`, it is part of your transaction there, as in `CommandBus.send`. `process_id` makes the start
        idempotent: the same id with the same class and state again is a receipt with `duplicate=True`, with others a
        `CommandIdConflictError`. Raises `DatabaseUnavailableError` when nothing was done, `OutcomeUnknownError` when it
        may have been started: start it again with its id.
        """
        new, work = beginning(self._bus, process, state, process_id)
        if connection is not None:
            return await arun_on(connection, work)
        run = self._bus.database.run
        receipt: ProcessReceipt = await drive(work.steps, lambda call: insist(lambda: run(call), f"process {new}", new))
        await self._bus.wake(*work.domains)
        return receipt

    async def get_process(self, domain: str, process_id: UUID) -> ProcessRecord:
        """Return a process. Raises `CommandNotFoundError`."""
        found = await self._bus.database.repeat(_process_calls.get(domain, process_id))
        if found is None:
            raise CommandNotFoundError(f'no process {process_id} in domain "{domain}"')
        return found

    async def query_processes(
        self,
        *,
        domain: str | None = None,
        status: ProcessStatus | None = None,
        process_type: str | None = None,
        limit: int = 100,
        cursor: str | None = None,
    ) -> Page[ProcessRecord]:
        """Return a page of processes, newest first within a domain. `limit`: 1 to 1,000."""
        return await self._bus.database.repeat(_process_calls.query(domain, status, process_type, limit, cursor))

    async def get_timeline(self, domain: str, process_id: UUID) -> list[ProcessStep]:
        """Return all commands that a process has sent, in order. Raises `CommandNotFoundError`."""
        await self.get_process(domain, process_id)
        return await self._bus.database.repeat(_process_calls.timeline(domain, process_id))

    async def retry_process(self, domain: str, process_id: UUID, *, operator: str, reason: str | None = None) -> int:
        """Put back what holds a process up: its parked steps and replies. Returns how many.

        A reply that somebody has canceled is sent again.
        """
        count = await self._bus.database.run(_process_calls.retry(domain, process_id, operator, reason))
        await self._bus.wake(domain)
        return count

    async def cancel_process(self, domain: str, process_id: UUID, *, operator: str, reason: str) -> None:
        """Compensate a process: `RUNNING -> COMPENSATING`. Open steps are canceled; what runs is awaited."""
        await self._bus.database.run(_process_calls.cancel(domain, process_id, operator, reason))
        await self._bus.wake(domain)

    async def resume_process(
        self, domain: str, process_id: UUID, *, operator: str, reason: str | None = None
    ) -> tuple[str, ...]:
        """End the waits of a process now; returns their names."""
        names = await self._bus.database.run(_process_calls.resume(domain, process_id, operator, reason))
        await self._bus.wake(domain)
        return names
