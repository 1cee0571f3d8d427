"""The command line's `doctor`: each check is provoked in the database where it can be, and else given its row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from commandbus.cli import checks, doctor
from commandbus.cli.checks import CHECKS, Level
from commandbus.embedded import EmbeddedPostgres
from tests.acceptance.cli_support import CommandLine, Park, at_once, execute
from tests.sql.batch_support import ended_long_ago

Connect = Callable[..., psycopg.Connection]

NEW_WORKER = "select commandbus.announce_v1('w1', 'shop', '{Buy}', 5)"
OLD_WORKER = f"{NEW_WORKER}; update commandbus.worker set seen_at = seen_at - interval '1 min'"


def examine(dsn: str, check: str) -> list[tuple[str, str]]:
    """What a check says: levels and findings."""
    return [(verdict.level.value, verdict.found) for name, verdict in doctor.examine(dsn) if name == check]


def level(dsn: str, check: str) -> str:
    ((found, _),) = examine(dsn, check)
    return found


# -- the subcommand ----------------------------------------------------------------------------------------------------


def test_all_checks_are_told_with_what_to_do(cli: CommandLine) -> None:
    """The server of the tests runs without fsync."""
    text = cli("doctor", code=1, quiet=True).stdout
    assert re.findall(r"^  \w+ +([\w ]+):", text, re.MULTILINE) == [
        *["server", "schema", "durability", "durability", "clock", "test clock", "transactions", "vacuum", "queue"],
        *["workers", "leases", "parked", "history", "retention", "rights", "pooler"],
    ]
    assert "  FAILURE  durability: fsync is off: a crash of the machine may destroy all data\n    turn it on in" in text
    assert re.search(r"^  WARNING  durability: full_page_writes is off", text, re.MULTILINE)
    found = cli.json("doctor", code=1, quiet=True)
    assert found["level"] == "FAILURE"
    assert [check["check"] for check in found["checks"] if check["level"] != "OK"] == ["durability", "durability"]
    assert all((check["advice"] is None) == (check["level"] == "OK") for check in found["checks"])


def test_the_exit_code(
    cli: CommandLine,
    db: psycopg.Connection,
    park: Park,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As the subcommand gives it, without what only the server of the tests has."""
    monkeypatch.setattr(doctor, "CHECKS", [check for check in CHECKS if check.name != "durability"])
    assert doctor.doctor(dsn=cli.dsn, strict=True) == 0
    park()
    assert (doctor.doctor(dsn=cli.dsn), doctor.doctor(dsn=cli.dsn, strict=True)) == (0, 1)
    assert "1 wait for an operator" in capsys.readouterr().out
    cli.send("shop", "Buy")
    assert doctor.doctor(dsn=cli.dsn) == 1


def test_without_a_database_it_is_3_and_without_a_schema_it_says_what_to_run(server: EmbeddedPostgres) -> None:
    nowhere, no_schema = at_once(
        lambda: execute("doctor", dsn="postgresql://ana:canary@localhost:1/shop"),
        lambda: execute("doctor", dsn=server.dsn("postgres")),
    )
    assert (nowhere.returncode, nowhere.stdout) == (3, "")
    assert re.fullmatch(r"commandbus: no connection to PostgreSQL.*\n", nowhere.stderr)
    assert "canary" not in nowhere.stderr
    assert (no_schema.returncode, no_schema.stderr) == (1, "")
    assert re.search(r"^  FAILURE  schema: .*\n    run `commandbus migrate`\n", no_schema.stdout, re.MULTILINE)


def test_it_only_reads(dsn: str, db: psycopg.Connection) -> None:
    db.execute("create table public.written (x int)")
    db.execute(
        "create or replace function commandbus.schema_v1() returns table (version integer, oldest_client integer) "
        "language sql as 'insert into public.written values (1) returning 2, 1'"
    )
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        examine(dsn, "schema")


# -- what is provoked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "oldest_client"), [(1, 1), (99, 98)])
def test_a_schema_that_does_not_fit_is_a_failure(
    dsn: str, db: psycopg.Connection, version: int, oldest_client: int
) -> None:
    db.execute("delete from commandbus.migration")
    db.execute("insert into commandbus.migration values (%s, 'x', %s)", [version, oldest_client])
    ((found, said),) = examine(dsn, "schema")
    assert (found, f"version {version}" in said) == ("FAILURE", True)


