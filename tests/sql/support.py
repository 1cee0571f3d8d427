"""What the tests of the SQL functions share: short calls, and a command in every status."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import dict_row
from psycopg.sql import SQL, Identifier, Literal

from tests.support import eventually

T = TypeVar("T")
Row = dict[str, Any]
Connection = psycopg.Connection
Connect = Callable[..., Connection]

LEVEL = 1 << 54  # the places of one priority
EVERYWHERE = (-1, 201 * LEVEL)
HOUR = 3600.0


# --------------------------------------------------------------------------------------------- calls


def send(db: Connection, *commands: Row, **common: object) -> list[tuple[str, str]]:
    """Send these commands, or one of type A in domain d; returns ids and outcomes."""
    sql = "SELECT command_id::text, outcome FROM commandbus.send_v1(%s) ORDER BY ordinal"
    return [(row[0], row[1]) for row in db.execute(sql, [payload(*commands, **common)])]


def send_ids(db: Connection, count: int = 1, /, **common: object) -> list[str]:
    """Send `count` commands with minted ids; all of them are accepted. Returns the ids."""
    found = send(db, *[{"command_id": str(uuid4()), **common} for _ in range(count)])
    assert {outcome for _, outcome in found} <= {"accepted"}
    return [command_id for command_id, _ in found]


def payload(*commands: Row, **common: object) -> str:
    """What `send_v1` takes."""
    default: Row = {"domain": "d", "command_type": "A", "data": {"n": 1}}
    return json.dumps([default | common | command for command in commands or ({},)])


def segments(*types: str, after: int = EVERYWHERE[0], up_to: int = EVERYWHERE[1]) -> str:
    """What `claim_v1` takes: the whole queue of these types, or this part of each."""
    return json.dumps([[name, after, up_to] for name in types])


def claim_all(
    db: Connection, limit: int = 10, *, parts: str = segments("A"), lease: float = 60, worker: str = "w1",
    **flags: bool,
) -> tuple[list[Row], Row]:  # fmt: skip
    """Claim; returns the commands, and the last row of the answer."""
    sql = "SELECT * FROM commandbus.claim_v1('d', %s, %s, %s, %s, %s, %s)"
    args = [parts, limit, worker, lease, flags.get("sweep", False), flags.get("alone", False)]
    rows = db.cursor(row_factory=dict_row).execute(sql, args).fetchall()
    assert rows[-1]["command_id"] is None
    return rows[:-1], rows[-1]


def claim(db: Connection, limit: int = 10, **how: Any) -> list[Row]:
    """Claim; returns the commands."""
    return claim_all(db, limit, **how)[0]


def look_ahead(db: Connection, start: int, wait: int, *, parts: str = segments("A")) -> list[Row]:
    """Claim so many to start at once, and so many more to wait; returns the commands by place."""
    sql = """SELECT * FROM commandbus.work_v1('d', '[]', %s, %s, 'w1', 60, false, false, %s)
             WHERE command_id IS NOT NULL ORDER BY place"""
    return db.cursor(row_factory=dict_row).execute(sql, [parts, start + wait, wait]).fetchall()


def sweep(db: Connection) -> None:
    """Look for expired leases, and claim nothing."""
    assert claim(db, 0, parts="[]", sweep=True) == []


def promote(db: Connection) -> None:
    """Promote what is due, and claim nothing."""
    assert claim(db, 0, parts="[]") == []


def item(leased: Row, **more: object) -> Row:
    """A claimed row as the lease verbs take it."""
    return {
        "command_id": str(leased["command_id"]),
        "delivery": leased["delivery"],
        "lease_token": str(leased["lease_token"]),
        **more,
    }


_LEASE_VERBS = {
    "renew": "SELECT command_id::text, outcome FROM commandbus.renew_v1(%s, %s, 60)",
    "complete": "SELECT command_id::text, outcome FROM commandbus.complete_v1(%s, %s)",
    "work": """
        WITH given AS (SELECT %s AS domain, %s AS items), undone AS (
            SELECT w.command_id, w.outcome
            FROM given g, commandbus.work_v1(g.domain, g.items, '[]', 0, 'w', 60) w WHERE w.command_id IS NOT NULL)
        SELECT i ->> 'command_id', coalesce(u.outcome, 'done')
        FROM given g, json_array_elements(g.items::json) i
        LEFT JOIN undone u ON u.command_id::text = i ->> 'command_id'""",
    "fail": "SELECT command_id::text, outcome FROM commandbus.fail_v1(%s, %s)",
    "release": "SELECT command_id::text, outcome FROM commandbus.release_v1(%s, %s)",
}
FAILURE = {"error": {"code": "X", "message": "m"}, "retry_in": HOUR, "max_attempts": 4}
KINDS = ("TRANSIENT", "PERMANENT", "BUSINESS")
LEASE_VERBS = ("renew", "complete", "work", *(f"fail {kind}" for kind in KINDS), "release")


def lease_verb(db: Connection, verb: str, *items: Row, domain: str = "d") -> list[tuple[str, str]]:
    """Call `renew`, `complete`, `work`, `fail TRANSIENT` ..., `release`; returns the answer, ordered by id.

    `work` completes, and then claims; here nothing.
    """
    name, _, kind = verb.partition(" ")
    more: Row = {**FAILURE, "kind": kind} if kind else {}
    found = db.execute(_LEASE_VERBS[name], [domain, json.dumps([more | one for one in items])])
    return sorted((row[0], row[1]) for row in found)


def outcome(db: Connection, verb: str, one: Row) -> str:
    """Call a lease verb with one item; returns its outcome."""
    ((command_id, word),) = lease_verb(db, verb, one)
    assert command_id == one["command_id"]
    return word


def complete_all(db: Connection, leased: Sequence[Row]) -> list[str]:
    """Complete what is leased, the busy ones again; returns the ids that are done.

    A rival's claim that saw a row before it was taken holds its lock until that claim commits.
    """
    left = {str(row["command_id"]): item(row) for row in leased}
    done = []
    while left:
        for command_id, word in lease_verb(db, "complete", *left.values()):
            if word != "busy":
                assert word == "done"
                done.append(command_id)
                del left[command_id]
    return done


_OPERATOR_VERBS = {
    "cancel": "SELECT commandbus.cancel_v1('d', %s, 'ana', 'why')",
    "operator_retry": "SELECT commandbus.operator_retry_v1('d', %s, 'ana', 'why')",
    "operator_cancel": "SELECT commandbus.operator_cancel_v1('d', %s, 'ana', 'why')",
    "operator_complete": "SELECT commandbus.operator_complete_v1('d', %s, 'ana', 'why', '{\"by\": \"hand\"}')",
}
OPERATOR_VERBS = tuple(_OPERATOR_VERBS)


def operator_verb(db: Connection, verb: str, command_id: str) -> str:
    """Call an operator's verb; returns ok or the SQLSTATE."""
    try:
        db.execute(_OPERATOR_VERBS[verb], [command_id])
    except psycopg.Error as error:
        return error.sqlstate or "?"
    return "ok"


