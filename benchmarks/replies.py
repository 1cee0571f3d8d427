"""How long it takes to send a command and have the reply, and how many of that there are in a second."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Bench, Figure, at_least, at_most, ours, p50, p99, rate

_PAUSE_MS = 50  # as in `latency`


def measure(bench: Bench) -> Iterator[Figure]:
    """Blocking calls: one caller and a worker that idles, then as fast as it goes; 64 threads at once.

    The worker is another process. A peer that can only be asked in the process that does the work has that for itself.
    """
    idle = {"tasks": 1, "count": bench.size(60, 5), "pause_ms": _PAUSE_MS}
    alone = ours("call", "blocking", tasks=1, count=bench.size(1000, 5))
    peers = bench.peers("call", among=("dbos",), mode="blocking", **idle)
    race = bench.race({"commandbus": ours("call", "blocking", **idle), "without pauses": alone, **peers})
    yield race.figure("call p50", "commandbus", p50, "ms", bar=at_most(4, "value"))
    yield race.figure("call p99", "commandbus", p99, "ms", bar=at_most(12, "value"))
    yield race.figure("calls without pauses", "without pauses", rate)
    yield race.figure("calls without pauses p50", "without pauses", p50, "ms")
    for name, measured in (("call p50", p50), ("call p99", p99)):
        yield from race.against_all(name, "commandbus", measured, "ms", dict.fromkeys(peers, at_most(1)))
    many = {"tasks": 64, "count": bench.size(20_000, 128)}
    race = bench.race({"commandbus": ours("call", "blocking", **many)})
    yield race.figure("calls from 64 threads", "commandbus", rate, bar=at_least(3000, "value"))
    yield race.figure("calls from 64 threads p99", "commandbus", p99, "ms")
