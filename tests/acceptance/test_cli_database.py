"""The command line where the database is away, empty, locked or new."""

from __future__ import annotations

import functools
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrations
from tests.acceptance.cli_support import CommandLine, at_once, execute, running
from tests.support import eventually

NOBODY = "00000000-0000-4000-8000-000000000000"

EVERY_COMMAND_WITH_A_DATABASE = [
    ["migrate"],
    ["migrate", "--check"],
    ["send", "shop", "Buy"],
    ["show", NOBODY],
    ["list"],
    ["stats"],
    ["workers"],
    ["troubleshooting", "list", "shop"],
    ["troubleshooting", "retry", "shop", NOBODY],
    ["troubleshooting", "cancel", "shop", NOBODY, "--reason", "r"],
    ["troubleshooting", "complete", "shop", NOBODY, "--reason", "r"],
]


@pytest.mark.parametrize("command", EVERY_COMMAND_WITH_A_DATABASE, ids=" ".join)
def test_an_unreachable_database_is_3_and_no_dsn_is_4(command: list[str]) -> None:
    nowhere = "postgresql://ana:canary@localhost:1/shop"
    *unreachable, no_dsn = at_once(
        lambda: execute(*command, dsn=nowhere), lambda: execute(*command, "--dsn", nowhere), lambda: execute(*command)
    )
    for result in unreachable:
        assert (result.returncode, result.stdout) == (3, "")
        assert re.fullmatch(r"commandbus: .*\bport 1\b.*\n", result.stderr)
        assert "canary" not in result.stderr
    assert (no_dsn.returncode, no_dsn.stdout) == (4, "")
    assert no_dsn.stderr == "commandbus: no DSN: set COMMAND_BUS_DSN, or give one\n"


@pytest.mark.parametrize("command", EVERY_COMMAND_WITH_A_DATABASE[2:], ids=" ".join)
def test_a_database_without_the_schema_is_3(server: EmbeddedPostgres, command: list[str]) -> None:
    result = execute(*command, dsn=server.dsn("postgres"))  # in which no test makes anything
    assert (result.returncode, result.stdout) == (3, "")
    assert re.fullmatch(r"commandbus: .*`commandbus migrate`.*\n", result.stderr)


def test_a_worker_without_database_schema_or_dsn(empty_dsn: str, shop: Path) -> None:
    command = ["worker", "shop_handlers:registry"]
    result = execute(*command, dsn=empty_dsn, cwd=shop)
    assert result.returncode == 3
    assert "`commandbus migrate`" in result.stderr
    result = execute(*command, cwd=shop)
    assert (result.returncode, result.stderr.count("\n")) == (4, 1)
    result = execute(*command, dsn="postgresql://ana:canary@localhost:1/shop", cwd=shop)  # it tries for 10 s
    assert result.returncode == 3
    assert "no connection to PostgreSQL" in result.stderr
    assert "canary" not in result.stderr


@pytest.mark.parametrize(
    "dsn",
    [
        "password=can ary host=localhost",
        "postgresql://ana:can@ary@localhost:1/shop",
        "postgresql://ana:can/ary@localhost:1/shop",
        "postgresql://ana:1/ary@localhost:1/shop",
        "nonsense can ary",
    ],
)
def test_of_a_dsn_that_cannot_be_read_nothing_is_told(dsn: str, shop: Path) -> None:
    commands = (["migrate"], ["send", "shop", "Buy"], ["worker", "shop_handlers:registry"])
    for result in at_once(*(functools.partial(execute, *command, dsn=dsn, cwd=shop) for command in commands)):
        assert (result.returncode, result.stdout) == (4, "")
        assert re.fullmatch(r"commandbus: the DSN .*\n", result.stderr)
        assert not re.search(r"can(?!not)|ary", result.stderr)


def test_ctrl_c_is_130_and_says_what_is_known_of_the_send(
    cli: CommandLine, db: psycopg.Connection, connect: Callable[[], psycopg.Connection], tmp_path: Path
) -> None:
    with connect() as blocker:
        blocker.execute("lock table commandbus.command in access exclusive mode")
        with running("send", "shop", "Buy", dsn=cli.dsn, folder=tmp_path) as process:
            waiting = "select query from pg_locks l join pg_stat_activity a using (pid) where not l.granted"
            eventually(lambda: "send_v1" in str(db.execute(waiting).fetchall()), what="a send that waits")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
    said = (tmp_path / "err").read_text()
    assert re.fullmatch(r"commandbus: interrupted: command [0-9a-f-]{36} may have been sent\n", said)


