"""Fills a database with commands, through the functions; only a long history is multiplied from a real one.

10,000,000 commands through the functions take a quarter of an hour, multiplied a few minutes: this is the one
place outside the functions that `scripts/dml_guard.py` lets write to the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from itertools import repeat

import psycopg

from benchmarks.program import DOMAIN, PAYLOAD, TYPE
from commandbus import SendRequest, _calls
from commandbus._ids import new_id

_ROWS = 1000
_BATCH = 500
_SEED = 10_000
_SEGMENTS = json.dumps([(TYPE, -1, _calls.LAST_PLACE)])

# Claims, and presents each lease with one of these endings.
_END = """
SELECT count(*) FROM commandbus.{verb}(%(domain)s, coalesce((
    SELECT json_agg(json_build_object('command_id', c.command_id, 'delivery', c.delivery, 'lease_token', c.lease_token)
                    ::jsonb || %(ending)s::jsonb)
    FROM commandbus.claim_v1(%(domain)s, %(segments)s, %(limit)s, 'stock', 60) c
    WHERE c.command_id IS NOT NULL)::text, '[]'))
"""
_PARKED = {"kind": "PERMANENT", "error": {"code": "UNKNOWN_ITEM", "message": "nobody sells that"}}


def send(dsn: str, count: int, *, command_type: str = TYPE, delay: timedelta | None = None) -> None:
    """Send so many commands."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        _send(connection, count, SendRequest(DOMAIN, command_type, PAYLOAD, delay=delay))


def park(dsn: str, count: int) -> None:
    """Send so many commands and let them fail for good."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        _send(connection, count, SendRequest(DOMAIN, TYPE, PAYLOAD))
        _end(connection, "fail_v1", _PARKED)


def finish(dsn: str, count: int, *, ago: timedelta = timedelta(0)) -> None:
    """Put so many commands into the history, finished so long ago: some really, the others in their likeness."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("UPDATE commandbus.setting SET value = 'on' WHERE name = 'test_clock'")
        connection.execute("SELECT set_config('commandbus.clock_offset', %s, false)", [f"-{ago.total_seconds()} s"])
        connection.execute("SELECT commandbus.make_partitions_v1()")
        _send(connection, min(count, _SEED), SendRequest(DOMAIN, TYPE, PAYLOAD))
        _end(connection, "complete_v1", {"result": None})
        _multiply(connection, count // _SEED - 1)
        connection.execute("UPDATE commandbus.setting SET value = 'off' WHERE name = 'test_clock'")


def keep(dsn: str, retention: timedelta) -> None:
    """Set for how long finished commands are kept."""
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE commandbus.setting SET value = %s WHERE name = 'retention'", [str(retention)])


def settle(dsn: str) -> None:
    """Vacuum and analyze, as time would have done."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")


def rows(request: SendRequest, count: int) -> Iterator[str]:
    """Return so many commands as `send_v1` takes them, in texts of up to 1,000."""
    for begin in range(0, count, _ROWS):
        several = repeat(request, min(_ROWS, count - begin))
        outgoing = [_calls.outgoing(one, {}, new_id(), 1 << 20) for one in several]
        yield f"[{','.join(one.row(minted=True) for one in outgoing)}]"


def _send(connection: psycopg.Connection, count: int, request: SendRequest) -> None:
    for text in rows(request, count):
        connection.execute("SELECT count(*) FROM commandbus.send_v1(%s)", [text])


def _end(connection: psycopg.Connection, verb: str, ending: Mapping[str, object]) -> None:
    values = {"domain": DOMAIN, "segments": _SEGMENTS, "limit": _BATCH, "ending": json.dumps(ending)}
    while connection.execute(_END.format(verb=verb).encode(), values).fetchall() != [(0,)]:
        pass


def _multiply(connection: psycopg.Connection, times: int) -> None:
    """Insert each finished command so many times more, with ids of their own."""
    columns = connection.execute(
        "SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute"
        " WHERE attrelid = 'commandbus.command_history'::regclass AND attnum > 0 AND attname <> 'command_id'"
        " AND NOT attisdropped"
    ).fetchall()[0][0]
    new = "uuidv7()" if connection.info.server_version >= 180000 else "gen_random_uuid()"  # noqa: PLR2004
    connection.execute("CREATE TEMPORARY TABLE seed AS SELECT * FROM commandbus.command_history")
    for _ in range(times):
        connection.execute(
            f"INSERT INTO commandbus.command_history (command_id, {columns}) SELECT {new}, {columns} FROM seed".encode()  # noqa: S608
        )
