"""What the tests of the private PostgreSQL share: another process that uses it, and looks at what runs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self, TypeVar

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from commandbus import _keeper
from commandbus.embedded import EmbeddedPostgres

T = TypeVar("T")

START = """
import os, signal, sys
from commandbus.embedded import EmbeddedPostgres
postgres = EmbeddedPostgres(sys.argv[1]).start()
print(postgres.dsn(), flush=True)
sys.stdin.readline()
"""


def only_where(holds: object) -> Callable[[T], T | None]:
    """Define the test that this decorates only where it applies: elsewhere there is none, and none is skipped."""
    return lambda test: test if holds else None


def _has_namespaces() -> bool:
    if os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory(prefix="commandbus-") as folder:
        return _keeper.Account(Path(folder)).uid == 0


needs_proc = only_where(Path("/proc/self").exists())  # it looks for processes there
needs_root = only_where(os.geteuid() == 0)  # only root has to become another user
needs_namespaces = only_where(_has_namespaces())  # root, on a kernel that allows them


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
        line = pipe(self.process.stdout).readline()
        if not line:
            pytest.fail(f"it did not start: {pipe(self.process.stderr).read()}")
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


def pipe(end: IO[str] | None) -> IO[str]:
    assert end is not None
    return end


def processes(folder: Path) -> dict[int, str]:
    """Return pid and command line of the living processes that belong to a server in `folder`."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_text(errors="replace").replace("\0", " ").strip()
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


def in_threads(count: int, work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
