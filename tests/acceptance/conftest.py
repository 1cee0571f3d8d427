"""A command line with a database behind it, and a folder for a private PostgreSQL."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import psycopg
import pytest

from commandbus import _calls
from commandbus._calls import Call
from commandbus._connections import adopt
from commandbus.embedded import EmbeddedPostgres
from tests.acceptance.cli_support import SHOP, CommandLine, Park
from tests.acceptance.embedded_support import processes
from tests.support import eventually

T = TypeVar("T")


@pytest.fixture
def cli(dsn: str) -> CommandLine:
    return CommandLine(dsn)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop_handlers.py").write_text(SHOP)
    return tmp_path


@pytest.fixture
def park(cli: CommandLine, db: psycopg.Connection) -> Park:
    """Send a command and park it, as a worker would; returns its id."""

    def run(call: Call[T]) -> T:
        return adopt(db).execute(call)

    def park(data: str = "{}", *, message: str = "none left", code: str = "NO_STOCK", details: object = None) -> str:
        command_id = cli.send("shop", "Buy", data)
        (claimed,) = run(
            _calls.work("shop", [("Buy", -1, _calls.LAST_PLACE)], 1, "tester", timedelta(seconds=60))
        ).commands
        error = json.dumps({"code": code, "message": message, "details": details})
        more = f',"kind":"PERMANENT","error":{error},"retry_in":0,"max_attempts":4'
        run(_calls.fail("shop", [_calls.held(claimed.command_id, claimed.delivery, claimed.lease_token, more)]))
        assert str(claimed.command_id) == command_id
        return command_id

    return park


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for a server, of which no process may be left when the test is over."""
    yield tmp_path / "data"
    eventually(lambda: not processes(tmp_path), what="the end of all processes")


@pytest.fixture(scope="session")
def _new_data(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> Path:
    """The folder of a server that has run once, with nothing in it but what initdb made."""
    folder = tmp_path_factory.mktemp("initialised") / "data"
    with EmbeddedPostgres(folder) as postgres:
        home = folder / f"pg{postgres.major}"
    for path in home.iterdir():
        if path.name != "data":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


@pytest.fixture
def initialised(folder: Path, _new_data: Path) -> None:
    """Spare the server of `folder` its initdb, for a test whose subject comes after it."""
    subprocess.run(["cp", "-a", str(_new_data), str(folder)], check=True)  # noqa: S607 - keeps the owner
