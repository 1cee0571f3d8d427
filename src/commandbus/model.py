"""The values that go in and come out: plain, frozen, without I/O."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Generic, Literal, TypeAlias, TypeVar
from uuid import UUID

from commandbus.errors import PermanentCommandError

Json: TypeAlias = Any
"""Anything that `json.dumps` takes: the one place where `Any` is allowed."""

T = TypeVar("T")

OnParked: TypeAlias = Literal["wait", "raise"]
"""What a parked command is to who waits for it: no end, or a `CommandParkedError`."""

REPLY = "Reply"
"""The type of the commands that tell a domain how others ended."""

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

    @classmethod
    def of(cls, value: Json) -> Error | None:
        """Return the error that is kept as this JSON value; None if it is none."""
        if not isinstance(value, dict):
            return None
        return cls(str(value.get("code", "")), str(value.get("message", "")), value.get("details"))


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
    batch_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Commands of one domain that are counted together, as they were at one moment.

    `total` = `completed` + `failed` + `canceled` + `in_trouble` (parked) + `open` (waiting or running). `growing`: more
    may be added. `on_complete`: the command that is sent when it finishes. `duplicate`: it was there already when it
    was to be created.
    """

    domain: str
    batch_id: UUID
    name: str | None
    total: int
    completed: int
    failed: int
    canceled: int
    in_trouble: int
    open: int
    growing: bool
    created_at: datetime
    finished_at: datetime | None
    on_complete: Receipt | None
    duplicate: bool = False

    @property
    def done(self) -> bool:
        """Whether all its commands have ended and no more can be added; its `on_complete` has been sent then."""
        return self.finished_at is not None

    @property
    def progress(self) -> float:
        """Which part of its commands has ended: 0 to 1."""
        ended = self.completed + self.failed + self.canceled
        return ended / self.total if self.total else float(self.done)


@dataclass(frozen=True, slots=True)
class Reply:
    """How a command ended: `COMPLETED`, `FAILED` or `CANCELED`. `data` is its result; `error` says why it has none.

    Of a canceled one `error` is that of its last failed attempt, or None; the audit trail has the reason.
    """

    domain: str
    command_id: UUID
    command_type: str
    status: CommandStatus
    data: Json
    error: Error | None
    correlation_id: str | None

    @property
    def succeeded(self) -> bool:
        """Whether it was completed, by its handler or by an operator."""
        return self.status is CommandStatus.COMPLETED

    @property
    def failed(self) -> bool:
        """Whether it ended without success: a business rule said no, or it was canceled."""
        return not self.succeeded

    @classmethod
    def of(cls, command: Command) -> Reply:
        """Return what a command of type `Reply` tells, which came to the domain that `reply_to` named.

        Raises `PermanentCommandError` for anything else: who handles it parks it.
        """
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            said = command.data
            reply = cls(
                said["domain"], UUID(said["command_id"]), said["command_type"], CommandStatus(said["status"]),
                said["result"], Error.of(said["error"]), command.correlation_id,
            )  # fmt: skip
            if command.command_type == REPLY and reply.status.terminal:
                return reply
        message = f"command {command.command_id} of type {command.command_type} is no reply of this library"
        raise PermanentCommandError("NOT_A_REPLY", message)


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
    batch_id: UUID | None = field(default=None, kw_only=True)


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
