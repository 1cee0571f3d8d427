"""Whether everything stays level for ten minutes at 80 % of what one sender and one worker can do."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import psycopg

from benchmarks.harness import Bench, Figure, answer_of, at_most, ours
from benchmarks.ours import wait_for_workers
from benchmarks.program import Answer, memory_mb

_SHARE = 0.8
_SIZE = "SELECT pg_table_size('commandbus.command'), pg_indexes_size('commandbus.command')"


def measure(bench: Bench) -> Iterator[Figure]:
    """The last third against the second: the first fills caches and free space."""
    with bench.database() as dsn:
        peak, _ = _run(bench, dsn, rate=0, seconds=bench.size(30, 2))
    # What is sent in excess of what is handled waits; the slower of the two is what can be sustained.
    pace = _SHARE * peak["handled"] / peak["seconds"]
    with bench.database() as dsn:
        steady, samples = _run(bench, dsn, rate=pace, seconds=bench.size(600, 3))
    periods = [period["p99"] for period in steady["periods"]]
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    for name, unit, values in (("hot table", "MB", columns["table"]), ("its indexes", "MB", columns["indexes"])):
        yield _level(f"sustained: {name}", unit, values, rate=round(pace))
    yield _level("sustained: memory", "MB", columns["memory"], rate=round(pace))
    yield _level("sustained: p99", "ms", periods, rate=round(pace))
    yield Figure("sustained: most memory", "MB", [max(columns["memory"])], at_most(100, "value"))


def _level(name: str, unit: str, values: list[float], **settings: object) -> Figure:
    third = max(1, len(values) // 3)
    return Figure(name, unit, values[-third:], at_most(1.25), "before", values[-2 * third : -third] or values, settings)


def _run(bench: Bench, dsn: str, *, rate: float, seconds: float) -> tuple[Answer, list[dict[str, float]]]:
    """Send and work for so long, and look at the sizes meanwhile."""
    period = seconds / 10
    samples = []
    with bench.running(ours("serve", period_seconds=period), dsn) as worker:
        wait_for_workers(dsn)
        with bench.running(ours("flow", tasks=64, rate=rate, seconds=seconds), dsn) as sender:
            while sender.poll() is None:
                samples.append(_sample(dsn, worker))
                time.sleep(seconds / 60)
            answer_of(sender)
        worker.terminate()
        served = answer_of(worker)
    return {**served, "handled": served["count"], "seconds": seconds}, samples


def _sample(dsn: str, worker: subprocess.Popen[str]) -> dict[str, float]:
    with psycopg.connect(dsn) as connection:
        ((table, indexes),) = connection.execute(_SIZE).fetchall()
    return {"table": table / 2**20, "indexes": indexes / 2**20, "memory": memory_mb(worker.pid)}