def test_a_database_that_does_not_wait_for_its_commits_is_a_failure(dsn: str, db: psycopg.Connection) -> None:
    db.execute(f"alter database {db.info.dbname} set synchronous_commit = off".encode())
    found = examine(dsn, "durability")
    assert ("FAILURE", "synchronous_commit is off: a crash of the server loses commands that `send` has acknowledged") in found  # noqa: E501 # fmt: skip


def test_an_open_test_clock_is_a_warning(dsn: str, db: psycopg.Connection) -> None:
    db.execute("update commandbus.setting set value = 'on' where name = 'test_clock'")
    assert level(dsn, "test clock") == "WARNING"


def test_the_oldest_open_transaction_is_named(dsn: str, connect: Connect) -> None:
    reader, writer = connect(), connect()
    reader.execute("select from commandbus.command")  # at READ COMMITTED it holds no snapshot between statements
    assert examine(dsn, "transactions") == [("OK", "no other is open")]
    writer.execute("select pg_current_xact_id()")
    ((found, said),) = examine(dsn, "transactions")
    assert found == "OK"
    assert re.fullmatch(rf"the oldest is of process {writer.info.backend_pid}, for \d+s", said)


def test_dead_rows_that_nobody_clears_away_are_a_warning(dsn: str, db: psycopg.Connection) -> None:
    assert level(dsn, "vacuum") == "OK"
    db.execute("alter table commandbus.command set (autovacuum_enabled = off)")
    rows = 'select json_agg(\'{"domain": "shop", "command_type": "Buy"}\'::json)::text from generate_series(1, 11000)'
    db.execute(f"select commandbus.send_v1(({rows})); delete from commandbus.command; select pg_stat_force_next_flush()".encode())  # noqa: E501 # fmt: skip
    ((found, said),) = examine(dsn, "vacuum")
    assert (found, said.startswith("11,000 dead rows beside 0")) == ("WARNING", True)


def test_a_command_that_nobody_takes_is_a_warning(cli: CommandLine, db: psycopg.Connection) -> None:
    assert examine(cli.dsn, "queue") == [("OK", "no command is waiting for a worker")]
    cli.send("shop", "Buy")
    assert level(cli.dsn, "queue") == "OK"
    db.execute("update commandbus.command set sent_at = sent_at - interval '11 min'")
    assert examine(cli.dsn, "queue") == [
        ("WARNING", "shop: 1 are PENDING; of those never claimed, the first could have run for 11m")
    ]
    db.execute("update commandbus.command set not_before = clock_timestamp() - interval '1 min'")
    assert level(cli.dsn, "queue") == "OK"


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        ("select", "FAILURE"),
        (OLD_WORKER, "FAILURE"),
        (NEW_WORKER.replace("Buy", "Sell"), "FAILURE"),
        (NEW_WORKER, "OK"),
    ],
)
def test_a_type_that_no_living_worker_knows_is_a_failure(
    cli: CommandLine, db: psycopg.Connection, prepare: str, expected: str
) -> None:
    cli.send("shop", "Buy")
    db.execute(prepare.encode())
    assert level(cli.dsn, "workers") == expected


def test_expired_leases_that_nobody_notices_are_a_warning(cli: CommandLine, db: psycopg.Connection) -> None:
    cli.send("shop", "Buy")
    db.execute("""select commandbus.claim_v1('shop', '[["Buy", -1, 3640000000000000000]]', 1, 'w', 60)""")
    assert level(cli.dsn, "leases") == "OK"
    db.execute("update commandbus.command set lease_until = lease_until - interval '130 s'")
    assert level(cli.dsn, "leases") == "WARNING"


def test_what_is_parked_is_a_warning(cli: CommandLine, park: Park) -> None:
    assert level(cli.dsn, "parked") == "OK"
    park()
    assert examine(cli.dsn, "parked") == [("WARNING", "shop: 1 wait for an operator, the first for 0s")]


def test_a_history_without_coming_weeks_is_a_warning(dsn: str, db: psycopg.Connection) -> None:
    assert examine(dsn, "history") == [("OK", "4 weeks are made ahead")]
    *_, third, fourth, fifth = [
        row[0] for row in db.execute("select inhrelid::regclass::text from pg_inherits where inhparent = 'commandbus.command_history'::regclass order by 1")  # noqa: E501
    ]  # fmt: skip
    db.execute(f"drop table {third}, {fourth}, {fifth}".encode())
    assert examine(dsn, "history") == [("WARNING", "1 weeks are made ahead")]


