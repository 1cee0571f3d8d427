"""How long it takes from `send` to the handler, when the worker idles."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Bench, Figure, at_most, ours, p50, p99
from benchmarks.program import Options


def measure(bench: Bench) -> Iterator[Figure]:
    """Single sends from one process to an idle worker in another; async, and with `def` handlers.

    Idle virtual cores wake slowly, which meets everybody alike.
    """
    work: Options = {"count": bench.size(300, 5)}
    peers = bench.peers("latency", mode="async", **work)
    race = bench.race_all({"ours": ours("latency", **work), "blocking": ours("latency", "blocking", **work), **peers})
    rivals = dict.fromkeys(peers, at_most(1))
    for who, name in (("ours", "async"), ("blocking", "blocking")):
        yield race.figure(f"latency {name} p50", who, p50, "ms", bar=at_most(2.5, "value"))
        yield race.figure(f"latency {name} p99", who, p99, "ms", bar=at_most(8, "value"))
    yield from race.against_all("latency async p50", "ours", p50, "ms", rivals)
    yield from race.against_all("latency async p99", "ours", p99, "ms", rivals)