def test_without_a_right_it_says_whom_to_ask(dsn: str, db: psycopg.Connection) -> None:
    db.execute("drop role if exists cli_guest")
    db.execute("create role cli_guest login")
    guest = CommandLine(make_conninfo(dsn, user="cli_guest"))
    owner, ask = "; run it as the owner of the database\n", ": ask the owner of the database for the role .*\n"
    said = guest("migrate", code=1).stderr
    assert re.fullmatch(rf"commandbus: permission denied for .*{owner}", said)
    for command in (["send", "shop", "Buy"], ["troubleshooting", "list", "shop"]):
        said = guest(*command, code=1).stderr
        assert re.fullmatch(rf"commandbus: permission denied for schema commandbus{ask}", said)
    db.execute("drop role cli_guest")


def test_migrate(empty_dsn: str) -> None:
    cli = CommandLine(empty_dsn)
    assert cli("migrate", "--check", code=1, quiet=True).stdout.startswith("to apply: 0001_")
    pending = cli.json("migrate", "--check", code=1, quiet=True)["pending"]
    assert pending[0].startswith("0001_")
    assert cli("migrate").stdout == f"applied: {', '.join(pending)}\n"
    assert cli("migrate").stdout == "the schema is up to date\n"
    assert cli.json("migrate") == {"applied": []}
    assert cli("migrate", "--check").stdout == "the schema is up to date\n"
    assert cli.json("migrate", "--check") == {"pending": []}


def test_migrate_tells_what_it_applied_as_json(empty_dsn: str) -> None:
    assert CommandLine(empty_dsn).json("migrate")["applied"][0].startswith("0001_")


def test_migrate_print_needs_no_database_and_its_script_does_the_same(empty_dsn: str) -> None:
    printed = execute("migrate", "--print")
    assert (printed.returncode, printed.stderr) == (0, "")
    assert json.loads(execute("migrate", "--print", "--json").stdout)["sql"].strip() == printed.stdout.strip()
    with psycopg.connect(empty_dsn) as connection:
        connection.execute(printed.stdout.encode())
    assert CommandLine(empty_dsn)("migrate", "--check").returncode == 0


def test_through_a_transaction_pooler(pooler: str, empty_dsn: str) -> None:
    """The variable says so for every subcommand."""
    dsn = make_conninfo(pooler, dbname=conninfo_to_dict(empty_dsn)["dbname"])
    told = {"COMMAND_BUS_TRANSACTION_POOLER": "1"}
    assert execute("migrate", dsn=dsn).returncode == 0
    assert execute("send", "payments", "DebitAccount", "{}", dsn=dsn, env=told).returncode == 0
    not_told = execute("send", "payments", "DebitAccount", "{}", dsn=dsn)
    assert (not_told.returncode, not_told.stdout) == (4, "")
    assert "set COMMAND_BUS_TRANSACTION_POOLER=1" in not_told.stderr


def test_migrate_print_after_a_migration_leaves_it_out(empty_dsn: str) -> None:
    printed = execute("migrate", "--print", "--after", "1").stdout
    first = migrations()[0]
    with psycopg.connect(empty_dsn) as connection:
        for statement in ("create schema commandbus", first.sql, first.record, printed):
            connection.execute(statement.encode())
    assert CommandLine(empty_dsn)("migrate", "--check").returncode == 0


@pytest.mark.parametrize("printed", [False, True])
def test_migrate_with_roles(empty_dsn: str, *, printed: bool) -> None:
    cli = CommandLine(empty_dsn)
    if printed:
        with psycopg.connect(empty_dsn) as connection:
            connection.execute(execute("migrate", "--print", "--roles").stdout.encode())
    else:
        assert cli("migrate", "--roles").stdout.endswith("\nfrom now on only members of its roles may use it\n")
    assert cli.json("migrate", "--roles") == {"applied": []}
    with psycopg.connect(empty_dsn) as connection:
        connection.execute("set role commandbus_sender")
        connection.execute("select commandbus.wake_v1('{shop}')")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select from commandbus.commands")


@pytest.mark.parametrize("options", [["--check", "--roles"], ["--check", "--print"], ["--after", "1"]], ids=" ".join)
def test_options_of_migrate_that_do_not_go_together(options: list[str]) -> None:
    assert execute("migrate", *options, dsn="postgresql://localhost:1/shop").returncode == 2
