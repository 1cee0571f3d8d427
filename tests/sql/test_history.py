from __future__ import annotations

import datetime as dt
from functools import partial
from uuid import uuid4

import pytest

from tests.sql.support import (
    Connect,
    Connection,
    arrange,
    at_once,
    background,
    claim,
    everything,
    impatient,
    item,
    move_clock_to,
    one,
    operator_verb,
    outcome,
    rows,
    send,
    send_ids,
    shift,
    sqlstate,
    start_waiting,
    status_of,
    trail,
)

DAY = 86_400.0
TABLES = ("command_history", "audit_history")


def weeks(db: Connection, table: str = "command_history") -> list[str]:
    """The weeks of a table, by the names of its partitions."""
    sql = """SELECT substr(c.relname, length(%s) + 2) FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
             WHERE i.inhparent = ('commandbus.' || %s)::regclass ORDER BY 1"""
    return [str(row[0]) for row in rows(db, sql, table, table)]


def week_of(db: Connection, ahead: int = 0) -> str:
    """Return the name of the week that this session's clock stands in, or one ahead."""
    now = one(db, "SELECT commandbus.clock()").astimezone(dt.UTC) + dt.timedelta(weeks=ahead)
    return "{}w{:02}".format(*now.isocalendar()[:2])


def make_weeks(db: Connection) -> None:
    db.execute("SELECT commandbus.make_partitions_v1()")


def drop_expired(db: Connection) -> dict[str, list[int] | None]:
    """Drop what is over: the weeks, and who blocked them."""
    return {row[0]: row[1] for row in rows(db, "SELECT week, blocked_by FROM commandbus.drop_expired_v1()")}


# ----------------------------------------------------------------------------------------- made ahead


def test_five_weeks_are_made_ahead(db: Connection) -> None:
    make_weeks(db)
    make_weeks(db)
    expected = sorted(week_of(db, ahead) for ahead in range(5))
    for table in TABLES:
        assert set(weeks(db, table)) >= set(expected)
    assert weeks(db, TABLES[0]) == weeks(db, TABLES[1])


@pytest.mark.parametrize("verb", ["complete", "fail BUSINESS", "cancel", "operator_complete"])
def test_after_a_year_a_completion_makes_its_own_week(db: Connection, verb: str) -> None:
    make_weeks(db)
    lease = arrange(db, "IN_TROUBLESHOOTING_QUEUE" if verb.startswith("operator") else "IN_PROGRESS")
    shift(db, 365 * DAY)
    if verb in {"cancel", "operator_complete"}:
        assert operator_verb(db, verb, lease["command_id"]) == "ok"
    else:
        assert outcome(db, verb, lease) == "done"
    for table in TABLES:
        assert week_of(db) in weeks(db, table)
    assert rows(db, "SELECT tableoid::regclass::text FROM commandbus.command_history") == [
        (f"commandbus.command_history_{week_of(db)}",)
    ]


def test_there_is_no_default_partition(db: Connection) -> None:
    make_weeks(db)
    sql = """SELECT count(*) FROM pg_partitioned_table WHERE partdefid <> 0"""
    assert one(db, sql) == 0
    assert one(db, "SELECT count(*) FROM pg_partitioned_table") == len(TABLES)


# The first is an hour before the clocks change, the second is the week in which they change back.
CHANGES = ["2031-03-30 23:30+00", "2031-03-31 00:30+00", "2031-10-26 23:30+00", "2031-10-27 00:30+00"]


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"])
def test_weeks_are_whole_in_every_time_zone(db: Connection, zone: str) -> None:
    """A session's time zone may have weeks of 167 and 169 hours: a gap of an hour would refuse completions."""
    db.execute("SELECT set_config('TimeZone', %s, false)", [zone])
    for moment in CHANGES:
        move_clock_to(db, moment)
        send_ids(db)
        assert outcome(db, "complete", item(claim(db)[0])) == "done"
        make_weeks(db)
        assert {week_of(db, ahead) for ahead in range(5)} <= set(weeks(db))
    db.execute("SET TimeZone = 'UTC'")
    bounds = rows(db, """SELECT pg_get_expr(c.relpartbound, c.oid) FROM pg_class c WHERE c.relispartition AND c.relkind = 'r'""")  # fmt: skip  # noqa: E501
    assert bounds
    assert not [bound for (bound,) in bounds if bound.count(" 00:00:00+00") != 2]


