"""Every pair of verbs that can meet on a row. The first stays in an open transaction while the second starts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import psycopg
import pytest

from tests.sql.support import (
    HOUR,
    LEASE_VERBS,
    OPERATOR_VERBS,
    Connect,
    Connection,
    Row,
    arrange,
    at_once,
    background,
    claim,
    complete_all,
    everything,
    impatient,
    item,
    lease_verb,
    one,
    operator_verb,
    outcome,
    payload,
    promote,
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


PARKED = "IN_TROUBLESHOOTING_QUEUE"


@pytest.fixture(autouse=True)
def _weeks(db: Connection) -> None:
    """The first completion of a week makes it; the others wait then."""
    db.execute("SELECT commandbus.make_partitions_v1()")


def act(db: Connection, verb: str, lease: Row) -> str:
    """Call any verb on this command; returns what it answers."""
    if verb in LEASE_VERBS:
        return outcome(db, verb, lease)
    if verb in OPERATOR_VERBS:
        return operator_verb(db, verb, lease["command_id"])
    if verb == "send again":
        ((_, word),) = send(db, {"command_id": lease["command_id"]})
        return word
    if verb == "claim":
        return str(len(claim(db)))
    shift(db, {"promote": HOUR + 1, "sweep": 61}[verb])
    {"promote": promote, "sweep": sweep}[verb](db)
    db.execute("RESET commandbus.clock_offset")
    return "-"


# Verbs that pass a locked row over: the status, who locks it, who comes, the answer while it is locked,
# then the answer to the same call after the first has committed, and after it was rolled back.
SKIP = """
PENDING      claim            claim            0     0     1
PENDING      cancel           claim            0     0     1
IN_PROGRESS  cancel           complete         busy  lost  done
IN_PROGRESS  cancel           renew            busy  lost  done
IN_PROGRESS  cancel           release          busy  lost  done
IN_PROGRESS  cancel           fail_TRANSIENT   busy  lost  done
IN_PROGRESS  cancel           fail_PERMANENT   busy  lost  done
IN_PROGRESS  cancel           fail_BUSINESS    busy  lost  done
IN_PROGRESS  cancel           sweep            -     -     -
IN_PROGRESS  complete         complete         busy  done  done
IN_PROGRESS  complete         fail_PERMANENT   busy  done  done
IN_PROGRESS  complete         renew            busy  done  done
IN_PROGRESS  complete         release          busy  done  done
IN_PROGRESS  complete         sweep            -     -     -
IN_PROGRESS  renew            complete         busy  done  done
IN_PROGRESS  renew            renew            busy  done  done
IN_PROGRESS  renew            sweep            -     -     -
IN_PROGRESS  release          sweep            -     -     -
IN_PROGRESS  release          complete         busy  lost  done
IN_PROGRESS  release          renew            busy  lost  done
IN_PROGRESS  fail_TRANSIENT   complete         busy  lost  done
IN_PROGRESS  fail_TRANSIENT   renew            busy  lost  done
IN_PROGRESS  fail_TRANSIENT   sweep            -     -     -
IN_PROGRESS  fail_PERMANENT   complete         busy  lost  done
IN_PROGRESS  fail_BUSINESS    complete         busy  done  done
IN_PROGRESS  sweep            complete         busy  lost  done
IN_PROGRESS  sweep            renew            busy  lost  done
IN_PROGRESS  sweep            release          busy  lost  done
IN_PROGRESS  sweep            fail_TRANSIENT   busy  lost  done
IN_PROGRESS  sweep            fail_PERMANENT   busy  lost  done
IN_PROGRESS  sweep            sweep            -     -     -
SCHEDULED    cancel           promote          -     -     -
SCHEDULED    promote          promote          -     -     -
"""


def cases(table: str) -> list[tuple[str, ...]]:
    """The rows of a table; `fail_X` and `send_again` are two words elsewhere."""
    words = (re.sub(r"\b(fail|send)_", r"\1 ", line).split("  ") for line in table.strip().splitlines())
    return [tuple(word.strip() for word in line if word) for line in words]


@pytest.mark.parametrize(("status", "first", "second", "meanwhile", "after", "undone"), cases(SKIP))
@pytest.mark.parametrize("commits", [True, False])
def test_who_does_not_wait(  # noqa: PLR0917
    db: Connection, connect: Connect, status: str, first: str, second: str,
    meanwhile: str, after: str, undone: str, *, commits: bool,
) -> None:  # fmt: skip
    lease = arrange(db, status)
    holder, comer = connect(), impatient(connect(autocommit=True))
    shift(comer, 0)
    holder.commit()
    assert act(holder, first, lease) in {"1", "done", "ok", "-"}
    before = everything(db)

    assert act(comer, second, lease) == meanwhile
    assert everything(db) == before

    if commits:
        holder.commit()
        before = everything(db)
        assert act(comer, second, lease) == after
        if (first, second) not in {("renew", "complete"), ("renew", "renew"), ("renew", "sweep")}:
            assert everything(db) == before
    else:
        holder.rollback()
        assert act(comer, second, lease) == undone
        assert everything(db) != before


# Verbs that wait for a locked row: the status, who locks it, who waits, its answer when the first commits and the
# status then, its answer when the first is rolled back and the status then.
WAIT = f"""
IN_PROGRESS  complete           cancel             CB003      COMPLETED    ok         CANCELED
IN_PROGRESS  renew              cancel             ok         CANCELED     ok         CANCELED
IN_PROGRESS  release            cancel             ok         CANCELED     ok         CANCELED
IN_PROGRESS  fail_TRANSIENT     cancel             ok         CANCELED     ok         CANCELED
IN_PROGRESS  fail_PERMANENT     cancel             ok         CANCELED     ok         CANCELED
IN_PROGRESS  fail_BUSINESS      cancel             CB003      FAILED       ok         CANCELED
IN_PROGRESS  sweep              cancel             ok         CANCELED     ok         CANCELED
IN_PROGRESS  fail_PERMANENT     operator_retry     ok         PENDING      CB003      IN_PROGRESS
IN_PROGRESS  fail_PERMANENT     operator_cancel    ok         CANCELED     CB003      IN_PROGRESS
IN_PROGRESS  fail_PERMANENT     operator_complete  ok         COMPLETED    CB003      IN_PROGRESS
PENDING      claim              cancel             ok         CANCELED     ok         CANCELED
PENDING      cancel             cancel             CB003      CANCELED     ok         CANCELED
SCHEDULED    promote            cancel             ok         CANCELED     ok         CANCELED
{PARKED}     operator_retry     operator_retry     CB003      PENDING      ok         PENDING
{PARKED}     operator_retry     operator_cancel    CB003      PENDING      ok         CANCELED
{PARKED}     operator_retry     operator_complete  CB003      PENDING      ok         COMPLETED
{PARKED}     operator_retry     cancel             ok         CANCELED     ok         CANCELED
{PARKED}     operator_cancel    operator_retry     CB003      CANCELED     ok         PENDING
{PARKED}     operator_cancel    operator_cancel    CB003      CANCELED     ok         CANCELED
{PARKED}     operator_cancel    operator_complete  CB003      CANCELED     ok         COMPLETED
{PARKED}     operator_cancel    cancel             CB003      CANCELED     ok         CANCELED
{PARKED}     operator_complete  operator_retry     CB003      COMPLETED    ok         PENDING
{PARKED}     operator_complete  operator_cancel    CB003      COMPLETED    ok         CANCELED
{PARKED}     operator_complete  operator_complete  CB003      COMPLETED    ok         COMPLETED
{PARKED}     operator_complete  cancel             CB003      COMPLETED    ok         CANCELED
{PARKED}     cancel             operator_retry     CB003      CANCELED     ok         PENDING
{PARKED}     cancel             operator_cancel    CB003      CANCELED     ok         CANCELED
{PARKED}     cancel             operator_complete  CB003      CANCELED     ok         COMPLETED
IN_PROGRESS  complete           send_again         duplicate  COMPLETED    duplicate  IN_PROGRESS
IN_PROGRESS  fail_BUSINESS      send_again         duplicate  FAILED       duplicate  IN_PROGRESS
IN_PROGRESS  cancel             send_again         duplicate  CANCELED     duplicate  IN_PROGRESS
IN_PROGRESS  renew              send_again         duplicate  IN_PROGRESS  duplicate  IN_PROGRESS
IN_PROGRESS  release            send_again         duplicate  PENDING      duplicate  IN_PROGRESS
PENDING      claim              send_again         duplicate  IN_PROGRESS  duplicate  PENDING
PENDING      cancel             send_again         duplicate  CANCELED     duplicate  PENDING
{PARKED}     operator_complete  send_again         duplicate  COMPLETED    duplicate  {PARKED}
"""


@pytest.mark.parametrize(("status", "first", "second", "won", "then", "undone", "else_then"), cases(WAIT))
@pytest.mark.parametrize("commits", [True, False])
def test_who_waits(  # noqa: PLR0917
    db: Connection, connect: Connect, status: str, first: str, second: str,
    won: str, then: str, undone: str, else_then: str, *, commits: bool,
) -> None:  # fmt: skip
    lease = arrange(db, status)
    holder, comer = connect(), impatient(connect(autocommit=True))
    shift(comer, 61)  # as `act` does for a sweep: of two clocks, one would go back
    assert act(holder, first, lease) in {"1", "done", "ok", "-"}
    with background() as pool:
        waiting = start_waiting(pool, db, comer, lambda connection: act(connection, second, lease))
        holder.commit() if commits else holder.rollback()
        assert waiting.result() == (won if commits else undone)
    assert status_of(db, lease["command_id"]) == (then if commits else else_then)


def test_a_locked_row_does_not_hold_up_its_neighbours(db: Connection, connect: Connect) -> None:
    send_ids(db, 5)
    items = [item(row) for row in claim(db)]
    holder = connect()
    operator_verb(holder, "cancel", items[2]["command_id"])
    for verb in ("renew", "complete"):
        words = dict(lease_verb(impatient(connect(autocommit=True)), verb, *items))
        expected = dict.fromkeys([one["command_id"] for one in items], "done")
        assert words == expected | {items[2]["command_id"]: "busy"}


def test_a_locked_row_does_not_hold_up_another_type(db: Connection, connect: Connect) -> None:
    """The share of each type is counted before rivals are seen; what they hold must not use it up."""
    (locked,) = send_ids(db)
    send_ids(db, command_type="B")
    operator_verb(connect(), "cancel", locked)
    (leased,) = claim(impatient(connect(autocommit=True)), 1, parts=segments("A", "B"))
    assert leased["command_type"] == "B"


# ----------------------------------------------------------------------------------------------- bulk


def test_bulk_verbs_in_any_order_do_not_deadlock(db: Connection, connect: Connect) -> None:
    """Every command ends exactly once, whoever wins it; nobody is told 40P01."""
    ids = send_ids(db, 200)
    items = [item(row) for row in claim(db, 200)]
    assert len(items) == len(ids)
    calls: list[Callable[[], None]] = []
    for seed, verb in enumerate(("renew", "complete", "renew", "complete", "cancel", "release")):
        calls.append(partial(mangle, connect(autocommit=True), verb, random.Random(seed), items))
    with background() as pool:
        at_once(pool, calls)
    assert one(db, "SELECT count(DISTINCT command_id) FROM commandbus.commands") == len(ids)
    assert one(db, "SELECT count(*) FROM commandbus.commands") == len(ids)


def mangle(connection: Connection, verb: str, order: random.Random, items: list[Row]) -> None:
    for _ in range(10):
        some = order.sample(items, 100)
        if verb == "cancel":
            for one_of_them in some[:10]:
                assert operator_verb(connection, verb, one_of_them["command_id"]) in {"ok", "CB003"}
        else:
            words = {word for _, word in lease_verb(connection, verb, *some)}
            assert words <= {"done", "busy", "lost"}


def test_claims_at_once_share_the_queue(db: Connection, connect: Connect) -> None:
    ids = send_ids(db, 300)
    with background() as pool:
        calls = [partial(drain, connect(autocommit=True), f"w{number}") for number in range(6)]
        taken = [command_id for part in at_once(pool, calls) for command_id in part]
    assert sorted(taken) == sorted(ids)
    assert one(db, "SELECT max(delivery) FROM commandbus.command") == 1


def drain(connection: Connection, worker: str) -> list[str]:
    taken: list[str] = []
    while leased := claim(connection, 7, worker=worker):
        taken += [str(row["command_id"]) for row in leased]
    return taken


def test_sends_and_completions_of_the_same_ids_never_lose_or_double(db: Connection, connect: Connect) -> None:
    """Four senders send the same ids over and over while two workers finish them."""
    ids = [f"{number:08x}-0000-4000-8000-000000000000" for number in range(40)]
    batch = payload(*[{"command_id": command_id} for command_id in ids])
    with background() as pool:
        senders = [pool.submit(send_often, connect(autocommit=True), batch) for _ in range(4)]
        workers = [pool.submit(work, connect(autocommit=True), senders) for _ in range(2)]
        accepted = sum(future.result() for future in senders)
        completed = sum(future.result() for future in workers)
    assert (accepted, completed) == (len(ids), len(ids))
    assert one(db, "SELECT count(*) FROM commandbus.command_history") == len(ids)


def send_often(connection: Connection, batch: str) -> int:
    accepted = 0
    for _ in range(40):
        for (word,) in connection.execute("SELECT outcome FROM commandbus.send_v1(%s)", [batch]):
            assert word in {"accepted", "duplicate"}
            accepted += word == "accepted"
    return accepted


def work(connection: Connection, senders: list[Future[int]]) -> int:
    completed = 0
    while True:
        over = all(sender.done() for sender in senders)
        leased = claim(connection, 5)
        completed += len(complete_all(connection, leased))
        if over and not leased:
            return completed


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_handlers_transaction_at_a_higher_level_cannot_pass_the_fence(
    db: Connection, connect: Connect, level: str
) -> None:
    """Its snapshot is old: it still sees its own lease. PostgreSQL says 40001, and nothing is written."""
    lease = arrange(db, "IN_PROGRESS")
    handler = connect()
    handler.execute(f"SET TRANSACTION ISOLATION LEVEL {level}".encode())
    assert status_of(handler, lease["command_id"]) == "IN_PROGRESS"
    operator_verb(db, "cancel", lease["command_id"])
    with pytest.raises(psycopg.errors.SerializationFailure):
        outcome(handler, "complete", lease)
    handler.rollback()
    assert status_of(db, lease["command_id"]) == "CANCELED"
