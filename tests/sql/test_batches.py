"""The counts of batches, and the command that is sent when the last of one has ended: exactly once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from tests.sql.support import (
    HOUR,
    Connect,
    Connection,
    Row,
    arrange,
    at_once,
    background,
    bulk,
    claim,
    impatient,
    item,
    lease_verb,
    one,
    operator_verb,
    outcome,
    payload,
    rows,
    send,
    shift,
    start_waiting,
    sweep,
)

PARKED = "IN_TROUBLESHOOTING_QUEUE"
DONE = {"domain": "reports", "command_type": "Done", "data": {"of": "batch"}, "priority": 5}


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


@pytest.fixture(autouse=True)
def _weeks(db: Connection) -> None:
    db.execute("SELECT commandbus.make_partitions_v1()")


# ------------------------------------------------------------------------------------------- what is called


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


# ------------------------------------------------------------------------------------------------ counting


def test_a_batch_counts_its_commands_and_sends_one_when_the_last_has_ended(db: Connection) -> None:
    batch_id = batch_of(db, 3)
    assert counts(db, batch_id) == {"total": 3, "open": 3}
    done, refused, last = claim(db)
    assert lease_verb(db, "complete", item(done)) == [(item(done)["command_id"], "done")]
    assert outcome(db, "fail BUSINESS", item(refused)) == "done"
    assert counts(db, batch_id) == {"total": 3, "completed": 1, "failed": 1, "open": 1}
    assert not finished(db, batch_id)
    assert told(db) == 0
    assert outcome(db, "complete", item(last)) == "done"
    assert counts(db, batch_id) == {"total": 3, "completed": 2, "failed": 1}
    assert finished(db, batch_id)
    sent = rows(db, "SELECT command_type, status, data, priority, correlation_id FROM commandbus.commands "
                    "WHERE domain = 'reports'")  # fmt: skip
    assert sent == [("Done", "PENDING", {"of": "batch"}, 5, batch_id)]
