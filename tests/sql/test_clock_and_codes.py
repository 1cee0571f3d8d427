from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files

import pytest

from commandbus.errors import BY_SQLSTATE
from tests.sql.support import (
    Connect,
    Connection,
    arrange,
    claim,
    everything,
    one,
    operator_verb,
    outcome,
    rows,
    send,
    send_ids,
    shift,
    sqlstate,
    status_of,
    sweep,
)

SQL = files("commandbus").joinpath("sql")
MIGRATIONS = {file.name for file in SQL.joinpath("migrations").iterdir()}
TEXTS = {
    file.name: file.read_text("utf-8")
    for folder in (SQL.joinpath("functions"), SQL.joinpath("migrations"), SQL)
    for file in folder.iterdir()
    if file.name.endswith(".sql")
}
CODE = {name: re.sub(r"--[^\n]*", "", text) for name, text in TEXTS.items()}


# -------------------------------------------------------------------------------------------- the clock


@pytest.mark.parametrize("verb", ["send", "claim", "renew", "complete", "fail BUSINESS", "release", "cancel"])
@pytest.mark.parametrize("opened", ["off", None])
def test_nobody_shifts_a_clock_that_is_closed(db: Connection, verb: str, opened: str | None) -> None:
    lease = arrange(db, "IN_PROGRESS")
    if opened is None:
        db.execute("DELETE FROM commandbus.setting WHERE name = 'test_clock'")
    before = everything(db)
    db.execute("SET commandbus.clock_offset = '61 seconds'")
    calls = {
        "send": lambda: send(db),
        "claim": lambda: claim(db, sweep=True),
        "cancel": lambda: db.execute("SELECT commandbus.cancel_v1('d', %s, NULL, NULL)", [lease["command_id"]]),
    }
    assert sqlstate(calls.get(verb, lambda: outcome(db, verb, lease))) == "CB004"
    assert everything(db) == before
    db.execute("SET commandbus.clock_offset = ''")
    assert outcome(db, "complete", lease) == "done"


def test_a_clock_that_is_open_moves_for_its_session_only(db: Connection, connect: Connect) -> None:
    lease = arrange(db, "IN_PROGRESS")
    other = connect(autocommit=True)
    shift(other, 61)
    sweep(db)
    assert status_of(db, lease["command_id"]) == "IN_PROGRESS"
    sweep(other)
    assert status_of(db, lease["command_id"]) == "PENDING"


def test_time_goes_on_within_a_transaction(connect: Connect) -> None:
    caller = connect()
    send_ids(caller)
    send_ids(caller)
    assert one(caller, "SELECT count(DISTINCT sent_at) FROM commandbus.command") == 2


def test_no_function_asks_for_the_start_of_the_transaction() -> None:
    still = (
        r"\b(now|transaction_timestamp|statement_timestamp|timeofday)\s*\(|\b(current|local)_(time|timestamp|date)\b"
    )
    assert {name: re.findall(still, text, re.IGNORECASE) for name, text in CODE.items()} == {name: [] for name in CODE}


def test_only_the_clock_reads_the_clock() -> None:
    found = {name: text.count("clock_timestamp()") for name, text in CODE.items() if "clock_timestamp()" in text}
    assert found == {"command.sql": 2, "0001_tables.sql": 1}


# -------------------------------------------------------------------------------------------- the codes

PARKED = "IN_TROUBLESHOOTING_QUEUE"
RAISED: dict[str, Callable[[Connection], object]] = {
    "CB001": lambda db: send(db, priority=101),
    "CB002": lambda db: db.execute("SELECT commandbus.cancel_v1('d', gen_random_uuid(), NULL, NULL)"),
    "CB003": lambda db: db.execute(
        "SELECT commandbus.operator_retry_v1('d', %s, 'ana', 'why')", [arrange(db, "PENDING")["command_id"]]
    ),
    "CB004": lambda db: db.execute("SET commandbus.clock_offset = '1 s'; SELECT commandbus.clock()"),
    "CB005": lambda db: db.execute("SELECT commandbus.close_batch_v1('d', gen_random_uuid())"),
}


def test_the_codes_in_sql_are_the_codes_in_python() -> None:
    found = {code for text in CODE.values() for code in re.findall(r"ERRCODE = '(CB\w*)'", text)}
    assert found == set(BY_SQLSTATE) == set(RAISED)


