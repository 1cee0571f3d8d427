"""A command waits in exactly one line, and one that runs has a lease: the table itself refuses anything else."""

from __future__ import annotations

import itertools
from uuid import uuid4

import psycopg
import pytest

from tests.sql.support import Connection

LINES = ("place", "due_at", "alone_since", "parked_at")
LEASE = ("lease_token", "lease_until", "claimed_at", "worker")
VALUES = {"place": "1", "lease_token": "gen_random_uuid()", "worker": "'w'"}  # and of the rest, a moment

ALLOWED = {
    "PENDING": {("place",), ("alone_since",)},
    "IN_PROGRESS": {("place",), ("alone_since",)},
    "SCHEDULED": {("due_at",)},
    "IN_TROUBLESHOOTING_QUEUE": {("parked_at",)},
    "COMPLETED": set(),
}


def fits(db: Connection, status: str, present: tuple[str, ...]) -> bool:
    columns = "".join(f", {column}" for column in present)
    values = "".join(f", {VALUES.get(column, 'now()')}" for column in present)
    try:
        with db.transaction(force_rollback=True):
            db.execute(
                "INSERT INTO commandbus.command"
                f" (domain, command_id, command_type, status, sent_at, data_hash, data, headers{columns})"
                f" VALUES ('d', %s, 't', %s, now(), '', '1', '{{}}'{values})",
                [uuid4(), status],
            )
    except psycopg.errors.CheckViolation:
        return False
    return True


@pytest.mark.parametrize("status", ALLOWED)
def test_a_command_is_in_one_line(db: Connection, status: str) -> None:
    every = [lines for count in range(5) for lines in itertools.combinations(LINES, count)]
    assert {lines for lines in every if fits(db, status, (*lines, *LEASE))} == ALLOWED[status]


@pytest.mark.parametrize("missing", LEASE)
def test_what_runs_has_a_lease(db: Connection, missing: str) -> None:
    rest = [column for column in LEASE if column != missing]
    assert not fits(db, "IN_PROGRESS", ("place", *rest))
    assert fits(db, "PENDING", ("place", *rest))
