"""How fast a large batch is."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Bench, Figure, at_least, ceiling, ours, rate
from benchmarks.program import Options


def measure(bench: Bench) -> Iterator[Figure]:
    """`send_batch` beside what PostgreSQL takes in as plain rows."""
    work: Options = {"count": bench.size(100_000, 5000)}
    peers = bench.peers("batch", **work)
    race = bench.race(
        {
            "ours": ours("batch", **work),
            "insert": ceiling("batch", "insert", **work),
            "copy": ceiling("batch", "copy", **work),
            **peers,
        }
    )
    bars = {"insert": at_least(0.5), "copy": None, **dict.fromkeys(peers, at_least(1))}
    yield from race.against_all("send_batch", "ours", rate, "/s", bars)
