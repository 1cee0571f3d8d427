"""The pytest plugin of commandbus: a database for each test that asks for one.

commandbus is imported then, and not before: it takes 0.2 s, which runs without such a test do not pay.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# Without fsync only a crash of the machine loses anything.
_SETTINGS = {"fsync": "off", "full_page_writes": "off"}
_HELP = "PostgreSQL on which commandbus_dsn makes databases (default: start a private one); what is there is left alone"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which server it is. Not `$COMMAND_BUS_DSN`: that may be somebody's production."""
    parser.getgroup("commandbus").addoption("--commandbus-dsn", metavar="DSN", help=_HELP)
    parser.addini("commandbus_dsn", _HELP)


@pytest.fixture(scope="session")
def _commandbus_template(pytestconfig: pytest.Config) -> Iterator[tuple[str, str]]:
    """The DSN of the server, and the name of a database with the schema; with pytest-xdist in each of its processes."""
    from commandbus.embedded import EmbeddedPostgres
    from commandbus.testing import template_database

    with ExitStack() as stack:
        server = pytestconfig.getoption("commandbus_dsn") or pytestconfig.getini("commandbus_dsn")
        if not server:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="commandbus-"))
            server = stack.enter_context(EmbeddedPostgres(Path(folder, "data"), settings=_SETTINGS)).dsn()
        yield server, stack.enter_context(template_database(server))


@pytest.fixture
def commandbus_dsn(_commandbus_template: tuple[str, str]) -> Iterator[str]:
    """The DSN of a database of this test's own, with the schema of commandbus and a clock that can be moved."""
    from commandbus.testing import fresh_database

    with fresh_database(*_commandbus_template) as dsn:
        yield dsn
