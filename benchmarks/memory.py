"""How much memory a worker needs beside a long queue."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import stock
from benchmarks.harness import Bench, Contender, Figure, at_most, ours
from benchmarks.program import Answer


def measure(bench: Bench) -> Iterator[Figure]:
    """The most that a worker of concurrency 100 had at once. One run: it takes minutes, and is no matter of luck."""
    count = bench.size(1_000_000, 5000)
    for mode, tasks in (("async", 1), ("blocking", 16)):
        worker = ours("drain", mode, tasks=tasks, concurrency=100, count=count)
        done = _drain(bench, worker, count)
        settings = {**done["settings"], "commands": count}
        yield Figure(f"memory, {mode} worker", "MB", [done["peak_mb"]], at_most(100, "value"), settings=settings)


def _drain(bench: Bench, worker: Contender, count: int) -> Answer:
    with bench.database() as dsn:
        stock.send(dsn, count)
        return bench.run(worker, dsn)
