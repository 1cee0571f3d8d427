"""Batches and processes leave in portions, beside the weeks and not in their way."""

from __future__ import annotations

import pytest

from tests.sql.batch_support import batch_of, create, ended_long_ago, finished
from tests.sql.plans import buffers, nodes, plans_of
from tests.sql.support import HOUR, Connect, Connection, claim, item, lease_verb, one, rows, shift

DAY = 24 * HOUR

pytestmark = pytest.mark.corrupts  # the tables are stuffed, no process has lived


def drop_finished(db: Connection) -> bool:
    return bool(one(db, "SELECT commandbus.drop_finished_v1()"))


def left(db: Connection) -> dict[str, int]:
    """How many rows there are of each table that is not empty."""
    tables = ("batch", "batch_command", "process", "process_step")
    found = {table: int(one(db, f"SELECT count(*) FROM commandbus.{table}")) for table in tables}
    return {table: count for table, count in found.items() if count}


def fill_processes(db: Connection, count: int, steps: int, *, days: int = 40) -> None:
    """Write down processes that finished so many days ago, each with its steps."""
    db.execute(
        """
        WITH made AS (
            INSERT INTO commandbus.process (domain, process_id, process_type, status, steps, state, state_version,
                                            result, data_hash, started_at, updated_at, finished_at)
            SELECT 'd', gen_random_uuid(), 'Trial', 'COMPLETED', %(steps)s, '1', 1, '1', '', t.at, t.at, t.at
            FROM (SELECT clock_timestamp() - make_interval(days => %(days)s) - make_interval(secs => n) AS at
                  FROM generate_series(1, %(count)s) n) t
            RETURNING *
        )
        INSERT INTO commandbus.process_step
            (domain, command_id, process_id, number, kind, name, command_domain, status, applied, sent_at, ended_at)
        SELECT m.domain, gen_random_uuid(), m.process_id, n, 'step', 'a', 'work', 'COMPLETED', n, m.started_at,
               m.started_at
        FROM made m, generate_series(1, m.steps) n""",
        {"count": count, "steps": steps, "days": days},
    )


def test_batches_leave_when_their_retention_is_over(db: Connection) -> None:
    db.execute("SELECT commandbus.make_partitions_v1()")
    growing = create(db)
    ended = batch_of(db, 2)
    lease_verb(db, "complete", *[item(row) for row in claim(db)])
    assert finished(db, ended)
    shift(db, 29 * DAY)
    assert not drop_finished(db)
    assert left(db) == {"batch": 2, "batch_command": 2}
    shift(db, 31 * DAY)
    assert not drop_finished(db)
    assert [str(row[0]) for row in rows(db, "SELECT batch_id FROM commandbus.batch")] == [growing]
    assert left(db) == {"batch": 1}


def test_a_large_batch_leaves_in_portions(db: Connection) -> None:
    ended_long_ago(db, 20_001)
    ended_long_ago(db, 0, days=31)
    seen = []
    while drop_finished(db):
        seen.append(left(db))
    assert seen == [{"batch": 2, "batch_command": 10_001}, {"batch": 2, "batch_command": 1}]
    assert left(db) == {}


def test_processes_leave_in_portions_the_oldest_first_with_all_their_steps(db: Connection) -> None:
    fill_processes(db, 30, 999)
    fill_processes(db, 1, 4, days=29)
    seen = []
    while drop_finished(db):
        seen.append(left(db))
        assert rows(db, "SELECT * FROM commandbus.verify_v1() WHERE violation ~ 'process_s|_process'") == []
    assert seen == [{"process": 31 - n, "process_step": 30 * 999 + 4 - 999 * n} for n in (10, 20, 30)]
    assert left(db) == {"process": 1, "process_step": 4}


def test_batches_and_processes_share_a_portion(db: Connection) -> None:
    ended_long_ago(db, 9_000)
    fill_processes(db, 2, 998)
    assert drop_finished(db)
    assert left(db) == {"process": 1, "process_step": 998}
    assert not drop_finished(db)
    assert left(db) == {}


def test_what_somebody_keeps_is_passed_over(db: Connection, connect: Connect) -> None:
    kept = ended_long_ago(db, 5)
    ended_long_ago(db, 5)
    fill_processes(db, 2, 3)
    other = connect()
    one(other, "SELECT name FROM commandbus.batch WHERE batch_id = %s FOR UPDATE", kept)
    one(other, "SELECT state FROM commandbus.process ORDER BY finished_at LIMIT 1 FOR UPDATE")
    db.execute("SET statement_timeout = '5s'")
    assert not drop_finished(db)
    assert left(db) == {"batch": 1, "batch_command": 5, "process": 1, "process_step": 3}
    other.rollback()
    assert not drop_finished(db)
    assert left(db) == {}


def test_weeks_are_dropped_whoever_keeps_batches_and_processes(db: Connection, connect: Connect) -> None:
    """A portion of these takes its time, and nobody passes who drops a week."""
    db.execute("SELECT commandbus.make_partitions_v1()")
    ended_long_ago(db, 5)
    fill_processes(db, 2, 3)
    other = connect()
    for table in ("batch", "process", "process_step"):
        other.execute(f"LOCK TABLE commandbus.{table}".encode())
    shift(db, 60 * DAY)
    assert {row[0] for row in rows(db, "SELECT blocked_by FROM commandbus.drop_expired_v1()")} == {None}
    other.rollback()
    assert left(db) == {"batch": 1, "batch_command": 5, "process": 2, "process_step": 6}


@pytest.mark.parametrize("known", ["analyzed empty", "analyzed full"])
def test_a_portion_reads_what_it_takes_out(db: Connection, connect: Connect, known: str) -> None:
    if known == "analyzed empty":
        db.execute("VACUUM ANALYZE")
    fill_processes(db, 20_000, 5, days=10)
    for _ in range(20):
        ended_long_ago(db, 1_000, days=10)
    if known == "analyzed full":
        db.execute("VACUUM ANALYZE")
    fill_processes(db, 3, 5)
    ended_long_ago(db, 5)
    fresh = connect(autocommit=True)
    plans = plans_of(fresh, lambda: drop_finished(fresh))
    assert left(db) == {"batch": 20, "batch_command": 20_000, "process": 20_000, "process_step": 100_000}
    scans = {
        (node["Node Type"], node["Relation Name"])
        for node in (node for plan in plans for node in nodes(plan))
        if node.get("Relation Name", "setting") != "setting"
    }
    assert {kind for kind, _ in scans} <= {"Index Scan", "Index Only Scan", "Tid Scan", "ModifyTable"}
    assert not [node for plan in plans for node in nodes(plan) if "Sort" in node["Node Type"]]
    assert buffers(plans) < 1000  # a new session reads some hundred of the catalog
