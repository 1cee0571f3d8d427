"""What PostgreSQL and psycopg can do at most, as contenders; see `program.py`.

The bare tables have the columns and indexes of ours, in a schema of their own. `insert` is what the simplest queue
would do: an id, its data, one partial index.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import psycopg

from benchmarks import stock
from benchmarks.program import DOMAIN, TYPE, Answer, Options, answer, main, send_in_threads, started, watching
from commandbus import SendRequest, _calls
from commandbus._ids import new_id
from commandbus.migrate import migrate

Connection: TypeAlias = psycopg.AsyncConnection[tuple[Any, ...]]
Row: TypeAlias = tuple[Any, ...]
Claim: TypeAlias = Callable[[Connection, int], Awaitable[list[Row]]]
Complete: TypeAlias = Callable[[Connection, list[Row]], Awaitable[None]]

_ROWS = 1000
_SEGMENTS = json.dumps([(TYPE, -1, _calls.LAST_PLACE)])
# So that each statement keeps the plan that ours have: one probe of an index a row.
_PLANS = "-c enable_seqscan=off -c enable_bitmapscan=off -c enable_sort=off -c enable_hashjoin=off -c jit=off"

_BARE = """
CREATE SCHEMA IF NOT EXISTS bare;
CREATE TABLE IF NOT EXISTS bare.job (
    id uuid PRIMARY KEY, seq bigint GENERATED ALWAYS AS IDENTITY, domain text NOT NULL, type text NOT NULL,
    status text NOT NULL DEFAULT 'PENDING', data jsonb NOT NULL, headers jsonb NOT NULL DEFAULT '{}');
CREATE INDEX IF NOT EXISTS job_queue ON bare.job (domain, type, seq) WHERE status = 'PENDING';
CREATE TABLE IF NOT EXISTS bare.command (LIKE commandbus.command INCLUDING ALL);
CREATE TABLE IF NOT EXISTS bare.history (LIKE commandbus.command_history INCLUDING ALL);
"""
_INSERT = "INSERT INTO bare.job (id, domain, type, data) VALUES (%s, %s, %s, %s)"
_INSERT_MANY = (
    "INSERT INTO bare.job (id, domain, type, data) SELECT u, %s, %s, d FROM unnest(%s, %s::jsonb[]) AS x (u, d)"
)
_COPY = "COPY bare.job (id, domain, type, data) FROM STDIN"

_CLAIM = """
UPDATE bare.command AS c
SET status = 'IN_PROGRESS', delivery = c.delivery + 1, lease_token = gen_random_uuid(), worker = 'bare',
    lease_until = clock_timestamp() + interval '60 s', claimed_at = clock_timestamp()
WHERE c.ctid = ANY (ARRAY(
    SELECT q.ctid FROM bare.command q
    WHERE q.domain = %s AND q.command_type = %s AND q.place > %s AND q.place IS NOT NULL AND q.status = 'PENDING'
    ORDER BY q.place LIMIT %s FOR UPDATE SKIP LOCKED))
RETURNING c.command_id, c.data::text, c.place
"""
_COMPLETE = """
WITH gone AS (DELETE FROM bare.command c WHERE c.domain = %s AND c.command_id = ANY (%s) RETURNING c.*)
INSERT INTO bare.history (domain, command_id, command_type, status, priority, attempts, crashes, events, delivery,
                          lease_token, lease_until, claimed_at, worker, sent_at, finished_at, data_hash, data, headers)
SELECT g.domain, g.command_id, g.command_type, 'COMPLETED', g.priority, g.attempts + 1, g.crashes, g.events, g.delivery,
       g.lease_token, g.lease_until, g.claimed_at, g.worker, g.sent_at, clock_timestamp(), g.data_hash, g.data,
       g.headers
