"""The protocol with the database, without I/O: one value for each SQL function or view that is used.

A `Call` says what to execute and how to read the rows; `_database` executes it on a connection of any colour. This,
`_desk_calls`, `_batch_calls` and `_process_calls` are the only Python that names the SQL functions which change
something; `_queries` has what reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar
from uuid import UUID

from commandbus._limits import MAX_BYTES, MAX_CORRELATION_ID, MAX_HEADER_BYTES, encode, shown
from commandbus.errors import InvalidCommandError
from commandbus.model import Command, CommandStatus, SendRequest

T = TypeVar("T")
Row: TypeAlias = tuple[Any, ...]

MAX_DELAY = timedelta(days=3650)
SEQUENCE_BITS = 54
"""`place >> 54` is the level of a priority, 0 for the highest of 201; the rest is the sequence number."""
LAST_PLACE = (201 << SEQUENCE_BITS) - 1

_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One statement: its text, its parameters, and how to read what comes back."""

    sql: str
    params: tuple[object, ...]
    read: Callable[[list[Row]], T]


def as_text(value: Any) -> Any:  # noqa: ANN401 - of a row
    """Return bytes as text, anything else as it is: on a caller's connection the client encoding may be SQL_ASCII."""
    return value.decode() if isinstance(value, bytes) else value


# -- sending -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A command on its way, checked and serialised. `minted`: its id was made for this send; `awaited`: by a call."""

    domain: str
    command_id: UUID
    minted: bool
    text: str
    awaited: bool = False

    def asking(self, address: str) -> Outgoing:
        """Return the same, but when it ends the bus at this address is told to look."""
        return replace(self, text=f'{self.text[:-1]},"reply_to":"{address}"}}', awaited=True)

    def row(self, *, minted: bool) -> str:
        """Return the row for `send_v1`; one that is not minted, or was on its way before, is looked up there."""
        return f'{self.text[:-1]},"minted":true}}' if minted else self.text


def outgoing(
    request: SendRequest, headers: Mapping[str, str], fresh_id: UUID, max_data_bytes: int = MAX_BYTES
) -> Outgoing:
    """Check a request and serialise it; raises `InvalidCommandError` that names the field.

    `fresh_id` is for a request without an id of its own.
    """
    own_id: object = request.command_id
    if own_id is not None and not isinstance(own_id, UUID):
        raise InvalidCommandError(f"command_id is {shown(own_id)}: it must be a uuid.UUID")
    command_id = own_id or fresh_id
    name = str(command_id)  # once: it takes 0.6 us
    what = f"command {name}"
    domain = checked_name("domain", request.domain, what)
    command_type = checked_name("command_type", request.command_type, what)
    data = encode(request.data, f"{what}: data", max_data_bytes)
    text = (
        f'{{"domain":"{domain}","command_type":"{command_type}","command_id":"{name}","data":{data}'
        f"{_options(request, headers, what)}}}"
    )
    return Outgoing(domain, command_id, own_id is None, text)


def _options(request: SendRequest, headers: Mapping[str, str], what: str) -> str:
    """Return the rest of a row, which most commands do not have."""
    found = ""
    if headers:
        found += f',"headers":{_headers(headers, what)}'
    if request.correlation_id is not None:
        found += f',"correlation_id":{_text("correlation_id", request.correlation_id, MAX_CORRELATION_ID, what)}'
    if request.reply_to is not None:
        found += f',"reply_to":"{checked_name("reply_to", request.reply_to, what)}"'
    if request.max_attempts is not None:
        found += f',"max_attempts":{_bounded("max_attempts", request.max_attempts, 1, 1_000_000, what)}'
    if request.priority:
        found += f',"priority":{_bounded("priority", request.priority, -100, 100, what)}'
    if request.delay is not None:
        delay: object = request.delay
        if not isinstance(delay, timedelta) or not timedelta(0) <= delay <= MAX_DELAY:
            raise InvalidCommandError(f"{what}: delay must be a timedelta of 0 to {MAX_DELAY.days} days")
        found += f',"delay":{delay.total_seconds()}'
    return found


def _headers(headers: Mapping[str, str], what: str) -> str:
    text = encode(dict(headers), f"{what}: headers", MAX_HEADER_BYTES)
    if not all(isinstance(value, str) for value in headers.values()):
        raise InvalidCommandError(f"{what}: headers must map strings to strings")
    return text


