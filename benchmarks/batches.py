"""What it costs to count the commands of a batch."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Bench, Figure, at_least, ours, rate
from benchmarks.program import Options


def measure(bench: Bench) -> Iterator[Figure]:
    """A worker empties a queue whose commands are one batch, beside the same commands without one."""
    work: Options = {"count": bench.size(100_000, 1000), "fill": True, "concurrency": 100}
    race = bench.race({"batch": ours("drain", in_batch=True, **work), "no batch": ours("drain", **work)})
    yield race.figure("drain a batch", "batch", rate, against="no batch", bar=at_least(0.8))