FROM gone g
"""


def setup(options: Options) -> Answer:
    """Make the bare tables, in the likeness of ours."""
    migrate(options["dsn"])
    with psycopg.connect(options["dsn"]) as connection:
        connection.execute(_BARE)
    return {}


# -- sending -----------------------------------------------------------------------------------------------------------


def send(options: Options) -> Answer:
    """Send one command a call, on a connection a thread: a bare insert, or our function."""
    if options["way"] == "insert":
        setup(options)
    data = json.dumps(options["payload"])
    request = SendRequest(DOMAIN, TYPE, options["payload"])

    @contextlib.contextmanager
    def sender() -> Iterator[Callable[[], object]]:
        with psycopg.connect(options["dsn"], autocommit=True, prepare_threshold=0) as connection:
            if options["way"] == "insert":
                yield lambda: connection.execute(_INSERT, (new_id(), DOMAIN, TYPE, data))
            else:
                yield lambda: connection.execute(
                    "SELECT outcome FROM commandbus.send_v1(%s)", [next(stock.rows(request, 1))]
                ).fetchall()

    return send_in_threads(options, sender)


def batch(options: Options) -> Answer:
    """Insert all rows, 1,000 a statement and commit; or copy them so."""
    setup(options)
    data = json.dumps(options["payload"])
    with psycopg.connect(options["dsn"], autocommit=True, prepare_threshold=0) as connection:
        began = started(options)
        for begin in range(0, options["count"], _ROWS):
            ids = [new_id() for _ in range(min(_ROWS, options["count"] - begin))]
            if options["way"] == "insert":
                connection.execute(_INSERT_MANY, (DOMAIN, TYPE, ids, [data] * len(ids)))
            else:
                with connection.cursor().copy(_COPY) as copy:
                    for each in ids:
                        copy.write_row((each, DOMAIN, TYPE, data))
        return answer(options["count"], began, connections=1, settings={"chunk": _ROWS})


# -- working -----------------------------------------------------------------------------------------------------------


def drain(options: Options) -> Answer:
    """Claim and complete in a loop, with bare statements or our functions, one after the other or overlapping."""
    if options.get("fill"):
        stock.send(options["dsn"], options["count"])
        stock.settle(options["dsn"])
    if options["way"] == "statements":
        setup(options)
        with psycopg.connect(options["dsn"]) as connection:
            connection.execute("INSERT INTO bare.command SELECT * FROM commandbus.command")
            connection.execute("ANALYZE bare.command")
    with watching(options["dsn"]) as seen:
        done = asyncio.run(_drain(options))
    return {**done, "connections": seen.most}


async def _drain(options: Options) -> Answer:
    claim, complete = _with_statements() if options["way"] == "statements" else (_claim, _complete)
    size, count = options["batch"], options["count"]
    handled = 0

    async def handle(data: object) -> None:
        nonlocal handled
        handled += data is not None

    connect = partial(
        psycopg.AsyncConnection.connect, options["dsn"], autocommit=True, prepare_threshold=0, options=_PLANS
    )
    async with await connect() as one, await connect() as other:
        began = started(options)
        rows = await claim(one, size)
        while rows:
            for row in rows:
                await handle(json.loads(row[1]))
            if handled >= count:
                await complete(one, rows)
                break
            if options["overlap"]:
                rows, _ = await asyncio.gather(claim(one, size), complete(other, rows))
            else:
                await complete(one, rows)
                rows = await claim(one, size)
        return answer(handled, began, settings={"batch": size, "overlap": options["overlap"]})


def _with_statements() -> tuple[Claim, Complete]:
    """Return claim and complete as bare statements; the claim starts where the last one ended."""
    place = -1

    async def claim(connection: Connection, size: int) -> list[Row]:
        nonlocal place
        rows = await (await connection.execute(_CLAIM, (DOMAIN, TYPE, place, size))).fetchall()
        place = max((row[2] for row in rows), default=place)
        return rows

    async def complete(connection: Connection, rows: list[Row]) -> None:
        await connection.execute(_COMPLETE, (DOMAIN, [row[0] for row in rows]))

    return claim, complete


async def _claim(connection: Connection, size: int) -> list[Row]:
    found = await connection.execute(
        "SELECT command_id, data, delivery, lease_token FROM commandbus.claim_v1(%s, %s, %s, 'bare', 60)",
        (DOMAIN, _SEGMENTS, size),
    )
    return [row for row in await found.fetchall() if row[0] is not None]


async def _complete(connection: Connection, rows: list[Row]) -> None:
    items = [_calls.held(row[0], row[2], row[3], ',"result":null') for row in rows]
    await connection.execute("SELECT outcome FROM commandbus.complete_v1(%s, %s)", (DOMAIN, f"[{','.join(items)}]"))


if __name__ == "__main__":
    main({"setup": setup, "send": send, "batch": batch, "drain": drain})
