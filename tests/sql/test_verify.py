"""`verify_v1` finds nothing in what the functions write, and each thing that is corrupted afterwards.

Commands that have lived (`lives.py`) stand in one database. A corruption is made, looked at and rolled back in one
transaction, so that none meets another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.resources import files

import psycopg
import pytest

from tests.sql.corruptions import CORRUPTIONS, LOOSEN
from tests.sql.lives import live_all
from tests.sql.support import (
    Connect,
    Connection,
    at_once,
    background,
    claim,
    item,
    lease_verb,
    one,
    outcome,
    rows,
    send_ids,
    shift,
    status_of,
)

DAY = 86_400.0
_VERIFY = files("commandbus").joinpath("sql", "functions", "verify.sql").read_text("utf-8")


@pytest.fixture(scope="module")
def lived(module_dsn: str) -> dict[str, str]:
    """The ids of the commands of `LIVES`, by name."""
    with psycopg.connect(module_dsn, autocommit=True) as db:
        return live_all(db)


@pytest.fixture
def loose(module_dsn: str, lived: dict[str, str]) -> Iterator[Connection]:
    """A transaction without the constraints, rolled back after the test."""
    with psycopg.connect(module_dsn) as connection:
        connection.execute(LOOSEN)
        yield connection
        connection.rollback()


def found(db: Connection) -> set[tuple[str, str]]:
    """What is reported: names of violations, with ids; for a reply that of the command whose end it tells of."""
    reply = "c.domain = 'replies' AND c.command_id = v.command_id"
    told = f"SELECT c.data ->> 'command_id' FROM commandbus.command c WHERE {reply}"
    reported = rows(db, f"SELECT v.violation, coalesce(({told}), v.command_id::text) FROM commandbus.verify_v1() v")
    return {(violation, str(command_id)) for violation, command_id in reported}


def test_what_has_lived_is_sound(loose: Connection) -> None:
    assert found(loose) == set()


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_is_corrupted_is_found(loose: Connection, lived: dict[str, str], name: str) -> None:
    victim, violations, *statements = CORRUPTIONS[name]
    for statement in statements:
        assert loose.execute(statement.encode(), {"id": lived[victim]}).rowcount > 0
    assert found(loose) == {(violation, lived[victim]) for violation in violations.split()}


def test_each_violation_is_found_somewhere(loose: Connection) -> None:
    known = re.findall(r"(?:\(|SELECT )'([a-z]+_[a-z_]+)', ", _VERIFY)
    assert len(set(known)) == len({name for _, names, *_ in CORRUPTIONS.values() for name in names.split()})


def test_each_edge_has_been_gone(loose: Connection) -> None:
    """Else one that is missing in the checker would not be missed."""
    edges = rows(loose, "SELECT DISTINCT event, from_status, to_status FROM commandbus.audit_trail")
    known = re.findall(r"^ +\('([A-Z_]+)', '([A-Z_]+)', '([A-Z_]+)'\)", _VERIFY, re.MULTILINE)
    told_by_the_command = {"SENT", "CLAIMED", "COMPLETED", "FAILED"}
    assert {edge for edge in edges if edge[0] not in told_by_the_command} == set(known)


# ------------------------------------------------------------------------------------- a live system


def test_it_runs_where_nothing_can_be_written(connect: Connect) -> None:
    reader = connect()
    reader.execute("SET TRANSACTION READ ONLY")
    assert found(reader) == set()


def test_what_others_have_not_committed_is_not_seen(db: Connection, connect: Connect) -> None:
    send_ids(db, 4)
    first, second, third, fourth = [item(row) for row in claim(db)]
    other = connect()
    for verb, lease in (("complete", first), ("fail TRANSIENT", second), ("release", third), ("fail BUSINESS", fourth)):
        assert outcome(other, verb, lease) == "done"
    assert found(db) == set()
    assert found(other) == set()


def test_a_busy_system_is_sound_at_every_moment(db: Connection, connect: Connect) -> None:
    send_ids(db, 600)
    looks: list[set[tuple[str, str]]] = []

    def work(connection: Connection, verbs: Sequence[str]) -> None:
        for verb in verbs:
            lease_verb(connection, verb, *[item(row, retry_in=0) for row in claim(connection, 10)])

    def look(connection: Connection) -> None:
        looks.extend(found(connection) for _ in range(30))

    verbs = ["complete", "fail TRANSIENT", "release", "fail PERMANENT", "fail BUSINESS"] * 5
    with background() as pool:
        workers = [partial(work, connect(autocommit=True), verbs[number:] * 2) for number in range(3)]
        at_once(pool, [*workers, partial(look, connect(autocommit=True))])
    assert looks == [set()] * 30


def test_a_week_that_was_dropped_is_not_missed(db: Connection) -> None:
    ids = live_all(db)
    shift(db, 60 * DAY)
    assert one(db, "SELECT count(*) FROM commandbus.drop_expired_v1()") > 0
    assert status_of(db, ids["completed-late"]) == "absent"
    assert found(db) == set()
