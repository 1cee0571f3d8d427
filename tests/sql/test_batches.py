"""The counts of batches, and the command that is sent when the last of one has ended: exactly once."""

from __future__ import annotations

import json
from collections import Counter
from uuid import uuid4

import psycopg
import pytest

from tests.sql.batch_support import DONE, add, batch_of, close, counts, create, finished, told
from tests.sql.support import (
    HOUR,
    Connect,
    Connection,
    at_once,
    background,
    bulk,
    claim,
    impatient,
    item,
    lease_verb,
    one,
    operator_verb,
    outcome,
    rows,
    send,
    shift,
    start_waiting,
    sweep,
)


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


@pytest.fixture(autouse=True)
def _weeks(db: Connection) -> None:
    db.execute("SELECT commandbus.make_partitions_v1()")


# ------------------------------------------------------------------------------------------------ counting


def test_a_batch_counts_its_commands_and_sends_one_when_the_last_has_ended(db: Connection) -> None:
    batch_id = batch_of(db, 3)
    assert counts(db, batch_id) == {"total": 3, "open": 3}
    done, refused, last = claim(db)
    assert lease_verb(db, "complete", item(done)) == [(item(done)["command_id"], "done")]
    assert outcome(db, "fail BUSINESS", item(refused)) == "done"
    assert counts(db, batch_id) == {"total": 3, "completed": 1, "failed": 1, "open": 1}
    assert not finished(db, batch_id)
    assert told(db) == 0
    assert outcome(db, "complete", item(last)) == "done"
    assert counts(db, batch_id) == {"total": 3, "completed": 2, "failed": 1}
    assert finished(db, batch_id)
    sent = rows(db, "SELECT command_type, status, data, priority, correlation_id FROM commandbus.commands "
                    "WHERE domain = 'reports'")  # fmt: skip
    assert sent == [("Done", "PENDING", {"of": "batch"}, 5, batch_id)]


@pytest.mark.parametrize(
    ("verb", "name"),
    [("complete", "completed"), ("work", "completed"), ("fail BUSINESS", "failed"), ("fail PERMANENT", "in_trouble"),
     ("fail TRANSIENT", "open"), ("release", "open"), ("renew", "open")],
    ids=str,
)  # fmt: skip
def test_each_verb_of_a_worker_counts(db: Connection, verb: str, name: str) -> None:
    batch_id = batch_of(db, 3)
    leased = claim(db)
    lease_verb(db, verb, *[item(row) for row in leased[:2]])
    expected = {"total": 3, "open": 1}
    expected[name] = expected.get(name, 0) + 2
    assert counts(db, batch_id) == expected
    lease_verb(db, verb, *[item(row) for row in leased[:2]])  # repeated, or too late
    assert counts(db, batch_id) == expected


@pytest.mark.parametrize(
    ("verb", "name"),
    [("cancel", "canceled"), ("operator_cancel", "canceled"), ("operator_complete", "completed"),
     ("operator_retry", "open")],
    ids=str,
)  # fmt: skip
def test_each_verb_on_a_parked_command_counts(db: Connection, verb: str, name: str) -> None:
    batch_id = batch_of(db, 1)
    (leased,) = claim(db)
    assert outcome(db, "fail PERMANENT", item(leased)) == "done"
    assert counts(db, batch_id) == {"total": 1, "in_trouble": 1}
    assert operator_verb(db, verb, item(leased)["command_id"]) == "ok"
    assert counts(db, batch_id) == {"total": 1, name: 1}
    assert finished(db, batch_id) == (name != "open")
    assert told(db) == (name != "open")


@pytest.mark.parametrize(
    ("verb", "name"), [("retry", "open"), ("cancel", "canceled"), ("complete", "completed")], ids=lambda value: value
)
def test_each_verb_on_many_parked_commands_counts(db: Connection, verb: str, name: str) -> None:
    batch_id = batch_of(db, 3)
    leased = [item(row) for row in claim(db)]
    lease_verb(db, "fail PERMANENT", *leased)
    assert [word for _, word in bulk(db, verb, *leased)] == ["done"] * 3
    assert counts(db, batch_id) == {"total": 3, name: 3}
    assert told(db) == (name != "open")


def test_a_sweep_that_parks_counts(db: Connection) -> None:
    batch_id = batch_of(db, 1)
    for crash in range(3):
        claim(db, alone=crash == 2)
        shift(db, (crash + 1) * HOUR)
        sweep(db)
    assert counts(db, batch_id) == {"total": 1, "in_trouble": 1}


def test_one_call_counts_in_several_batches(db: Connection) -> None:
    first, second = batch_of(db, 2), batch_of(db, 1)
    lease_verb(db, "complete", *[item(row) for row in claim(db)])
    assert counts(db, first) == {"total": 2, "completed": 2}
    assert counts(db, second) == {"total": 1, "completed": 1}
    assert told(db) == 2


