"""The pytest plugin as a project of a user's has it: each test here is a run of pytest of its own."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from commandbus.embedded import EmbeddedPostgres
from tests.support import PYTEST

pytest_plugins = "pytester"

Run = Callable[..., pytest.RunResult]

TWO_TESTS = """
    import uuid
    from datetime import timedelta

    import pytest
    from commandbus import HandlerRegistry
    from commandbus.testing import SyncHarness

    registry = HandlerRegistry()

    @registry.handler("payments", "DebitAccount")
    def debit(command, context):
        return command.data

    @pytest.mark.parametrize("number", [1, 2])
    def test_a_delayed_debit(commandbus_dsn, number):
        with SyncHarness(commandbus_dsn, registry) as harness:
            harness.bus.send("payments", "DebitAccount", number, command_id=uuid.UUID(int=1), delay=timedelta(days=1))
            assert harness.run_until_idle().commands == []
            harness.advance(timedelta(days=1))
            assert [command.result for command in harness.run_until_idle().commands] == [number]
"""

INTERRUPTED = """
    import asyncio, os, signal
    from commandbus import HandlerRegistry
    from commandbus.testing import Harness, SyncHarness

    registry = HandlerRegistry()

    @registry.handler("payments", "DebitAccount")
    async def debit(command, context):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    def test_async(commandbus_dsn):
        async def main():
            async with Harness(commandbus_dsn, registry) as harness:
                await harness.bus.send("payments", "DebitAccount", {})
                await harness.run_until_idle()

        asyncio.run(main())

    def test_sync(commandbus_dsn):
        with SyncHarness(commandbus_dsn, registry) as harness:
            harness.bus.send("payments", "DebitAccount", {})
            harness.run_until_idle()
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest on this text, in a process of its own, in an empty folder."""
    for name, value in PYTEST.items():
        monkeypatch.setenv(name, value)

    def run(text: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(text)
        return pytester.runpytest_subprocess(*arguments, timeout=100)

    return run


def databases(server: EmbeddedPostgres) -> set[str]:
    with psycopg.connect(server.dsn()) as admin:
        return {row[0] for row in admin.execute("SELECT datname FROM pg_database")}


def test_each_test_has_a_database_of_its_own_with_the_schema_and_a_test_clock(run: Run) -> None:
    run(TWO_TESTS).assert_outcomes(passed=2)


@pytest.mark.parametrize("where", ["option", "ini"])
def test_a_server_of_ones_own_is_left_as_it_was(
    run: Run, pytester: pytest.Pytester, server: EmbeddedPostgres, where: str
) -> None:
    before = databases(server)
    if where == "ini":
        pytester.makeini(f"[pytest]\ncommandbus_dsn = {server.dsn()}")
    arguments = [] if where == "ini" else ["--commandbus-dsn", server.dsn()]
    seen = "\n    def test_where(commandbus_dsn):\n        assert '{}' in commandbus_dsn\n"
    run(TWO_TESTS + seen.format(server.data_dir), *arguments).assert_outcomes(passed=3)
    assert databases(server) == before


def test_the_processes_of_xdist_do_not_meet(run: Run, server: EmbeddedPostgres) -> None:
    pytest.importorskip("xdist")
    before = databases(server)
    run(TWO_TESTS, "-n", "2", "--commandbus-dsn", server.dsn()).assert_outcomes(passed=2)
    assert databases(server) == before


def test_the_dsn_of_the_environment_is_not_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMAND_BUS_DSN", "host=somebodys.production")
    run(TWO_TESTS).assert_outcomes(passed=2)


def test_a_run_without_the_fixture_does_not_import_the_library(run: Run) -> None:
    run("""
        import sys

        def test_nothing_of_it():
            assert "pytest_commandbus" in sys.modules
            assert {"commandbus", "psycopg"}.isdisjoint(sys.modules)
    """).assert_outcomes(passed=1)


@pytest.mark.parametrize("half", ["async", "sync"])
def test_an_interrupt_ends_the_run_of_pytest(run: Run, half: str) -> None:
    ended = run(INTERRUPTED, "-k", half)
    assert ended.ret == pytest.ExitCode.INTERRUPTED
    ended.stdout.fnmatch_lines(["*KeyboardInterrupt*"])


def test_installed_the_plugin_is_known_to_pytest() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"pytest_commandbus": "pytest_commandbus"}
