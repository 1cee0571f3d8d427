"""Whether more worker processes do more, without getting into each other's way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from operator import itemgetter

import psycopg

from benchmarks import stock
from benchmarks.harness import Bench, Figure, answer_of, at_least, at_most, ours, rate
from benchmarks.ours import wait_for_workers
from benchmarks.program import Answer

_START_SECONDS = 2.0
_TROUBLE = ("still waiting for", "deadlock detected")  # log_lock_waits tells of waits above deadlock_timeout
_LEFT = "SELECT FROM commandbus.command LIMIT 1"
_LAST = "SELECT extract(epoch FROM max(finished_at))::float8 FROM commandbus.commands"


def measure(bench: Bench) -> Iterator[Figure]:
    """One, two and four processes on one queue."""
    names = {1: "one process", 2: "two processes", 4: "four processes"}
    race = bench.race({name: partial(_drain, bench, number) for number, name in names.items()})
    yield race.figure("drain by two processes", names[2], rate, against=names[1], bar=at_least(1.2))
    yield race.figure("drain by four processes", names[4], rate, against=names[2], bar=at_least(1.0))
    for name in (names[2], names[4]):
        yield race.figure(f"lock waits, {name}", name, itemgetter("troubles"), "", bar=at_most(0, "value"))


def _drain(bench: Bench, processes: int) -> Answer:
    """Let so many processes empty a queue: from their common start to the last completion, by the server's clock."""
    count = bench.size(60_000, 1000)
    with (
        bench.database() as dsn,
        psycopg.connect(dsn, autocommit=True) as connection,
        contextlib.ExitStack() as running,
    ):
        stock.send(dsn, count)
        known = len(bench.log())
        at = time.monotonic() + _START_SECONDS
        workers = [running.enter_context(bench.running(ours("serve"), dsn, start_at=at)) for _ in range(processes)]
        wait_for_workers(dsn, processes)
        while connection.execute(_LEFT).rowcount:
            time.sleep(0.2)
        for worker in workers:
            worker.terminate()
        answers = [answer_of(worker) for worker in workers]
        began = min(each["began"] for each in answers) + time.time() - time.monotonic()
        ((ended,),) = connection.execute(_LAST).fetchall()
        log = bench.log()[known:]
    troubles = sum(log.count(words) for words in _TROUBLE)
    settings = {"processes": processes, **answers[0]["settings"]}
    return {"count": count, "seconds": ended - began, "troubles": troubles, "settings": settings}
