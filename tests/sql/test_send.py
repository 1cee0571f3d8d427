from __future__ import annotations

import json
import random
from functools import partial
from uuid import UUID, uuid4

import psycopg
import pytest

from tests.sql.support import (
    HOUR,
    STATUSES,
    Connect,
    Connection,
    Row,
    arrange,
    at_once,
    background,
    claim,
    claim_all,
    column,
    everything,
    impatient,
    one,
    outcome,
    payload,
    rows,
    segments,
    send,
    send_ids,
    shift,
    sqlstate,
    status_of,
    trail,
    waits,
)


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


OWN = "11111111-1111-4111-8111-111111111111"
FIRST = "00000000-0000-4000-8000-000000000001"  # before OWN
LAST = "ffffffff-ffff-4fff-8fff-ffffffffffff"  # after OWN


def send_own(db: Connection, command_id: str = OWN, **more: object) -> str:
    ((_, word),) = send(db, {"command_id": command_id}, **more)
    return word


# -------------------------------------------------------------------------------------------- dedupe

SECOND: list[tuple[Row, str]] = [
    ({}, "duplicate"),
    ({"headers": {"a": "1"}, "priority": 5, "delay": 7, "correlation_id": "c", "reply_to": "r"}, "duplicate"),
    ({"data": {"n": 2}}, "conflict"),
    ({"command_type": "B"}, "conflict"),
    ({"domain": "e"}, "accepted"),
]


@pytest.mark.parametrize("status", STATUSES[:-1])
@pytest.mark.parametrize(("again", "expected"), SECOND)
def test_an_own_id_sent_again(db: Connection, status: str, again: Row, expected: str) -> None:
    command_id = arrange(db, status, command_id=OWN)["command_id"]
    before = everything(db)
    assert send_own(db, command_id, **again) == expected
    assert (everything(db) == before) is (expected != "accepted")


def test_no_data_is_null(db: Connection) -> None:
    assert send_own(db, data=None) == "accepted"
    without = json.dumps([{"domain": "d", "command_type": "A", "command_id": OWN}])
    assert one(db, "SELECT outcome FROM commandbus.send_v1(%s)", without) == "duplicate"
    assert send_own(db, data={}) == "conflict"
    assert claim(db)[0]["data"] == "null"


@pytest.mark.parametrize("status", ["PENDING", "COMPLETED"])
def test_a_duplicate_is_as_durable_as_what_is_accepted(db: Connection, connect: Connect, status: str) -> None:
    """Only a transaction that has written something waits, as it commits, for the disk and a synchronous standby."""
    arrange(db, status, command_id=OWN)
    # A sequence writes once in 32 times. Let it be now, and not as the command is sent again.
    one(db, "SELECT setval('commandbus.command_seq', nextval('commandbus.command_seq'))")
    one(db, "SELECT nextval('commandbus.command_seq')")
    caller = connect()
    assert send_own(caller) == "duplicate"
    assert one(caller, "SELECT pg_current_xact_id_if_assigned() IS NOT NULL")


def test_the_same_contents_in_another_spelling_are_a_duplicate(db: Connection) -> None:
    send_own(db, data={"a": 1, "b": [1, 2]})
    assert send_own(db, data={"b": [1, 2], "a": 1}) == "duplicate"


@pytest.mark.parametrize("finished", [False, True])
def test_what_counts_is_what_was_first_sent(db: Connection, *, finished: bool) -> None:
    arrange(db, "IN_TROUBLESHOOTING_QUEUE", command_id=OWN)
    db.execute("SELECT commandbus.operator_retry_v1('d', %s, 'ana', 'why', %s)", [OWN, '{"n": 2}'])
    if finished:
        db.execute("SELECT commandbus.cancel_v1('d', %s, 'ana', 'why')", [OWN])
    assert send_own(db, data={"n": 1}) == "duplicate"
    assert send_own(db, data={"n": 2}) == "conflict"


@pytest.mark.parametrize("finished", [False, True])
def test_twice_in_one_call(db: Connection, *, finished: bool) -> None:
    if finished:
        arrange(db, "COMPLETED", command_id=OWN)
    own = {"command_id": OWN}
    answer = send(db, own, {**own, "data": {"n": 2}}, own, {"command_id": FIRST})
    first = "duplicate" if finished else "accepted"
    assert answer == [(OWN, first), (OWN, "conflict"), (OWN, "duplicate"), (FIRST, "accepted")]
    if not finished:
        assert column(db, "data", OWN) == {"n": 1}


