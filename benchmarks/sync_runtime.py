"""What the way from a thread to the loop and back costs."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Bench, Figure, at_least, ours, p50, rate


def measure(bench: Bench) -> Iterator[Figure]:
    """Calls of an empty coroutine function, from one thread and from 16; beside `run_coroutine_threadsafe`."""
    for threads, bar in ((1, None), (16, at_least(2))):
        work = {"count": bench.size(50_000, 1000), "tasks": threads}
        race = bench.race({way: ours("hop", "blocking", way=way, **work) for way in ("runtime", "threadsafe")})
        yield race.figure(f"calls from {threads} threads", "runtime", rate, against="threadsafe", bar=bar)
        yield race.figure(f"calls from {threads} threads p50", "runtime", p50, "ms", against="threadsafe")
