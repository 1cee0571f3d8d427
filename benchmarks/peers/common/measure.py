"""What is measured alike for all Python peers: sends, a drain, single sends to an idle worker."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from peer import Answer, Request

WARM_UP = 10  # single sends that are not measured: plans, caches and code are cold
SETTLE_SECONDS = 1.0  # until a worker listens; none of the peers tells when it does


async def send_from_tasks(request: Request, send: Callable[[int], Awaitable[object]]) -> Answer:
    """Measure `count` sends by `tasks` tasks; `send` gets the number of the task that calls."""
    latencies: list[float] = []

    async def sender(number: int) -> None:
        for _ in range(number, request.count, request.tasks):
            began = time.perf_counter()
            await send(number)
            latencies.append((time.perf_counter() - began) * 1e3)

    began = time.perf_counter()
    await asyncio.gather(*map(sender, range(request.tasks)))
    return {"seconds": time.perf_counter() - began, "latencies_ms": latencies}


def send_from_threads(request: Request, send: Callable[[int], object]) -> Answer:
    """Measure `count` sends by `tasks` threads; `send` gets the number of the thread that calls."""
    latencies: list[float] = []
    ready = threading.Barrier(request.tasks + 1)

    def sender(number: int) -> None:
        ready.wait()
        for _ in range(number, request.count, request.tasks):
            began = time.perf_counter()
            send(number)
            latencies.append((time.perf_counter() - began) * 1e3)

    threads = [threading.Thread(target=sender, args=(number,), daemon=True) for number in range(request.tasks)]
    for thread in threads:
        thread.start()
    ready.wait(60)
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if len(latencies) != request.count:
        raise RuntimeError(f"{len(latencies)} of {request.count} sends succeeded")
    return {"seconds": seconds, "latencies_ms": latencies}


class Countdown:
    """The handler calls it, from whatever thread; `wait` returns when it has done so `count` times."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._done = asyncio.Event()

    def __call__(self) -> None:
        """Note that a handler has run."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self._loop.call_soon_threadsafe(self._done.set)

    async def wait(self, worker: asyncio.Task[Any] | None = None) -> None:
        """Wait for the last call; fail if the worker ends before it."""
        waiting = asyncio.ensure_future(self._done.wait())
        await asyncio.wait({waiting, worker or waiting}, return_when=asyncio.FIRST_COMPLETED)
        if worker and worker.done():
            waiting.cancel()
            raise RuntimeError("the worker ended too early") from worker.exception()


async def until_done(request: Request, began: float, unfinished: str, finished: str) -> Answer:
    """Wait until the server has no unfinished job; both texts are queries that count jobs."""
    with request.connect() as connection:
        while connection.execute(unfinished.encode()).fetchone() != (0,):  # noqa: ASYNC110 - what it waits for is there
            await asyncio.sleep(0.002)
        seconds = time.perf_counter() - began
        row = connection.execute(finished.encode()).fetchone()
    if row != (request.count,):
        raise RuntimeError(f"of {request.count} jobs, {row} are finished")
    return {"seconds": seconds}


class SingleSends:
    """Sends one job at a time from another process, each a pause after the one before it was handled.

    The payload carries the moment of the send to the handler, which calls `handled` with it first thing:
    CLOCK_MONOTONIC is the same for all processes of a machine.
    """

    def __init__(self, request: Request) -> None:
        self._latencies: list[float] = []
        self._all = Countdown(WARM_UP + request.count)
        asked = {key: value for key, value in asdict(request).items() if key != "settings"}  # it has its own
        command = [sys.executable, sys.argv[0], "send-when-asked", json.dumps(asked)]
        self._sender = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, bufsize=0)

    def _ask(self) -> None:
        if self._sender.stdin and not self._sender.stdin.closed:
            self._sender.stdin.write(b"\n")

    def handled(self, sent_ns: int) -> None:
        """Note that the handler of a job has begun; called in that handler, from whatever thread."""
        self._latencies.append((time.monotonic_ns() - sent_ns) / 1e6)
        self._all()
        self._ask()

    async def latencies(self, worker: asyncio.Task[Any] | None = None) -> Answer:
        """Let the other process send; return what was measured."""
        await asyncio.sleep(SETTLE_SECONDS)
        self._ask()
        await self._all.wait(worker)
        self._sender.kill()  # it was asked for one more
        self._sender.wait()
        return {"latencies_ms": self._latencies[WARM_UP:]}


async def send_when_asked(request: Request, send: Callable[[dict[str, Any]], Awaitable[object]]) -> Answer:
    """Be the other process of `SingleSends`: a send for each line of stdin, after a pause."""
    for _ in sys.stdin:
        await asyncio.sleep(request.pause_ms * random.uniform(0.5, 1.5) / 1e3)  # not in step with any poll
        await send({**request.payload, "sent": time.monotonic_ns()})
    return {}
