"""One verb on many parked commands in one call, and what makes failures one group."""

from __future__ import annotations

import json
import random
from functools import partial

import pytest

from tests.sql.support import (
    OPERATOR_VERBS,
    STATUSES,
    Connect,
    Connection,
    Row,
    arrange,
    at_once,
    background,
    bulk,
    claim,
    everything,
    impatient,
    item,
    lease_verb,
    one,
    operator_verb,
    outcome,
    rows,
    send_ids,
    shift,
    sqlstate,
    start_waiting,
    status_of,
    trail,
)


@pytest.fixture
def dsn(emptied_dsn: str) -> str:
    return emptied_dsn


@pytest.fixture(autouse=True)
def _weeks(db: Connection) -> None:
    """The first completion of a week makes it; the others wait then."""
    db.execute("SELECT commandbus.make_partitions_v1()")


PARKED = "IN_TROUBLESHOOTING_QUEUE"
THEN = {"retry": "PENDING", "cancel": "CANCELED", "complete": "COMPLETED"}
VERBS = tuple(THEN)


def park(db: Connection, count: int, **common: object) -> list[Row]:
    """Park that many commands; returns them as an operator sees them, by id."""
    send_ids(db, count, **common)
    leased = [item(row) for row in claim(db, count)]
    assert {word for _, word in lease_verb(db, "fail PERMANENT", *leased)} == {"done"}
    return sorted(leased, key=lambda each: str(each["command_id"]))


def answers(db: Connection, verb: str, *items: Row, value: str | None = None) -> list[str]:
    return [word for _, word in bulk(db, verb, *items, value=value)]


# ------------------------------------------------------------------------------------------- the verbs


def story(db: Connection, command_id: str) -> list[tuple[object, ...]]:
    """Everything that is told of a command, but ids, leases and times."""
    unlike = "{command_id,lease_token,sent_at,claimed_at,lease_until,occurred_at,finished_at}"
    sql = "SELECT (to_jsonb(v) - %s::text[])::text FROM commandbus.{} v WHERE command_id = %s ORDER BY 1"
    return [row for view in ("commands", "audit_trail") for row in rows(db, sql.format(view), unlike, command_id)]


@pytest.mark.parametrize("verb", VERBS)
def test_it_does_what_the_single_verb_does(db: Connection, verb: str) -> None:
    single, many = park(db, 2)
    assert operator_verb(db, f"operator_{verb}", single["command_id"]) == "ok"
    assert bulk(db, verb, many) == [(many["command_id"], "done")]
    assert status_of(db, many["command_id"]) == THEN[verb]
    assert story(db, many["command_id"]) == story(db, single["command_id"])


@pytest.mark.parametrize("status", [status for status in STATUSES if status != PARKED])
@pytest.mark.parametrize("verb", VERBS)
def test_what_is_not_parked_is_changed_and_left_alone(db: Connection, verb: str, status: str) -> None:
    lease = arrange(db, status)
    before = everything(db)
    assert answers(db, verb, lease) == ["changed"]
    assert everything(db) == before


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_parked_anew_is_changed(db: Connection, verb: str) -> None:
    seen = arrange(db, PARKED)
    operator_verb(db, "operator_retry", seen["command_id"])
    (again,) = claim(db)
    outcome(db, "fail PERMANENT", item(again))
    before = everything(db)
    assert answers(db, verb, seen) == ["changed"]
    assert everything(db) == before
    assert answers(db, verb, item(again)) == ["done"]


def test_what_is_parked_anew_by_a_crash_is_changed(db: Connection) -> None:
    """The third crash parks without a verdict: it is the claim before it that makes the delivery higher."""
    seen = arrange(db, PARKED)
    operator_verb(db, "operator_retry", seen["command_id"])
    again = seen
    for number in range(1, 4):
        (again,) = claim(db, alone=number == 3)
        shift(db, 61 * number)
        claim(db, 0, parts="[]", sweep=True)
    assert status_of(db, seen["command_id"]) == PARKED
    assert answers(db, "cancel", seen) == ["changed"]
    assert answers(db, "cancel", item(again)) == ["done"]


