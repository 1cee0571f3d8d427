"""The benchmark of pgqueuer: asyncpg and uvloop, as its own command line has them; durable tables."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import psycopg
from measure import Countdown, SingleSends, send_from_tasks, send_from_threads, send_when_asked, until_done
from peer import Answer, Request, main
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, SyncPsycopgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries, SyncQueries
from psycopg.conninfo import conninfo_to_dict

UNFINISHED = "SELECT count(*) FROM pgqueuer"
FINISHED = "SELECT count(*) FROM pgqueuer_log WHERE status = 'successful'"  # its history
CLEAR = "TRUNCATE pgqueuer, pgqueuer_log, pgqueuer_statistics"

# Preferred first, by searches on a busy machine, so with little weight: `search` on a quiet one decides.
# `pool` is the size of asyncpg's pool; 0 is one connection, of which all tasks take turns. `lean` leaves
# out the pool's reset after each use. `dequeue` is its batch_size: how many jobs it takes, and ends it writes, at once.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "send async": [
        {"uvloop": True, "pool": pool, "lean": lean}
        for pool, lean in ((2, True), (4, True), (4, False), (10, True), (64, True), (0, True))
    ],
    "send blocking": [{"connections": number} for number in (2, 1, 4, 16, 64)],  # that the threads share
    "batch": [{"uvloop": True, "pool": 0, "batch": size} for size in (5000, 1000, 20000, 100_000)],
    "drain": [
        {"uvloop": True, "pool": pool, "lean": True, "dequeue": dequeue}
        for pool in (4, 0)
        for dequeue in (500, 200, 1000, 2000)
    ],
    "latency": [
        {"uvloop": True, "pool": pool, "lean": True, "dequeue": dequeue} for pool in (0, 4) for dequeue in (1, 10)
    ],
    "send-when-asked": [{"uvloop": True, "pool": 0}],
}


def _arguments(dsn: str) -> dict[str, Any]:
    """Return the DSN as asyncpg takes it."""
    names = {"dbname": "database"}
    return {names.get(name, name): value for name, value in conninfo_to_dict(dsn).items()}


async def _keep(_connection: asyncpg.Connection) -> None:
    """Take the place of asyncpg's reset: pgqueuer changes nothing in a session but what it listens to."""


@contextlib.asynccontextmanager
async def _pgqueuer(request: Request) -> AsyncIterator[PgQueuer]:
    arguments = _arguments(request.dsn)
    if size := request.settings.get("pool", 0):
        reset = _keep if request.settings.get("lean") else None
        async with asyncpg.create_pool(**arguments, min_size=size, max_size=size, reset=reset) as pool:
            yield PgQueuer.from_asyncpg_pool(pool)
    else:
        connection = await asyncpg.connect(**arguments)
        try:
            yield PgQueuer.from_asyncpg_connection(connection)
        finally:
            await connection.close()


@contextlib.asynccontextmanager
async def _working(pgq: PgQueuer, request: Request) -> AsyncIterator[asyncio.Task[None]]:
    worker = asyncio.create_task(pgq.run(batch_size=request.settings["dequeue"]))
    try:
        yield worker
    finally:
        pgq.shutdown.set()
        await asyncio.wait({worker})


def _body(request: Request) -> bytes:
    return json.dumps(request.payload).encode()


async def setup(request: Request) -> Answer:
    connection = await asyncpg.connect(**_arguments(request.dsn))
    await Queries(AsyncpgDriver(connection)).install()
    await connection.close()
    return {"ok": True}


async def send(request: Request) -> Answer:
    request.run_sql(CLEAR)
    body = _body(request)
    if request.mode == "blocking":
        return _send_blocking(request, body)
    async with _pgqueuer(request) as pgq:
        return await send_from_tasks(request, lambda _: pgq.qm.queries.enqueue("noop", body))


def _send_blocking(request: Request, body: bytes) -> Answer:
    # Its blocking driver wraps one connection, which psycopg lets threads share.
    with contextlib.ExitStack() as stack:
        number = min(request.tasks, request.settings["connections"])
        connections = [psycopg.connect(request.dsn, autocommit=True) for _ in range(number)]
        queries = [SyncQueries(SyncPsycopgDriver(stack.enter_context(each))) for each in connections]
        return send_from_threads(request, lambda task: queries[task % number].enqueue("noop", body))


async def batch(request: Request) -> Answer:
    request.run_sql(CLEAR)
    size = request.settings.get("batch", 5000)
    body = _body(request)
    async with _pgqueuer(request) as pgq:
        began = time.perf_counter()
        for start in range(0, request.count, size):
            n = min(size, request.count - start)
            await pgq.qm.queries.enqueue(["noop"] * n, [body] * n, [0] * n)
        return {"seconds": time.perf_counter() - began}


async def drain(request: Request) -> Answer:
    if request.fill:
        await batch(request)
        request.run_sql("VACUUM ANALYZE")
    async with _pgqueuer(request) as pgq:
        countdown = Countdown(request.count)

        @pgq.entrypoint("noop")
        async def noop(_job: Job) -> None:
            countdown()

        began = time.perf_counter()
        async with _working(pgq, request) as worker:
            await countdown.wait(worker)
            return await until_done(request, began, UNFINISHED, FINISHED)


async def latency(request: Request) -> Answer:
    request.run_sql(CLEAR)
    async with _pgqueuer(request) as pgq:
        sends = SingleSends(request)

        @pgq.entrypoint("noop")
        async def noop(job: Job) -> None:
            sends.handled(json.loads(job.payload or b"{}")["sent"])

        async with _working(pgq, request) as worker:
            return await sends.latencies(worker)


async def sender(request: Request) -> Answer:
    async with _pgqueuer(request) as pgq:
        return await send_when_asked(request, lambda body: pgq.qm.queries.enqueue("noop", json.dumps(body).encode()))


if __name__ == "__main__":
    main(
        {
            "setup": setup,
            "send": send,
            "batch": batch,
            "drain": drain,
            "latency": latency,
            "send-when-asked": sender,
            "call": "its completion watcher tells that a job ended, and brings no reply",
        },
        SETTINGS,
    )
