"""The replies of SQL: who is told of an end, by which command or notification, and what may be asked afterwards."""

from __future__ import annotations

import json

import psycopg
import pytest

from commandbus._ids import new_id
from tests.sql.support import (
    OPERATOR_VERBS,
    Connect,
    Connection,
    arrange,
    bulk,
    claim,
    item,
    lease_verb,
    operator_verb,
    outcome,
    rows,
    send_ids,
    sqlstate,
)

ADDRESS = f"?{'0123456789abcdef' * 2}"


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


def replies(db: Connection) -> list[tuple[str, str]]:
    """The id and the status in each reply."""
    sql = "SELECT data ->> 'command_id', data ->> 'status' FROM commandbus.commands WHERE domain = 'r' ORDER BY 1"
    return [(command_id, status) for command_id, status in rows(db, sql)]


@pytest.mark.parametrize("verb", ["complete", "work", "fail BUSINESS"])
def test_a_verdict_that_ends_sends_a_reply_to_each_that_asked(db: Connection, verb: str) -> None:
    asked, _ = send_ids(db, 2, reply_to="r"), send_ids(db, 2)
    leases = [item(row) for row in claim(db)]
    assert {word for _, word in lease_verb(db, verb, *leases)} == {"done"}
    assert replies(db) == [(each, "FAILED" if "fail" in verb else "COMPLETED") for each in sorted(asked)]


@pytest.mark.parametrize("verb", ["fail TRANSIENT", "fail PERMANENT", "release", "renew"])
def test_what_goes_on_sends_none(db: Connection, verb: str) -> None:
    send_ids(db, reply_to="r")
    assert outcome(db, verb, item(claim(db)[0])) == "done"
    assert replies(db) == []


@pytest.mark.parametrize("verb", [verb for verb in OPERATOR_VERBS if verb != "operator_retry"])
def test_people_end_with_a_reply_too(db: Connection, verb: str) -> None:
    command_id = arrange(db, "IN_TROUBLESHOOTING_QUEUE", reply_to="r")["command_id"]
    assert operator_verb(db, verb, command_id) == "ok"
    assert [given for given, _ in replies(db)] == [command_id]


def test_many_at_once_end_with_a_reply_each(db: Connection) -> None:
    parked = [arrange(db, "IN_TROUBLESHOOTING_QUEUE", reply_to="r") for _ in range(3)]
    assert {word for _, word in bulk(db, "cancel", *parked)} == {"done"}
    assert [status for _, status in replies(db)] == ["CANCELED"] * 3


def test_a_rollback_takes_the_reply_along(connect: Connect, db: Connection) -> None:
    send_ids(db, reply_to="r")
    leased = item(claim(db)[0])
    other = connect()
    assert outcome(other, "complete", leased) == "done"
    other.rollback()
    assert replies(db) == []
    assert outcome(db, "complete", leased) == "done"
    assert len(replies(db)) == 1


def test_ids_of_replies_grow_with_time(db: Connection) -> None:
    for _ in range(3):
        arrange(db, "COMPLETED", reply_to="r")
    ids = [row[0] for row in rows(db, "SELECT command_id FROM commandbus.command WHERE domain = 'r' ORDER BY place")]
    assert ids == sorted(ids)
    assert {(each.version, each.variant) for each in ids} == {(7, new_id().variant)}


@pytest.mark.parametrize("reply_to", ["?", "?r", f"?{'A' * 32}", f"?{'a' * 33}", f"{ADDRESS}?"])
def test_an_address_is_a_question_mark_and_32_digits(db: Connection, reply_to: str) -> None:
    assert sqlstate(lambda: send_ids(db, reply_to=reply_to)) == "CB001"


def heard(listener: psycopg.Connection) -> list[str]:
    """The ids in all notifications up to the end of this call."""
    listener.execute("SELECT pg_notify(%s, 'end')", [f"commandbus{ADDRESS}"])
    found: list[str] = []
    for notice in listener.notifies(timeout=10):
        if notice.payload == "end":
            return found
        assert len(notice.payload) < 8000
        found += notice.payload.split()
    raise AssertionError(found)


def test_a_bus_is_told_the_ids_of_its_own(connect: Connect, db: Connection) -> None:
    listener = connect(autocommit=True)
    listener.execute(f'LISTEN "commandbus{ADDRESS}"'.encode())
    mine, others = send_ids(db, 450, reply_to=ADDRESS), send_ids(db, 2, reply_to=f"?{'f' * 32}")
    leases = [item(row) for row in claim(db, 500)]
    assert len(leases) == len(mine) + len(others)
    assert {word for _, word in lease_verb(db, "complete", *leases)} == {"done"}
    assert sorted(heard(listener)) == sorted(mine)
    assert replies(db) == []


def test_outcomes_are_of_what_has_ended_and_of_the_parked_if_asked(db: Connection) -> None:
    goes_on = ("SCHEDULED", "IN_TROUBLESHOOTING_QUEUE", "IN_PROGRESS", "absent")
    ids = {status: arrange(db, status)["command_id"] for status in ("COMPLETED", "FAILED", "CANCELED", *goes_on)}
    terminal = {"COMPLETED", "FAILED", "CANCELED"}
    for parked in (False, True):
        asked = [{"domain": "d", "command_id": each, "parked": parked} for each in ids.values()]
        sql = "SELECT command_id::text, status FROM commandbus.outcomes_v1(%s)"
        expected = terminal | ({"IN_TROUBLESHOOTING_QUEUE"} if parked else set())
        assert dict(rows(db, sql, json.dumps(asked))) == {
            ids["absent"]: None, **{ids[status]: status for status in expected}}  # fmt: skip


def test_a_reply_that_was_canceled_may_be_sent_again_and_no_other(db: Connection) -> None:
    command_id = arrange(db, "COMPLETED", reply_to="r")["command_id"]
    again = """SELECT commandbus._reply(h.domain, ARRAY[h.command_id], h.finished_at, commandbus.clock())
               FROM commandbus.command_history h WHERE h.command_id = %s"""
    violations = "SELECT violation FROM commandbus.verify_v1()"
    with db.transaction(force_rollback=True):
        db.execute(again, [command_id])
        assert rows(db, violations) == [("reply_without_end",)]
    db.execute("SELECT commandbus.cancel_v1('r', c.command_id, 'ana', 'why') FROM commandbus.command c")
    db.execute(again, [command_id])
    assert rows(db, violations) == []


def test_what_ended_before_there_were_replies_lacks_none(db: Connection) -> None:
    arrange(db, "COMPLETED", reply_to="r")
    with db.transaction(force_rollback=True):
        db.execute("DELETE FROM commandbus.command WHERE domain = 'r'")
        assert rows(db, "SELECT violation FROM commandbus.verify_v1()") == [("reply_missing",)]
        db.execute("UPDATE commandbus.migration SET applied_at = clock_timestamp() WHERE version = 3")
        assert rows(db, "SELECT violation FROM commandbus.verify_v1()") == []