def test_many_are_answered_one_by_one_in_the_order_of_their_ids(db: Connection) -> None:
    items = park(db, 5)
    operator_verb(db, "operator_cancel", items[1]["command_id"])
    shuffled = random.Random(3).sample(items, 5)
    assert bulk(db, "retry", *shuffled) == [
        (each["command_id"], "changed" if number == 1 else "done") for number, each in enumerate(items)
    ]
    assert bulk(db, "retry") == []


def test_a_command_that_is_named_twice_is_acted_on_once(db: Connection) -> None:
    (seen,) = park(db, 1)
    assert answers(db, "retry", seen, seen) == ["done", "changed"]
    assert [event for event, *_ in trail(db, seen["command_id"])].count("OPERATOR_RETRIED") == 1


def test_a_command_of_another_domain_is_changed(db: Connection) -> None:
    (seen,) = park(db, 1)
    assert bulk(db, "cancel", seen, domain="e") == [(seen["command_id"], "changed")]


@pytest.mark.parametrize(
    ("verb", "operator"), [*((verb, "") for verb in (*VERBS, "replace")), ("drop", "ana"), (None, "ana")]
)
@pytest.mark.parametrize("count", [0, 2])
def test_without_a_name_or_a_verb_nothing_is_written(db: Connection, verb: str, operator: str, count: int) -> None:
    items = park(db, 2)[:count]
    before = everything(db)
    assert sqlstate(lambda: bulk(db, verb, *items, operator=operator)) == "CB001"
    assert everything(db) == before


# ------------------------------------------------------------------------------------------- the patch


@pytest.mark.parametrize("patch", ["[1]", "1", "null", '"x"'])
def test_a_patch_that_is_no_object_is_refused(db: Connection, patch: str) -> None:
    """By the rule of RFC 7396 it would replace the data of all that is chosen."""
    items = park(db, 2)
    before = everything(db)
    assert sqlstate(lambda: bulk(db, "retry", *items, value=patch)) == "CB001"
    assert everything(db) == before


# The examples of RFC 7396, appendix A: the target, the patch, the result.
RFC = r"""
{"a":"b"}                 {"a":"c"}                     {"a":"c"}
{"a":"b"}                 {"b":"c"}                     {"a":"b","b":"c"}
{"a":"b"}                 {"a":null}                    {}
{"a":"b","b":"c"}         {"a":null}                    {"b":"c"}
{"a":["b"]}               {"a":"c"}                     {"a":"c"}
{"a":"c"}                 {"a":["b"]}                   {"a":["b"]}
{"a":{"b":"c"}}           {"a":{"b":"d","c":null}}      {"a":{"b":"d"}}
{"a":[{"b":"c"}]}         {"a":[1]}                     {"a":[1]}
["a","b"]                 ["c","d"]                     ["c","d"]
{"a":"b"}                 ["c"]                         ["c"]
{"a":"foo"}               null                          null
{"a":"foo"}               "bar"                         "bar"
{"e":null}                {"a":1}                       {"e":null,"a":1}
[1,2]                     {"a":"b","c":null}            {"a":"b"}
{}                        {"a":{"bb":{"ccc":null}}}     {"a":{"bb":{}}}
"""


@pytest.mark.parametrize(("target", "patch", "merged"), [line.split() for line in RFC.strip().splitlines()])
def test_a_patch_is_merged_as_the_rfc_says(db: Connection, target: str, patch: str, merged: str) -> None:
    found = one(db, "SELECT commandbus._merge_patch(%s, %s)::text", target, patch)
    assert json.loads(found) == json.loads(merged)


def test_an_edited_retry_keeps_the_old_and_the_new_data(db: Connection) -> None:
    items = park(db, 2, data={"n": 1, "to": "x"})
    assert [word for _, word in bulk(db, "retry", *items, value='{"n": 2, "to": null}')] == ["done"] * 2
    for each in items:
        ((details,),) = trail(db, each["command_id"], "details")[-1:]
        assert details == {"old_data": {"n": 1, "to": "x"}, "new_data": {"n": 2}}
    assert [row["data"] for row in claim(db)] == ['{"n": 2}'] * 2


