"""A DSN may name several servers, in each way that libpq knows."""

from __future__ import annotations

import pytest
from psycopg.conninfo import conninfo_to_dict

from commandbus._database import conninfo


@pytest.mark.parametrize(
    ("dsn", "host", "port"),
    [
        ("postgresql://u:p@db1:5433,db2:5434/app", "db1,db2", "5433,5434"),
        ("postgresql://u@db1:5433,db2/app", "db1,db2", "5433,"),
        ("postgresql://u@[::1]:5433,db2:5434/app", "::1,db2", "5433,5434"),
        ("postgresql://u@/app?host=/run/a,/run/b", "/run/a,/run/b", None),
        ("host=db1,db2 port=5433,5434 dbname=app", "db1,db2", "5433,5434"),
        ("host=/run/a,/run/b port=5433", "/run/a,/run/b", "5433"),
    ],
)
@pytest.mark.parametrize("wanted", ["read-write", "any"])
def test_several_servers(dsn: str, host: str, port: str | None, wanted: str) -> None:
    separator = ("&" if "?" in dsn else "?") if "://" in dsn else " "
    found = conninfo_to_dict(conninfo(f"{dsn}{separator}target_session_attrs={wanted}", "app"))
    assert (found["host"], found.get("port"), found["target_session_attrs"]) == (host, port, wanted)
