from __future__ import annotations

import pytest

from tests.sql.support import (
    HOUR,
    Connection,
    Row,
    arrange,
    claim,
    claim_all,
    column,
    everything,
    item,
    lease_verb,
    one,
    operator_verb,
    outcome,
    promote,
    rows,
    segments,
    send_ids,
    shift,
    sqlstate,
    status_of,
    sweep,
    trail,
)


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


PARKED = "IN_TROUBLESHOOTING_QUEUE"
WHO = "event, from_status, to_status, delivery, attempt, worker, operator, reason"


def crash(db: Connection, times: int) -> str:
    """Send a command and let its lease run out this often; the clock then stands at 61 s a crash."""
    (command_id,) = send_ids(db)
    for number in range(1, times + 1):
        assert len(claim(db, alone=number == 3)) == 1
        shift(db, 61 * number)
        sweep(db)
    return command_id


# ------------------------------------------------------------------------------------------- attempts


@pytest.mark.parametrize(
    ("own", "policy", "attempts"),
    [(None, 1, 1), (None, 3, 3), (2, 5, 2), (5, 1, 5), (1, 4, 1), (None, None, 1)],
)
def test_attempts_are_limited_by_the_command_then_by_the_policy(
    db: Connection, own: int | None, policy: int | None, attempts: int
) -> None:
    (command_id,) = send_ids(db, max_attempts=own)
    for attempt in range(1, attempts + 1):
        (leased,) = claim(db)
        assert (leased["attempts"], leased["delivery"]) == (attempt - 1, attempt)
        failed = item(leased, retry_in=0, max_attempts=policy)
        assert outcome(db, "fail TRANSIENT", failed) == "done"
        assert column(db, "attempts", command_id) == attempt
        assert status_of(db, command_id) == (PARKED if attempt == attempts else "SCHEDULED")
    assert claim(db) == []
    last = [(event, attempt) for event, attempt in trail(db, command_id, "event, attempt") if attempt]
    assert last == [*(("ATTEMPT_FAILED", n) for n in range(1, attempts)), ("PARKED", attempts)]


@pytest.mark.parametrize(("verb", "attempts"), [("complete", 1), ("fail BUSINESS", 1)])
def test_a_verdict_that_finishes_is_an_attempt(db: Connection, verb: str, attempts: int) -> None:
    outcome(db, verb, arrange(db, "IN_PROGRESS"))
    assert rows(db, "SELECT attempts FROM commandbus.command_history") == [(attempts,)]


def test_back_off_starts_now(db: Connection) -> None:
    lease = arrange(db, "IN_PROGRESS")
    outcome(db, "fail TRANSIENT", lease | {"retry_in": 10})
    _, last = claim_all(db)
    assert 9 < last["next_due"] <= 10
    shift(db, 9)
    assert claim(db) == []
    shift(db, 11)
    assert len(claim(db)) == 1


def test_a_release_charges_nothing_and_goes_to_the_end_of_the_line(db: Connection) -> None:
    first, second = send_ids(db, 2)
    (leased,) = claim(db, 1)
    first, second = sorted((first, second), key=lambda one: one != str(leased["command_id"]))
    assert outcome(db, "release", item(leased)) == "done"
    assert [column(db, name, first) for name in ("attempts", "crashes", "delivery")] == [0, 0, 1]
    assert [str(row["command_id"]) for _ in range(2) for row in claim(db, 1)] == [second, first]
    assert trail(db, first, WHO) == [
        ("SENT", None, "PENDING", None, None, None, None, None),
        ("CLAIMED", "PENDING", "IN_PROGRESS", 1, None, "w1", None, None),
        ("RELEASED", "IN_PROGRESS", "PENDING", 1, None, "w1", None, None),
        ("CLAIMED", "PENDING", "IN_PROGRESS", 2, None, "w1", None, None),
    ]


