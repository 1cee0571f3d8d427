from __future__ import annotations

import json

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.sql.support import (
    EVERYWHERE,
    HOUR,
    LEVEL,
    Connect,
    Connection,
    Row,
    arrange,
    background,
    claim,
    claim_all,
    impatient,
    item,
    lease_verb,
    one,
    promote,
    rows,
    segments,
    send,
    send_ids,
    shift,
    start_waiting,
    status_of,
    sweep,
)


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


def numbers(claimed: list[Row]) -> list[int]:
    """What was sent as data, in order of place."""
    return [int(row["data"]) for row in sorted(claimed, key=lambda row: row["place"])]


def send_numbers(db: Connection, *what: tuple[int, str, int]) -> None:
    """Send one by one: data, type, priority."""
    for data, command_type, priority in what:
        send(db, data=data, command_type=command_type, priority=priority)


# ------------------------------------------------------------------------------- segments and places


def test_a_segment_is_after_and_up_to(db: Connection) -> None:
    send_numbers(db, *[(number, "A", 0) for number in range(5)])
    places = [row[0] for row in rows(db, "SELECT place FROM commandbus.command ORDER BY place")]
    assert numbers(claim(db, parts=segments("A", after=places[1], up_to=places[3]))) == [2, 3]
    assert numbers(claim(db, parts=segments("A", after=places[3]))) == [4]
    assert numbers(claim(db, parts=segments("A", up_to=places[0]))) == [0]
    assert numbers(claim(db)) == [1]


def test_the_place_that_is_answered_is_where_to_go_on(db: Connection) -> None:
    send_numbers(db, *[(number, "A", 0) for number in range(6)])
    first = claim(db, 2)
    after = max(row["place"] for row in first)
    assert numbers(claim(db, 2, parts=segments("A", after=after))) == [2, 3]
    assert lease_verb(db, "release", item(first[0]))[0][1] == "done"
    assert numbers(claim(db, parts=segments("A", after=after))) == [4, 5, 0]


def test_segments_of_several_priorities_of_a_type(db: Connection) -> None:
    """A worker remembers a place for each priority."""
    send_numbers(db, *[(number, "A", number % 3) for number in range(9)])
    place = {int(data): at for data, at in rows(db, "SELECT data, place FROM commandbus.command")}
    parts = json.dumps([["A", place[start], ((place[start] >> 54) + 1) * LEVEL - 1] for start in (0, 1, 2)])
    assert numbers(claim(db, 3, parts=parts)) == [5, 8, 4]
    assert numbers(claim(db, parts=parts)) == [7, 3, 6]
    assert numbers(claim(db)) == [2, 1, 0]


