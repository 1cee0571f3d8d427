from __future__ import annotations

from uuid import uuid4

import pytest
from psycopg.rows import dict_row

from tests.sql.support import (
    HOUR,
    Connect,
    Connection,
    Row,
    arrange,
    claim,
    column,
    operator_verb,
    promote,
    send_ids,
    shift,
    sqlstate,
    sweep,
)


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


def explain(db: Connection, command_id: str, domain: str = "d") -> list[Row]:
    sql = "SELECT * FROM commandbus.explain_v1(%s, %s)"
    return db.cursor(row_factory=dict_row).execute(sql, [domain, command_id]).fetchall()


def why(db: Connection, command_id: str) -> Row:
    """The answer, without what is null."""
    (row,) = explain(db, command_id)
    return {name: value for name, value in row.items() if value is not None}


def announce(db: Connection, *types: str, worker: str = "w1", domain: str = "d") -> None:
    db.execute("SELECT commandbus.announce_v1(%s, %s, %s, 5)", [worker, domain, list(types)])


def crash(db: Connection, times: int) -> str:
    """Send a command and let its lease run out this often."""
    (command_id,) = send_ids(db)
    for number in range(1, times + 1):
        assert len(claim(db)) == 1
        shift(db, 61 * number)
        sweep(db)
    return command_id


# ---------------------------------------------------------------------------------------- one reason each


def test_a_delay(db: Connection) -> None:
    (command_id,) = send_ids(db, delay=HOUR)
    assert why(db, command_id) == {"reason": "DELAY", "until": column(db, "due_at", command_id), "workers": 0}
    announce(db, "A")
    assert why(db, command_id)["workers"] == 1


def test_a_back_off(db: Connection) -> None:
    lease = arrange(db, "SCHEDULED")
    due = column(db, "due_at", lease["command_id"])
    assert why(db, lease["command_id"]) == {"reason": "BACK_OFF", "until": due, "workers": 0}


@pytest.mark.parametrize("gone", ["never came", "was seen long ago", "works elsewhere", "left"])
def test_no_worker(db: Connection, gone: str) -> None:
    (command_id,) = send_ids(db)
    if gone != "never came":
        announce(db, "A", domain="e" if gone == "works elsewhere" else "d")
    if gone == "was seen long ago":
        shift(db, 31)
    if gone == "left":
        db.execute("SELECT commandbus.leave_v1('w1')")
    assert why(db, command_id) == {"reason": "NO_WORKER", "workers": 0}


def test_no_worker_that_knows_the_type(db: Connection) -> None:
    (command_id,) = send_ids(db)
    announce(db, "B", "C")
    assert why(db, command_id) == {"reason": "NO_WORKER_FOR_TYPE", "workers": 0}
    announce(db, "A", worker="w2")
    announce(db, "A", worker="w3")
    assert why(db, command_id) == {"reason": "BEHIND", "ahead": 0, "workers": 2}


def test_two_crashes(db: Connection) -> None:
    command_id = crash(db, 1)
    announce(db, "A")
    assert why(db, command_id)["reason"] == "BEHIND"
    assert claim(db)
    shift(db, 122)
    sweep(db)
    announce(db, "A")
    assert why(db, command_id) == {"reason": "ALONE", "workers": 1}


def test_in_progress(db: Connection) -> None:
    lease = arrange(db, "IN_PROGRESS")
    until = column(db, "lease_until", lease["command_id"])
    expected = {"reason": "IN_PROGRESS", "until": until, "worker": "w1", "workers": 0}
    assert why(db, lease["command_id"]) == expected


def test_parked(db: Connection) -> None:
    lease = arrange(db, "IN_TROUBLESHOOTING_QUEUE")
    assert why(db, lease["command_id"]) == {"reason": "PARKED", "workers": 0}


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "CANCELED"])
def test_what_is_finished_does_not_wait(db: Connection, status: str) -> None:
    assert explain(db, arrange(db, status)["command_id"]) == []


def test_an_unknown_id_is_an_error(db: Connection) -> None:
    (command_id,) = send_ids(db)
    assert sqlstate(lambda: explain(db, str(uuid4()))) == "CB002"
    assert sqlstate(lambda: explain(db, command_id, "e")) == "CB002"


# --------------------------------------------------------------------------------------- places in line


def ahead(db: Connection, command_id: str) -> int:
    found = why(db, command_id)
    assert found["reason"] == "BEHIND"
    return int(found["ahead"])


def test_what_stands_before_it_is_what_its_workers_claim_first(db: Connection) -> None:
    announce(db, "A", "B")
    announce(db, "A", "B", worker="its twin")
    announce(db, "C", worker="w2")
    early = send_ids(db, 2)
    send_ids(db, 3, command_type="B")
    send_ids(db, 5, command_type="C")
    send_ids(db, 7, command_type="unknown")
    (mine,) = send_ids(db)
    (late,) = send_ids(db, command_type="B")
    assert (ahead(db, mine), ahead(db, late)) == (5, 6)
    (urgent,) = send_ids(db, priority=1)
    assert (ahead(db, urgent), ahead(db, mine)) == (0, 6)
    assert operator_verb(db, "cancel", early[0]) == "ok"
    claim(db, 1)  # the urgent one: what is leased stands in nobody's way
    assert ahead(db, mine) == 4


def test_what_is_due_and_not_promoted_stands_at_the_end_of_its_priority(db: Connection) -> None:
    (delayed,) = send_ids(db, delay=HOUR)
    shift(db, HOUR + 1)
    assert why(db, delayed) == {"reason": "NO_WORKER", "workers": 0}
    announce(db, "A")
    send_ids(db, 3)
    send_ids(db, 2, priority=-1)
    assert ahead(db, delayed) == 3
    promote(db)
    assert ahead(db, delayed) == 3


def test_the_count_stops_at_ten_thousand(db: Connection) -> None:
    announce(db, "A", "B")
    db.execute(
        "SELECT commandbus.send_v1((SELECT json_agg(json_build_object('domain', 'd', 'command_type', "
        "CASE WHEN n < 6000 THEN 'A' ELSE 'B' END, 'data', 1))::text FROM generate_series(1, 10100) n))"
    )
    (command_id,) = send_ids(db)
    assert ahead(db, command_id) == 10_000


# ---------------------------------------------------------------------------------------- what it needs


def test_it_can_be_asked_in_a_read_only_transaction(db: Connection) -> None:
    (command_id,) = send_ids(db)
    with db.transaction():
        db.execute("SET TRANSACTION READ ONLY")
        assert why(db, command_id)["reason"] == "NO_WORKER"


def test_it_waits_for_no_lock(db: Connection, connect: Connect) -> None:
    (command_id,) = send_ids(db)
    connect().execute("SELECT FROM commandbus.command FOR UPDATE")
    db.execute("SET statement_timeout = '5s'")
    assert why(db, command_id)["reason"] == "NO_WORKER"
