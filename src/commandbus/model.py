"""The values that go in and come out: plain, frozen, without I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, TypeAlias, TypeVar
from uuid import UUID

Json: TypeAlias = Any
"""Anything that `json.dumps` takes: the one place where `Any` is allowed."""

T = TypeVar("T")

MOST_COUNTED = 10_000
"""Where `explain_v1` stops counting what stands before a command."""


class CommandStatus(StrEnum):
    """Where a command is in its life. The last three are terminal; a parked command is not."""

    PENDING = "PENDING"
    SCHEDULED = "SCHEDULED"
    IN_PROGRESS = "IN_PROGRESS"
    IN_TROUBLESHOOTING_QUEUE = "IN_TROUBLESHOOTING_QUEUE"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"

    @property
    def terminal(self) -> bool:
        """Whether a command of this status is finished for good."""
        return self in (CommandStatus.COMPLETED, CommandStatus.FAILED, CommandStatus.CANCELED)


@dataclass(frozen=True, slots=True)
class SendRequest:
    """One command to send: the parameters of `CommandBus.send`, for `send_batch`."""

    domain: str
    command_type: str
    data: Json
    command_id: UUID | None = field(default=None, kw_only=True)
    correlation_id: str | None = field(default=None, kw_only=True)
    reply_to: str | None = field(default=None, kw_only=True)
    max_attempts: int | None = field(default=None, kw_only=True)
    delay: timedelta | None = field(default=None, kw_only=True)
    priority: int = field(default=0, kw_only=True)
    headers: Mapping[str, str] | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Receipt:
    """The command is durable. `duplicate`: it was already, with the same type and data as first sent."""

    domain: str
    command_id: UUID
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Error:
    """Why an attempt did not succeed. `code` is for programs, `message` for people, `details` any JSON value."""

    code: str
    message: str = ""
    details: Json = None


@dataclass(frozen=True, slots=True)
class Command:
    """A command as it is kept. Times are aware; `attempts` and `crashes` start anew with an operator's retry."""

    domain: str
    command_id: UUID
    command_type: str
    status: CommandStatus
    data: Json
    headers: Mapping[str, str]
    correlation_id: str | None
    reply_to: str | None
    priority: int
    max_attempts: int | None
    attempts: int
    crashes: int
    delivery: int
    result: Json
    error: Error | None
    worker: str | None
    sent_at: datetime
    not_before: datetime | None
    due_at: datetime | None
    parked_at: datetime | None
    claimed_at: datetime | None
    lease_until: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Reply:
    """How a command has ended. `data` is its result; `error` is set when it is not `COMPLETED`."""

    domain: str
    command_id: UUID
    command_type: str
    status: CommandStatus
    data: Json = None
    error: Error | None = None
    correlation_id: str | None = None

    @property
    def succeeded(self) -> bool:
        """Whether the command was completed."""
        return self.status == CommandStatus.COMPLETED

    @property
    def failed(self) -> bool:
        """Whether a business rule said no, or the command was canceled."""
        return not self.succeeded

    @staticmethod
    def of(command: Command) -> Reply:
        """Return what a command of type `Reply` tells."""
        told, error = command.data, command.data["error"]
        return Reply(
            told["domain"],
            UUID(told["command_id"]),
            told["command_type"],
            CommandStatus(told["status"]),
            told["result"],
            None if error is None else Error(error.get("code", ""), error.get("message", ""), error.get("details")),
            command.correlation_id,
        )


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
    in the troubleshooting queue."""  # noqa: D205, D209

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


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One step in the life of a command. `step` orders the steps; `lease_token` names the lease it was made under."""

    domain: str
    command_id: UUID
    step: int
    event: str
    occurred_at: datetime
    from_status: CommandStatus | None
    to_status: CommandStatus
    delivery: int | None
    attempt: int | None
    worker: str | None
    lease_token: UUID | None
    operator: str | None
    reason: str | None
    error: Error | None
    details: Json


@dataclass(frozen=True, slots=True)
class Stat:
    """How many commands of a domain and type are in an unfinished status, and when the oldest of them was sent."""

    domain: str
    command_type: str
    status: CommandStatus
    count: int
    oldest_sent_at: datetime


class WaitingReason(StrEnum):
    """Why an unfinished command is where it is."""

    DELAY = "DELAY"
    BACK_OFF = "BACK_OFF"
    NO_WORKER = "NO_WORKER"
    NO_WORKER_FOR_TYPE = "NO_WORKER_FOR_TYPE"
    ALONE = "ALONE"
    BEHIND = "BEHIND"
    IN_PROGRESS = "IN_PROGRESS"
    PARKED = "PARKED"