def test_a_replacement_takes_the_place_of_the_data(db: Connection) -> None:
    (seen,) = park(db, 1, data={"n": 1, "to": "x"})
    assert answers(db, "replace", seen, value='{"n": 12345678901234567.25}') == ["done"]
    ((details,),) = trail(db, seen["command_id"], "details")[-1:]
    assert details["old_data"] == {"n": 1, "to": "x"}
    assert [row["data"] for row in claim(db)] == ['{"n": 12345678901234567.25}']


def test_a_replacement_is_for_what_was_seen(db: Connection) -> None:
    seen = arrange(db, PARKED)
    operator_verb(db, "operator_retry", seen["command_id"])
    outcome(db, "fail PERMANENT", *[item(row) for row in claim(db)])
    before = everything(db)
    assert answers(db, "replace", seen, value="7") == ["changed"]
    assert everything(db) == before


def test_what_a_patch_would_make_too_large_is_refused_and_holds_up_no_other(db: Connection) -> None:
    small, large = park(db, 1, data={"n": 1}), park(db, 1, data={"n": "x" * 262_100})
    patch = '{"a": "' + "y" * 40 + '"}'
    items = sorted(small + large, key=lambda each: str(each["command_id"]))
    assert dict(bulk(db, "retry", *items, value=patch)) == {
        small[0]["command_id"]: "done", large[0]["command_id"]: "refused",
    }  # fmt: skip
    assert status_of(db, large[0]["command_id"]) == PARKED
    assert trail(db, large[0]["command_id"])[-1][0] == "PARKED"
    assert answers(db, "retry", *large) == ["done"]


def test_data_of_too_many_levels_are_refused(db: Connection) -> None:
    (seen,) = park(db, 1)
    assert answers(db, "replace", seen, value="[" * 65 + "]" * 65) == ["refused"]
    assert answers(db, "retry", seen, value='{"a": ' + "[" * 64 + "]" * 64 + "}") == ["refused"]
    assert answers(db, "replace", seen, value="[" * 64 + "]" * 64) == ["done"]


