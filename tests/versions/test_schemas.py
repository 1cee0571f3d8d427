"""What 0.1.0 calls and reads is in the new schema as it was; and who meets a schema that does not fit is told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

import psycopg
import pytest

from commandbus import CommandBus, SchemaError
from commandbus.migrate import migrate, migrations, pending
from commandbus.sync import SyncCommandBus
from tests.support import eventually
from tests.versions.support import Version, rows, run

_SIGNATURES = """
    SELECT p.oid::regprocedure::text, pg_get_function_result(p.oid) FROM pg_proc p
    WHERE p.pronamespace = 'commandbus'::regnamespace AND (p.proname !~ '^_' AND p.proname ~ '_v[0-9]+$')"""
_COLUMNS = """
    SELECT table_name, ordinal_position, column_name, data_type FROM information_schema.columns
    WHERE table_schema = 'commandbus'"""


def test_every_function_and_column_of_the_old_schema_is_in_the_new_one_as_it_was(old_dsn: str) -> None:
    functions, columns = set(rows(old_dsn, _SIGNATURES)), set(rows(old_dsn, _COLUMNS))
    assert migrate(old_dsn) == [migration.name for migration in migrations()[1:]]
    assert functions - set(rows(old_dsn, _SIGNATURES)) == set()
    assert columns - set(rows(old_dsn, _COLUMNS)) == set()
    assert len(functions) > 10
    assert len(columns) > 100


def test_the_new_client_refuses_the_old_schema_and_says_what_to_run(old_dsn: str) -> None:
    says = rf"^the schema is at version 1, this client needs {len(migrations())}: run `commandbus migrate`$"

    async def open_bus() -> None:
        async with CommandBus(old_dsn):
            pass

    with pytest.raises(SchemaError, match=says):
        asyncio.run(open_bus())
    with pytest.raises(SchemaError, match=says), SyncCommandBus(old_dsn):
        pass


def test_the_new_command_line_refuses_the_old_schema_and_says_what_to_run(old_dsn: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "commandbus", "stats"],
        env=os.environ | {"COMMAND_BUS_DSN": old_dsn},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "run `commandbus migrate`" in done.stderr) == (3, True), done.stderr


def test_the_old_client_opens_on_the_new_schema_and_does_not_migrate_it(dsn: str, old: Version) -> None:
    program = """
import asyncio, sys
from commandbus import CommandBus, SchemaError
from commandbus.migrate import migrate
async def main():
    async with CommandBus(sys.argv[1]) as bus:
        print(await bus.stats())
asyncio.run(main())
try:
    migrate(sys.argv[1])
except SchemaError as error:
    print(error)
"""
    opened, refused = run(old, "-c", program, dsn).splitlines()
    assert opened == "[]"
    assert "it does not go backwards; upgrade the commandbus package" in refused


def test_a_migration_that_is_killed_leaves_the_old_schema(old_dsn: str) -> None:
    """It is killed with all its tables and functions made, before its last views."""
    before = set(rows(old_dsn, _SIGNATURES)), set(rows(old_dsn, _COLUMNS))
    waiting = "SELECT FROM pg_stat_activity WHERE application_name = 'commandbus migrate'"
    with psycopg.connect(old_dsn) as report:
        report.execute("SELECT FROM commandbus.audit_trail")  # the last of the views
        program = "import sys; from commandbus.migrate import migrate; migrate(sys.argv[1])"
        migrator = subprocess.Popen([sys.executable, "-c", program, old_dsn], stderr=subprocess.DEVNULL)
        try:
            eventually(lambda: rows(old_dsn, f"{waiting} AND wait_event = 'relation'"), what="a migration that waits")
        finally:
            migrator.send_signal(signal.SIGKILL)
            migrator.wait()
        eventually(lambda: not rows(old_dsn, waiting), what="the end of its session")
    assert (set(rows(old_dsn, _SIGNATURES)), set(rows(old_dsn, _COLUMNS))) == before
    assert pending(old_dsn) == migrate(old_dsn)
    assert pending(old_dsn) == []