def test_what_is_sent_at_the_end_is_delayed_from_then(db: Connection) -> None:
    batch_of(db, 1, on_complete={**DONE, "delay": 60})
    shift(db, HOUR)
    lease_verb(db, "complete", item(claim(db)[0]))
    sql = "SELECT status, due_at - clock_timestamp() > interval '1 hour 50 seconds' FROM commandbus.command"
    assert rows(db, sql) == [("SCHEDULED", True)]


# ------------------------------------------------------------------------------------------- what is refused


def test_what_is_sent_at_the_end_may_have_no_data(db: Connection) -> None:
    batch_of(db, 0, on_complete={"domain": "reports", "command_type": "Done", "data": None})
    assert rows(db, "SELECT data FROM commandbus.commands WHERE domain = 'reports'") == [(None,)]


def test_nobody_else_names_the_batch_of_a_command(db: Connection) -> None:
    batch_id = batch_of(db, 1)
    send(db, batch_id=batch_id)
    assert counts(db, batch_id) == {"total": 1, "open": 1}
    assert rows(db, "SELECT count(*) FROM commandbus.commands WHERE batch_id IS NULL") == [(1,)]


def test_what_was_sent_before_is_not_put_into_a_batch(db: Connection) -> None:
    known = str(uuid4())
    send(db, command_id=known)
    batch_id = create(db)
    new = str(uuid4())
    assert add(db, batch_id, {"command_id": known}, {"command_id": new}, {"command_id": new, "data": 2}) == [
        (known, "duplicate"), (new, "accepted"), (new, "conflict"),
    ]  # fmt: skip
    assert counts(db, batch_id) == {"total": 1, "open": 1}


def test_a_batch_takes_commands_of_its_domain_only(db: Connection) -> None:
    batch_id = create(db)
    with pytest.raises(psycopg.Error, match="another domain") as caught:
        add(db, batch_id, {}, {"domain": "e"})
    assert caught.value.sqlstate == "CB001"
    assert counts(db, batch_id) == {}


def test_a_batch_that_grows_does_not_finish(db: Connection) -> None:
    batch_id = create(db, on_complete=DONE)
    add(db, batch_id, {})
    lease_verb(db, "complete", item(claim(db)[0]))
    assert counts(db, batch_id) == {"total": 1, "completed": 1}
    assert one(db, "SELECT completed FROM commandbus.batch") == 1  # in the row itself: nothing was wrong with that
    assert not finished(db, batch_id)
    close(db, batch_id)
    ended = one(db, "SELECT finished_at FROM commandbus.batches")
    assert ended is not None
    close(db, batch_id)
    assert one(db, "SELECT finished_at FROM commandbus.batches") == ended
    assert told(db) == 1


# ------------------------------------------------------------------------------------------------- races


def test_of_two_that_end_the_last_two_commands_one_finishes_the_batch(db: Connection, connect: Connect) -> None:
    """Each of 400 batches ends with two commands at once; counting rows would miss the end of most."""
    sessions = [connect(autocommit=True) for _ in range(2)]
    with background() as pool:
        for _ in range(400):
            batch_of(db, 2)
            leased = [item(row) for row in claim(db)]
            calls = [
                lambda session=session, one=one: outcome(session, "complete", one)
                for session, one in zip(sessions, leased, strict=True)
            ]
            assert at_once(pool, calls) == ["done", "done"]
    assert rows(db, "SELECT count(*), count(finished_at) FROM commandbus.batch") == [(400, 400)]
    assert told(db) == 400


def test_who_counts_waits_for_the_one_before_and_finishes_the_batch(db: Connection, connect: Connect) -> None:
    batch_id = batch_of(db, 2)
    first, second = [item(row) for row in claim(db)]
    # Longer than a test may take, in place of 100 ms.
    db.execute("ALTER FUNCTION commandbus._turn(commandbus.batch_change, boolean) SET lock_timeout = '60s'")
    other = connect()
    assert outcome(other, "complete", first) == "done"
    with background() as pool:
        waiting = start_waiting(pool, db, impatient(connect(autocommit=True)), lambda c: outcome(c, "complete", second))
        other.commit()
        assert waiting.result() == "done"
    db.execute("ALTER FUNCTION commandbus._turn(commandbus.batch_change, boolean) SET lock_timeout = '100ms'")
    assert finished(db, batch_id)
    assert told(db) == 1


def test_an_open_transaction_holds_up_nobody_and_the_next_sweep_finishes_the_batch(
    db: Connection, connect: Connect
) -> None:
    batch_id = batch_of(db, 3)
    kept, *others = [item(row) for row in claim(db)]
    application = connect()
    assert outcome(application, "complete", kept) == "done"
    assert [outcome(db, "complete", one) for one in others] == ["done", "done"]
    assert counts(db, batch_id) == {"total": 3, "completed": 2, "open": 1}
    sweep(db)  # passes over the batch
    application.commit()
    assert counts(db, batch_id) == {"total": 3, "completed": 3}
    assert not finished(db, batch_id)
    sweep(db)
    assert finished(db, batch_id)
    assert told(db) == 1