@pytest.mark.parametrize("priority", [-100, -1, 0, 1, 100])
def test_the_whole_queue_is_every_priority(db: Connection, priority: int) -> None:
    send_numbers(db, (1, "A", priority))
    (leased,) = claim(db)
    assert EVERYWHERE[0] < leased["place"] <= EVERYWHERE[1]
    assert (leased["priority"], leased["place"] // LEVEL) == (priority, 100 - priority)


def test_an_empty_queue_and_no_segments(db: Connection) -> None:
    assert claim_all(db) == ([], {**claim_all(db)[1], "next_due": None, "alone_waiting": False})
    send_ids(db)
    assert claim(db, parts="[]") == []
    assert claim(db, 0) == []


def test_only_types_that_were_asked_for(db: Connection) -> None:
    send_numbers(db, (1, "A", 0), (2, "B", 100), (3, "C", 50))
    assert numbers(claim(db, parts=segments("A", "C"))) == [3, 1]
    assert one(db, "SELECT status FROM commandbus.command WHERE command_type = 'B'") == "PENDING"


def test_only_the_domain_that_was_asked_for(db: Connection) -> None:
    send(db, domain="e")
    assert claim(db, sweep=True) == claim(db, alone=True) == []


# --------------------------------------------------------------------------------------------- merges

MIXED = [(0, "A", 0), (1, "B", 0), (2, "C", 1), (3, "A", -1), (4, "B", 1), (5, "A", 1), (6, "C", 0), (7, "A", 0)]
ORDER = [2, 4, 5, 0, 1, 6, 7, 3]


@pytest.mark.parametrize("limit", range(1, 9))
def test_types_are_merged_by_priority_then_by_sending(db: Connection, limit: int) -> None:
    send_numbers(db, *MIXED)
    taken = [numbers(claim(db, limit, parts=segments("C", "A", "B"))) for _ in range(0, 8, limit)]
    assert [number for part in taken for number in part] == ORDER


def test_rivals_pass_over_what_the_others_hold(db: Connection, connect: Connect) -> None:
    send_numbers(db, *MIXED)
    sessions = [impatient(connect()) for _ in range(4)]
    db.execute(
        """INSERT INTO commandbus.claim_mark
           SELECT 'd', t, p >> 54, p + 4096
           FROM unnest('{A,B,C}'::text[]) t, generate_series(-1, 1) n, commandbus._place(n::smallint) p"""
    )
    taken = [numbers(claim(session, 2, parts=segments("A", "B", "C"))) for session in sessions]
    assert sorted(number for part in taken for number in part) == list(range(8))
    assert taken[0] == ORDER[:2]


def test_no_share_is_lost_to_what_a_rival_holds(db: Connection, connect: Connect) -> None:
    send_numbers(db, (0, "A", 0), (1, "A", 0), (2, "B", 0), (3, "B", 0))
    holder = connect()
    holder.execute("SELECT FROM commandbus.command WHERE command_type = 'A' FOR UPDATE")
    assert numbers(claim(db, 2, parts=segments("A", "B"))) == [2, 3]
    holder.rollback()
    assert numbers(claim(db, 9, parts=segments("A", "B"))) == [0, 1]


def test_no_command_is_taken_twice_by_a_second_round(db: Connection, connect: Connect) -> None:
    send_numbers(db, *[(number, "AB"[number % 2], 0) for number in range(10)])
    holder = connect()
    holder.execute("SELECT FROM commandbus.command WHERE data IN ('0', '2') FOR UPDATE")
    assert numbers(claim(db, 6, parts=segments("A", "B"))) in ([1, 3, 4, 5, 6, 7], [1, 3, 4, 5, 6, 8])
    assert one(db, "SELECT count(*) FROM commandbus.command WHERE delivery = 1") == 6


# ----------------------------------------------------------------------------------------- promotions


def test_at_most_500_are_promoted_in_a_call(db: Connection) -> None:
    for _ in range(3):
        send_ids(db, 400, delay=10)
    shift(db, 11)
    left = [one(db, "SELECT count(*) FROM commandbus.command WHERE due_at IS NOT NULL")]
    last: list[float | None] = []
    for _ in range(3):
        last.append(claim_all(db, 0)[1]["next_due"])
        left.append(one(db, "SELECT count(*) FROM commandbus.command WHERE due_at IS NOT NULL"))
    assert left == [1200, 700, 200, 0]
    assert last[0] is not None
    assert last[0] <= 0
    assert last[2] is None


def test_the_first_that_are_due_are_promoted_first(db: Connection) -> None:
    late = send_ids(db, 100, delay=20)
    early = send_ids(db, 450, delay=10)
    shift(db, 21)
    promote(db)
    left = {str(row[0]) for row in rows(db, "SELECT command_id FROM commandbus.command WHERE due_at IS NOT NULL")}
    assert (len(left), left <= set(late), left & set(early)) == (50, True, set())


def test_next_due_is_of_any_type(db: Connection) -> None:
    """It is the hint for when to look again; a worker that knows no such type only looks in vain."""
    send_ids(db, delay=HOUR, command_type="U")
    assert claim_all(db)[1]["next_due"] == pytest.approx(HOUR, abs=60)


# ------------------------------------------------------------------------------------- expired leases

TYPES = ("A", "B", "C")
PRIORITIES = (-100, -1, 0, 1, 100)


def test_every_expired_lease_is_found_whatever_its_type_and_priority(db: Connection) -> None:
    for command_type in TYPES:
        for priority in PRIORITIES:
            send_ids(db, 3, command_type=command_type, priority=priority)
    while claim(db, 7, parts=segments(*TYPES)):
        pass
    shift(db, 61)
    sweep(db)
    assert rows(db, "SELECT status, crashes, count(*)::int FROM commandbus.command GROUP BY 1, 2") == [
        ("PENDING", 1, 45)
    ]


def test_a_place_far_beyond_the_mark_is_found(db: Connection) -> None:
    """The mark runs 4,096 ahead of a claim; what is claimed beyond it raises it."""
    send_ids(db, 10)
    claim(db, 1)
    db.execute("SELECT setval('commandbus.command_seq', 1000000)")
    send_ids(db, 10)
    assert len(claim(db, 19)) == 19
    shift(db, 61)
    sweep(db)
    assert one(db, "SELECT count(*) FROM commandbus.command WHERE crashes = 1") == 20


def test_the_mark_is_written_once_in_thousands_of_claims(db: Connection) -> None:
    send_ids(db, 200)
    versions = set()
    while claim(db, 10):
        versions |= set(rows(db, "SELECT xmin::text, ctid::text FROM commandbus.claim_mark"))
    assert len(versions) == 1


def test_a_higher_priority_that_comes_in_between_is_marked_too(db: Connection, connect: Connect) -> None:
    """The claim has looked at which priorities wait; then a first command of another one is sent."""
    send_numbers(db, *[(number, "A", 0) for number in range(4)], *[(number, "B", 0) for number in range(10, 12)])
    rival, claimer = connect(), impatient(connect(autocommit=True))
    assert len(claim(rival, 1)) == 1
    with background() as pool:
        # It waits for the rival's mark of type A, then goes on with type B.
        waiting = start_waiting(pool, db, claimer, lambda caller: claim(caller, 6, parts=segments("A", "B")))
        send_numbers(db, (20, "B", 50))
        rival.commit()
        taken = numbers(waiting.result())
    assert set(taken) >= {1, 2, 3, 10, 11}
    claim(db, 1, parts=segments("B"))
    shift(db, 61)
    sweep(db)
    assert rows(db, "SELECT data FROM commandbus.command WHERE crashes = 0") == []


def test_a_sweep_takes_500_a_type_and_priority_in_a_call(db: Connection) -> None:
    send_ids(db, 600)
    send_ids(db, 100, command_type="B")
    assert len(claim(db, 1000, parts=segments("A", "B"))) == 700
    shift(db, 61)
    swept = []
    for _ in range(2):
        sweep(db)
        swept.append(one(db, "SELECT count(*) FROM commandbus.command WHERE crashes = 1"))
    assert swept == [600, 700]


def test_a_sweep_leaves_other_domains_and_living_leases_alone(db: Connection) -> None:
    arrange(db, "IN_PROGRESS")
    send_ids(db)
    claim(db, lease=200)
    shift(db, 61)
    claim(db, parts="[]", sweep=True)
    assert one(db, "SELECT count(*) FROM commandbus.command WHERE status = 'IN_PROGRESS'") == 1


def test_what_a_claim_answers(db: Connection) -> None:
    """The columns are explicit and pinned; data and headers are text, decoded by whoever needs them."""
    send_ids(db, data={"big": "1e5000"}, headers={"a": "b"})
    (leased,) = claim(db)
    assert list(leased) == [
        "command_id", "command_type", "data", "headers", "correlation_id", "reply_to", "priority", "max_attempts",
        "attempts", "crashes", "delivery", "lease_token", "place", "sent_at", "next_due", "alone_waiting",
    ]  # fmt: skip
    assert (leased["data"], leased["headers"]) == ('{"big": "1e5000"}', '{"a": "b"}')
    send_row = '[{"domain": "d", "command_type": "A", "data": 1e5000}]'
    db.execute("SELECT * FROM commandbus.send_v1(%s)", [send_row])
    assert len(claim(db)[0]["data"]) == 5001


def test_a_round_says_what_is_undone_and_then_what_it_claims(db: Connection) -> None:
    send_ids(db, 4)
    finished, stale = claim(db, 2)
    items = json.dumps([item(finished, result=1), item(stale, delivery=9, result=2)])
    sql = "SELECT * FROM commandbus.work_v1('d', %s, %s, 10, 'w2', 60)"
    undone, *claimed, last = db.cursor(row_factory=dict_row).execute(sql, [items, segments("A")]).fetchall()
    assert {name for name, value in undone.items() if value is not None} == {"command_id", "outcome"}
    assert (undone["command_id"], undone["outcome"]) == (stale["command_id"], "lost")
    assert [row["outcome"] for row in claimed] == [None, None]
    assert {row["delivery"] for row in claimed} == {1}
    assert (last["command_id"], last["alone_waiting"]) == (None, False)
    assert status_of(db, str(finished["command_id"])) == "COMPLETED"


def test_a_completion_that_is_refused_takes_the_claim_back(db: Connection) -> None:
    send_ids(db, 2)
    (leased,) = claim(db, 1)
    items = json.dumps([item(leased)]).replace("}]", ', "result": "\\u0000"}]')
    with pytest.raises(psycopg.errors.UntranslatableCharacter):
        db.execute("SELECT * FROM commandbus.work_v1('d', %s, %s, 10, 'w', 60)", [items, segments("A")])
    assert one(db, "SELECT count(*) FROM commandbus.command WHERE status = 'PENDING'") == 1


def test_two_claims_never_share_a_token(db: Connection) -> None:
    send_ids(db, 100)
    tokens = {row["lease_token"] for row in claim(db, 100)}
    assert len(tokens) == 100
