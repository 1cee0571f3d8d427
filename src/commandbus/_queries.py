"""The reading half of the protocol: a value for each question to the views."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Generic, TypeAlias, TypeVar, cast
from uuid import UUID

from commandbus._calls import MAX_DELAY, Call, Row
from commandbus._limits import shown
from commandbus.errors import InvalidCommandError
from commandbus.model import (
    AuditEvent,
    Command,
    CommandStatus,
    Error,
    Json,
    Page,
    Reply,
    Stat,
    Violation,
    Waiting,
    WaitingReason,
)

T = TypeVar("T")

MAX_LIMIT = 1000

_COLUMNS = (
    "domain, command_id, command_type, status, data::text, headers::text, correlation_id, reply_to, priority, "
    "max_attempts, attempts, crashes, delivery, result::text, error::text, worker, sent_at, not_before, due_at, "
    "parked_at, claimed_at, lease_until, finished_at, batch_id"
)


def _command(row: Row) -> Command:
    (domain, command_id, command_type, status, data, headers, correlation_id, reply_to, priority, max_attempts,
     attempts, crashes, delivery, result, error, *rest) = row  # fmt: skip
    return Command(
        domain, command_id, command_type, CommandStatus(status), json_of(data), json_of(headers), correlation_id,
        reply_to, priority, max_attempts, attempts, crashes, delivery, json_of(result), Error.of(json_of(error)), *rest,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source(Generic[T]):
    """A view, what to read of it, how, and the id of a row."""

    view: str
    columns: str
    read: Callable[[Row], T]
    key: str


COMMANDS = Source("commands", _COLUMNS, _command, "command_id")


def json_of(text: str | None) -> Json:
    """Return the value of JSON text, or words about why Python cannot read it."""
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"<cannot be read: {error}>"


def get_command(domain: str, command_id: UUID) -> Call[Command | None]:
    """Read one command, unfinished or finished."""
    return Call(
        f"SELECT {_COLUMNS} FROM commandbus.commands WHERE domain = %s AND command_id = %s LIMIT 1",
        (domain, command_id),
        lambda rows: _command(rows[0]) if rows else None,
    )


def commands(rest: str, *params: object) -> Call[list[Command]]:
    """Read what this rest of the statement chooses."""
    sql = f"SELECT {_COLUMNS} FROM commandbus.commands {rest}"
    return Call(sql, params, lambda rows: [_command(row) for row in rows])


# One probe of an index for each domain.
_DOMAINS = (
    "WITH RECURSIVE d (domain) AS ("
    "(SELECT c.domain FROM commandbus.commands c ORDER BY c.domain LIMIT 1) UNION ALL SELECT "
    "(SELECT c.domain FROM commandbus.commands c WHERE c.domain > d.domain ORDER BY c.domain LIMIT 1) "
    "FROM d WHERE d.domain IS NOT NULL) "
)


def domains() -> Call[list[str]]:
    """Return the domains that have commands, finished ones included."""
    return Call(
        f"{_DOMAINS}SELECT d.domain FROM d WHERE d.domain IS NOT NULL ORDER BY d.domain",
        (),
        lambda rows: [str(row[0]) for row in rows],
    )


def find_domains(command_id: UUID) -> Call[list[str]]:
    """Return the domains that have a command of this id.

    Ids are indexed by domain: one probe for each. LATERAL with LIMIT pins that plan.
    """
    return Call(
        f"{_DOMAINS}SELECT d.domain FROM d CROSS JOIN LATERAL (SELECT FROM "
        "commandbus.commands c WHERE c.domain = d.domain AND c.command_id = %s LIMIT 1) found ORDER BY d.domain",
        (command_id,),
        lambda rows: [str(row[0]) for row in rows],
    )


def query_commands(
    *,
    domain: str | None,
    status: CommandStatus | None,
    command_type: str | None,
    since: timedelta | None,
    limit: int,
    cursor: str | None,
) -> Call[Page[Command]]:
    """Newest first within a domain, by id; ids that the library made grow with time."""
    where, params = conditions(domain, status, command_type)
    if since is not None:
        check_age("since", since)
        where.append("sent_at >= clock_timestamp() - %s")
        params.append(since)
    return page(COMMANDS, where, params, by="domain", read=str, backwards=True, limit=limit, cursor=cursor)


def clock() -> Call[datetime]:
    """Return the moment that the functions use now."""
    return Call("SELECT commandbus.clock()", (), lambda rows: cast("datetime", rows[0][0]))


def count(domain: str | None, status: CommandStatus | None, command_type: str | None) -> Call[int]:
    """Count commands, finished ones included."""
    where, params = conditions(domain, status, command_type)
    return Call(
        f"SELECT count(*) FROM commandbus.commands{where_clause(where)}",
        tuple(params),
        lambda rows: int(rows[0][0]),
    )


def stats(domain: str | None) -> Call[list[Stat]]:
    """Count what is unfinished, by domain, type and status."""
    where, params = conditions(domain)
    return Call(
        "SELECT domain, command_type, status, count, oldest_sent_at FROM commandbus.stats"
        f"{where_clause(where)} ORDER BY 1, 2, 3",
        tuple(params),
        lambda rows: [Stat(row[0], row[1], CommandStatus(row[2]), row[3], row[4]) for row in rows],
    )


def audit_trail(domain: str, command_id: UUID) -> Call[list[AuditEvent]]:
    """All steps of a command, in order."""

    def read(row: Row) -> AuditEvent:
        fields = list(row)
        fields[5] = CommandStatus(row[5]) if row[5] else None
        fields[6] = CommandStatus(row[6])
        fields[13:] = Error.of(json_of(row[13])), json_of(row[14])
        return AuditEvent(*fields)

    return Call(
        "SELECT domain, command_id, step, event, occurred_at, from_status, to_status, delivery, attempt, worker, "
        "lease_token, operator, reason, error::text, details::text FROM commandbus.audit_trail "
        "WHERE domain = %s AND command_id = %s ORDER BY step",
        (domain, command_id),
        lambda rows: [read(row) for row in rows],
    )


Key: TypeAlias = tuple[str, UUID]
"""The domain and the id of a command."""


def outcomes(keys: Mapping[Key, bool]) -> Call[dict[Key, Reply | None]]:
    """Return how these ended, and of those that are true here whether they are parked; see `outcomes_v1`.

    A parked one has a reply of that status. None: there is no such command. Missing: it goes on.
    """
    items = [{"domain": key[0], "command_id": str(key[1]), "parked": parked} for key, parked in keys.items()]

    def read(row: Row) -> Reply | None:
        domain, command_id, command_type, status, result, error, correlation_id = row
        if status is None:
            return None
        return Reply(
            domain, command_id, command_type, CommandStatus(status), json_of(result), Error.of(json_of(error)),
            correlation_id,
        )  # fmt: skip

    return Call(
        "SELECT domain, command_id, command_type, status, result, error, correlation_id "
        "FROM commandbus.outcomes_v1(%s)",
        (json.dumps(items),),
        lambda rows: {(row[0], row[1]): read(row) for row in rows},
    )


def explain(domain: str, command_id: UUID) -> Call[Waiting | None]:
    """Say why a command waits; None when it is finished. See `explain_v1`."""

    def read(rows: list[Row]) -> Waiting | None:
        return Waiting(WaitingReason(rows[0][0]), *rows[0][1:]) if rows else None

    sql = "SELECT reason, until, ahead, worker, workers FROM commandbus.explain_v1(%s, %s)"
    return Call(sql, (domain, command_id), read)


def workers(domain: str | None) -> Call[list[dict[str, Json]]]:
    """List the workers that have announced themselves, alive or not, by the columns of the view."""
    columns = ("domain", "worker", "command_types", "concurrency", "started_at", "seen_at", "alive")
    where, params = conditions(domain)
    return Call(
        f"SELECT {', '.join(columns)} FROM commandbus.workers{where_clause(where)} ORDER BY domain, started_at, worker",
        tuple(params),
        lambda rows: [dict(zip(columns, row, strict=True)) for row in rows],
    )


def verify() -> Call[list[Violation]]:
    """What the library cannot have written, by domain and id; see `verify_v1`."""
    return Call(
        "SELECT violation, domain, command_id, detail FROM commandbus.verify_v1()",
        (),
        lambda rows: [Violation(*row) for row in rows],
    )


def schema() -> Call[tuple[int | None, int | None]]:
    """The database's schema version and the oldest client it serves."""
    return Call("SELECT version, oldest_client FROM commandbus.schema_v1()", (), lambda rows: (rows[0][0], rows[0][1]))


