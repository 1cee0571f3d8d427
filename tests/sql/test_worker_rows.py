from __future__ import annotations

import pytest

from tests.sql.support import Connect, Connection, one, rows, shift, sqlstate

DAY = 86_400.0
ALL = "SELECT domain, worker, command_types, concurrency FROM commandbus.workers ORDER BY domain, worker"


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


def announce(db: Connection, worker: str, *types: str, domain: str = "d", concurrency: int = 5) -> None:
    db.execute("SELECT commandbus.announce_v1(%s, %s, %s, %s)", [worker, domain, list(types), concurrency])


def leave(db: Connection, worker: str) -> None:
    db.execute("SELECT commandbus.leave_v1(%s)", [worker])


def test_a_worker_has_a_row_for_each_domain(db: Connection) -> None:
    announce(db, "w1", "A", "B")
    announce(db, "w1", "C", domain="e")
    announce(db, "w2", "A", concurrency=9)
    assert rows(db, ALL) == [("d", "w1", ["A", "B"], 5), ("d", "w2", ["A"], 9), ("e", "w1", ["C"], 5)]


def test_who_announces_itself_again_is_seen_later_and_started_when_it_did(db: Connection) -> None:
    times = "SELECT started_at, seen_at FROM commandbus.workers"
    announce(db, "w1", "A")
    ((started, first_seen),) = rows(db, times)
    assert started == first_seen
    shift(db, 10)
    announce(db, "w1", "A", "B", concurrency=7)
    ((started_as_before, seen),) = rows(db, times)
    assert started_as_before == started
    assert (seen - first_seen).total_seconds() >= 10
    assert rows(db, ALL) == [("d", "w1", ["A", "B"], 7)]


@pytest.mark.parametrize(("seconds", "alive"), [(29, True), (31, False)])
def test_a_worker_is_alive_for_thirty_seconds(db: Connection, seconds: int, *, alive: bool) -> None:
    announce(db, "w1", "A")
    shift(db, seconds)
    assert one(db, "SELECT alive FROM commandbus.workers") is alive


def test_who_leaves_leaves_all_domains_and_no_other_does(db: Connection) -> None:
    announce(db, "w1", "A")
    announce(db, "w1", "A", domain="e")
    announce(db, "w2", "A")
    leave(db, "w1")
    assert rows(db, ALL) == [("d", "w2", ["A"], 5)]
    leave(db, "unknown")


def test_rows_of_a_domain_that_were_not_seen_for_a_day_are_removed(db: Connection) -> None:
    announce(db, "dead", "A")
    announce(db, "elsewhere", "A", domain="e")
    shift(db, DAY - 10)
    announce(db, "young", "A")
    assert [row[1] for row in rows(db, ALL)] == ["dead", "young", "elsewhere"]
    shift(db, DAY + 10)
    announce(db, "young", "A")
    assert [row[1] for row in rows(db, ALL)] == ["young", "elsewhere"]


def test_a_dead_row_that_somebody_has_locked_holds_nobody_up(db: Connection, connect: Connect) -> None:
    announce(db, "dead", "A")
    other = connect()
    other.execute("SELECT FROM commandbus.worker FOR UPDATE")
    shift(db, DAY + 10)
    db.execute("SET statement_timeout = '5s'")
    assert sqlstate(lambda: announce(db, "young", "A")) == "ok"
    assert [row[1] for row in rows(db, ALL)] == ["dead", "young"]
