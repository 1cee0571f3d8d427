from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest

from tests.sql.support import (
    HOUR,
    LEASE_VERBS,
    OPERATOR_VERBS,
    STATUSES,
    Connection,
    Row,
    arrange,
    claim,
    everything,
    item,
    lease_verb,
    operator_verb,
    outcome,
    promote,
    send_ids,
    shift,
    sqlstate,
    status_of,
    sweep,
)


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


# Each cell: what the verb answers (- : it answers nothing), then the new status, if anything was written at all.
# The lease that is presented is the only one that the command ever had. P PENDING, S SCHEDULED, I IN_PROGRESS,
# T IN_TROUBLESHOOTING_QUEUE, C COMPLETED, F FAILED, X CANCELED.
TABLE = """
                   P         S         I         T         C         F         X         absent
claim              1>I       0         0         0         0         0         0         0
promote            -         ->P       -         -         -         -         -         -
sweep              -         -         ->P       -         -         -         -         -
renew              lost      lost      done>I    lost      done      done      lost      lost
complete           lost      lost      done>C    lost      done      done      lost      lost
work               lost      lost      done>C    lost      done      done      lost      lost
fail_TRANSIENT     lost      lost      done>S    lost      done      done      lost      lost
fail_PERMANENT     lost      lost      done>T    lost      done      done      lost      lost
fail_BUSINESS      lost      lost      done>F    lost      done      done      lost      lost
release            lost      lost      done>P    lost      done      done      lost      lost
cancel             ok>X      ok>X      ok>X      ok>X      CB003     CB003     CB003     CB002
operator_retry     CB003     CB003     CB003     ok>P      CB003     CB003     CB003     CB002
operator_cancel    CB003     CB003     CB003     ok>X      CB003     CB003     CB003     CB002
operator_complete  CB003     CB003     CB003     ok>C      CB003     CB003     CB003     CB002
"""
LETTERS = dict(zip("PSITCFX", STATUSES[:-1], strict=True))
CASES = [
    pytest.param(verb.replace("_", " ") if verb.startswith("fail") else verb, status, cell, id=f"{verb}-{status}")
    for verb, *cells in (line.split() for line in TABLE.strip().splitlines()[1:])
    for status, cell in zip(STATUSES, cells, strict=True)
]


def act(db: Connection, verb: str, lease: Row) -> str:
    if verb == "claim":
        return str(len(claim(db)))
    if verb in OPERATOR_VERBS:
        return operator_verb(db, verb, lease["command_id"])
    if verb in LEASE_VERBS:
        return outcome(db, verb, lease)
    shift(db, {"promote": HOUR + 1, "sweep": 61}[verb])
    {"promote": promote, "sweep": sweep}[verb](db)
    return "-"


@pytest.mark.parametrize(("verb", "status", "cell"), CASES)
def test_every_status_times_every_verb(db: Connection, verb: str, status: str, cell: str) -> None:
    answer, moves, letter = cell.partition(">")
    lease = arrange(db, status)
    before = everything(db)

    assert act(db, verb, lease) == answer

    assert status_of(db, lease["command_id"]) == (LETTERS[letter] if moves else status)
    assert (everything(db) == before) is not bool(moves)


def test_the_table_names_every_verb() -> None:
    verbs = {case.values[0] for case in CASES}
    assert verbs == {"claim", "promote", "sweep", *LEASE_VERBS, *OPERATOR_VERBS}


# ------------------------------------------------------------------------------------------ the fence

STALE: dict[str, Callable[[Row, Row], Row]] = {
    "the lease of before": lambda old, new: old,
    "right token, wrong delivery": lambda old, new: {**new, "delivery": old["delivery"]},
    "right delivery, wrong token": lambda old, new: {**new, "lease_token": old["lease_token"]},
    "a delivery to come": lambda old, new: {**new, "delivery": new["delivery"] + 1},
    "another command": lambda old, new: {**new, "command_id": str(uuid4())},
    "no token": lambda old, new: {**new, "lease_token": None},
}


def taken_over(db: Connection) -> tuple[Row, Row]:
    """Return the leases of a worker that was too slow, and of the one that has the command now."""
    send_ids(db)
    old = item(claim(db)[0])
    shift(db, 61)
    new = item(claim(db, sweep=True, worker="w2")[0])
    assert (old["command_id"], new["delivery"]) == (new["command_id"], 2)
    return old, new


@pytest.mark.parametrize("stale", STALE)
@pytest.mark.parametrize("verb", LEASE_VERBS)
def test_a_stale_lease_changes_nothing(db: Connection, verb: str, stale: str) -> None:
    old, new = taken_over(db)
    before = everything(db)

    assert outcome(db, verb, STALE[stale](old, new)) == "lost"

    assert everything(db) == before
    assert outcome(db, verb, new) == "done"


@pytest.mark.parametrize("verb", LEASE_VERBS)
def test_the_lease_of_another_domain_changes_nothing(db: Connection, verb: str) -> None:
    lease = arrange(db, "IN_PROGRESS")
    before = everything(db)
    assert lease_verb(db, verb, lease, domain="e") == [(lease["command_id"], "lost")]
    assert everything(db) == before


@pytest.mark.parametrize("verb", LEASE_VERBS)
@pytest.mark.parametrize("order", ["stale first", "true first", "twice the same"])
def test_a_command_is_named_once_in_a_call(db: Connection, verb: str, order: str) -> None:
    """One worker may hold two leases of a command, if it lost it and claimed it again: one would pass the other in."""
    old, new = taken_over(db)
    pairs = {"stale first": (old, new), "true first": (new, old), "twice the same": (new, new)}
    before = everything(db)

    assert sqlstate(lambda: lease_verb(db, verb, *pairs[order])) == "CB001"

    assert everything(db) == before
    assert outcome(db, verb, new) == "done"


def test_items_are_answered_one_by_one(db: Connection) -> None:
    finished = arrange(db, "COMPLETED")
    gone = arrange(db, "CANCELED")
    held = arrange(db, "IN_PROGRESS")
    absent = arrange(db, "absent")
    answer = dict(lease_verb(db, "complete", absent, held, gone, finished))
    assert [answer[lease["command_id"]] for lease in (finished, gone, held, absent)] == [
        "done", "lost", "done", "lost",
    ]  # fmt: skip
    assert lease_verb(db, "complete") == []


def test_a_renewed_lease_lasts_from_now(db: Connection) -> None:
    lease = arrange(db, "IN_PROGRESS")
    shift(db, 50)
    assert outcome(db, "renew", lease) == "done"
    shift(db, 61)
    sweep(db)
    assert status_of(db, lease["command_id"]) == "IN_PROGRESS"
    shift(db, 111)
    sweep(db)
    assert status_of(db, lease["command_id"]) == "PENDING"