def test_who_counts_next_puts_in_what_waits(db: Connection, connect: Connect) -> None:
    batch_id = batch_of(db, 3)
    kept, second, last = [item(row) for row in claim(db)]
    application = connect()
    assert outcome(application, "complete", kept) == "done"
    assert outcome(db, "fail PERMANENT", second) == "done"
    application.commit()
    assert operator_verb(db, "operator_cancel", second["command_id"]) == "ok"
    assert outcome(db, "complete", last) == "done"
    assert counts(db, batch_id) == {"total": 3, "completed": 2, "canceled": 1}
    assert told(db) == 1


def test_above_read_committed_a_count_waits_to_be_put_in(db: Connection, connect: Connect) -> None:
    batch_id = batch_of(db, 2)
    first, second = [item(row) for row in claim(db)]
    application = connect()
    application.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    application.execute("SELECT count(*) FROM commandbus.batch")
    assert outcome(db, "complete", first) == "done"
    assert outcome(application, "complete", second) == "done"
    application.commit()
    sweep(db)
    assert finished(db, batch_id)
    assert counts(db, batch_id) == {"total": 2, "completed": 2}


def test_two_that_count_in_two_batches_in_any_order_do_not_deadlock(db: Connection, connect: Connect) -> None:
    first, second = batch_of(db, 2), batch_of(db, 2)
    a1, a2 = [item(row) for row in claim(db, 2)]
    b1, b2 = [item(row) for row in claim(db, 2)]
    one_way, other_way = connect(), connect()
    assert outcome(one_way, "complete", a1) == "done"
    assert outcome(other_way, "complete", b1) == "done"
    with background() as pool:
        calls = [lambda: outcome(one_way, "complete", b2), lambda: outcome(other_way, "complete", a2)]
        assert at_once(pool, calls) == ["done", "done"]
    one_way.commit()
    other_way.commit()
    sweep(db)
    assert finished(db, first)
    assert finished(db, second)


def test_a_batch_is_closed_at_read_committed_only(db: Connection, connect: Connect) -> None:
    batch_id = create(db)
    strict = connect()
    strict.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    one(strict, "SELECT 1")
    add(db, batch_id, {})
    with pytest.raises(psycopg.Error, match="can be closed at READ COMMITTED only") as raised:
        close(strict, batch_id)
    assert raised.value.sqlstate == "CB004"
    assert not finished(db, batch_id)


def test_one_who_keeps_many_batches_is_waited_for_once(db: Connection, connect: Connect) -> None:
    batches = [batch_of(db, 2) for _ in range(3)]
    kept, others = [], []
    for batch_id in batches:
        found = rows(db, "SELECT command_id FROM commandbus.batch_commands WHERE batch_id = %s", batch_id)
        kept.append(found[0][0])
        others.append(found[1][0])
    leases = {item(row)["command_id"]: item(row) for row in claim(db)}
    application = connect()
    assert set(lease_verb(application, "complete", *[leases[str(one_)] for one_ in kept])) == {
        (str(i), "done") for i in kept
    }
    lease_verb(db, "complete", *[leases[str(one_)] for one_ in others])
    assert one(db, "SELECT count(*) FROM commandbus.batch_change WHERE completed = 1") == 3
    application.commit()
    sweep(db)
    assert [finished(db, batch_id) for batch_id in batches] == [True] * 3


@pytest.mark.parametrize("verb", ["retry", "cancel", "complete", "cancel_bulk"])
def test_a_call_for_many_waits_once_for_who_keeps_their_batch(db: Connection, connect: Connect, verb: str) -> None:
    batch_id = batch_of(db, 101)
    kept, *parked = [item(row) for row in claim(db, 101)]
    lease_verb(db, "fail PERMANENT", *parked)
    application = connect()
    assert outcome(application, "complete", kept) == "done"
    hurried = connect(autocommit=True)
    hurried.execute("SET statement_timeout = '9s'")  # 100 times 100 ms, and as long again to count what ended
    if verb == "cancel_bulk":
        answer = rows(
            hurried, "SELECT outcome FROM commandbus.cancel_bulk_v1('d', %s, 'ana', 'why')", json.dumps(parked)
        )
    else:
        answer = [(word,) for _, word in bulk(hurried, verb, *parked)]
    assert answer == [("done",)] * 100
    application.commit()
    sweep(db)
    name = {"retry": "open", "complete": "completed"}.get(verb, "canceled")
    assert counts(db, batch_id) == {"total": 101, **Counter({"completed": 1}) + Counter({name: 100})}
    assert finished(db, batch_id) == (verb != "retry")


