"""Whether more worker processes do more, without getting into each other's way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import psycopg

from benchmarks import stock
from benchmarks.harness import Bench, Figure, answer_of, at_least, at_most, ours, rate
from benchmarks.program import Answer

_START_SECONDS = 2.0
_TROUBLE = ("still waiting for", "deadlock detected")  # log_lock_waits tells of waits above deadlock_timeout


def measure(bench: Bench) -> Iterator[Figure]:
    """One, two and four processes on one queue."""
    names = {1: "one process", 2: "two processes", 4: "four processes"}
    race = bench.race_all({name: partial(_drain, bench, number) for number, name in names.items()})
    yield race.figure("drain by two processes", names[2], rate, against=names[1], bar=at_least(1.2))
    yield race.figure("drain by four processes", names[4], rate, against=names[2], bar=at_least(1.0))
    for number in (2, 4):
        yield race.figure(f"lock waits, {number} processes", names[number], _troubles, "", bar=at_most(0, "value"))


def _troubles(answer: Answer) -> float:
    return float(answer["troubles"])


def _drain(bench: Bench, processes: int) -> Answer:
    """Let so many processes empty a queue; from the first one's start to the last completion."""
    count = bench.size(60_000, 1000)
    worker = ours("drain", until_empty=True, count=count)
    with bench.database() as dsn:
        stock.send(dsn, count)
        known = len(bench.log())
        at = time.monotonic() + _START_SECONDS
        began = time.time() + _START_SECONDS
        answers = [answer_of(process) for process in [bench.start(worker, dsn, start_at=at) for _ in range(processes)]]
        with psycopg.connect(dsn) as connection:
            (((ended,),)) = connection.execute(
                "SELECT extract(epoch FROM max(finished_at))::float8 FROM commandbus.commands"
            ).fetchall()
    log = bench.log()[known:]
    return {
        "count": sum(each["count"] for each in answers),
        "seconds": ended - began,
        "troubles": sum(log.count(words) for words in _TROUBLE),
        "connections": max(each["connections"] for each in answers),
        "settings": {"processes": processes, **answers[0]["settings"]},
    }
