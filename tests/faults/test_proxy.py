"""The proxy by which other tests make trouble does make it."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.faults.proxy import Proxy
from tests.support import eventually


@pytest.fixture
def proxy(dsn: str) -> Iterator[Proxy]:
    with Proxy(dsn) as proxy:
        yield proxy


def test_it_leads_to_the_same_database(proxy: Proxy, db: psycopg.Connection) -> None:
    with psycopg.connect(proxy.dsn()) as through:
        assert through.execute("SELECT current_database()").fetchone() == (db.info.dbname,)


def test_what_it_cuts_is_broken_and_a_new_connection_is_not(proxy: Proxy) -> None:
    through = psycopg.connect(proxy.dsn())
    assert proxy.cut() == 1
    with pytest.raises(psycopg.OperationalError):
        through.execute("SELECT 1")
    psycopg.connect(proxy.dsn()).close()


def test_frozen_it_passes_nothing_on_until_it_thaws(proxy: Proxy, db: psycopg.Connection) -> None:
    with contextlib.closing(psycopg.connect(proxy.dsn(), autocommit=True)) as through:
        through.pgconn.nonblocking = 1
        proxy.freeze()
        through.pgconn.send_query(b"CREATE TABLE public.reached ()")
        through.pgconn.flush()
        with socket.create_connection(("127.0.0.1", through.info.port)) as new:
            new.sendall(b"\x00\x00\x00\x08\x04\xd2\x16\x2f")  # SSLRequest
            new.settimeout(0)
            with pytest.raises(BlockingIOError):
                new.recv(1)
        assert db.execute("SELECT to_regclass('public.reached')").fetchone() == (None,)
        proxy.thaw()
        eventually(lambda: db.execute("SELECT to_regclass('public.reached')").fetchone() == ("reached",))


def test_a_client_that_hangs_up_leaves_no_session(proxy: Proxy, db: psycopg.Connection) -> None:
    through = psycopg.connect(proxy.dsn())
    pid = through.execute("SELECT pg_backend_pid()").fetchone()
    through.close()
    eventually(lambda: not db.execute("SELECT FROM pg_stat_activity WHERE pid = %s", pid).fetchall())


def test_a_connection_that_the_server_resets_is_reset_for_the_client() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with Proxy(f"host=127.0.0.1 port={port}") as proxy:
            through = conninfo_to_dict(proxy.dsn())
            with socket.create_connection(("127.0.0.1", int(through["port"] or 0)), timeout=10) as client:
                client.sendall(b"?")
                backend, _ = server.accept()
                backend.recv(1)
                backend.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close: reset
                backend.close()
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(1) == b""