@pytest.mark.parametrize("moment", ["2026-12-31 12:00+00", "2027-01-01 12:00+00", "2027-01-04 12:00+00"])
def test_the_weeks_around_new_year(db: Connection, moment: str) -> None:
    move_clock_to(db, moment)
    assert outcome(db, "complete", arrange(db, "IN_PROGRESS")) == "done"
    assert week_of(db) in weeks(db)


def test_eight_make_the_weeks_at_once(db: Connection, connect: Connect) -> None:
    callers = [connect(autocommit=True) for _ in range(8)]
    for year in range(1, 4):
        for caller in callers:
            shift(caller, year * 365 * DAY)
        with background() as pool:
            at_once(pool, [partial(make_weeks, caller) for caller in callers])
        assert {week_of(callers[0], ahead) for ahead in range(5)} <= set(weeks(db))


def test_making_weeks_blocks_nobody_whose_week_is_there(db: Connection, connect: Connect) -> None:
    assert outcome(db, "complete", arrange(db, "IN_PROGRESS")) == "done"
    lease = arrange(db, "IN_PROGRESS")
    maker, other = connect(), impatient(connect(autocommit=True))
    shift(maker, 365 * DAY)
    maker.commit()
    make_weeks(maker)
    assert len(weeks(maker)) >= 10
    assert outcome(other, "complete", lease) == "done"
    assert outcome(other, "complete", arrange(other, "IN_PROGRESS")) == "done"
    assert status_of(other, lease["command_id"]) == "COMPLETED"
    maker.commit()
    assert len(weeks(db)) >= 10


@pytest.mark.parametrize("commits", [True, False])
def test_who_finds_nothing_to_finish_waits_for_no_week(db: Connection, connect: Connect, *, commits: bool) -> None:
    """The first completion of a week may be part of a long transaction."""
    first, second = arrange(db, "IN_PROGRESS"), arrange(db, "IN_PROGRESS")
    handler, other = connect(), impatient(connect(autocommit=True))
    for session in (db, handler, other):
        shift(session, 365 * DAY)
    handler.commit()
    assert outcome(handler, "complete", first) == "done"
    assert outcome(other, "complete", first) == "busy"
    assert outcome(other, "fail TRANSIENT", second) == "done"
    handler.commit() if commits else handler.rollback()
    assert outcome(other, "complete", first) == "done"


# -------------------------------------------------------------------------------------------- dropped


def finished_with_events(db: Connection) -> str:
    """Finish a command that has events."""
    lease = arrange(db, "IN_TROUBLESHOOTING_QUEUE")
    assert operator_verb(db, "operator_complete", lease["command_id"]) == "ok"
    return str(lease["command_id"])


def test_events_move_and_leave_with_their_command(db: Connection) -> None:
    finished = finished_with_events(db)
    waiting = arrange(db, "PENDING")
    assert len(trail(db, finished)) == 4
    moved = rows(db, "SELECT command_id::text, event, finished_at FROM commandbus.audit_history ORDER BY event_no")
    assert [row[:2] for row in moved] == [(finished, "PARKED"), (finished, "OPERATOR_COMPLETED")]
    assert {row[2] for row in moved} == {one(db, "SELECT finished_at FROM commandbus.command_history")}
    week = week_of(db)
    shift(db, 38 * DAY)
    assert week in drop_expired(db)
    assert week not in weeks(db)
    assert [row.partition("(")[0] for row in everything(db)] == ["audit_event", "command"]
    assert (status_of(db, finished), trail(db, finished)) == ("absent", [])
    assert len(trail(db, waiting["command_id"])) == 3


@pytest.mark.parametrize("days", [36.99, 37.01])
def test_a_week_is_dropped_when_all_of_it_is_over(db: Connection, days: float) -> None:
    move_clock_to(db, "2031-06-02 00:00:00+00")  # a Monday: the week ends seven days later
    finished = finished_with_events(db)
    move_clock_to(db, str(dt.datetime(2031, 6, 2, tzinfo=dt.UTC) + dt.timedelta(days=days)))
    assert ("2031w23" in drop_expired(db)) is (days > 37)
    assert "2031w22" not in weeks(db)
    assert status_of(db, finished) == ("absent" if days > 37 else "COMPLETED")


def test_retention_is_what_the_owner_says(db: Connection) -> None:
    finished_with_events(db)
    week = week_of(db)
    shift(db, 38 * DAY)
    db.execute("UPDATE commandbus.setting SET value = '60 days' WHERE name = 'retention'")
    assert drop_expired(db) == {}
    db.execute("UPDATE commandbus.setting SET value = '7 days' WHERE name = 'retention'")
    assert week in drop_expired(db)