def test_a_lease_keeps_what_it_was_claimed_with(db: Connection) -> None:
    """The completion's own row says which delivery, worker and lease; nothing else is written about it."""
    (command_id,) = send_ids(db)
    (leased,) = claim(db, worker="w7")
    outcome(db, "complete", item(leased, result={"ok": 1}))
    sql = "SELECT delivery, worker, lease_token, presented_token, claimed_at < finished_at, result FROM commandbus."
    token = leased["lease_token"]
    assert rows(db, sql + "command_history") == [(1, "w7", token, token, True, {"ok": 1})]
    assert len(everything(db)) == 1
    assert trail(db, command_id, "step, event, attempt, lease_token") == [
        (0, "SENT", None, None), (1, "CLAIMED", None, token), (2, "COMPLETED", 1, token),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "last"),
    [
        ("SCHEDULED", [("ATTEMPT_FAILED", "IN_PROGRESS", "SCHEDULED", 1, 1, "w1", None, None)]),
        (PARKED, [("PARKED", "IN_PROGRESS", PARKED, 1, 1, "w1", None, None)]),
        ("COMPLETED", [("COMPLETED", "IN_PROGRESS", "COMPLETED", 1, 1, "w1", None, None)]),
        ("FAILED", [("FAILED", "IN_PROGRESS", "FAILED", 1, 1, "w1", None, None)]),
        ("CANCELED", [("CANCELED", "IN_PROGRESS", "CANCELED", 1, None, "w1", "ana", "why")]),
        ("IN_PROGRESS", []),
    ],
)
def test_the_trail_of_one_delivery(db: Connection, status: str, last: list[tuple[object, ...]]) -> None:
    lease = arrange(db, status)
    assert trail(db, lease["command_id"], WHO) == [
        ("SENT", None, "PENDING", None, None, None, None, None),
        ("CLAIMED", "PENDING", "IN_PROGRESS", 1, None, "w1", None, None),
        *last,
    ]


def test_the_trail_of_a_delayed_command_that_nobody_claimed(db: Connection) -> None:
    (command_id,) = send_ids(db, delay=HOUR)
    operator_verb(db, "cancel", command_id)
    assert trail(db, command_id, WHO) == [
        ("SENT", None, "SCHEDULED", None, None, None, None, None),
        ("CANCELED", "SCHEDULED", "CANCELED", 0, None, None, "ana", "why"),
    ]


# -------------------------------------------------------------------------------------------- crashes


def test_the_first_crash_is_claimed_as_before(db: Connection) -> None:
    command_id = crash(db, 1)
    (leased,) = claim(db)
    assert (leased["crashes"], leased["attempts"], leased["delivery"]) == (1, 0, 2)
    assert trail(db, command_id, WHO)[2] == ("CRASHED", "IN_PROGRESS", "PENDING", 1, None, "w1", None, None)


def test_after_the_second_crash_it_runs_alone(db: Connection) -> None:
    command_id = crash(db, 2)
    assert claim_all(db, parts=segments("B"), alone=True)[0] == []
    shift(db, 121)
    assert claim_all(db) == ([], {**claim_all(db)[1], "alone_waiting": False})
    shift(db, 124)
    assert claim_all(db)[1]["alone_waiting"] is True
    assert claim_all(db, parts=segments("B"))[1]["alone_waiting"] is False
    send_ids(db)
    (leased,) = claim(db, alone=True)
    assert (str(leased["command_id"]), leased["crashes"]) == (command_id, 2)
    assert claim_all(db, 1)[1]["alone_waiting"] is False


def test_the_third_crash_parks(db: Connection) -> None:
    command_id = crash(db, 3)
    assert status_of(db, command_id) == PARKED
    assert [column(db, name, command_id) for name in ("attempts", "crashes", "delivery")] == [0, 3, 3]
    assert column(db, "error", command_id) == {
        "code": "CRASHED", "message": "The lease of w1 ran out during delivery 3.",
    }  # fmt: skip
    assert [event[:3] for event in trail(db, command_id)] == [
        ("SENT", None, "PENDING"),
        ("CLAIMED", "PENDING", "IN_PROGRESS"), ("CRASHED", "IN_PROGRESS", "PENDING"),
        ("CLAIMED", "PENDING", "IN_PROGRESS"), ("CRASHED", "IN_PROGRESS", "PENDING"),
        ("CLAIMED", "PENDING", "IN_PROGRESS"), ("CRASHED", "IN_PROGRESS", PARKED),
    ]  # fmt: skip


@pytest.mark.parametrize("verb", ["release", "fail TRANSIENT"])
def test_what_crashed_twice_stays_alone(db: Connection, verb: str) -> None:
    command_id = crash(db, 2)
    (leased,) = claim(db, alone=True)
    assert outcome(db, verb, item(leased)) == "done"
    shift(db, HOUR + 200)
    promote(db)
    assert status_of(db, command_id) == "PENDING"
    assert claim(db) == []
    assert len(claim(db, alone=True)) == 1


