"""The protocol of processes, without I/O: one value for each SQL function and view of theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from commandbus._calls import Call, Row, as_text
from commandbus._desk_calls import check_words
from commandbus._queries import Source, conditions, json_of, page
from commandbus.model import CommandStatus, Error, Page, Reply
from commandbus.process_model import ProcessRecord, ProcessStatus, ProcessStep

T = TypeVar("T")


class Taken(NamedTuple):
    """What a class has to decide on: a process as it is kept, locked, and the step that has ended."""

    process_id: UUID
    process_type: str
    state: str
    state_version: int
    revision: int
    name: str
    error: str | None
    open: list[str]


def start(process: str, then: str) -> Call[str]:
    """Start a process, and send its first steps: accepted, duplicate or conflict. See `start_process_v1`."""
    return Call("SELECT commandbus.start_process_v1(%s, %s)", (process, then), lambda rows: as_text(rows[0][0]))


def take(domain: str, reply: Reply) -> Call[Taken | None]:
    """Apply an outcome; None when nothing is to be decided. See `take_reply_v1`."""
    error = None if reply.error is None else error_text(reply.error)
    return Call(
        "SELECT process_id, process_type, state, state_version, revision, name, error, open "
        "FROM commandbus.take_reply_v1(%s, %s, %s, %s)",
        (domain, reply.command_id, reply.status.value, error),
        lambda rows: Taken._make(rows[0]) if rows else None,
    )


def advance(domain: str, taken: Taken, state: str, version: int, then: str) -> Call[None]:
    """Keep the state and do what was decided; see `advance_process_v1`."""
    return Call(
        "SELECT commandbus.advance_process_v1(%s, %s, %s, %s, %s, %s)",
        (domain, taken.process_id, taken.revision, state, version, then),
        lambda _: None,
    )


def cancel(domain: str, process_id: UUID, operator: str, reason: str) -> Call[None]:
    """Compensate what a process has done, and end it."""
    return _verb("cancel", domain, process_id, operator, reason, read=lambda _: None)


def resume(domain: str, process_id: UUID, operator: str, reason: str | None) -> Call[tuple[str, ...]]:
    """End the waits of a process; returns their names."""
    return _verb("resume", domain, process_id, operator, reason, read=tuple)


def retry(domain: str, process_id: UUID, operator: str, reason: str | None) -> Call[int]:
    """Put back what of a process is parked; returns how many commands."""
    return _verb("retry", domain, process_id, operator, reason, read=int)


def _verb(
    name: str, domain: str, process_id: UUID, operator: str, reason: str | None, *, read: Callable[[Any], T]
) -> Call[T]:
    check_words(f"process {process_id}: ", operator, reason)
    return Call(
        f"SELECT commandbus.{name}_process_v1(%s, %s, %s, %s)",
        (domain, process_id, operator, reason),
        lambda rows: read(rows[0][0]),
    )


def error_text(error: Error) -> str:
    """Return an error as JSON text, as it is kept: one level deeper than its details, which alone have a limit."""
    return json.dumps({"code": error.code, "message": error.message, "details": error.details})


# -- reading -----------------------------------------------------------------------------------------------------------

_COLUMNS = (
    "domain, process_id, process_type, status, state::text, state_version, result::text, error::text, deadline, "
    "started_at, updated_at, finished_at, open, parked"
)


def _record(row: Row) -> ProcessRecord:
    fields = list(row)
    fields[3:8] = ProcessStatus(row[3]), json_of(row[4]), row[5], json_of(row[6]), Error.of(json_of(row[7]))
    fields[12] = tuple(row[12])
    return ProcessRecord(*fields)


_PROCESSES = Source("processes", _COLUMNS, _record, "process_id")


def get(domain: str, process_id: UUID) -> Call[ProcessRecord | None]:
    """Read one process."""
    return Call(
        f"SELECT {_COLUMNS} FROM commandbus.processes WHERE domain = %s AND process_id = %s",
        (domain, process_id),
        lambda rows: _record(rows[0]) if rows else None,
    )


def query(
    domain: str | None, status: ProcessStatus | None, process_type: str | None, limit: int, cursor: str | None
) -> Call[Page[ProcessRecord]]:
    """Newest first within a domain, by id; ids that the library made grow with time."""
    where, params = conditions(domain, status, process_type=process_type, statuses=ProcessStatus)
    return page(_PROCESSES, where, params, by="domain", read=str, backwards=True, limit=limit, cursor=cursor)


def timeline(domain: str, process_id: UUID) -> Call[list[ProcessStep]]:
    """All commands that a process has sent, in order."""

    def read(row: Row) -> ProcessStep:
        fields = list(row)
        fields[10] = row[10] and CommandStatus(row[10])
        fields[15:] = Error.of(json_of(row[15])), json_of(row[16])
        return ProcessStep(*fields)

    return Call(
        "SELECT domain, process_id, number, kind, name, of_number, status, command_domain, command_id, command_type, "
        "command_status, sent_at, due_at, parked_at, ended_at, error::text, result::text "
        "FROM commandbus.process_steps WHERE domain = %s AND process_id = %s ORDER BY number",
        (domain, process_id),
        lambda rows: [read(row) for row in rows],
    )
