"""The benchmark of DBOS: a workflow without steps on a queue; the workflows that ended are kept.

It sends from outside by its client, and has no bulk call: a batch is many sends in one transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import sqlalchemy
from dbos import DBOS, DBOSClient, EnqueueOptions
from measure import Countdown, SingleSends, send_from_tasks, send_from_threads, send_when_asked, until_done
from peer import Answer, Request, main
from psycopg.conninfo import conninfo_to_dict

UNFINISHED = "SELECT count(*) FROM dbos.workflow_status WHERE status IN ('ENQUEUED', 'PENDING')"
FINISHED = "SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS'"  # its history
CLEAR = "TRUNCATE dbos.workflow_status CASCADE"
NAME = "benchmark"
NOOP: EnqueueOptions = {"workflow_name": "noop", "queue_name": "noops"}

# Preferred first, by searches on a busy machine, so with little weight: `search` on a quiet one decides.
# `lean` leaves out the check of a connection before each use. `poll` is in seconds, for DBOS polls its
# queues: as short as it helps. `limit` is how many workflows of the queue the worker takes at once; a workflow is a
# function in a thread: as a coroutine it drained 194/s instead of 246/s, with pool 4 and on that busy machine.
POOLS = [{"pool": pool, "lean": lean} for pool, lean in ((16, True), (4, True), (4, False), (2, True), (64, True))]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "send async": POOLS,
    "send blocking": POOLS,
    "drain": [
        {"pool": pool, "lean": True, "threads": threads, "limit": limit, "poll": 0.02}
        for pool, threads, limit in ((10, 10, 100), (4, 4, 500), (4, 4, 100), (10, 10, 500), (20, 64, None))
    ],
    "latency": [{"pool": 4, "lean": True, "threads": 4, "limit": None, "poll": poll} for poll in (0.02, 0.005, 0.001)],
    "send-when-asked": [{"pool": 1, "lean": True}],
    "call": [{"pool": 4, "lean": lean, "threads": 64} for lean in (True, False)],
}


def _url(dsn: str) -> str:
    """Return the DSN as SQLAlchemy takes it: the folder of a Unix socket is no host of a URL."""
    given = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    user, password, database = given.pop("user", None), given.pop("password", None), given.pop("dbname", None)
    url = sqlalchemy.URL.create("postgresql", username=user, password=password, database=database, query=given)
    return url.render_as_string(hide_password=False)


@contextlib.contextmanager
def _engine(request: Request, size: int) -> Iterator[sqlalchemy.Engine]:
    url = sqlalchemy.make_url(_url(request.dsn)).set(drivername="postgresql+psycopg")
    check = not request.settings.get("lean")
    engine = sqlalchemy.create_engine(url, pool_size=size, max_overflow=0, pool_pre_ping=check)
    try:
        yield engine
    finally:
        engine.dispose()


@contextlib.contextmanager
def _client(request: Request) -> Iterator[DBOSClient]:
    with _engine(request, min(request.tasks, request.settings.get("pool", 1))) as engine:
        client = DBOSClient(system_database_engine=engine, application_name=NAME)
        try:
            yield client
        finally:
            client.destroy()


def _configure(request: Request) -> None:
    DBOS(
        config={
            "name": NAME,
            "application_version": "1",
            "system_database_url": _url(request.dsn),
            "sys_db_pool_size": request.settings.get("pool", 4),
            "db_engine_kwargs": {"pool_pre_ping": not request.settings.get("lean")},
            "max_executor_threads": request.settings.get("threads"),
            "log_level": "ERROR",
        }
    )


@contextlib.asynccontextmanager
async def _launched() -> AsyncIterator[None]:
    """Run what `_configure` made; the queue has been registered, so it is served at once."""
    DBOS.launch()
    try:
        yield
    finally:
        await asyncio.to_thread(DBOS.destroy, destroy_registry=True)


def _register_queue(request: Request) -> None:
    given = request.settings
    with _client(request) as client:
        client.register_queue(NOOP["queue_name"], polling_interval_sec=given["poll"], worker_concurrency=given["limit"])


async def setup(request: Request) -> Answer:
    _configure(request)
    async with _launched():
        return {"ok": True}


async def send(request: Request) -> Answer:
    request.run_sql(CLEAR)
    with _client(request) as client:
        if request.mode == "blocking":
            return send_from_threads(request, lambda _: client.enqueue(NOOP, request.payload))
        # `enqueue_async` calls `enqueue` in a thread of the loop's.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(request.settings["pool"]))
        return await send_from_tasks(request, lambda _: client.enqueue_async(NOOP, request.payload))


async def batch(request: Request) -> Answer:
    request.run_sql(CLEAR)
    with _client(request) as client, _engine(request, 1) as engine, engine.connect() as connection:
        began = time.perf_counter()
        for _ in range(request.count):
            client.enqueue_in_transaction(connection, NOOP, request.payload)
        connection.commit()
        return {"seconds": time.perf_counter() - began}


async def drain(request: Request) -> Answer:
    if request.fill:
        await batch(request)
        request.run_sql("VACUUM ANALYZE")
    await asyncio.to_thread(_register_queue, request)
    countdown = Countdown(request.count)
    _configure(request)

    @DBOS.workflow(name=NOOP["workflow_name"])
    def noop(_payload: dict[str, Any]) -> None:
        countdown()

    began = time.perf_counter()
    async with _launched():
        await countdown.wait()
        return await until_done(request, began, UNFINISHED, FINISHED)


async def latency(request: Request) -> Answer:
    request.run_sql(CLEAR)
    await asyncio.to_thread(_register_queue, request)
    _configure(request)
    sends = SingleSends(request)

    @DBOS.workflow(name=NOOP["workflow_name"])
    def noop(payload: dict[str, Any]) -> None:
        sends.handled(payload["sent"])

    async with _launched():
        return await sends.latencies()


async def sender(request: Request) -> Answer:
    with _client(request) as client:

        async def enqueue(payload: dict[str, Any]) -> None:
            client.enqueue(NOOP, payload)

        return await send_when_asked(request, enqueue)


async def call(request: Request) -> Answer:
    """Start a workflow in the same process and wait for its result: no queue and no other process between."""
    request.run_sql(CLEAR)
    _configure(request)

    @DBOS.workflow(name=NOOP["workflow_name"])
    def noop(_payload: dict[str, Any]) -> None:
        pass

    async with _launched():
        return await asyncio.to_thread(
            send_from_threads, request, lambda _: DBOS.start_workflow(noop, request.payload).get_result()
        )


if __name__ == "__main__":
    main(
        {
            "setup": setup,
            "send": send,
            "batch": batch,
            "drain": drain,
            "latency": latency,
            "send-when-asked": sender,
            "call": call,
        },
        SETTINGS,
    )