def test_without_a_retention_nothing_is_dropped(db: Connection) -> None:
    finished_with_events(db)
    db.execute("DELETE FROM commandbus.setting WHERE name = 'retention'")
    shift(db, 3650 * DAY)
    assert drop_expired(db) == {}


def test_a_drop_that_is_blocked_says_by_whom(db: Connection, connect: Connect) -> None:
    first = finished_with_events(db)
    week = week_of(db)
    reader = connect()
    assert status_of(reader, first) == "COMPLETED"
    shift(db, 60 * DAY)
    db.execute("SET statement_timeout = '5s'")
    assert drop_expired(db)[week] == [reader.info.backend_pid]
    assert status_of(db, first) == "COMPLETED"
    reader.rollback()
    assert drop_expired(db)[week] is None
    assert one(db, "SELECT current_setting('lock_timeout')") == "0"
    assert drop_expired(db) == {}


def test_a_dropped_id_may_be_sent_again(db: Connection) -> None:
    (command_id,) = send_ids(db)
    assert outcome(db, "complete", item(claim(db)[0])) == "done"
    shift(db, 38 * DAY)
    drop_expired(db)
    assert send_ids(db, command_id=command_id) == [command_id]


def test_dropped_weeks_of_a_year(db: Connection) -> None:
    kept = []
    for week in range(0, 52, 13):
        shift(db, week * 7 * DAY)
        kept.append(finished_with_events(db))
    assert set(drop_expired(db).values()) == {None}
    assert [status_of(db, command_id) for command_id in kept] == ["absent"] * 3 + ["COMPLETED"]


def test_a_finish_waits_for_a_week_that_is_being_made(db: Connection, connect: Connect) -> None:
    """Two of the same missing week: the second waits, and finds it."""
    lease, maker, other = arrange(db, "IN_PROGRESS"), connect(), impatient(connect(autocommit=True))
    for session in (maker, other):
        shift(session, 365 * DAY)
        session.commit()
    make_weeks(maker)
    with background() as pool:
        waiting = start_waiting(pool, db, other, lambda caller: sqlstate(lambda: outcome(caller, "complete", lease)))
        maker.commit()
        assert waiting.result() == "ok"
    assert status_of(db, lease["command_id"]) == "COMPLETED"


# --------------------------------------------------------------------------- an id that history knows


def test_an_own_id_is_looked_up_in_history_unless_it_says_that_it_is_minted(db: Connection) -> None:
    """A sender in another language gives an id, and says nothing of where it comes from."""
    own = {"command_id": str(uuid4())}
    assert send(db, own) == [(own["command_id"], "accepted")]
    assert send(db, own) == [(own["command_id"], "duplicate")]
    assert operator_verb(db, "cancel", own["command_id"]) == "ok"
    before = everything(db)
    assert send(db, own) == [(own["command_id"], "duplicate")]
    assert send(db, own, data={"n": 2}) == [(own["command_id"], "conflict")]
    assert send(db, own, minted=False) == [(own["command_id"], "duplicate")]
    assert send(db, own, minted=None) == [(own["command_id"], "duplicate")]
    assert everything(db) == before
    assert one(db, "SELECT count(*) FROM commandbus.commands") == 1
    assert status_of(db, own["command_id"]) == "CANCELED"


def test_own_and_minted_ids_in_one_call(db: Connection) -> None:
    known, fresh, minted = ({"command_id": str(uuid4())} for _ in range(3))
    send(db, known)
    assert operator_verb(db, "cancel", known["command_id"]) == "ok"
    found = send(db, known, fresh, {**minted, "minted": True}, fresh, {"command_id": None})
    assert [outcome for _, outcome in found] == ["duplicate", "accepted", "accepted", "duplicate", "accepted"]
    assert one(db, "SELECT count(*) FROM commandbus.commands") == 4


@pytest.mark.parametrize("nonsense", ["for ever", "", "-1 days", "0", "23 hours", "NULL"])
def test_a_retention_that_makes_no_sense_is_refused(db: Connection, nonsense: str) -> None:
    value = None if nonsense == "NULL" else nonsense
    update = "UPDATE commandbus.setting SET value = %s WHERE name = 'retention'"
    assert sqlstate(lambda: db.execute(update, [value])) in {"22007", "23514", "23502"}
    assert one(db, "SELECT value FROM commandbus.setting WHERE name = 'retention'") == "30 days"
    assert drop_expired(db) == {}
