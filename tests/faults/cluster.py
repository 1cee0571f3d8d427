"""A primary with a standby: what is written on one comes to the other, synchronously or not, until it is promoted."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from commandbus._keeper import SERVER_SOCKET
from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrate
from tests.faults.proxy import Proxy
from tests.support import eventually

_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "wal_retrieve_retry_interval": "100ms",  # 5 s by default
}


class Cluster:
    """Two servers; the standby is fed through `replication`, a proxy, which can hold it back.

    `dsn` names both and leads to the one that takes writes, whichever that is.
    """

    def __init__(self, primary: EmbeddedPostgres, standby: EmbeddedPostgres, replication: Proxy) -> None:
        self.primary = primary
        self.standby = standby
        self.replication = replication
        hosts = f"{_host(primary)},{_host(standby)}"
        one = make_conninfo(primary.dsn(), target_session_attrs="read-write", connect_timeout=2)
        self.dsn = make_conninfo(one, host=hosts, port="5432,5432")

    def make_synchronous(self) -> None:
        """Let a commit on the primary wait for the standby."""
        ask(self.primary, "ALTER SYSTEM SET synchronous_standby_names = '*'")
        ask(self.primary, "SELECT pg_reload_conf()")
        query = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        eventually(lambda: ask(self.primary, query) == 1, what="a synchronous standby")

    def catch_up(self) -> None:
        """Come back when the standby has all that the primary has now."""
        now = ask(self.primary, "SELECT pg_current_wal_lsn()::text")
        query = f"SELECT pg_last_wal_replay_lsn() >= '{now}'"
        eventually(lambda: ask(self.standby, query), what="a standby that has caught up", timeout=30)

    def promote(self) -> None:
        """Make the standby a primary; returns when it takes writes."""
        ask(self.standby, "SELECT pg_promote()")
        eventually(lambda: not ask(self.standby, "SELECT pg_is_in_recovery()"), what="the promotion")

    @contextlib.contextmanager
    def switched_over(self) -> Iterator[None]:
        """Change the roles in good order: the primary stops, the standby is promoted, the old primary follows it."""
        self.primary.stop()
        self.promote()
        with Proxy(self.standby.dsn()) as replication:
            data = _data(self.primary)
            (data / "standby.signal").touch()
            with (data / "postgresql.auto.conf").open("a") as settings:
                settings.write(f"primary_conninfo = '{replication.dsn()}'\n")
            self.primary.start()
            yield
            self.primary.stop()


class Address:
    """One DSN that leads where it is told, as a name or a virtual address does: a folder with a link to a socket."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="commandbus-")
        self.dsn = make_conninfo(host=self._folder.name, user="postgres", dbname="postgres")
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.cleanup()

    def leads_to(self, server: EmbeddedPostgres) -> None:
        """Let new connections go to this server; those that there are stay."""
        link = Path(self._folder.name, SERVER_SOCKET)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(_host(server), SERVER_SOCKET))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A migrated primary and its standby."""
    primary, standby = (EmbeddedPostgres(folder / name, settings=_SETTINGS) for name in ("a", "b"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(primary)
        migrate(primary.dsn())
        replication = stack.enter_context(Proxy(primary.dsn()))
        follow(standby, replication.dsn())
        stack.enter_context(standby)
        yield Cluster(primary, standby, replication)


def follow(server: EmbeddedPostgres, dsn: str) -> None:
    """Make a copy of the server behind this DSN, as which `server` will start and which it will follow."""
    data = _data(server)
    data.parent.mkdir(parents=True)
    options = ["--dbname", dsn, "--pgdata", str(data), "--write-recovery-conf", "--checkpoint", "fast"]
    subprocess.run([server.bin_dir / "pg_basebackup", *options], check=True)


def ask(server: EmbeddedPostgres, query: str) -> Any:  # noqa: ANN401 - any value
    """The one value of a query on this very server, None if it has none."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        cursor = connection.execute(query.encode())
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def freeze(server: EmbeddedPostgres) -> list[int]:
    """Let every process of a server stand still, as on a machine that hangs; returns their pids, the first's first."""
    pids = [int((_data(server) / "postmaster.pid").read_text("utf-8").split()[0])]
    os.kill(pids[0], signal.SIGSTOP)  # it starts no more
    children = Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text("utf-8")
    pids += map(int, children.split())
    for pid in pids[1:]:
        os.kill(pid, signal.SIGSTOP)
    return pids


def _data(server: EmbeddedPostgres) -> Path:
    return server.data_dir / f"pg{server.major}" / "data"


def _host(server: EmbeddedPostgres) -> str:
    return str(conninfo_to_dict(server.dsn())["host"])
