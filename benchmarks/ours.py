"""commandbus as a contender; see `program.py`. Beside the contract: `serve`, a worker until SIGTERM, and `flow`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import psycopg

from benchmarks import stock
from benchmarks.program import (
    DOMAIN,
    TYPE,
    Answer,
    Latencies,
    Options,
    answer,
    main,
    memory_mb,
    send_in_threads,
    started,
    watching,
)
from commandbus import Command, CommandBus, HandlerRegistry, SendRequest, Worker
from commandbus.migrate import migrate
from commandbus.sync import SyncCommandBus, SyncRuntime, SyncWorker

_LOOK_SECONDS = 0.02
_HOUR = 3600.0
_PATIENCE = timedelta(seconds=30)
_WARM_UP = 10  # single sends that are not measured, as with the peers: plans, caches and code are cold


def setup(options: Options) -> Answer:
    """Make the tables."""
    migrate(options["dsn"])
    return {}


# -- sending -----------------------------------------------------------------------------------------------------------


def send(options: Options) -> Answer:
    """Send one command a call, from tasks or threads that share a bus."""
    if options["mode"] == "blocking":
        with SyncCommandBus(options["dsn"]) as bus:
            call = partial(bus.send, DOMAIN, TYPE, options["payload"])
            return send_in_threads(options, lambda: contextlib.nullcontext(call))
    with watching(options["dsn"]) as seen:
        done = asyncio.run(_send_in_tasks(options))
    return {**done, "connections": seen.most}


async def _send_in_tasks(options: Options) -> Answer:
    latencies: list[float] = []

    async def work(bus: CommandBus, numbers: Iterator[int]) -> None:
        for _ in numbers:
            began = time.monotonic()
            await bus.send(DOMAIN, TYPE, options["payload"])
            latencies.append((time.monotonic() - began) * 1000)

    async def all_of(bus: CommandBus, count: int) -> None:
        numbers = iter(range(count))
        async with asyncio.TaskGroup() as group:
            for _ in range(options["tasks"]):
                group.create_task(work(bus, numbers))

    async with CommandBus(options["dsn"]) as bus:
        await all_of(bus, 2 * options["tasks"])  # connects and prepares
        latencies.clear()
        began = started(options)
        await all_of(bus, options["count"])
        return answer(options["count"], began, latencies_ms=latencies, settings={"tasks": options["tasks"]})


def batch(options: Options) -> Answer:
    """Send all commands in one call."""

    async def run() -> Answer:
        requests = [SendRequest(DOMAIN, TYPE, options["payload"]) for _ in range(options["count"])]
        async with CommandBus(options["dsn"]) as bus:
            await bus.send_batch(requests[:1000])
            began = started(options)
            await bus.send_batch(requests)
            return answer(len(requests), began, settings={"chunk": 1000})

    with watching(options["dsn"]) as seen:
        done = asyncio.run(run())
    return {**done, "connections": seen.most}


# -- working -----------------------------------------------------------------------------------------------------------


class Tally:
    """Counts the handled commands, and says when it was the last one."""

    def __init__(self, options: Options) -> None:
        self.latencies = Latencies(options.get("period_seconds", _HOUR))
        self.marks: list[float] = []  # when each tenth was done
        self.full: Callable[[], object] = lambda: None
        self._count = options.get("count", 0)
        self._numbers = itertools.count(1)

    def add(self, command: Command) -> None:
        """Count one; any thread may."""
        if isinstance(command.data, dict) and "at" in command.data:
            now = time.monotonic()
            self.latencies.add(now - command.data["at"], now)
        number = next(self._numbers)  # atomic
        if self._count and number % max(1, self._count // 10) == 0:
            self.marks.append(time.monotonic())
        if number == self._count:
            self.full()

    def total(self) -> int:
        """Return how many were counted, at the end."""
        return next(self._numbers) - 1


def drain(options: Options) -> Answer:
    """Handle so many commands that wait, or all; each handler sleeps for `sleep_ms`, or does nothing."""
    if options.get("fill"):
        _create_batch(options) if options.get("in_batch") else stock.send(options["dsn"], options["count"])
        stock.settle(options["dsn"])
    tally = Tally(options)
    with watching(options["dsn"]) as seen:
        done = _work(options, tally)
    return {**done, "connections": seen.most, "marks": tally.marks, "peak_mb": memory_mb(peak=True)}


def _create_batch(options: Options) -> None:
    with SyncCommandBus(options["dsn"]) as bus:
        bus.create_batch(DOMAIN, [SendRequest(DOMAIN, TYPE, options["payload"])] * options["count"])


def serve(options: Options) -> Answer:
    """Work until SIGTERM. Answers the latencies of the commands that carry the time of their sending."""
    tally = Tally(options)
    done = _work(options, tally)
    tally.latencies.close()
    return {**done, "periods": tally.latencies.periods}


def _registry(options: Options, tally: Tally) -> HandlerRegistry:
    sleep = options.get("sleep_ms", 0) / 1000
    registry = HandlerRegistry()

    def handle(command: Command, _: object) -> None:
        tally.add(command)
        if sleep:
            time.sleep(sleep)

    async def ahandle(command: Command, _: object) -> None:
        tally.add(command)
        if sleep:
            await asyncio.sleep(sleep)

    registry.handler(DOMAIN, TYPE)(handle if options["mode"] == "blocking" else ahandle)
    return registry


def _work(options: Options, tally: Tally) -> Answer:
    if options["mode"] == "blocking":
        return _work_in_threads(options, tally)
    return asyncio.run(_work_in_tasks(options, tally))


async def _work_in_tasks(options: Options, tally: Tally) -> Answer:
    async with CommandBus(options["dsn"]) as bus:
        worker = Worker(bus, DOMAIN, _registry(options, tally), concurrency=options["concurrency"])
        tally.full = worker.stop
        began = started(options)
        await worker.run()
        return answer(tally.total(), began, settings={"concurrency": options["concurrency"]})


def _work_in_threads(options: Options, tally: Tally) -> Answer:
    settings = {"concurrency": options["concurrency"], "thread_pool_size": options["tasks"]}
    with SyncCommandBus(options["dsn"]) as bus:
        worker = SyncWorker(bus, DOMAIN, _registry(options, tally), **settings)
        tally.full = worker.stop
        began = started(options)
        worker.run()
        return answer(tally.total(), began, settings=settings)


# -- there and back ----------------------------------------------------------------------------------------------------


def call(options: Options) -> Answer:
    """Call from threads, each of which pauses before the next, a worker in another process whose handlers are async."""
    served = {"dsn": options["dsn"], "mode": "async", "concurrency": options["concurrency"]}

    def ask(bus: SyncCommandBus) -> None:
        bus.call(DOMAIN, TYPE, options["payload"], timeout=_PATIENCE)

    with serving(served), SyncCommandBus(options["dsn"]) as bus:
        return send_in_threads(options, lambda: contextlib.nullcontext(partial(ask, bus)))


@contextlib.contextmanager
def serving(options: Options) -> Iterator[subprocess.Popen[str]]:
    """Let a worker in another process serve while this is open."""
    command = [sys.executable, "-m", "benchmarks.ours", "serve", json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:  # noqa: S603 - ourselves
        try:
            wait_for_workers(options["dsn"])
            yield worker
        finally:
            worker.terminate()
            worker.wait()  # what it has to say fits into the pipe


# -- from sender to handler --------------------------------------------------------------------------------------------


def latency(options: Options) -> Answer:
    """Send single commands, each after a pause, to a worker in another process; `mode` is the worker's."""
    served = {"dsn": options["dsn"], "mode": options["mode"], "tasks": options["tasks"], "period_seconds": 0}
    pause = options["pause_ms"] / 1000

    async def run() -> None:
        async with CommandBus(options["dsn"]) as bus:
            for _ in range(_WARM_UP + options["count"]):
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311 - not in step with any poll
                await bus.send(DOMAIN, TYPE, {**options["payload"], "at": time.monotonic()})
            await asyncio.sleep(1)

    with serving(served) as worker:
        asyncio.run(run())
        worker.terminate()
        done: Answer = json.loads(worker.communicate()[0])
    latencies = [period["max"] for period in done["periods"]][_WARM_UP:]  # one in each
    return {"latencies_ms": latencies, "settings": {"pause_ms": options["pause_ms"], **done["settings"]}}


