"""Commands that a worker claims before it has a slot for them: what runs out before it has started is not charged."""

from __future__ import annotations

import pytest

from tests.sql.support import (
    Connection,
    Row,
    claim,
    column,
    item,
    look_ahead,
    outcome,
    segments,
    send_ids,
    shift,
    status_of,
    sweep,
    trail,
)


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


def ids_of(leased: list[Row]) -> list[str]:
    return [str(row["command_id"]) for row in leased]


def crashes(db: Connection, *ids: str) -> list[int]:
    return [column(db, "crashes", one) for one in ids]


def test_what_waited_in_a_dead_worker_is_not_charged(db: Connection) -> None:
    ids = send_ids(db, 3)
    started, *waiting = ids_of(look_ahead(db, 1, 2))
    assert {started, *waiting} == set(ids)
    shift(db, 61)
    sweep(db)
    assert crashes(db, started, *waiting) == [1, 0, 0]
    for one in waiting:
        assert (status_of(db, one), column(db, "error", one)) == ("PENDING", None)
        assert trail(db, one, "event, from_status, to_status, delivery")[-1] == ("EXPIRED", "IN_PROGRESS", "PENDING", 1)


def test_what_starts_are_the_first_by_place_whatever_their_types(db: Connection) -> None:
    first, second = (send_ids(db, 1, command_type=name)[0] for name in ("B", "A"))
    assert ids_of(look_ahead(db, 1, 1, parts=segments("A", "B"))) == [first, second]
    shift(db, 61)
    sweep(db)
    assert crashes(db, first, second) == [1, 0]


@pytest.mark.parametrize(("start", "claimed"), [(0, "b"), (1, "b"), (2, "bac"), (3, "bac")])
def test_only_a_first_delivery_may_wait_and_nothing_behind_another_overtakes_it(
    db: Connection, start: int, claimed: str
) -> None:
    (a,) = send_ids(db)
    (leased,) = claim(db)
    (b,) = send_ids(db)
    assert outcome(db, "release", item(leased)) == "done"
    (c,) = send_ids(db)
    names = {a: "a", b: "b", c: "c"}
    assert "".join(names[one] for one in ids_of(look_ahead(db, start, 3 - start))) == claimed


def test_what_kills_its_process_as_soon_as_it_is_claimed_is_parked_after_one_delivery_more(db: Connection) -> None:
    (one,) = send_ids(db)
    assert ids_of(look_ahead(db, 0, 1)) == [one]
    for delivery in range(1, 5):
        shift(db, 61 * delivery)
        sweep(db)
        assert crashes(db, one) == [delivery - 1]
        assert look_ahead(db, 0, 1) == []
        assert len(claim(db, alone=delivery == 3)) == (delivery < 4)
    assert (status_of(db, one), column(db, "delivery", one)) == ("IN_TROUBLESHOOTING_QUEUE", 4)
