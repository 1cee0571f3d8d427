"""What several tests here need; and the figures with which the sweep over the crash points ends."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator

import pytest

from commandbus import cli
from tests import blocking
from tests.bus.support import Connection
from tests.faults.payloads import MAX_DATA
from tests.faults.stage import Stage
from tests.support import Route


class _Screen(io.StringIO):
    """Takes what is shown, as a terminal does or as a file."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command line in this process, and return what it prints: `show(dsn, "list", terminal=True)`."""

    def show(dsn: str, *arguments: str, terminal: bool = False) -> str:
        screen = _Screen()
        screen.terminal = terminal
        with monkeypatch.context() as patch:
            patch.setenv("COMMAND_BUS_DSN", dsn)
            patch.setattr(sys, "argv", ["commandbus", *arguments])
            patch.setattr(sys, "stdout", screen)
            patch.setattr(sys, "stderr", screen)
            patch.setattr(logging.root, "handlers", [])  # the command line puts its own there, and sets levels
            before = {logger: logger.level for logger in (logging.root, logging.getLogger("psycopg.pool"))}
            try:
                cli.main()
            finally:
                for logger, level in before.items():
                    logger.setLevel(level)
        return screen.getvalue()

    return show


@pytest.fixture
def stage(
    request: pytest.FixtureRequest, route: Route, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Stage]:
    """A bus and a worker that take hostile payloads."""
    # A loop that runs while Hypothesis draws would use `random` then, which Hypothesis takes for a fault of ours.
    monkeypatch.setattr(blocking, "make_runtime", blocking.tests_loop)
    db.execute("UPDATE commandbus.setting SET value = %s WHERE name = 'max_data_bytes'", [str(MAX_DATA)])
    stage = Stage(route, db, request.node.callspec.params["route"])
    with stage.runner:
        stage.runner.run(stage.start())
        yield stage
        stage.runner.run(stage.end())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many points and cases there were, over all processes of the run."""
    counts = {"points": 0, "cases": 0, "unreached": 0}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name in counts and isinstance(value, int):
                counts[name] += value
    if counts["cases"]:
        figures = ", ".join(f"{count:,} {name}" for name, count in counts.items())
        terminalreporter.write_line(f"crash points: {figures}")
