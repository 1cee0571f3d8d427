"""What the tests of the bus share: short queries, a command in every status, a gate for sends."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from psycopg.sql import SQL, Identifier

from tests.support import aeventually

T = TypeVar("T")
Connection = psycopg.Connection
Connect = Callable[..., Connection]
Row = tuple[Any, ...]

DOMAIN = "payments"


def rows(db: Connection, query: str, *args: object) -> list[Row]:
    """The rows of a query."""
    return db.execute(query.encode(), args or None).fetchall()


def one(db: Connection, query: str, *args: object) -> Any:  # noqa: ANN401 - any value
    """The one value of a query."""
    ((value,),) = rows(db, query, *args)
    return value


def ids(db: Connection) -> list[UUID]:
    """The ids of all commands, finished ones included."""
    return [row[0] for row in rows(db, "SELECT command_id FROM commandbus.commands")]


def poisonous(db: Connection) -> str:
    """Data that a bus which is open already takes, and the database refuses: its owner has lowered the limit."""
    db.execute("UPDATE commandbus.setting SET value = '1024' WHERE name = 'max_data_bytes'")
    return "x" * 1024


def terminate(db: Connection, query: str) -> list[int]:
    """End the backends of this database whose last statement contains this; returns their process ids."""
    found = db.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND query LIKE %s AND pg_terminate_backend(pid)",
        [f"%{query}%"],
    )
    return [row[0] for row in found]


def in_progress(db: Connection) -> int:
    """How many commands are leased."""
    return int(one(db, "SELECT count(*) FROM commandbus.command WHERE status = 'IN_PROGRESS'"))


async def until(predicate: Callable[[], T], what: str, timeout: float = 20) -> T:
    """`aeventually` for a plain function."""

    async def look() -> T:
        return predicate()

    return await aeventually(look, what=what, timeout=timeout)


# --------------------------------------------------------------------------- a command in every status


def lease(db: Connection, command_type: str, *, domain: str = DOMAIN, seconds: float = 60) -> dict[str, Any]:
    """Claim one command of this type as a worker of the test's own; returns the item that names the lease."""
    segments = json.dumps([[command_type, -1, 201 << 54]])
    found = rows(
        db,
        "SELECT command_id::text, delivery, lease_token::text FROM commandbus.claim_v1(%s, %s, 1, 'thief', %s)",
        domain,
        segments,
        seconds,
    )
    command_id, delivery, token = found[0]
    assert command_id is not None, f"nothing of type {command_type} could be claimed"
    return {"command_id": command_id, "delivery": delivery, "lease_token": token}


def expire(db: Connection, command_id: UUID | str, *, domain: str = DOMAIN) -> None:
    """Let the lease of a command run out, and count the crash."""
    with db.transaction():
        db.execute(
            "UPDATE commandbus.command SET lease_until = clock_timestamp() - interval '1 s' "
            "WHERE command_id = %s AND status = 'IN_PROGRESS'",
            [command_id],
        )
        db.execute("SELECT commandbus.claim_v1(%s, '[]', 0, 'sweeper', 60, true)", [domain])


def complete(db: Connection, item: dict[str, Any], result: object, *, domain: str = DOMAIN) -> str:
    """Complete a lease; returns done, busy or lost."""
    text = json.dumps([item | {"result": result}])
    return str(one(db, "SELECT outcome FROM commandbus.complete_v1(%s, %s)", domain, text))


def fail(db: Connection, item: dict[str, Any], kind: str, *, domain: str = DOMAIN) -> str:
    """Fail a lease as TRANSIENT, PERMANENT or BUSINESS; returns done, busy or lost."""
    more = {"kind": kind, "error": {"code": "X", "message": "m"}, "retry_in": 3600, "max_attempts": 4}
    text = json.dumps([item | more])
    return str(one(db, "SELECT outcome FROM commandbus.fail_v1(%s, %s)", domain, text))


def bring(db: Connection, command_type: str, status: str) -> None:
    """Bring the one PENDING command of this type to this status."""
    if status == "PENDING":
        return
    item = lease(db, command_type)
    kinds = {"SCHEDULED": "TRANSIENT", "IN_TROUBLESHOOTING_QUEUE": "PERMANENT", "FAILED": "BUSINESS"}
    if status in kinds:
        assert fail(db, item, kinds[status]) == "done"
    elif status == "COMPLETED":
        assert complete(db, item, {"by": "test"}) == "done"
    elif status == "CANCELED":
        db.execute("SELECT commandbus.cancel_v1(%s, %s, NULL, NULL)", [DOMAIN, item["command_id"]])


# ------------------------------------------------------------------------------------ a gate for sends


class Gate:
    """Sends of a type wait inside PostgreSQL, in flight, until the gate is opened for it."""

    def __init__(self, db: Connection) -> None:
        self._db = db
        db.execute("CREATE TABLE public.gate (command_type text)")
        db.execute(
            "CREATE FUNCTION public.wait_at_gate() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "WHILE EXISTS (SELECT FROM public.gate g WHERE g.command_type = NEW.command_type) LOOP "
            "PERFORM pg_sleep(0.005); END LOOP; RETURN NEW; END $$"
        )
        db.execute(
            "CREATE TRIGGER gate BEFORE INSERT ON commandbus.command "
            "FOR EACH ROW EXECUTE FUNCTION public.wait_at_gate()"
        )

    def shut(self, command_type: str) -> None:
        """Hold sends of this type back from now on."""
        self._db.execute("INSERT INTO public.gate VALUES (%s)", [command_type])

    def open(self) -> None:
        """Let everything through."""
        self._db.execute("DELETE FROM public.gate")

    def waiting(self) -> int:
        """How many statements wait at the gate."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        return int(one(self._db, query))

    async def reached(self, count: int = 1) -> None:
        """Come back when so many statements wait at the gate."""
        await until(lambda: self.waiting() >= count, "a send at the gate")


def lock_table(db: Connection, table: str) -> None:
    """Take the strongest lock on a table in the open transaction of this connection."""
    db.execute(SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(Identifier("commandbus", table)))


@contextlib.asynccontextmanager
async def connect_caller(dsn: str) -> AsyncIterator[psycopg.AsyncConnection[Row]]:
    """An async connection of the caller's; what is done on it commits at the end."""
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        yield connection
