"""However a user, the keeper or the server of a private PostgreSQL ends: real processes, real kills."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from commandbus.embedded import EmbeddedPostgres
from tests.acceptance.embedded_support import (
    User,
    ask,
    keeper,
    needs_proc,
    pipe,
    postmaster,
    processes,
    started_at,
)
from tests.support import eventually


@pytest.mark.usefixtures("initialised")
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("postgres.stop()", 0),
        ("pass", 0),
        ("os._exit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("os.kill(os.getpid(), signal.SIGTERM)", -15),
    ],
)
def test_no_process_is_left_and_nothing_said_however_the_owner_ends(folder: Path, ending: str, code: int) -> None:
    with User(folder, ending) as user:
        user.dsn()
        assert len(processes(folder)) > 3
        user.go_on()
        assert user.process.returncode == code
    eventually(lambda: not processes(folder), what="the end of the server")


@pytest.mark.usefixtures("initialised")
def test_an_exception_in_the_block_stops_the_server(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), EmbeddedPostgres(folder):
        _ = 1 / 0
    assert not processes(folder)


def test_an_owner_killed_during_initdb_leaves_nothing_in_the_way(folder: Path) -> None:
    with User(folder) as user:
        eventually(lambda: list(folder.glob("pg*/data.new/*")), what="initdb's first file")
        user.kill()
    eventually(lambda: not processes(folder), what="the end of initdb")
    with EmbeddedPostgres(folder) as postgres:
        assert ask(postgres.dsn(), "select 1") == "1"


@pytest.mark.usefixtures("initialised")
def test_the_last_of_two_users_stops_the_server_when_the_first_was_killed(folder: Path) -> None:
    with User(folder) as first:
        first.dsn()
        with EmbeddedPostgres(folder) as second:
            first.kill()
            first.process.wait()
            assert ask(second.dsn(), "select 1") == "1"
        assert not processes(folder)


@pytest.mark.usefixtures("initialised")
def test_a_killed_server_is_recovered_by_the_next_start(folder: Path) -> None:
    with (
        EmbeddedPostgres(folder) as postgres,
        User(folder, "postgres.start(); print(postgres.dsn())") as other,
    ):
        before = started_at(other.dsn())
        with busy(postgres), psycopg.connect(postgres.dsn()) as connection:
            connection.execute("create table kept as select 7 as n")
            connection.commit()
            os.kill(postmaster(folder), signal.SIGKILL)
            postgres.start()
        assert ask(postgres.dsn(), "select n from kept") == "7"
        assert started_at(postgres.dsn()) != before
        assert other.go_on().strip() == postgres.dsn()
    assert not processes(folder)


@needs_proc
@pytest.mark.usefixtures("initialised")
@pytest.mark.parametrize("victims", [(keeper,), (keeper, postmaster)], ids=["keeper", "keeper and server"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_killed_keeper_takes_the_server_along(
    folder: Path, victims: list[Callable[[Path], int]], *, at_once: bool
) -> None:
    with EmbeddedPostgres(folder) as postgres, psycopg.connect(postgres.dsn()):
        before = started_at(postgres.dsn())
        killed = [victim(folder) for victim in victims]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        # A signal takes its time; until then all looks well to start().
        eventually(lambda: not set(killed) & set(processes(folder)), what="the end of those killed")
        if not at_once:
            eventually(lambda: not processes(folder), what="the end of the server")
        assert started_at(postgres.start().dsn()) != before
        assert len([command for command in processes(folder).values() if "_keeper.py" in command]) == 1


@pytest.mark.usefixtures("initialised")
def test_a_server_that_outlives_its_keeper_keeps_the_next_one_out(folder: Path) -> None:
    with EmbeddedPostgres(folder) as postgres:
        server, gone = postmaster(folder), keeper(folder)
        os.kill(server, signal.SIGSTOP)
        try:
            os.kill(gone, signal.SIGKILL)
            eventually(lambda: gone not in processes(folder), what="the end of the keeper")
            with (folder / f"pg{postgres.major}" / "keeper.lock").open() as lock, pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.kill(server, signal.SIGCONT)
        assert ask(postgres.start().dsn(), "select 1") == "1"


@pytest.mark.usefixtures("initialised")
def test_a_server_whose_keeper_is_told_to_end_ends_cleanly(folder: Path) -> None:
    with EmbeddedPostgres(folder) as postgres:
        os.kill(keeper(folder), signal.SIGTERM)
        eventually(lambda: not processes(folder), what="the end of the server")
        assert "database system is shut down" in (folder / f"pg{postgres.major}" / "server.log").read_text()


@contextlib.contextmanager
def busy(postgres: EmbeddedPostgres) -> Iterator[None]:
    """Keep a backend so busy that it does not notice the death of its server."""
    loop = "set statement_timeout = '150s'; do $$ begin loop perform 1; end loop; end $$"

    def spin() -> None:
        with contextlib.suppress(psycopg.OperationalError):
            ask(postgres.dsn(), loop)

    thread = threading.Thread(target=spin)
    thread.start()
    running = "select count(*) from pg_stat_activity where query like 'set %do %' and state = 'active'"
    eventually(lambda: ask(postgres.dsn(), running) == "1", what="the busy backend")
    yield
    thread.join()


# -- forks -------------------------------------------------------------------------------------------------------------

FORK = """
if os.fork() == 0:
    signal.alarm(60)
    postgres.stop()
    os.write(1, b"child\\n")
    signal.pause()
os.write(1, b"parent\\n")
sys.stdin.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("initialised")
def test_a_forked_child_neither_stops_the_server_nor_keeps_it(folder: Path) -> None:
    with User(folder, FORK) as user:
        dsn = user.dsn()
        stdin, stdout = pipe(user.process.stdin), pipe(user.process.stdout)
        stdin.write("\n")
        stdin.flush()
        assert {stdout.readline(), stdout.readline()} == {"child\n", "parent\n"}
        assert ask(dsn, "select 1") == "1"  # the child's stop() was none
        child = int(Path(f"/proc/{user.process.pid}/task/{user.process.pid}/children").read_text())
        try:
            stdin.write("\n")
            stdin.flush()
            eventually(lambda: not processes(folder), what="the end of the server")
            os.kill(child, 0)  # although the child lives
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.usefixtures("initialised")
def test_a_forked_child_that_starts_is_a_user(folder: Path) -> None:
    started, parent_gone = os.pipe(), os.pipe()
    dsn = ""
    with EmbeddedPostgres(folder) as postgres:
        dsn = postgres.dsn()
        child = os.fork()
        if child == 0:
            status = 1
            signal.alarm(60)  # should the parent fail
            try:
                postgres.start()
                os.write(started[1], b"x")
                os.read(parent_gone[0], 1)
                status = int(ask(dsn, "select 0"))
                postgres.stop()
            finally:
                os._exit(status)
        os.read(started[0], 1)
    assert ask(dsn, "select 1") == "1"
    os.write(parent_gone[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert not processes(folder)
    for end in (*started, *parent_gone):
        os.close(end)