def wait_for_workers(dsn: str, number: int = 1) -> None:
    """Return when so many workers have announced themselves in this database, and have claimed for the first time."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        while connection.execute("SELECT FROM commandbus.workers").rowcount < number:
            time.sleep(_LOOK_SECONDS)
    time.sleep(0.5)


def flow(options: Options) -> Answer:
    """Send for some time at some rate (0: as fast as it goes), from tasks."""

    async def run() -> Answer:
        latencies = Latencies(options.get("period_seconds", _HOUR))
        numbers = itertools.count()
        async with CommandBus(options["dsn"]) as bus:
            began = started(options)

            async def work() -> None:
                while (now := time.monotonic()) - began < options["seconds"]:
                    number = next(numbers)
                    due = began + number / options["rate"] if options["rate"] else now
                    await asyncio.sleep(max(0.0, due - now))
                    at = time.monotonic()
                    await bus.send(DOMAIN, TYPE, {**options["payload"], "at": at})
                    latencies.add((ended := time.monotonic()) - at, ended)

            async with asyncio.TaskGroup() as group:
                for _ in range(options["tasks"]):
                    group.create_task(work())
        latencies.close()
        return answer(next(numbers), began, periods=latencies.periods)

    return asyncio.run(run())


# -- the way to the loop -----------------------------------------------------------------------------------------------


def hop(options: Options) -> Answer:
    """Call an empty coroutine function from threads, through the runtime or `run_coroutine_threadsafe`."""

    async def nothing() -> None:
        pass

    with SyncRuntime() as runtime:
        loop = runtime.start()
        ways: dict[str, Callable[[], object]] = {
            "runtime": lambda: runtime.run(nothing),
            "threadsafe": lambda: asyncio.run_coroutine_threadsafe(nothing(), loop).result(),
        }
        return send_in_threads(options, lambda: contextlib.nullcontext(ways[options["way"]]))


ACTIONS = {
    "setup": setup,
    "send": send,
    "batch": batch,
    "drain": drain,
    "latency": latency,
    "call": call,
    "hop": hop,
    "serve": serve,
    "flow": flow,
}

if __name__ == "__main__":
    main(ACTIONS)