_SENTENCES = {
    WaitingReason.DELAY: "it is delayed until {until}",
    WaitingReason.BACK_OFF: "an attempt failed: it is tried again at {until}",
    WaitingReason.NO_WORKER: "no worker for its domain is alive",
    WaitingReason.NO_WORKER_FOR_TYPE: "no living worker knows its type",
    WaitingReason.ALONE: "it crashed twice: it waits until a worker can run it alone",
    WaitingReason.BEHIND: "it waits in line, behind {ahead}",
    WaitingReason.IN_PROGRESS: "{worker} runs it, under a lease until {until}",
    WaitingReason.PARKED: "it is parked: an operator has to decide",
}


@dataclass(frozen=True, slots=True)
class Waiting:
    """Why an unfinished command is where it is; `str` says it in a sentence.

    `until`: the end of the delay, the back-off or the lease. `ahead`: how many commands stand before it; 10,000 stands
    for more. `worker`: who runs it. `workers`: how many living workers know its type.
    """

    reason: WaitingReason
    until: datetime | None
    ahead: int | None
    worker: str | None
    workers: int

    def __str__(self) -> str:
        more = " or more" if self.ahead == MOST_COUNTED else ""
        sentence = _SENTENCES[self.reason].format(
            until=f"{self.until.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}" if self.until else None,
            ahead={0: "no other", 1: "1 other"}.get(self.ahead or 0, f"{self.ahead or 0:,}{more} others"),
            worker=self.worker,
        )
        alone = self.reason in (WaitingReason.DELAY, WaitingReason.BACK_OFF) and self.workers == 0
        return f"{sentence}; no living worker knows its type" if alone else sentence


@dataclass(frozen=True, slots=True)
class Violation:
    """Something in the database that the library cannot have written. `violation` is its name, `detail` for people."""

    violation: str
    domain: str
    command_id: UUID
    detail: str


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a longer list. Give `next_cursor` back as `cursor` for the next part; None: this was the last."""

    items: tuple[T, ...]
    next_cursor: str | None

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True, slots=True)
class StuckHandler:
    """A `def` handler that still ran when its worker had stopped; `stack` says where, its oldest frame first."""

    domain: str
    command_id: UUID
    command_type: str
    stack: str


@dataclass(frozen=True, slots=True)
class StopReport:
    """How the end of a worker went.

    `finished`: deliveries that came to an outcome after the stop was asked for. `released`: those that did not, given
    back uncharged. `stuck`: handlers whose threads go on for all that; what they do can no longer be recorded.
    """

    finished: int
    released: int
    stuck: tuple[StuckHandler, ...]


@dataclass(frozen=True, slots=True)
class TroubleshootingFilter:
    """Which parked commands of a domain: those for which everything that is given holds.

    `fingerprint` is that of a `TroubleshootingGroup`; `parked_for`: at least so long; `text` stands in the error's
    message or in the data as JSON text, in upper or lower case.
    """

    domain: str
    command_type: str | None = field(default=None, kw_only=True)
    error_code: str | None = field(default=None, kw_only=True)
    fingerprint: str | None = field(default=None, kw_only=True)
    parked_for: timedelta | None = field(default=None, kw_only=True)
    text: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class TroubleshootingGroup:
    """Parked commands of one type whose errors differ at most in ids, numbers and what stands in quotes.

    `sample_ids` are up to three of them, the longest parked first; `sample_message` begins the message of the first.
    """

    domain: str
    command_type: str
    error_code: str
    fingerprint: str
    count: int
    oldest_parked_at: datetime
    newest_parked_at: datetime
    sample_ids: tuple[UUID, ...]
    sample_message: str


@dataclass(frozen=True, slots=True)
class BulkPreview:
    """What a bulk action over a filter would act on. Without any, the two times are None."""

    count: int
    oldest_parked_at: datetime | None
    newest_parked_at: datetime | None
    groups: tuple[TroubleshootingGroup, ...]


@dataclass(frozen=True, slots=True)
class BulkResult:
    """How far a bulk action came; the five numbers add up to the count that it was given.

    `changed`: left alone, for they were no longer parked, or parked anew, since the set was fixed. `refused`: left
    alone, for their patched data would break a limit. `busy`: locked by somebody else. `remaining`: not tried, because
    it was stopped.
    """

    done: int
    changed: int
    refused: int
    busy: int
    remaining: int
