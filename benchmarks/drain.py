"""How fast one worker process empties a queue."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import PYTHON_PEERS, Bench, Figure, at_least, ceiling, ours, rate
from benchmarks.program import Options

_BEST = 400  # of 100 and 400: half of it is a call's batch, and a call has costs of its own; the default is 100
_THREADS = 16
_SLEEP_MS = 5


def measure(bench: Bench) -> Iterator[Figure]:
    """Async no-ops, `def` no-ops in threads, `def` handlers that take 5 ms."""
    yield from _async(bench)
    yield from _threads(bench)
    yield from _sleeping(bench)


def _async(bench: Bench) -> Iterator[Figure]:
    work: Options = {"count": bench.size(40_000, 1000), "fill": True}
    race = bench.race(
        {
            "ours": ours("drain", concurrency=_BEST, **work),
            "concurrency 100": ours("drain", concurrency=100, **work),
            "statements": ceiling("drain", "statements", batch=500, overlap=False, **work),
            "statements overlapping": ceiling("drain", "statements", batch=500, overlap=True, **work),
            "functions": ceiling("drain", "functions", batch=500, overlap=False, **work),
            "functions overlapping": ceiling("drain", "functions", batch=500, overlap=True, **work),
            **bench.peers("drain", mode="async", **work),
        }
    )
    rivals = {"statements": at_least(0.6), "statements overlapping": None, "functions": None}
    rivals |= {
        "functions overlapping": None,
        **dict.fromkeys(PYTHON_PEERS, at_least(2.0)),
        "graphile-worker": at_least(1.0),
    }
    yield from race.against_all("drain async", "ours", rate, "/s", rivals)
    yield from race.against_all("drain async, the default", "concurrency 100", rate, "/s", dict.fromkeys(rivals))


def _threads(bench: Bench) -> Iterator[Figure]:
    work: Options = {"count": bench.size(20_000, 500), "fill": True}
    race = bench.race(
        {
            "ours": ours("drain", "blocking", tasks=_THREADS, **work),
            **bench.peers("drain", mode="async", among=["pgqueuer", "procrastinate", "dbos"], **work),
        }
    )
    yield race.figure("drain 16 threads", "ours", rate, bar=at_least(10_000, "value"))
    rivals = {"pgqueuer": at_least(10 / 14), "procrastinate": at_least(8), "dbos": at_least(8)}
    yield from race.against_all("drain 16 threads", "ours", rate, "/s", rivals)


def _sleeping(bench: Bench) -> Iterator[Figure]:
    count = bench.size(10_000, 320)
    work = ours("drain", "blocking", tasks=_THREADS, count=count, fill=True, sleep_ms=_SLEEP_MS)
    race = bench.race({"ours": work})
    race.answers["16 threads / 5 ms"] = [{"count": _THREADS, "seconds": _SLEEP_MS / 1000}]
    yield race.figure("drain 16 threads of 5 ms", "ours", rate, against="16 threads / 5 ms", bar=at_least(0.8))