# -------------------------------------------------------------------------------------------- races


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("single", OPERATOR_VERBS)
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_single_verb_holds_is_busy(
    db: Connection, connect: Connect, verb: str, single: str, *, commits: bool
) -> None:
    """It is passed over, its neighbours are not; afterwards it is changed, or as before."""
    items = park(db, 3)
    holder = connect()
    assert operator_verb(holder, single, items[1]["command_id"]) == "ok"

    assert answers(impatient(connect(autocommit=True)), verb, *items) == ["done", "busy", "done"]

    holder.commit() if commits else holder.rollback()
    assert answers(db, verb, *items) == ["changed", "changed" if commits else "done", "changed"]


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("single", OPERATOR_VERBS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_single_verb_waits_for_many_and_is_told(
    db: Connection, connect: Connect, verb: str, single: str, *, commits: bool
) -> None:
    items = park(db, 3)
    holder, comer = connect(), impatient(connect(autocommit=True))
    assert answers(holder, verb, *items) == ["done"] * 3
    with background() as pool:
        call = partial(operator_verb, verb=single, command_id=items[1]["command_id"])
        waiting = start_waiting(pool, db, comer, call)
        holder.commit() if commits else holder.rollback()
        may = not commits or (verb, single) == ("retry", "cancel")
        assert waiting.result() == ("ok" if may else "CB003")


def test_a_claim_does_not_see_what_is_retried_before_it_is_committed(db: Connection, connect: Connect) -> None:
    items = park(db, 3)
    holder = connect()
    answers(holder, "retry", *items)
    comer = impatient(connect(autocommit=True))
    assert claim(comer) == []
    holder.commit()
    assert len(claim(comer)) == 3


def test_a_claim_that_is_not_committed_leaves_the_rest_to_the_operator(db: Connection, connect: Connect) -> None:
    """What was retried, and is being claimed, is no longer parked: it is changed, and nobody waits for the claim."""
    items = park(db, 2)
    operator_verb(db, "operator_retry", items[0]["command_id"])
    holder = connect()
    assert len(claim(holder)) == 1
    assert answers(impatient(connect(autocommit=True)), "cancel", *items) == ["changed", "done"]


def test_many_against_many_never_wait_for_each_other(db: Connection, connect: Connect) -> None:
    """In opposite order, too: neither waits, so neither deadlocks."""
    items = park(db, 6)
    first, second = connect(), impatient(connect())
    assert answers(first, "retry", *items[:4]) == ["done"] * 4
    assert answers(second, "cancel", *reversed(items)) == ["busy"] * 4 + ["done"] * 2
    assert answers(impatient(first), "retry", *items[4:]) == ["busy"] * 2
    first.commit()
    second.commit()
    assert answers(db, "complete", *items) == ["changed"] * 6


def test_many_at_once_act_on_each_command_once(db: Connection, connect: Connect) -> None:
    items = park(db, 200)
    with background() as pool:
        calls = [partial(until_none_is_busy, connect(autocommit=True), n, items) for n in range(6)]
        done = sum(at_once(pool, calls))
    assert done == len(items)
    assert one(db, "SELECT count(*) FROM commandbus.audit_trail WHERE operator = 'ana'") == len(items)


def until_none_is_busy(connection: Connection, seed: int, items: list[Row]) -> int:
    """Act in batches of a random order; returns how many were done."""
    left, done = random.Random(seed).sample(items, len(items)), 0
    while left:
        batch, left = left[:40], left[40:]
        words = dict(bulk(connection, VERBS[seed % 3], *batch))
        done += list(words.values()).count("done")
        left += [each for each in batch if words[each["command_id"]] == "busy"]
    return done


# ---------------------------------------------------------------------------------------- fingerprints


def fingerprint(db: Connection, message: object, code: object = "X") -> str:
    error = json.dumps({"code": code, "message": message, "details": {"traceback": random.random()}})
    return str(one(db, "SELECT commandbus._fingerprint(%s::jsonb)", error))


SAME = [
    ("account 7 lacks 3.50", "account 12 lacks -1,000.25"),
    ("order 0b0e7a52-6d3c-4d9c-8f7e-0a1b2c3d4e5f is gone", "order 11111111-1111-4111-8111-111111111111 is gone"),
    ("no user 'anna'", "no user 'bob d. 2nd'"),
    ('no user "anna"', 'no user ""'),
    ("no `anna`", "no `bob`"),
    ("at 0x7fa3deadbeef", "at 0X12"),
    ("digest 9f86d081884c7d65", "digest 60303ae22b998861"),
    ("row order_17", "row order_4"),
    ("on 2026-11-23 at 13:05:01", "on 2027-01-01 at 00:00:59"),
    ("cannot read '" + "x" * 2000, "cannot read '" + "y" * 3000),
    ("of one kind: " + "word " * 300 + "this", "of one kind: " + "word " * 300 + "that"),
]


@pytest.mark.parametrize(("one_message", "another"), SAME)
def test_failures_of_one_kind_share_a_fingerprint(db: Connection, one_message: str, another: str) -> None:
    assert fingerprint(db, one_message) == fingerprint(db, another)


OTHER = [
    ("account 7 is closed", "account 7 is blocked"),
    ("anna has no account", "bob has no account"),
    ("can't debit it, won't try", "can't credit it, won't try"),
    ("the shop's debit of the customers' order", "the shop's credit of the customers' order"),
    ("decade of beef", "facade of beef"),
    ("x", None),
]


@pytest.mark.parametrize(("one_message", "another"), OTHER)
def test_failures_of_another_kind_have_another(db: Connection, one_message: str, another: str) -> None:
    assert fingerprint(db, one_message) != fingerprint(db, another)


def test_the_code_is_part_of_it(db: Connection) -> None:
    assert len({fingerprint(db, "m", code) for code in ("A", "B", None)}) == 3


@pytest.mark.parametrize("error", ["null", "5", '"text"', "[]", "{}", '{"code": {"a": 1}, "message": [1]}'])
def test_any_error_has_a_fingerprint(db: Connection, error: str) -> None:
    found = rows(db, "SELECT commandbus._fingerprint(%s), commandbus._fingerprint(NULL)", error)
    assert all(len(text) == 12 for row in found for text in row)


def test_the_view_has_it(db: Connection) -> None:
    park(db, 1)
    sql = "SELECT fingerprint = commandbus._fingerprint(error) FROM commandbus.troubleshooting"
    assert one(db, sql) is True
