"""The benchmark of procrastinate: psycopg, as it has no other driver; the jobs that succeeded are kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from measure import Countdown, SingleSends, send_from_tasks, send_from_threads, send_when_asked, until_done
from peer import Answer, Request, main
from procrastinate import App, PsycopgConnector, SyncPsycopgConnector
from psycopg import AsyncConnection, Connection
from psycopg_pool import AsyncConnectionPool, ConnectionPool

UNFINISHED = "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
FINISHED = "SELECT count(*) FROM procrastinate_jobs WHERE status = 'succeeded'"  # its history
CLEAR = "TRUNCATE procrastinate_jobs, procrastinate_workers CASCADE"

# Preferred first, by searches on a busy machine, so with little weight: `search` on a quiet one decides.
# `lean` is a pool of ours instead of its own: without a check of the connection before each statement, and
# without BEGIN and COMMIT around it.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "send async": [
        {"uvloop": True, "pool": pool, "lean": lean}
        for pool, lean in ((10, True), (4, True), (4, False), (2, True), (64, True))
    ],
    "send blocking": [
        {"pool": pool, "lean": lean} for pool, lean in ((16, True), (4, True), (4, False), (2, True), (64, True))
    ],
    "batch": [{"uvloop": True, "pool": 1, "lean": True, "batch": size} for size in (200, 1000, 5000, 20000)],
    "drain": [
        {"uvloop": True, "pool": pool, "lean": lean, "concurrency": concurrency}
        for pool, lean, concurrency in ((4, True, 4), (4, True, 10), (4, False, 10), (10, True, 20), (20, True, 50))
    ],
    "latency": [{"uvloop": True, "pool": 4, "lean": True, "concurrency": number} for number in (10, 1)],
    "send-when-asked": [{"uvloop": True, "pool": 1, "lean": True}],
}


async def _autocommit(connection: AsyncConnection[Any]) -> None:
    await connection.set_autocommit(True)


def _autocommit_blocking(connection: Connection[Any]) -> None:
    connection.autocommit = True


def _pool_arguments(request: Request) -> dict[str, Any]:
    size = min(request.settings.get("pool", 1), request.tasks if request.mode == "blocking" else 64)
    return {"conninfo": request.dsn, "min_size": size, "max_size": size}


@contextlib.asynccontextmanager
async def _opened(request: Request) -> AsyncIterator[App]:
    arguments = _pool_arguments(request)
    app = App(connector=PsycopgConnector(**arguments))
    if request.settings.get("lean"):
        async with AsyncConnectionPool(**arguments, configure=_autocommit, open=False) as pool, app.open_async(pool):
            yield app
    else:
        async with app.open_async():
            yield app


@contextlib.asynccontextmanager
async def _working(app: App, request: Request) -> AsyncIterator[asyncio.Task[None]]:
    concurrency = request.settings["concurrency"]
    work = app.run_worker_async(concurrency=concurrency, install_signal_handlers=False, delete_jobs="never")
    worker = asyncio.create_task(work)
    try:
        yield worker
    finally:
        worker.cancel()
        await asyncio.wait({worker})


async def setup(request: Request) -> Answer:
    async with _opened(request) as app:
        await app.schema_manager.apply_schema_async()
    return {"ok": True}


async def send(request: Request) -> Answer:
    request.run_sql(CLEAR)
    if request.mode == "blocking":
        return _send_blocking(request)
    async with _opened(request) as app:
        noop = app.configure_task("noop")
        return await send_from_tasks(request, lambda _: noop.defer_async(**request.payload))


def _send_blocking(request: Request) -> Answer:
    arguments = _pool_arguments(request)
    app = App(connector=SyncPsycopgConnector(**arguments))
    lean = request.settings.get("lean")
    pooled = ConnectionPool(**arguments, configure=_autocommit_blocking) if lean else contextlib.nullcontext()
    with pooled as pool, app.open(pool):
        noop = app.configure_task("noop")
        return send_from_threads(request, lambda _: noop.defer(**request.payload))


async def batch(request: Request) -> Answer:
    request.run_sql(CLEAR)
    size = request.settings.get("batch", 200)
    async with _opened(request) as app:
        noop = app.configure_task("noop")
        began = time.perf_counter()
        for start in range(0, request.count, size):
            await noop.batch_defer_async(*[request.payload] * min(size, request.count - start))
        return {"seconds": time.perf_counter() - began}


async def drain(request: Request) -> Answer:
    if request.fill:
        await batch(request)
        request.run_sql("VACUUM ANALYZE")
    async with _opened(request) as app:
        countdown = Countdown(request.count)

        @app.task(name="noop")
        async def noop(**_payload: object) -> None:
            countdown()

        began = time.perf_counter()
        async with _working(app, request) as worker:
            await countdown.wait(worker)
            return await until_done(request, began, UNFINISHED, FINISHED)


async def latency(request: Request) -> Answer:
    request.run_sql(CLEAR)
    async with _opened(request) as app:
        sends = SingleSends(request)

        @app.task(name="noop")
        async def noop(sent: int, **_payload: object) -> None:
            sends.handled(sent)

        async with _working(app, request) as worker:
            return await sends.latencies(worker)


async def sender(request: Request) -> Answer:
    async with _opened(request) as app:
        noop = app.configure_task("noop")
        return await send_when_asked(request, lambda body: noop.defer_async(**body))


if __name__ == "__main__":
    logging.getLogger("procrastinate").setLevel(logging.ERROR)  # it warns of an App in the main module
    main(
        {
            "setup": setup,
            "send": send,
            "batch": batch,
            "drain": drain,
            "latency": latency,
            "send-when-asked": sender,
            "call": "it keeps no results",
        },
        SETTINGS,
    )