def bulk(
    db: Connection, verb: str, *items: Row, domain: str = "d", value: str | None = None, operator: str = "ana"
) -> list[tuple[str, str]]:
    """Call a verb for many parked commands; returns the answer as it comes."""
    sql = "SELECT command_id::text, outcome FROM commandbus.operator_bulk_v1(%s, %s, %s, %s, 'why', %s)"
    value = value or ('{"by": "hand"}' if verb == "complete" else None)
    found = db.execute(sql, [domain, verb, json.dumps(items), operator, value])
    return [(row[0], row[1]) for row in found]


# ------------------------------------------------------------------------------------- what is there


def status_of(db: Connection, command_id: str) -> str:
    """Return the status of a command, or `absent`."""
    sql = "SELECT status FROM commandbus.commands WHERE domain = 'd' AND command_id = %s"
    found = db.execute(sql, [command_id]).fetchall()
    assert len(found) <= 1, f"{len(found)} rows are this command"
    return str(found[0][0]) if found else "absent"


def column(db: Connection, name: str, command_id: str) -> Any:  # noqa: ANN401 - any column
    """One column of an unfinished command."""
    sql = SQL("SELECT {} FROM commandbus.command WHERE domain = 'd' AND command_id = {}")
    (found,) = db.execute(sql.format(Identifier(name), Literal(UUID(command_id)))).fetchall()
    return found[0]


def everything(db: Connection) -> list[str]:
    """Every column of every command and event, wherever it is: equal only if nothing at all was written."""
    tables = ("command", "audit_event", "command_history", "audit_history")
    sql = SQL("SELECT {} || t::text FROM commandbus.{} t")
    parts = SQL(" UNION ALL ").join(sql.format(Literal(name), Identifier(name)) for name in tables)
    return sorted(str(row[0]) for row in db.execute(parts))


