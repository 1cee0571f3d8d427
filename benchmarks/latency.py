"""How long it takes from `send` to the handler, when the worker idles."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Bench, Figure, at_most, ours, p50, p99
from benchmarks.program import Options

_PAUSE_MS = 50  # on average, from half of it to one and a half: the worker idles when the next one comes
_SHORT_PAUSE_MS = 10
_COUNT = 60  # in each of five rounds


def measure(bench: Bench) -> Iterator[Figure]:
    """Single sends from one process to an idle worker in another; async and `def` handlers; and at short pauses.

    Idle virtual cores wake slowly, which meets everybody alike.
    """
    work: Options = {"count": bench.size(_COUNT, 5), "pause_ms": _PAUSE_MS}
    short = {**work, "pause_ms": _SHORT_PAUSE_MS}
    peers = bench.peers("latency", mode="async", **work)
    contenders = {"async": ours("latency", **work), "def": ours("latency", "blocking", **work)}
    race = bench.race({**contenders, "short pauses": ours("latency", **short), **peers})
    for who in ("async", "def"):
        yield race.figure(f"latency {who} p50", who, p50, "ms", bar=at_most(2.5, "value"))
        yield race.figure(f"latency {who} p99", who, p99, "ms", bar=at_most(8, "value"))
    yield race.figure("latency, short pauses, p50", "short pauses", p50, "ms")
    yield race.figure("latency, short pauses, p99", "short pauses", p99, "ms")
    for name, measured in (("latency async p50", p50), ("latency async p99", p99)):
        yield from race.against_all(name, "async", measured, "ms", dict.fromkeys(peers, at_most(1)))
