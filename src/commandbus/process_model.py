"""What is kept of a process: plain, frozen, without I/O."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from commandbus.model import CommandStatus, Error, Json


class ProcessStatus(StrEnum):
    """Where a process is in its life. The last three are its ends; `FAILED`: not everything could be undone."""

    RUNNING = "RUNNING"
    COMPENSATING = "COMPENSATING"
    COMPLETED = "COMPLETED"
    COMPENSATED = "COMPENSATED"
    FAILED = "FAILED"

    @property
    def terminal(self) -> bool:
        """Whether a process of this status has ended."""
        return self not in (ProcessStatus.RUNNING, ProcessStatus.COMPENSATING)


@dataclass(frozen=True, slots=True)
class ProcessReceipt:
    """The process is durable. `duplicate`: it was already, with the same type and state as first given."""

    domain: str
    process_id: UUID
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A process as it is kept. `error` is the first; `open` names what it waits for, `parked` counts what of that is
    in the troubleshooting queue, itself or its reply."""  # noqa: D205, D209

    domain: str
    process_id: UUID
    process_type: str
    status: ProcessStatus
    state: Json
    state_version: int
    result: Json
    error: Error | None
    deadline: datetime | None
    started_at: datetime
    updated_at: datetime
    finished_at: datetime | None
    open: tuple[str, ...]
    parked: int


@dataclass(frozen=True, slots=True)
class ProcessStep:
    """One command that a process has sent. `kind`: step, undo, wait or deadline; the last two are timers.

    `status` is `OPEN` until its outcome is applied, then that of its reply; `command_status` is that of the command.
    `of_number`: which step it undoes, or is the deadline of. `error` of a parked one says why it is.
    """

    domain: str
    process_id: UUID
    number: int
    kind: str
    name: str
    of_number: int | None
    status: str
    command_domain: str
    command_id: UUID
    command_type: str | None
    command_status: CommandStatus | None
    sent_at: datetime
    due_at: datetime | None
    parked_at: datetime | None
    ended_at: datetime | None
    error: Error | None
    result: Json
