"""What the tests of batches share: short calls."""

from __future__ import annotations

import json
from uuid import uuid4

from tests.sql.support import Connection, Row, one, payload, rows

DONE = {"domain": "reports", "command_type": "Done", "data": {"of": "batch"}, "priority": 5}


def create(db: Connection, *, on_complete: Row | None = None, name: str | None = None, hash_: str = "h") -> str:
    """Create a batch that grows; returns its id."""
    batch_id = str(uuid4())
    assert create_as(db, batch_id, on_complete=on_complete, name=name, hash_=hash_) == "accepted"
    return batch_id


def create_as(
    db: Connection, batch_id: str, *, on_complete: Row | None = None, name: str | None = None, hash_: str | None = "h"
) -> str:
    text = None if on_complete is None else json.dumps(on_complete)
    return str(one(db, "SELECT commandbus.create_batch_v1('d', %s, %s, %s, %s)", batch_id, name, text, hash_))


def add(db: Connection, batch_id: str, *commands: Row, **common: object) -> list[tuple[str, str]]:
    sql = "SELECT command_id::text, outcome FROM commandbus.add_to_batch_v1('d', %s, %s) ORDER BY ordinal"
    text = payload(*commands, **common) if commands else "[]"
    return [(row[0], row[1]) for row in rows(db, sql, batch_id, text)]


def close(db: Connection, batch_id: str) -> None:
    db.execute("SELECT commandbus.close_batch_v1('d', %s)", [batch_id])


def batch_of(db: Connection, count: int, *, on_complete: Row | None = DONE) -> str:
    """Create a batch of so many commands that grows no more."""
    batch_id = create(db, on_complete=on_complete)
    add(db, batch_id, *[{}] * count)
    close(db, batch_id)
    return batch_id


def ended_long_ago(db: Connection, total: int, days: int = 40) -> str:
    """Write down a batch of so many commands, whose weeks were dropped."""
    return str(one(db, """
        WITH made AS (
            INSERT INTO commandbus.batch (domain, batch_id, total, completed, growing, created_at, finished_at)
            SELECT 'd', gen_random_uuid(), n.total, n.total, false, n.at, n.at
            FROM (SELECT %s AS total, clock_timestamp() - make_interval(days => %s) AS at) n RETURNING *
        ), listed AS (
            INSERT INTO commandbus.batch_command
            SELECT m.domain, m.batch_id, n, gen_random_uuid() FROM made m, generate_series(1, m.total) n
        )
        SELECT m.batch_id FROM made m""", total, days))  # fmt: skip


def counts(db: Connection, batch_id: str) -> dict[str, int]:
    """The counts that are not 0."""
    names = ("total", "completed", "failed", "canceled", "in_trouble", "open")
    (row,) = rows(db, f"SELECT {', '.join(names)} FROM commandbus.batches WHERE batch_id = %s", batch_id)
    return {name: value for name, value in zip(names, row, strict=True) if value}


def finished(db: Connection, batch_id: str) -> bool:
    return bool(one(db, "SELECT finished_at IS NOT NULL FROM commandbus.batches WHERE batch_id = %s", batch_id))


def told(db: Connection) -> int:
    """How many times the end of a batch was told."""
    return int(one(db, "SELECT count(*) FROM commandbus.commands WHERE domain = 'reports'"))
