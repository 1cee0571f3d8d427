"""Whether sends, claims and drains stay as fast beside a long history or a large backlog."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

from benchmarks import stock
from benchmarks.harness import Bench, Figure, at_least, ceiling, ours, rate
from benchmarks.program import Answer

_TOMORROW = timedelta(days=1)


def measure(bench: Bench) -> Iterator[Figure]:
    """The same work in an empty database and in each of the full ones, which stay from round to round.

    Each turn sends as many commands as it then drains, so that the stock stays as large as it is.
    """
    million = bench.size(1_000_000, 10_000)
    stocks: dict[str, Callable[[str], None]] = {
        "empty": lambda _: None,
        f"{10 * million:,} finished": partial(stock.finish, count=10 * million),
        f"{million:,} pending": partial(stock.send, count=million),
        f"{million:,} scheduled": partial(stock.send, count=million, delay=_TOMORROW),
        f"{million:,} of an unknown type": partial(stock.send, count=million, command_type="Unknown"),
        f"{million // 10:,} parked": partial(stock.park, count=million // 10),
    }
    with contextlib.ExitStack() as databases:
        turns = {}
        for name, fill in stocks.items():
            dsn = databases.enter_context(bench.database())
            fill(dsn)
            stock.settle(dsn)
            turns[name] = partial(_turn, bench, dsn)
        race = bench.race(turns)
    for verb in ("send", "claim and complete", "drain"):
        for name in list(stocks)[1:]:
            measured = partial(_rate, verb)
            yield race.figure(f"{verb}, {name}", name, measured, against="empty", bar=at_least(0.9))


def _rate(verb: str, answer: Answer) -> float:
    return rate(answer[verb])


def _turn(bench: Bench, dsn: str) -> Answer:
    count = bench.size(20_000, 300)
    return {
        "send": bench.run(ours("send", tasks=64, count=2 * count), dsn),
        "claim and complete": bench.run(ceiling("drain", "functions", batch=100, overlap=False, count=count), dsn),
        "drain": bench.run(ours("drain", count=count), dsn),
        "settings": {"tasks": 64, "batch": 100, "concurrency": 100},
    }
