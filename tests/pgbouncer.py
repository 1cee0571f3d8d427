"""A PgBouncer in transaction mode before the PostgreSQL of the tests. Run as a program it is its keeper."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from commandbus import _keeper
from tests.support import eventually

# As few as the tests get by with, so that clients do share them: a worker's transactional handlers keep four, and a
# test that sends behind a gate as many more.
POOL_SIZE = 10
_SETTINGS = {
    "pool_mode": "transaction",
    "default_pool_size": str(POOL_SIZE),
    "server_login_retry": "1",  # s; after a restart of the server everybody would wait for 15
}


@contextlib.contextmanager
def pgbouncer(server_dsn: str, **settings: str) -> Iterator[str]:
    """Run one before this server, with these settings besides; gives the conninfo that leads through it."""
    socket_folder = str(conninfo_to_dict(server_dsn)["host"])
    with tempfile.TemporaryDirectory(prefix="commandbus-") as folder, Path(folder, "log").open("w+b") as log:
        own = [f"{name} = {value}" for name, value in (_SETTINGS | settings).items()]
        keeper = subprocess.Popen(
            [sys.executable, __file__, folder, socket_folder, _binary(), *own],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        through = make_conninfo(server_dsn, host=folder, port=6432)
        try:
            eventually(lambda: keeper.poll() is not None or _answers(through), what="an answer through pgbouncer")
            assert keeper.poll() is None, Path(log.name).read_text("utf-8")
            yield through
        finally:
            keeper.communicate()


@cache
def _binary() -> str:
    script = Path(__file__).parent.parent / "scripts" / "_pgbouncer"
    found = subprocess.run([script], check=False, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def _answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn).close()
    except psycopg.OperationalError:
        return False
    return True


def _keep(folder: str, socket_folder: str, binary: str, *settings: str) -> None:
    """Keep a PgBouncer until stdin ends, which also the death of the tests does.

    It refuses to run as root; so it becomes who the server has become, and finds its folders as that one does.
    """
    account = _keeper.Account(Path(folder))
    account.own(Path(folder))
    own, servers, programs = (account.path_to(Path(path)) for path in (folder, socket_folder, Path(binary).parent))
    config = Path(folder, "pgbouncer.ini")
    config.write_text(
        "\n".join(
            [
                "[databases]",
                f"* = host='{servers}' port=5432 user=postgres",
                "[pgbouncer]",
                "auth_type = any",
                f"unix_socket_dir = {own}",
                *settings,
            ]
        ),
        "utf-8",
    )
    account.own(Path(folder))
    os.environ["LD_LIBRARY_PATH"] = programs
    child = account.spawn([f"{programs}/{Path(binary).name}", f"{own}/{config.name}"], signal.SIGKILL)
    sys.stdin.read()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


if __name__ == "__main__":
    _keep(*sys.argv[1:])