def _text(field: str, value: object, most: int, what: str) -> str:
    if not isinstance(value, str) or len(value) > most:
        raise InvalidCommandError(f"{what}: {field} must be a string of at most {most:,} characters")
    return encode(value, f"{what}: {field}")


def send(rows: Sequence[str], lock_timeout_ms: int | None = None) -> Call[list[str]]:
    """Return the outcomes in the order of `rows`: accepted, duplicate or conflict."""
    return Call(
        "SELECT outcome FROM commandbus.send_v1(%s, %s)",
        (f"[{','.join(rows)}]", lock_timeout_ms),
        lambda found: [as_text(row[0]) for row in found],
    )


def wake(domains: Sequence[str]) -> Call[None]:
    """Hint to the workers of these domains that there is work."""
    return Call("SELECT commandbus.wake_v1(%s)", (list(domains),), lambda _: None)


def checked_name(field: str, value: object, what: str) -> str:
    found = _NAME.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise InvalidCommandError(
            f"{what}: {field} is {shown(value)}: it must be 1 to 128 of letters, digits and _ . : -"
        )
    return found[0]  # of a member of an enumeration, its value


def _bounded(field: str, value: object, low: int, high: int, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidCommandError(f"{what}: {field} is {shown(value)}: it must be {low} to {high:,}")
    return int(value)


# -- leases ------------------------------------------------------------------------------------------------------------


class Claimed(NamedTuple):
    """One command that was leased; `data` is still text, so that one that cannot be read harms no other."""

    domain: str
    command_id: UUID
    command_type: str
    data: str
    headers: str
    correlation_id: str | None
    reply_to: str | None
    priority: int
    max_attempts: int | None
    attempts: int
    crashes: int
    delivery: int
    lease_token: UUID
    place: int | None
    sent_at: datetime

    def command(self, worker: str) -> Command:
        """Decode the data. Raises `ValueError` or `RecursionError`: PostgreSQL stores what Python cannot read."""
        return Command(
            self.domain, self.command_id, self.command_type, CommandStatus.IN_PROGRESS, json.loads(self.data),
            {} if self.headers == "{}" else json.loads(self.headers), self.correlation_id, self.reply_to, self.priority,
            self.max_attempts, self.attempts, self.crashes, self.delivery, None, None, worker, self.sent_at,
            None, None, None, None, None, None,
        )  # fmt: skip


Answers: TypeAlias = dict[UUID, str]
"""done, busy, and lost or changed, by command id."""


@dataclass(frozen=True, slots=True)
class Round:
    """What a round of a worker brought: commands, and which completions were `undone`, busy or lost.

    `next_due`: when the next SCHEDULED command is due, counted from now.
    """

    commands: list[Claimed]
    next_due: timedelta | None
    alone_waiting: bool
    undone: Answers


Segment: TypeAlias = tuple[str, int, int]
"""A command type and the places after the first number, up to the second."""


def work(
    domain: str,
    segments: Sequence[Segment],
    limit: int,
    worker: str,
    lease: timedelta,
    *,
    completions: Sequence[str] = (),
    sweep: bool = False,
    alone: bool = False,
    ahead: int = 0,
) -> Call[Round]:
    """Record these completions, then lease up to `limit` commands, `ahead` of which would wait; see `work_v1`."""

    def read(rows: list[Row]) -> Round:
        *found, (*_, next_due, alone_waiting, _) = rows
        undone = sum(row[-1] is not None for row in found)
        return Round(
            [Claimed._make((domain, *row[:-3])) for row in found[undone:]],
            None if next_due is None else timedelta(seconds=next_due),
            alone_waiting,
            {row[0]: row[-1] for row in found[:undone]},
        )

    return Call(
        "SELECT * FROM commandbus.work_v1(%s, %s, %s, %s, %s, %s, %s, %s, %s)",
        (
            domain, f"[{','.join(completions)}]", json.dumps(segments), limit, worker, lease.total_seconds(), sweep,
            alone, ahead,
        ),
        read,
    )  # fmt: skip


def _lease_call(name: str, domain: str, items: Sequence[str], *more: object) -> Call[Answers]:
    marks = "".join(", %s" for _ in more)
    return Call(
        f"SELECT command_id, outcome FROM commandbus.{name}(%s, %s{marks})",
        (domain, f"[{','.join(items)}]", *more),
        lambda rows: {row[0]: as_text(row[1]) for row in rows},
    )


def held(command_id: UUID, delivery: int, lease_token: UUID, more: str = "") -> str:
    """The item that names a lease; `more` is JSON of further fields, starting with a comma."""
    return f'{{"command_id":"{command_id}","delivery":{delivery},"lease_token":"{lease_token}"{more}}}'


def renew(domain: str, items: Sequence[str], lease: timedelta) -> Call[Answers]:
    """Extend leases; see `renew_v1`."""
    return _lease_call("renew_v1", domain, items, lease.total_seconds())


def complete(domain: str, items: Sequence[str]) -> Call[Answers]:
    """Record success; items carry `result`. See `complete_v1`."""
    return _lease_call("complete_v1", domain, items)


def fail(domain: str, items: Sequence[str]) -> Call[Answers]:
    """Record failure; items carry `kind`, `error`, `retry_in` and `max_attempts`. See `fail_v1`."""
    return _lease_call("fail_v1", domain, items)


def release(domain: str, items: Sequence[str]) -> Call[Answers]:
    """Give leases back uncharged; see `release_v1`."""
    return _lease_call("release_v1", domain, items)


class Session(NamedTuple):
    """What a pooler between us and the server decides: which process serves us, and its settings."""

    pid: int
    isolation: str
    datestyle: str


def session() -> Call[Session]:
    """Return how the session is that runs this call."""
    return Call(
        "SELECT pg_backend_pid(), current_setting('default_transaction_isolation'), current_setting('datestyle')",
        (),
        lambda rows: Session(*rows[0]),
    )


def transaction(*, last: bool = False) -> Call[str]:
    """Return the id of the transaction that is open on the connection.

    `last`: only the completion and the commit are to come. Should this process freeze between the two, the server ends
    the transaction, whose lock on the command would keep everybody from finding the lease expired.
    """
    if not last:
        return Call("SELECT pg_current_xact_id()::text", (), lambda rows: as_text(rows[0][0]))
    return Call(
        "SELECT pg_current_xact_id()::text, set_config('idle_in_transaction_session_timeout', '10s', true)",
        (),
        lambda rows: as_text(rows[0][0]),
    )


def stop_after(seconds: float) -> Call[None]:
    """Let the server itself end the statements of this transaction that take longer."""
    milliseconds = min(max(1, round(seconds * 1000)), 2**31 - 1)  # 0 would be without end; an integer holds 24 days
    return Call("SELECT set_config('statement_timeout', %s, true)", (str(milliseconds),), lambda _: None)


def pause(seconds: float) -> Call[None]:
    """Wait on the connection, whatever its colour."""
    return Call("SELECT pg_sleep(%s)", (seconds,), lambda _: None)


# -- the list of workers ---------------------------------------------------------------------------------------------


def announce(worker: str, domain: str, command_types: Sequence[str], concurrency: int) -> Call[None]:
    """Say that this worker works for this domain; see `announce_v1`."""
    return Call(
        "SELECT commandbus.announce_v1(%s, %s, %s, %s)",
        (worker, domain, list(command_types), concurrency),
        lambda _: None,
    )


def leave(worker: str) -> Call[None]:
    """Say that this worker has stopped."""
    return Call("SELECT commandbus.leave_v1(%s)", (worker,), lambda _: None)


# -- housekeeping ----------------------------------------------------------------------------------------------------


def make_partitions() -> Call[None]:
    """Make this and the next weeks of the history."""
    return Call("SELECT commandbus.make_partitions_v1()", (), lambda _: None)


def drop_expired() -> Call[list[tuple[str, list[int] | None]]]:
    """Drop the weeks whose retention is over; each with the process ids that blocked it, or None."""
    return Call(
        "SELECT week, blocked_by FROM commandbus.drop_expired_v1()",
        (),
        lambda rows: [(r[0], r[1]) for r in rows],
    )


def drop_finished() -> Call[bool]:
    """Take out a portion of the batches and processes whose retention is over; returns whether more may be left."""
    return Call("SELECT commandbus.drop_finished_v1()", (), lambda rows: bool(rows[0][0]))
