"""Plans and work, never time. Statistics are made to mislead: the shape of a plan must not depend on them."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest

from tests.sql.plans import buffers, faults, indexes, plans_of, tid_scans
from tests.sql.support import (
    HOUR,
    LEASE_VERBS,
    LEVEL,
    Connect,
    Connection,
    Row,
    bulk,
    claim,
    item,
    lease_verb,
    one,
    operator_verb,
    promote,
    rows,
    segments,
    send,
    send_ids,
    shift,
    sweep,
)
from tests.support import eventually

WEEK = 7 * 86_400.0

pytestmark = pytest.mark.corrupts  # the tables are stuffed, no command has lived

# ------------------------------------------------------------------------------------------ the tables

_COMMANDS = """
    INSERT INTO commandbus.command (domain, command_id, command_type, status, place, due_at, parked_at, sent_at, data,
                                    headers, data_hash)
    SELECT %(domain)s, gen_random_uuid(), %(type)s, %(status)s,
           CASE %(status)s WHEN 'PENDING' THEN commandbus._place(%(priority)s::smallint) END,
           CASE %(status)s WHEN 'SCHEDULED' THEN clock_timestamp() + interval '1 day' END,
           CASE %(status)s WHEN 'IN_TROUBLESHOOTING_QUEUE' THEN clock_timestamp() END,
           clock_timestamp(), '1', '{}', ''
    FROM generate_series(1, %(count)s)"""
_FINISHED = """
    INSERT INTO commandbus.command_history (domain, command_id, command_type, status, priority, attempts, crashes,
                                            events, delivery, sent_at, finished_at, data_hash, data, headers)
    SELECT 'd', gen_random_uuid(), 'A', 'COMPLETED', 0, 1, 0, 0, 1, clock_timestamp(), clock_timestamp(), '', '1', '{}'
    FROM generate_series(1, %(count)s)"""
_EVENTS = """
    INSERT INTO commandbus.audit_event
        (domain, command_id, event_no, event, occurred_at, from_status, to_status, delivery)
    SELECT domain, command_id, 1, 'PARKED', clock_timestamp(), 'IN_PROGRESS', status, 1
    FROM commandbus.command WHERE status <> 'PENDING'"""


def fill(
    db: Connection,
    count: int,
    *,
    domain: str = "d",
    command_type: str = "A",
    status: str = "PENDING",
    priority: int = 0,
) -> None:
    """Put that many commands into the table, quickly."""
    given = {"domain": domain, "type": command_type, "status": status, "priority": priority, "count": count}
    db.execute(_COMMANDS, given)


def fill_all(db: Connection) -> None:
    """Put 50,000 commands of ten types and three domains into the tables."""
    for number in range(10):
        fill(db, 3000, command_type="ABCDEFGHIJ"[number])
    fill(db, 10_000, domain="e")
    fill(db, 5000, status="SCHEDULED")
    fill(db, 5000, status="IN_TROUBLESHOOTING_QUEUE")
    db.execute(_FINISHED, {"count": 20_000})
    db.execute(_EVENTS)


def analyzed_empty(db: Connection) -> None:
    db.execute("VACUUM ANALYZE")
    fill_all(db)


def skewed(db: Connection) -> None:
    fill(db, 40_000)
    fill(db, 20, domain="e")
    fill(db, 20, command_type="B")
    db.execute(_FINISHED, {"count": 20_000})
    db.execute("VACUUM ANALYZE")


def full(db: Connection) -> None:
    fill_all(db)
    db.execute("VACUUM ANALYZE")


TABLES = {"analyzed empty": analyzed_empty, "skewed": skewed, "full": full}

# ------------------------------------------------------------------------------------------- the verbs

QUEUE, KEY, DUE, ALONE, MARK = "command_queue", "command_pkey", "command_due", "command_alone", "claim_mark_pkey"
MUST: dict[str, set[str]] = {
    "claim": {QUEUE, DUE, ALONE},
    "claim of two types": {QUEUE, DUE, ALONE},
    "claim alone": {ALONE, DUE},
    "sweep": {QUEUE, ALONE, DUE},
    "promote": {DUE},
    "send": set(),
    "send an own id": {"history"},
    "send an own id again": {KEY},
    **{verb: {KEY} for verb in LEASE_VERBS},
    "complete again": {KEY, "history"},
    "cancel": {KEY},
    "operator_retry": {KEY},
    "operator_complete": {KEY, "audit_event_pkey"},
    "operator_bulk": {KEY, "audit_event_pkey"},
}

NONE: dict[str, set[str]] = {verb: set() for verb in MUST}


def verbs(db: Connection) -> dict[str, Callable[[], object]]:
    """Calls of every verb, each on a few commands of its own."""
    leases = [item(row, kind="X") for row in claim(db, 80)]
    own: Row = {"command_id": str(uuid4())}
    calls: dict[str, Callable[[], object]] = {
        "claim": lambda: claim(db, 10),
        "claim of two types": lambda: claim(db, 10, parts=segments("A", "B")),
        "claim alone": lambda: claim(db, 10, alone=True),
        "sweep": lambda: sweep(db),
        "promote": lambda: promote(db),
        "send": lambda: send(db, *[{"command_id": str(uuid4())} for _ in range(5)]),
        "send an own id": lambda: send(db, own),
        "send an own id again": lambda: send(db, own),
    }
    for number, verb in enumerate(LEASE_VERBS):
        some = [{key: one[key] for key in one if key != "kind"} for one in leases[number * 5 : number * 5 + 5]]
        calls[verb] = lambda verb=verb, some=some: lease_verb(db, verb, *some)  # type: ignore[misc]
        if verb == "complete":
            calls["complete again"] = lambda some=some: lease_verb(db, "complete", *some)  # type: ignore[misc]
    parked = [item(row) for row in claim(db, 4)]
    lease_verb(db, "fail PERMANENT", *parked)
    calls["cancel"] = lambda: operator_verb(db, "cancel", leases[-1]["command_id"])
    calls["operator_retry"] = lambda: operator_verb(db, "operator_retry", parked[0]["command_id"])
    calls["operator_complete"] = lambda: operator_verb(db, "operator_complete", parked[1]["command_id"])
    calls["operator_bulk"] = lambda: bulk(db, "complete", *parked[2:])
    return calls


@pytest.mark.parametrize("tables", TABLES)
def test_plans_do_not_depend_on_statistics(db: Connection, connect: Connect, tables: str) -> None:
    TABLES[tables](db)
    calls = verbs(fresh := connect(autocommit=True))
    assert calls.keys() == MUST.keys()
    found = {verb: plans_of(fresh, call) for verb, call in calls.items()}
    assert {verb: faults(plans) for verb, plans in found.items()} == NONE
    assert {verb: MUST[verb] - indexes(plans) for verb, plans in found.items()} == NONE
    for verb in ("claim", *LEASE_VERBS):
        assert tid_scans(found[verb]) >= 1, verb
    most = {verb: buffers(plans) for verb, plans in found.items()}
    assert {verb: pages for verb, pages in most.items() if pages > 1200} == {}  # a new session reads 900 of the catalog


@pytest.mark.parametrize("tables", TABLES)
def test_what_stands_before_a_command_is_counted_in_the_queue_alone(
    db: Connection, connect: Connect, tables: str
) -> None:
    TABLES[tables](db)
    (command_id,) = send_ids(db, command_type="B")
    asker = connect(autocommit=True)
    asker.execute("SELECT commandbus.announce_v1('w', 'd', '{A,B}', 1)")
    plans = plans_of(asker, lambda: asker.execute("SELECT FROM commandbus.explain_v1('d', %s)", [command_id]))
    assert faults(plans) == set()
    assert {QUEUE, KEY} <= indexes(plans)


def test_plans_that_a_session_made_while_the_tables_were_empty(db: Connection, connect: Connect) -> None:
    """A worker is started with the application; its plans are cached before the first commands come."""
    db.execute("VACUUM ANALYZE")
    old = connect(autocommit=True)
    for _ in range(7):
        send_ids(old, 90)
        for call in verbs(old).values():
            call()
        db.execute("DELETE FROM commandbus.command; DELETE FROM commandbus.audit_event")
    shift(old, WEEK)  # whose partitions are empty yet
    send_ids(old, 90)
    for call in verbs(old).values():
        call()
    db.execute("DELETE FROM commandbus.command; DELETE FROM commandbus.audit_event")
    fill_all(db)
    db.execute(_FINISHED.replace("clock_timestamp()", "clock_timestamp() + interval '7 days'"), {"count": 20_000})
    found = {verb: plans_of(old, call) for verb, call in verbs(old).items()}
    assert {verb: faults(plans) for verb, plans in found.items()} == NONE


# -------------------------------------------------------------------------------------------- the work


def test_unknown_types_at_the_head_cost_a_claim_nothing(db: Connection) -> None:
    fill(db, 100_000, command_type="U", priority=100)
    fill(db, 20)
    assert len(claim(db, 10)) == 10
    plans = plans_of(db, lambda: claim(db, 10))
    assert buffers(plans) < 300
    assert faults(plans) == set()
    assert claim(db) == []


def test_a_claim_behind_a_remembered_place_does_not_walk_over_the_rest(db: Connection) -> None:
    """What is leased keeps its place in the index until it is finished and vacuumed."""
    fill(db, 5020)
    claimed = claim(db, 5000)
    from_the_start = buffers(plans_of(db, lambda: claim(db, 5)))
    after = max(row["place"] for row in claimed)
    behind = buffers(plans_of(db, lambda: claim(db, 5, parts=segments("A", after=after, up_to=201 * LEVEL))))
    assert behind * 3 < from_the_start


def test_a_sweep_of_an_idle_domain_costs_little(db: Connection) -> None:
    """What was never claimed lies beyond the claim mark."""
    send_ids(db, 10)
    claim(db)
    fill(db, 5000)
    fill(db, 30_000)
    shift(db, 61)
    plans = plans_of(db, lambda: sweep(db))
    assert one(db, "SELECT count(*) FROM commandbus.command WHERE crashes = 1") == 10
    assert buffers(plans) < 6000


def hot_and_all(db: Connection) -> tuple[int, int]:
    """How many updates of the table were HOT, and how many there were."""
    db.execute("SELECT pg_stat_force_next_flush()") if db.info.server_version >= 150000 else None
    sql = "SELECT n_tup_hot_upd, n_tup_upd FROM pg_stat_user_tables WHERE relid = 'commandbus.command'::regclass"
    ((hot, every),) = rows(db, sql)
    return int(hot), int(every)


def test_claims_and_renewals_are_hot_updates(db: Connection, connect: Connect) -> None:
    """They change no indexed column, and a page has room for a second version of nearly all it holds."""
    claimer, renewer = connect(autocommit=True), connect(autocommit=True)
    send_ids(claimer, 1000)
    claimed = claim(claimer, 1000)
    claimer.close()  # what a session counted is told at its end at the latest
    eventually(lambda: hot_and_all(db)[1] == 1000, what="the counts of the claimer")
    assert hot_and_all(db)[0] > 800
    lease_verb(renewer, "renew", *[item(row) for row in claimed])
    renewer.close()
    eventually(lambda: hot_and_all(db)[1] == 2000, what="the counts of the renewer")
    assert hot_and_all(db)[0] > 1700


def test_no_index_names_a_column_of_the_lease(db: Connection) -> None:
    sql = "SELECT indexname FROM pg_indexes WHERE schemaname = 'commandbus' AND tablename = 'command' AND indexdef ~ %s"
    assert rows(db, sql, "lease|delivery|claimed_at|worker|status") == []


def test_a_promotion_takes_what_is_due_only(db: Connection) -> None:
    fill(db, 20_000, status="SCHEDULED")
    send_ids(db, 5, delay=HOUR)
    shift(db, HOUR + 1)
    plans = plans_of(db, lambda: promote(db))
    assert buffers(plans) < 300
    assert one(db, "SELECT count(*) FROM commandbus.command WHERE status = 'PENDING'") == 5