def test_a_week_past_its_retention_is_a_warning(dsn: str, db: psycopg.Connection) -> None:
    assert level(dsn, "retention") == "OK"
    db.execute("select commandbus._make_partition('2020-01-08')")
    assert examine(dsn, "retention") == [("WARNING", "the finished commands of 2020w02 are past it, and still there")]


def test_batches_and_processes_past_their_retention_are_a_warning(dsn: str, db: psycopg.Connection) -> None:
    ended_long_ago(db, 1, days=30)
    assert level(dsn, "retention") == "OK"
    ended_long_ago(db, 1)
    db.execute(
        "insert into commandbus.process (domain, process_id, process_type, status, state, state_version, result, "
        "data_hash, started_at, updated_at, finished_at) select 'd', gen_random_uuid(), 'Trial', 'COMPLETED', '1', 1, "
        "'1', '', t.at, t.at, t.at from (select clock_timestamp() - interval '31 days' as at) t"
    )
    assert examine(dsn, "retention") == [
        ("WARNING", "finished batches are past it, and still there"),
        ("WARNING", "finished processes are past it, and still there"),
    ]


# -- what a row says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "row", "expected"),
    [
        (checks.server, ("14.9", False), "FAILURE"),
        (checks.clock, (4.9,), "OK"),
        (checks.clock, (-5.1,), "WARNING"),
        (checks.transactions, ("process 1", 299.0), "OK"),
        (checks.transactions, ("process 1", 301.0), "WARNING"),
        (checks.transactions, ("prepared transaction x", 3601.0), "FAILURE"),
        (checks.transactions, ("2", None), "UNSEEN"),
        (checks.vacuum, (1_000_000, 209_000, 60.0), "OK"),
        (checks.vacuum, (1_000_000, 211_000, None), "WARNING"),
    ],
)
def test_what_a_row_says(judge: checks.Judge, row: tuple[object, ...], expected: str) -> None:
    verdict = judge(*row)
    assert verdict.level == expected
    assert verdict.advice is not None


# -- another role ------------------------------------------------------------------------------------------------------


@pytest.fixture
def guest(dsn: str, db: psycopg.Connection) -> Iterator[str]:
    """The DSN of a role that may do nothing."""
    db.execute("create role doctor_guest login")
    yield make_conninfo(dsn, user="doctor_guest")
    db.execute("drop owned by doctor_guest; drop role doctor_guest")


def test_a_reader_is_told_what_it_cannot_see(guest: str, db: psycopg.Connection, connect: Connect) -> None:
    db.execute("grant usage on schema commandbus to doctor_guest")
    db.execute("grant select on all tables in schema commandbus to doctor_guest")
    db.execute("revoke all on commandbus.setting, commandbus.command from doctor_guest")
    connect().execute("select pg_current_xact_id()")  # of another role
    found = list(doctor.examine(guest))
    unseen = {name: verdict.found for name, verdict in found if verdict.level == Level.UNSEEN}
    assert unseen == {
        "test clock": "permission denied for table setting",
        "transactions": "1 of other roles are open, for how long?",
        "retention": "permission denied for table setting",
    }
    assert ("rights", "OK") in [(name, verdict.level) for name, verdict in found]


def test_a_role_without_any_right_is_told_so(guest: str) -> None:
    levels = {name: verdict.level for name, verdict in doctor.examine(guest)}
    assert {name for name, found in levels.items() if found == Level.UNSEEN} == {"test clock", "retention"}
    failures = {name for name, found in levels.items() if found == Level.FAILURE}
    assert failures >= {"schema", "queue", "workers", "leases", "parked"}
    ((found, said),) = examine(guest, "rights")
    assert (found, said) == ("WARNING", "this role may do nothing, and not operate, read, send, work")


# -- poolers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "served", "says"),
    [
        ((1, 2), (1, 2, 2, 1), "none stands"),
        ((7, 8), (1, 2, 2, 1), "session mode"),
        ((7, 8), (1, 1, 1, 1), "transaction_pooler=True"),
        ((7, 8), (1, 2, 3, 4), "transaction_pooler=True"),
    ],
)
def test_a_pooler_is_known_by_who_serves(
    monkeypatch: pytest.MonkeyPatch, told: tuple[int, int], served: tuple[int, ...], says: str
) -> None:
    class Client:
        def __init__(self, pid: int) -> None:
            self.info = type("Info", (), {"backend_pid": pid})

    answers = iter(served)
    monkeypatch.setattr(doctor, "_process", lambda connection: next(answers))
    verdict = doctor.pooler(*map(Client, told))  # type: ignore[arg-type]
    assert (verdict.level, says in verdict.found) == (Level.OK, True)