def test_every_error_is_one_of_ours_or_asks_to_try_again() -> None:
    raised = [
        code for text in CODE.values() for code in re.findall(r"RAISE EXCEPTION.*?ERRCODE = '(\w+)'", text, re.DOTALL)
    ]
    assert len(raised) == sum(text.count("RAISE EXCEPTION") for text in CODE.values())
    assert set(raised) == {*BY_SQLSTATE, "40001"}


@pytest.mark.parametrize("code", RAISED)
def test_every_code_is_raised(db: Connection, code: str) -> None:
    assert sqlstate(lambda: RAISED[code](db)) == code


def test_every_code_comes_with_what_to_do_next() -> None:
    raises = [part for text in CODE.values() for part in re.findall(r"RAISE EXCEPTION.*?;", text, re.DOTALL)]
    assert not [part for part in raises if "'CB" in part and "HINT" not in part]


# ---------------------------------------------------------------------------------------- the functions

FUNCTIONS = "FROM pg_proc p WHERE p.pronamespace = 'commandbus'::regnamespace"


def test_public_functions_have_a_version_and_internal_ones_an_underscore(db: Connection) -> None:
    for (name,) in rows(db, f"SELECT p.proname {FUNCTIONS}"):
        assert re.fullmatch(r"[a-z]\w*_v\d+|_[a-z_]+|clock", name), name


def test_public_functions_run_as_the_owner_with_a_path_of_their_own(db: Connection) -> None:
    found = rows(db, f"SELECT p.proname, p.prosecdef, p.proconfig {FUNCTIONS} ORDER BY 1")
    assert len([name for name, *_ in found if name.endswith("_v1")]) >= 12
    for name, definer, config in found:
        path = [setting for setting in config or [] if setting.startswith("search_path=")]
        public = bool(re.search(r"_v\d+$", name))
        assert (definer, path) == ((True, ["search_path=pg_catalog, pg_temp"]) if public else (False, [])), name


def test_who_steers_the_planner_turns_its_compiler_off(db: Connection) -> None:
    """A node that was switched off and is used all the same costs 1e10 before PostgreSQL 18: the plan is compiled.

    With one type a claim took 100 ms instead of 3, with two 500.
    """
    found = rows(db, f"SELECT p.proname, p.proconfig {FUNCTIONS} AND p.proconfig::text LIKE '%enable_%'")
    assert len(found) >= 5
    assert [name for name, config in found if "jit=off" not in config] == []


def test_a_user_of_the_functions_needs_no_right_to_the_tables(db: Connection, connect: Connect) -> None:
    """And what lies in such a user's own schema or temporary tables is not called instead."""
    db.execute("CREATE ROLE guest_of_commandbus") if not one(
        db, "SELECT count(*) FROM pg_roles WHERE rolname = 'guest_of_commandbus'"
    ) else None
    db.execute("GRANT USAGE ON SCHEMA commandbus TO guest_of_commandbus")
    guest = connect()
    guest.execute("SET ROLE guest_of_commandbus")
    guest.execute("CREATE TEMP TABLE command (domain text); CREATE TEMP TABLE json_to_recordset (x int)")
    (command_id,) = send_ids(guest)
    assert operator_verb(guest, "cancel", command_id) == "ok"
    assert sqlstate(lambda: everything(guest)) == "42501"
    guest.rollback()


def test_every_function_has_a_header() -> None:
    """What it does, from which status to which, its locks and what it raises stand above it."""
    for name in sorted(TEXTS.keys() - {"views.sql", *MIGRATIONS}):
        lines = TEXTS[name].splitlines()
        for number, line in enumerate(lines):
            if found := re.match(r"CREATE OR REPLACE FUNCTION commandbus\.(\w+)\(", line):
                head = number - 1
                while lines[head].startswith("--") and not lines[head].startswith(f"-- {found[1]}:"):
                    head -= 1
                assert lines[head].startswith(f"-- {found[1]}:"), found[1]


def test_a_wake_reaches_who_listens(db: Connection, connect: Connect) -> None:
    listener = connect(autocommit=True)
    listener.execute("LISTEN commandbus")
    db.execute("SELECT commandbus.wake_v1(%s)", [["d", "e"]])
    heard = sorted(notice.payload for notice in listener.notifies(timeout=5, stop_after=2))
    assert heard == ["d", "e"]


def test_a_send_does_not_notify(db: Connection, connect: Connect) -> None:
    listener = connect(autocommit=True)
    listener.execute("LISTEN commandbus")
    send_ids(db)
    db.execute("SELECT commandbus.wake_v1('{end}')")
    assert [notice.payload for notice in listener.notifies(timeout=5, stop_after=1)] == ["end"]
