"""What `verify_v1` says of batches that were tampered with."""

from __future__ import annotations

import pytest

from tests.sql.batch_support import batch_of, finished
from tests.sql.support import Connect, Connection, claim, item, lease_verb, operator_verb, rows


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


@pytest.fixture(autouse=True)
def _weeks(db: Connection) -> None:
    db.execute("SELECT commandbus.make_partitions_v1()")


# ----------------------------------------------------------------------------------------------- verify


CORRUPTIONS = {
    "one more is completed": ("batch_counts", "UPDATE commandbus.batch SET completed = completed + 1"),
    "one less is parked": ("batch_counts", "UPDATE commandbus.batch SET parked = parked - 1"),
    "one more is to come": ("batch_counts batch_list", "UPDATE commandbus.batch SET total = total + 1"),
    "a change is lost": ("batch_counts", "DELETE FROM commandbus.batch_change"),
    "a change is put in twice": ("batch_counts", "UPDATE commandbus.batch_change SET completed = 2"),
    "a line of the list is lost": (
        "batch_list",
        "DELETE FROM commandbus.batch_command WHERE position = (SELECT min(position) FROM commandbus.batch_command)",
    ),
    "it ended too early": ("batch_end batch_message", "UPDATE commandbus.batch SET finished_at = clock_timestamp()"),
    "it did not end": (
        "batch_end",
        "UPDATE commandbus.batch SET finished_at = NULL",
    ),
    "its end was not told": ("batch_message", "DELETE FROM commandbus.command WHERE domain = 'reports'"),
    "the batch is lost": ("batch_unknown", "DELETE FROM commandbus.batch"),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_corrupted_is_found(db: Connection, connect: Connect, name: str) -> None:
    violations, statement = CORRUPTIONS[name]
    batch_id = batch_of(db, 4)
    done, parked, late, waiting = [item(row) for row in claim(db)]
    lease_verb(db, "complete", done)
    lease_verb(db, "fail PERMANENT", parked)
    application = connect(autocommit=True)
    application.execute("SET default_transaction_isolation = 'repeatable read'")
    lease_verb(application, "complete", late)
    if name in {"it did not end", "its end was not told"}:
        lease_verb(db, "complete", waiting)
        assert operator_verb(db, "operator_cancel", parked["command_id"]) == "ok"
        assert finished(db, batch_id)
    assert rows(db, "SELECT * FROM commandbus.verify_v1()") == []
    with db.transaction(force_rollback=True):
        db.execute("ALTER TABLE commandbus.batch DROP CONSTRAINT batch_counts")
        assert db.execute(statement.encode()).rowcount > 0
        found = rows(db, "SELECT violation, command_id::text FROM commandbus.verify_v1()")
    assert {row for row in found if row[0].startswith("batch")} == {(one, batch_id) for one in violations.split()}
