"""A private PostgreSQL from start to stop, with real servers, for one user and for many at once."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import psycopg
import pytest

from commandbus.embedded import EmbeddedPostgres
from commandbus.errors import ConfigurationError
from tests.acceptance.embedded_support import User, ask, in_threads, processes, socket_folder, started_at
from tests.support import eventually


def test_a_server_is_durable_private_and_keeps_its_data(folder: Path) -> None:
    with EmbeddedPostgres(folder) as postgres:
        assert ask(postgres.dsn(), "show fsync") == "on"
        assert ask(postgres.dsn(), "show synchronous_commit") == "on"
        assert ask(postgres.dsn(), "show listen_addresses") == ""
        assert ask(postgres.dsn(), "show server_version").startswith(str(postgres.major))
        assert folder.stat().st_uid == os.geteuid()
        assert next(folder.iterdir()).stat().st_mode & 0o777 == 0o700
        with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
            connection.execute("create database shop")
        with psycopg.connect(postgres.dsn("shop")) as connection:
            connection.execute("create table kept as select 7 as n")
    assert not processes(folder)  # stop() returns when the server is gone
    with EmbeddedPostgres(folder) as postgres:
        assert ask(postgres.dsn("shop"), "select n from kept") == "7"


@pytest.mark.usefixtures("initialised")
def test_start_and_stop_are_idempotent(folder: Path) -> None:
    postgres = EmbeddedPostgres(folder)
    postgres.stop()
    assert postgres.start() is postgres
    first = started_at(postgres.dsn())
    assert started_at(postgres.start().dsn()) == first
    postgres.stop()
    assert not processes(folder)
    postgres.stop()


@pytest.mark.usefixtures("initialised")
def test_settings_reach_the_server(folder: Path) -> None:
    with EmbeddedPostgres(folder, settings={"max_connections": "17", "app.name": "a 'b'"}) as postgres:
        assert ask(postgres.dsn(), "show max_connections") == "17"
        assert ask(postgres.dsn(), "show app.name") == "a 'b'"


@pytest.mark.parametrize("name", ["port", "unix_socket_directories", "data_directory", "a b", "-D"])
def test_a_setting_that_would_break_the_server_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        EmbeddedPostgres(folder, settings={name: "1"})


def test_a_server_that_cannot_start_says_why(folder: Path) -> None:
    postgres = EmbeddedPostgres(folder, settings={"shared_buffers": "much"})
    with pytest.raises(ConfigurationError, match='invalid value for parameter "shared_buffers": "much"'):
        postgres.start()
    EmbeddedPostgres(folder).start().stop()


def test_an_initdb_that_fails_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = folder.parent / "bin"
    broken.mkdir()
    for name, script in {
        "postgres": "echo 'postgres (PostgreSQL) 99.1'",
        "initdb": "echo no space; false",
    }.items():
        (broken / name).write_text(f"#!/bin/sh\n{script}\n")
        (broken / name).chmod(0o755)
    monkeypatch.setenv("COMMAND_BUS_PG_BIN", str(broken))
    postgres = EmbeddedPostgres(folder)
    assert (postgres.bin_dir, postgres.major) == (broken, 99)
    with pytest.raises(ConfigurationError, match="no space"):
        postgres.start()


def test_a_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(ConfigurationError, match=str(folder)):
        EmbeddedPostgres(folder).start()


@pytest.mark.parametrize("name", ["d" * 120, "a,b", "ä b"])
def test_a_path_that_cannot_be_a_socket_address_gets_a_short_one(folder: Path, name: str) -> None:
    with EmbeddedPostgres(folder / name) as postgres, User(folder / name) as other:
        assert folder not in socket_folder(postgres).parents
        assert ask(postgres.dsn(), "select 1") == "1"
        assert started_at(other.dsn()) == started_at(postgres.dsn())
        other.go_on()
    assert not socket_folder(postgres).parent.exists()


def test_a_socket_folder_of_somebody_else_is_refused(folder: Path) -> None:
    postgres = EmbeddedPostgres(folder / ("d" * 120))
    private = socket_folder(postgres).parent
    private.symlink_to(folder)
    try:
        with pytest.raises(ConfigurationError, match="another user"):
            postgres.start()
    finally:
        private.unlink()


# -- many users --------------------------------------------------------------------------------------------------------


def test_six_processes_that_start_at_once_share_one_server(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        users = [stack.enter_context(User(folder)) for _ in range(6)]
        assert len({started_at(user.dsn()) for user in users}) == 1
        dsn = EmbeddedPostgres(folder).dsn()
        for user in users[:-1]:
            user.go_on()
            assert ask(dsn, "select 1") == "1"
        users[-1].go_on()
        eventually(lambda: not processes(folder), what="the end of the server")


def test_a_user_that_comes_while_the_last_one_leaves_gets_a_server(folder: Path) -> None:
    def come_and_go() -> None:
        for _ in range(15):
            with EmbeddedPostgres(folder) as postgres:
                answers.append(ask(postgres.dsn(), "select 1"))

    answers: list[str] = []
    in_threads(3, come_and_go)
    assert answers == ["1"] * 45
    assert not processes(folder)


def test_threads_share_an_object(folder: Path) -> None:
    postgres = EmbeddedPostgres(folder)
    found: list[str] = []
    in_threads(8, lambda: found.append(started_at(postgres.start().dsn())))
    assert len(found) == 8
    assert len(set(found)) == 1
    postgres.stop()
    assert not processes(folder)