def test_answers_come_in_the_order_of_what_was_sent(db: Connection) -> None:
    send_own(db, FIRST)
    send_own(db, LAST, data=7)
    ids = [LAST, str(uuid4()), OWN, FIRST]
    answer = send(db, *[{"command_id": command_id} for command_id in ids], {})
    assert answer[:4] == list(zip(ids, ["conflict", "accepted", "accepted", "duplicate"], strict=True))
    assert answer[4][1] == "accepted"
    assert UUID(answer[4][0]).int not in {UUID(command_id).int for command_id in ids}
    assert send(db, *[])[0][1] == "accepted"
    assert rows(db, "SELECT * FROM commandbus.send_v1('[]')") == []


def test_a_minted_id_is_not_looked_up_in_history(db: Connection) -> None:
    """A look-up costs an index probe for each week that is kept."""
    db.execute("SELECT commandbus.make_partitions_v1()")
    sql = """SELECT coalesce(sum(pg_stat_get_xact_numscans(x)), 0)::int
             FROM (SELECT inhrelid AS x FROM pg_inherits WHERE inhparent IN
                   ('commandbus.command_history'::regclass, 'commandbus.command_history_id'::regclass)) t"""
    probes = {}
    for own_id in (False, True):
        with db.transaction():
            before = one(db, sql)
            send(db, *[{"command_id": str(uuid4()), "minted": not own_id} for _ in range(10)])
            probes[own_id] = one(db, sql) - before
    assert probes[False] == 0
    assert probes[True] >= 10


# ------------------------------------------------------------------------------------ what is written


def test_a_delay_schedules(db: Connection) -> None:
    (command_id,) = send_ids(db, delay=10)
    assert status_of(db, command_id) == "SCHEDULED"
    assert trail(db, command_id) == [("SENT", None, "SCHEDULED")]
    assert 9 < claim_all(db)[1]["next_due"] <= 10
    shift(db, 11)
    (leased,) = claim(db)
    assert (str(leased["command_id"]), claim_all(db)[1]["next_due"]) == (command_id, None)


def test_no_delay_is_pending_at_once(db: Connection) -> None:
    assert {status_of(db, send_ids(db, delay=delay)[0]) for delay in (None, 0)} == {"PENDING"}


def test_everything_that_was_given_is_kept(db: Connection) -> None:
    given = {
        "command_type": "B", "headers": {"trace": "x"}, "correlation_id": "c", "reply_to": "r", "max_attempts": 7,
        "priority": -100, "data": [1, None, {"a": "ü"}],
    }  # fmt: skip
    (command_id,) = send_ids(db, **given)
    (leased,) = claim(db, parts=segments("B"))
    found = {**leased, "data": json.loads(leased["data"]), "headers": json.loads(leased["headers"])}
    assert {name: found[name] for name in given} == given
    assert (str(leased["command_id"]), leased["attempts"], leased["crashes"]) == (command_id, 0, 0)


def test_a_higher_priority_comes_first(db: Connection) -> None:
    order = [0, -100, 100, 1, -1, 100]
    for priority in order:
        send(db, priority=priority, data=priority)
    assert [int(row["data"]) for _ in order for row in claim(db, 1)] == sorted(order, reverse=True)


def test_sending_is_part_of_the_callers_transaction(db: Connection, connect: Connect) -> None:
    caller = connect()
    (command_id,) = send_ids(caller)
    assert status_of(db, command_id) == "absent"
    caller.rollback()
    assert everything(db) == []
    (command_id,) = send_ids(caller)
    caller.commit()
    assert status_of(db, command_id) == "PENDING"


# -------------------------------------------------------------------------------------- what is refused