def test_the_next_transaction_waits_again(db: Connection, connect: Connect) -> None:
    batch_of(db, 3)
    kept, second, third = [item(row) for row in claim(db)]
    application, worker = connect(), connect(autocommit=True)
    assert outcome(application, "complete", kept) == "done"
    assert outcome(worker, "complete", second) == "done"
    db.execute("ALTER FUNCTION commandbus._turn(commandbus.batch_change, boolean) SET lock_timeout = '60s'")
    with background() as pool:
        waiting = start_waiting(pool, db, impatient(worker), lambda c: outcome(c, "complete", third))
        application.commit()
        assert waiting.result() == "done"
    db.execute("ALTER FUNCTION commandbus._turn(commandbus.batch_change, boolean) SET lock_timeout = '100ms'")
    assert told(db) == 1


def test_closing_waits_for_what_is_being_added(db: Connection, connect: Connect) -> None:
    batch_id = create(db, on_complete=DONE)
    adding = connect()
    add(adding, batch_id, {})
    with background() as pool:
        closing = start_waiting(pool, db, impatient(connect(autocommit=True)), lambda c: close(c, batch_id))
        adding.commit()
        closing.result()
    assert counts(db, batch_id) == {"total": 1, "open": 1}
    assert not finished(db, batch_id)
    with pytest.raises(psycopg.Error, match="closed") as caught:
        add(db, batch_id, {})
    assert caught.value.sqlstate == "CB003"


def test_adding_holds_up_no_counting(db: Connection, connect: Connect) -> None:
    batch_id = create(db)
    add(db, batch_id, {})
    adding = connect()
    add(adding, batch_id, {})
    assert outcome(db, "complete", item(claim(db)[0])) == "done"
    assert one(db, "SELECT completed FROM commandbus.batch") == 1  # in the row itself: it did not have to wait
    adding.commit()
    assert counts(db, batch_id) == {"total": 2, "completed": 1, "open": 1}


# ------------------------------------------------------------------------------ what hinders the end of a batch


def sent_before(db: Connection, batch_id: str) -> str:
    """Send another command under the id of what the batch sends at its end, which anybody may see."""
    known = one(db, "SELECT on_complete_id::text FROM commandbus.batches WHERE batch_id = %s", batch_id)
    assert send(db, {"command_id": known, "domain": "reports", "data": "of somebody's"}) == [(known, "accepted")]
    return str(known)


@pytest.mark.parametrize("state", ["waiting", "ended"])
def test_a_batch_ends_although_somebody_has_sent_what_it_sends_then(db: Connection, state: str) -> None:
    batch_id = batch_of(db, 1)
    known = sent_before(db, batch_id)
    if state == "ended":
        db.execute("SELECT commandbus.cancel_v1('reports', %s, NULL, NULL)", [known])
    assert rows(db, "SELECT * FROM commandbus.verify_v1()") == []
    assert outcome(db, "complete", item(claim(db)[0])) == "done"
    assert finished(db, batch_id)
    assert rows(db, "SELECT data FROM commandbus.commands WHERE domain = 'reports'") == [("of somebody's",)]


def test_who_is_sending_what_a_batch_sends_at_its_end_holds_up_no_command(db: Connection, connect: Connect) -> None:
    batch_id = batch_of(db, 1)
    other = connect()
    sent_before(other, batch_id)
    (leased,) = claim(db)
    assert outcome(impatient(connect(autocommit=True)), "complete", item(leased)) == "done"
    assert counts(db, batch_id) == {"total": 1, "completed": 1}
    sweep(db)
    assert not finished(db, batch_id)
    other.rollback()
    sweep(db)
    assert finished(db, batch_id)
    assert rows(db, "SELECT data FROM commandbus.commands WHERE domain = 'reports'") == [({"of": "batch"},)]


def test_a_batch_that_cannot_be_counted_fails_no_command_and_no_claim(db: Connection) -> None:
    broken, sound = batch_of(db, 1), batch_of(db, 1)
    before = one(db, "SELECT on_complete FROM commandbus.batch WHERE batch_id = %s", broken)
    change = "UPDATE commandbus.batch SET on_complete = %s WHERE batch_id = %s"
    db.execute(change, [json.dumps(before | {"priority": "high"}), broken])
    leased = [item(row) for row in claim(db)]
    assert lease_verb(db, "complete", *leased) == sorted((one_["command_id"], "done") for one_ in leased)
    send(db)
    assert len(claim(db, sweep=True)) == 1
    assert counts(db, broken) == {"total": 1, "completed": 1}
    assert (finished(db, broken), finished(db, sound)) == (False, True)
    db.execute(change, [json.dumps(before), broken])
    sweep(db)
    assert finished(db, broken)