def test_a_crash_that_was_counted_is_not_counted_again(db: Connection) -> None:
    command_id = crash(db, 1)
    sweep(db)
    assert column(db, "crashes", command_id) == 1


# ------------------------------------------------------------------------------------------ operators


def parked(db: Connection) -> Row:
    return arrange(db, PARKED)


@pytest.mark.parametrize("edited", [None, '{"n": 2}'])
def test_operator_retry_gives_a_full_budget(db: Connection, edited: str | None) -> None:
    command_id = crash(db, 3)
    db.execute("SELECT commandbus.operator_retry_v1('d', %s, 'ana', 'fixed', %s)", [command_id, edited])
    names = ("status", "attempts", "crashes", "delivery", "error", "parked_at", "data")
    data = {"n": 2 if edited else 1}
    assert [column(db, name, command_id) for name in names] == ["PENDING", 0, 0, 3, None, None, data]
    (event,) = trail(db, command_id, WHO + ", details, error ->> 'code'")[-1:]
    details = {"old_data": {"n": 1}, "new_data": {"n": 2}} if edited else None
    assert event == ("OPERATOR_RETRIED", PARKED, "PENDING", 3, None, None, "ana", "fixed", details, "CRASHED")
    (leased,) = claim(db)
    assert (leased["delivery"], leased["crashes"], leased["data"]) == (4, 0, f'{{"n": {data["n"]}}}')


def test_operator_retry_gives_all_attempts_again(db: Connection) -> None:
    (command_id,) = send_ids(db, max_attempts=2)
    for expected in ("SCHEDULED", PARKED, "SCHEDULED", PARKED):
        assert outcome(db, "fail TRANSIENT", item(claim(db)[0], retry_in=0)) == "done"
        assert status_of(db, command_id) == expected
        if expected == PARKED:
            assert operator_verb(db, "operator_retry", command_id) == "ok"
            assert column(db, "attempts", command_id) == 0


@pytest.mark.parametrize(
    ("verb", "event", "status", "result", "error"),
    [
        ("operator_cancel", "OPERATOR_CANCELED", "CANCELED", None, "X"),
        ("operator_complete", "OPERATOR_COMPLETED", "COMPLETED", {"by": "hand"}, None),
        ("cancel", "CANCELED", "CANCELED", None, "X"),
    ],
)
def test_what_an_operator_finishes(  # noqa: PLR0917
    db: Connection, verb: str, event: str, status: str, result: object, error: str | None
) -> None:
    lease = parked(db)
    assert operator_verb(db, verb, lease["command_id"]) == "ok"
    sql = "SELECT status, result, error ->> 'code', presented_token, attempts, delivery FROM commandbus.command_history"
    assert rows(db, sql) == [(status, result, error, None, 1, 1)]
    assert trail(db, lease["command_id"], WHO)[-1] == (event, PARKED, status, 1, None, None, "ana", "why")


@pytest.mark.parametrize("verb", ["operator_retry", "operator_cancel", "operator_complete"])
@pytest.mark.parametrize("name", ["", None])
def test_an_operator_has_a_name(db: Connection, verb: str, name: str | None) -> None:
    lease = parked(db)
    before = everything(db)
    call = f"SELECT commandbus.{verb}_v1('d', %s, %s, 'why')".encode()
    assert sqlstate(lambda: db.execute(call, [lease["command_id"], name])) == "CB001"
    assert everything(db) == before


def test_the_application_cancels_without_a_name(db: Connection) -> None:
    lease = arrange(db, "PENDING")
    db.execute("SELECT commandbus.cancel_v1('d', %s, NULL, NULL)", [lease["command_id"]])
    assert status_of(db, lease["command_id"]) == "CANCELED"


def test_many_fail_in_one_call_each_in_its_way(db: Connection) -> None:
    send_ids(db, 6)
    kinds = ["BUSINESS", "PERMANENT", "TRANSIENT"] * 2
    items = [item(row, kind=kind) for row, kind in zip(claim(db), kinds, strict=True)]
    assert [word for _, word in lease_verb(db, "fail TRANSIENT", *items)] == ["done"] * 6
    expected = {"BUSINESS": "FAILED", "PERMANENT": PARKED, "TRANSIENT": "SCHEDULED"}
    for failed in items:
        assert status_of(db, failed["command_id"]) == expected[failed["kind"]]
    assert one(db, "SELECT count(*) FROM commandbus.audit_event") == 4
