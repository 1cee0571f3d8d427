"""Whether dropping a week of finished commands disturbs anybody."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from operator import itemgetter

import psycopg

from benchmarks import stock
from benchmarks.harness import Bench, Figure, answer_of, at_most, ours
from benchmarks.ours import wait_for_workers
from benchmarks.program import Answer

_LONG_AGO, _RETENTION, _LONGER = timedelta(days=60), timedelta(days=30), timedelta(days=90)
_RATE = 500.0
_PERIOD = 0.1
_BEFORE = 2.0


def measure(bench: Bench) -> Iterator[Figure]:
    """The drop, and the slowest send and the slowest way to the handler while it runs."""
    count = bench.size(1_000_000, 20_000)
    race = bench.race({"drop": partial(_drop, bench, count)})
    yield race.figure(f"retention of {count:,}", "drop", itemgetter("seconds"), "s", bar=at_most(1, "value"))
    for name in ("sends", "handling"):
        yield race.figure(f"slowest of {name}", "drop", itemgetter(name), "ms", bar=at_most(100, "value"))


def _drop(bench: Bench, count: int) -> Answer:
    with bench.database() as dsn:
        stock.finish(dsn, count, ago=_LONG_AGO)
        stock.settle(dsn)
        stock.keep(dsn, _LONGER)  # or the worker would drop it as it starts
        with bench.running(ours("serve", period_seconds=_PERIOD), dsn) as worker:
            wait_for_workers(dsn)
            stock.keep(dsn, _RETENTION)
            flow = ours("flow", tasks=16, rate=_RATE, seconds=2 * _BEFORE, period_seconds=_PERIOD)
            at = time.monotonic() + 1
            with bench.running(flow, dsn, start_at=at) as sender:
                time.sleep(1 + _BEFORE)
                began = time.monotonic()
                weeks = _weeks(dsn)
                ended = time.monotonic()
                sent = answer_of(sender)
            worker.terminate()
            handled = answer_of(worker)
    if not weeks:
        raise RuntimeError("no week was dropped: nothing was measured")
    return {
        "seconds": ended - began,
        "sends": _slowest(sent, began, ended),
        "handling": _slowest(handled, began, ended),
        "settings": {"rate": _RATE},
    }


def _weeks(dsn: str) -> list[str]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        found = connection.execute("SELECT week, blocked_by FROM commandbus.drop_expired_v1()").fetchall()
    return [week for week, blocked_by in found if blocked_by is None]


def _slowest(answer: Answer, began: float, ended: float) -> float:
    """Return the highest latency around the drop, in ms."""
    around = [p["max"] for p in answer["periods"] if began - _PERIOD <= p["began"] <= ended + 2 * _PERIOD]
    return max(around, default=0.0)
