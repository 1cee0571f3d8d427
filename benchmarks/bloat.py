"""Whether the queue stays fast while an open transaction elsewhere keeps dead rows from being removed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from operator import itemgetter

import psycopg

from benchmarks import stock
from benchmarks.harness import Bench, Figure, at_least, at_most, ours, rate
from benchmarks.program import Answer

_RECOVERED = 0.9
_PATIENCE = 300.0  # seconds for the recovery: autovacuum looks once a minute


def measure(bench: Bench) -> Iterator[Figure]:
    """A drain with the xmin horizon pinned and without, and how soon it is as fast again."""
    race = bench.race({name: partial(_drain, bench, pinned=name == "pinned") for name in ("free", "pinned")})
    yield race.figure("drain, xmin pinned", "pinned", rate, against="free", bar=at_least(0.7))
    yield race.figure("its last tenth", "pinned", _last_tenth, against="free")
    yield race.figure("recovery", "pinned", itemgetter("recovery"), "s", bar=at_most(_PATIENCE, "value"))


def _last_tenth(answer: Answer) -> float:
    *_, before, last = answer["marks"]
    return float(answer["count"] / 10 / (last - before))


def _drain(bench: Bench, *, pinned: bool) -> Answer:
    count, small = bench.size(500_000, 2000), bench.size(20_000, 300)
    with bench.database() as dsn:
        before = _run(bench, dsn, small)
        with _pinned_horizon(dsn) if pinned else contextlib.nullcontext():
            done = _run(bench, dsn, count)
        began = time.monotonic()
        while pinned and time.monotonic() - began < _PATIENCE:
            if rate(_run(bench, dsn, small)) >= _RECOVERED * rate(before) or bench.quick:
                break
        return {**done, "recovery": time.monotonic() - began}


def _run(bench: Bench, dsn: str, count: int) -> Answer:
    """Send and drain so many. No vacuum but the server's own."""
    stock.send(dsn, count)
    return bench.run(ours("drain", count=count), dsn)


@contextlib.contextmanager
def _pinned_horizon(dsn: str) -> Iterator[None]:
    """Hold a snapshot and a transaction id, as a forgotten session does."""
    with psycopg.connect(dsn) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT pg_current_xact_id()")
        yield
        connection.rollback()