def trail(db: Connection, command_id: str, columns: str = "event, from_status, to_status") -> list[tuple[Any, ...]]:
    """The audit trail of a command, in order."""
    sql = "SELECT {} FROM commandbus.audit_trail WHERE domain = 'd' AND command_id = {} ORDER BY step"
    return db.execute(SQL(sql).format(SQL(columns), Literal(UUID(command_id)))).fetchall()


def rows(db: Connection, sql: str, *args: object) -> list[tuple[Any, ...]]:
    """The rows of any query."""
    return db.execute(sql.encode(), args or None).fetchall()


def one(db: Connection, sql: str, *args: object) -> Any:  # noqa: ANN401 - any value
    """The one value of a query."""
    ((value,),) = rows(db, sql, *args)
    return value


def sqlstate(call: Callable[[], object]) -> str:
    """Return the SQLSTATE that this call ends with, or ok."""
    try:
        call()
    except psycopg.Error as error:
        return error.sqlstate or "?"
    return "ok"


def empty(db: Connection) -> None:
    """Take everything out of the tables; much faster than TRUNCATE when there is little."""
    tables = (
        "command", "audit_event", "command_history", "audit_history", "claim_mark", "worker",
        "batch", "batch_change", "batch_command",
    )  # fmt: skip
    db.execute("".join(f"DELETE FROM commandbus.{table};" for table in tables).encode())


# ------------------------------------------------------------------------------------------ the clock


def shift(db: Connection, seconds: float) -> None:
    """Set the clock of this session forward by `seconds` in all."""
    db.execute("UPDATE commandbus.setting SET value = 'on' WHERE name = 'test_clock' AND value <> 'on'")
    db.execute("SELECT set_config('commandbus.clock_offset', %s, false)", [f"{seconds} seconds"])


def move_clock_to(db: Connection, moment: str) -> None:
    """Set the clock of this session to this moment; it goes on from there."""
    db.execute("RESET commandbus.clock_offset")
    shift(db, one(db, "SELECT extract(epoch FROM %s::timestamptz - clock_timestamp())::float8", moment))


# --------------------------------------------------------------------------- a command in every status

STATUSES = (
    "PENDING", "SCHEDULED", "IN_PROGRESS", "IN_TROUBLESHOOTING_QUEUE", "COMPLETED", "FAILED", "CANCELED", "absent",
)  # fmt: skip

# How a command that was claimed gets there. Each keeps the token of its only lease.
_STEPS = {
    "PENDING": "release",
    "SCHEDULED": "fail TRANSIENT",
    "IN_TROUBLESHOOTING_QUEUE": "fail PERMANENT",
    "COMPLETED": "complete",
    "FAILED": "fail BUSINESS",
}


def arrange(db: Connection, status: str, **common: object) -> Row:
    """Bring a command, the only one of its queue, to this status; returns the item of the lease it had."""
    if status == "absent":
        return {"command_id": str(uuid4()), "delivery": 1, "lease_token": str(uuid4())}
    (command_id,) = send_ids(db, **common)
    (leased,) = claim(db)
    lease = item(leased)
    if status in _STEPS:
        assert outcome(db, _STEPS[status], lease) == "done"
    elif status == "CANCELED":
        assert operator_verb(db, "cancel", command_id) == "ok"
    assert status_of(db, command_id) == status
    return lease


# ---------------------------------------------------------------------------------------------- races


@contextmanager
def background() -> Iterator[ThreadPoolExecutor]:
    """Threads for calls that are going to wait."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


def impatient(connection: Connection) -> Connection:
    """Make a session fail rather than hang when it waits for a lock that nobody is going to give up."""
    with connection.transaction():
        connection.execute("SET statement_timeout = '5s'")
    return connection


def waits(db: Connection, connection: Connection) -> None:
    """Come back when this connection waits for a lock; fails if it does not."""
    sql = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
    pid = connection.info.backend_pid
    eventually(lambda: one(db, sql, pid), what=f"the wait of process {pid} for a lock")


def start_waiting(
    pool: ThreadPoolExecutor, db: Connection, connection: Connection, call: Callable[[Connection], T]
) -> Future[T]:
    """Start a call on this connection, and see it wait for a lock."""
    future = pool.submit(partial(call, connection))
    waits(db, connection)
    assert not future.done()
    return future


def at_once(pool: ThreadPoolExecutor, calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run these calls side by side; returns what they return."""
    return [future.result(timeout=60) for future in [pool.submit(call) for call in calls]]