def max_data_bytes() -> Call[int]:
    """How large the data of a command may be in this database."""
    return Call("SELECT max_data_bytes FROM commandbus.limits_v1()", (), lambda rows: int(rows[0][0]))


def conditions(
    domain: str | None,
    status: StrEnum | None = None,
    command_type: str | None = None,
    *,
    process_type: str | None = None,
    statuses: type[StrEnum] = CommandStatus,
) -> tuple[list[str], list[object]]:
    """Return the conditions for what is given, and their parameters. `statuses`: those that there are."""
    if status is not None and status not in statuses.__members__:
        raise InvalidCommandError(f"status is {status!r}: it must be one of {', '.join(statuses)}")
    given = {"domain": domain, "status": status, "command_type": command_type, "process_type": process_type}
    chosen = {column: str(value) for column, value in given.items() if value is not None}
    return [f"{column} = %s" for column in chosen], list(chosen.values())


def check_age(name: str, age: timedelta) -> None:
    """Raise `InvalidCommandError` for an age that is out of bounds."""
    given: object = age
    if not isinstance(given, timedelta) or not timedelta(0) <= given <= MAX_DELAY:
        raise InvalidCommandError(f"{name} is {shown(given)}: it must be a timedelta of 0 to {MAX_DELAY.days} days")