LONG = "x" * 129
WRONG: list[tuple[str, list[object]]] = [
    ("domain", [None, "", "a b", "a\n", "ü", LONG]),
    ("command_type", [None, "", "a b", "a\n", "ü", LONG]),
    ("headers", [[], "x", 1, {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": {"b": "c"}}]),
    ("correlation_id", ["x" * 257]),
    ("reply_to", ["", "a b", LONG]),
    ("priority", [101, -101]),
    ("max_attempts", [0, -1, 1_000_001]),
    ("delay", [-1, 315_360_001, 1e300]),
]


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG for value in values])
@pytest.mark.parametrize("own_id", [False, True])
def test_wrong_input_is_named(db: Connection, field: str, value: object, *, own_id: bool) -> None:
    with pytest.raises(psycopg.Error, match=f": {field} is missing or out of bounds") as caught:
        send(db, {}, {"command_id": OWN, "minted": not own_id, field: value}, {})
    assert caught.value.sqlstate == "CB001"
    assert OWN in str(caught.value)
    assert everything(db) == []


@pytest.mark.parametrize("more", [{"priority": 40_000}, {"command_id": "x"}, {"data": "\0"}, {"delay": "soon"}])
def test_what_postgresql_cannot_read_is_a_data_error(db: Connection, more: Row) -> None:
    """The class 22: a sender of many commands looks for the one at fault."""
    assert sqlstate(lambda: send(db, {}, more))[:2] == "22"
    assert everything(db) == []


# ------------------------------------------------------------------------------------ isolation levels


@pytest.mark.parametrize("level", ["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("known", ["absent", "PENDING", "COMPLETED"])
def test_an_own_id_above_read_committed(db: Connection, connect: Connect, level: str, known: str) -> None:
    if known != "absent":
        arrange(db, known, command_id=OWN)
    before = everything(db)
    caller = connect()
    caller.execute(f"SET TRANSACTION ISOLATION LEVEL {level}".encode())
    if level in {"READ UNCOMMITTED", "READ COMMITTED"}:
        assert send_own(caller) == ("accepted" if known == "absent" else "duplicate")
        return
    assert sqlstate(lambda: send_own(caller)) == "CB004"
    caller.rollback()
    assert everything(db) == before


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_minted_id_is_welcome_at_every_level(connect: Connect, level: str) -> None:
    caller = connect()
    caller.execute(f"SET TRANSACTION ISOLATION LEVEL {level}".encode())
    assert [word for _, word in send(caller, {}, {})] == ["accepted"] * 2


# ------------------------------------------------------------------------------------------ concurrency


@pytest.mark.parametrize("ends", ["commit", "rollback"])
@pytest.mark.parametrize(("again", "known"), [({}, "duplicate"), ({"data": 2}, "conflict")])
def test_two_senders_of_an_id(db: Connection, connect: Connect, ends: str, again: Row, known: str) -> None:
    first, second = connect(), impatient(connect(autocommit=True))
    assert send_own(first) == "accepted"
    with background() as pool:
        waiting = pool.submit(partial(send_own, second, **again))
        waits(db, second)
        getattr(first, ends)()
        assert waiting.result() == (known if ends == "commit" else "accepted")
    assert one(db, "SELECT count(*) FROM commandbus.commands") == 1


def test_a_sender_waits_no_longer_than_it_said(db: Connection, connect: Connect) -> None:
    other, caller = connect(), connect()
    send_own(other)
    sql = "SELECT outcome FROM commandbus.send_v1(%s, 20)"
    assert sqlstate(lambda: caller.execute(sql, [payload({"command_id": OWN}, {})])) == "55P03"
    caller.rollback()
    other.rollback()
    assert caller.execute(sql, [payload({"command_id": OWN})]).fetchall() == [("accepted",)]
    caller.rollback()
    assert one(caller, "SELECT current_setting('lock_timeout')") == "0"


def test_a_predecessor_that_vanished_is_a_matter_of_trying_again(db: Connection, connect: Connect) -> None:
    """Its insert saw the predecessor, its look-up does not: retention may drop it in between."""
    send_own(db, FIRST)
    twin, caller = connect(), impatient(connect(autocommit=True))
    send_own(twin, LAST)
    both = [{"command_id": command_id} for command_id in (FIRST, LAST)]
    with background() as pool:
        waiting = pool.submit(lambda: sqlstate(lambda: send(caller, *both)))
        waits(db, caller)
        db.execute("DELETE FROM commandbus.command WHERE command_id = %s", [FIRST])
        twin.commit()
        assert waiting.result() == "40001"
    assert [word for _, word in send(caller, *both)] == ["accepted", "duplicate"]


def test_senders_of_the_same_ids_in_any_order_do_not_deadlock(connect: Connect) -> None:
    ids = [str(uuid4()) for _ in range(60)]
    calls = []
    for seed in range(6):
        order = random.Random(seed)
        batches = [order.sample(ids, 40) for _ in range(8)]
        caller = connect(autocommit=True)
        calls.append(partial(send_batches, caller, batches))
    with background() as pool:
        words = [word for answer in at_once(pool, calls) for word in answer]
    assert words.count("accepted") == len(set(ids))
    assert set(words) == {"accepted", "duplicate"}


def send_batches(caller: Connection, batches: list[list[str]]) -> list[str]:
    return [word for ids in batches for _, word in send(caller, *[{"command_id": command_id} for command_id in ids])]


def test_a_command_scheduled_and_finished_is_known_too(db: Connection) -> None:
    send_own(db, delay=HOUR)
    shift(db, HOUR + 1)
    (leased,) = claim(db)
    row = {"command_id": OWN, "delivery": leased["delivery"], "lease_token": str(leased["lease_token"])}
    assert outcome(db, "complete", row) == "done"
    assert send_own(db) == "duplicate"
