"""How many processes of three steps one program starts and carries through, whether that lasts, and its memory.

Run as a program of its own by the harness: it keeps some hundred processes under way until so many have ended.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg

from benchmarks.harness import Bench, Contender, Figure, at_least
from benchmarks.program import Answer, Options, main, memory_mb
from commandbus import (
    Command,
    CommandBus,
    Finish,
    HandlerContext,
    HandlerRegistry,
    Process,
    Processes,
    ProcessStatus,
    Reply,
    Send,
    Worker,
)

_UNDER_WAY = 500
_STARTERS = 32
_TRANSACTIONS = 16


@dataclass
class Progress:
    """The state: how far it is."""

    steps: int = 0


class Three(Process[Progress], domain="bench"):
    """Three steps, one after the other, each with an undo that nobody needs."""

    def start(self, state: Progress) -> Send:
        """Send the first."""
        return self._step(state)

    def on_step(self, state: Progress, reply: Reply) -> Send | Finish:  # noqa: ARG002 - it always succeeds
        """Send the next, or finish."""
        state.steps += 1
        return Finish(state.steps) if state.steps == 3 else self._step(state)  # noqa: PLR2004 - see the name

    def _step(self, state: Progress) -> Send:
        return Send("bench", "Step", {"step": state.steps}, undo=("bench", "Undo", {"step": state.steps}))


def measure(bench: Bench) -> Iterator[Figure]:
    """One run: it takes minutes. The second half is held against the first."""
    count = bench.size(100_000, 100)
    with bench.database() as dsn:
        done = bench.run(Contender((sys.executable, "-m", "benchmarks.process"), "flow", {"count": count}), dsn)
    settings = {"processes": count, "under_way": _UNDER_WAY, "transactional_connections": _TRANSACTIONS}
    first, second = done["halves"]
    yield Figure("processes of three steps", "/s", [done["rate"]], settings=settings)
    yield Figure("the second half of them", "/s", [second], at_least(0.8), "the first half", [first], settings=settings)
    yield Figure("memory of starter and worker", "MB", [done["peak_mb"]], settings=settings)
    yield Figure("kept of each process", "B", [done["bytes"] / count], settings=settings)


def flow(options: Options) -> Answer:
    """Start so many processes, some hundred at a time, and work until they have ended."""
    return asyncio.run(_flow(options))


async def _flow(options: Options) -> Answer:
    count, ended_at = options["count"], []
    room = asyncio.Semaphore(_UNDER_WAY)
    numbers = iter(range(count))
    registry = HandlerRegistry()
    registry.register_process(Three)

    @registry.handler("bench", "Step")
    async def step(command: Command, _: HandlerContext) -> None:
        if command.data["step"] == 2:  # noqa: PLR2004 - the last of 0, 1, 2
            ended_at.append(time.monotonic())
            room.release()

    async def start(processes: Processes) -> None:
        for _ in numbers:
            await room.acquire()
            await processes.start_process(Three, Progress())

    async with CommandBus(options["dsn"]) as bus:
        worker = Worker(bus, "bench", registry, transactional_connections=_TRANSACTIONS)
        working = asyncio.create_task(worker.run())
        began = time.monotonic()
        await asyncio.gather(*(start(Processes(bus)) for _ in range(_STARTERS)))
        while (await Processes(bus).query_processes(status=ProcessStatus.RUNNING, limit=1)).items:  # noqa: ASYNC110 - the database tells
            await asyncio.sleep(0.02)
        seconds = time.monotonic() - began
        worker.stop()
        await working
    middle = ended_at[count // 2 - 1]
    halves = [count // 2 / (middle - began), (count - count // 2) / (ended_at[-1] - middle)]
    with psycopg.connect(options["dsn"]) as connection:
        sizes = connection.execute(
            "SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c "
            "WHERE c.relnamespace = 'commandbus'::regnamespace AND c.relname LIKE 'process%' AND c.relkind = 'r'"
        ).fetchone()
    return {
        "rate": count / seconds,
        "halves": halves,
        "peak_mb": memory_mb(peak=True),
        "bytes": int(sizes[0]) if sizes else 0,
    }


if __name__ == "__main__":
    main({"flow": flow})