def where_clause(conditions: list[str]) -> str:
    """Return the WHERE clause of these conditions."""
    return f" WHERE {' AND '.join(conditions)}" if conditions else ""


def page(
    source: Source[T],
    where: list[str],
    params: list[object],
    *,
    by: str,
    read: Callable[[str], object],
    backwards: bool = False,
    limit: int,
    cursor: str | None,
) -> Call[Page[T]]:
    """A page in the order of this column, the values of which a cursor holds as text, and of the id."""
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidCommandError(f"limit is {limit}: it must be between 1 and {MAX_LIMIT:,}")
    comparison, direction = ("<", " DESC") if backwards else (">", "")
    if cursor is not None:
        where.append(f"({by}, {source.key}) {comparison} (%s, %s)")
        params += read_cursor(cursor, read)

    def read_page(rows: list[Row]) -> Page[T]:
        items = tuple(source.read(row[:-2]) for row in rows[:limit])
        return Page(items, write_cursor(rows[limit - 1][-2:]) if len(rows) > limit else None)

    order = f"{by}{direction}, {source.key}{direction}"
    sql = f"SELECT {source.columns}, {by}, {source.key} FROM commandbus.{source.view}{where_clause(where)}"
    return Call(f"{sql} ORDER BY {order} LIMIT {limit + 1}", tuple(params), read_page)


def write_cursor(key: Row) -> str:
    """Return the cursor that leads behind this key."""
    return base64.urlsafe_b64encode(json.dumps(key, default=str).encode()).decode()


def read_cursor(cursor: str, read: Callable[[str], object]) -> list[object]:
    """Return the key that a cursor leads behind. Raises `InvalidCommandError`."""
    try:
        first, second = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        return [read(first), UUID(second)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InvalidCommandError("cursor is not one that a page gave out as next_cursor") from None
