"""How fast one command a call is, from tasks, threads and processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from operator import itemgetter

from benchmarks.harness import (
    Bench,
    Contender,
    Figure,
    answer_of,
    at_least,
    at_most,
    ceiling,
    ours,
    p50,
    p99,
    rate,
)
from benchmarks.program import Answer, Options

_OF_PEERS = 5000  # of two thousand a second, that is enough for a rate
_START_SECONDS = 0.5  # a process, for so many interpreters to start on two cores


def measure(bench: Bench) -> Iterator[Figure]:
    """64 tasks; 1, 16 and 64 threads; 16 processes."""
    yield from _tasks(bench)
    yield from _one_thread(bench)
    for threads in (16, 64):
        yield from _threads(bench, threads)
    yield from _processes(bench)


def _tasks(bench: Bench) -> Iterator[Figure]:
    work: Options = {"count": bench.size(20_000, 500), "tasks": 64}
    peers = bench.peers("send", mode="async", **{**work, "count": bench.size(_OF_PEERS, 500)})
    race = bench.race({"ours": ours("send", **work), **peers})
    yield race.figure("send 64 tasks", "ours", rate)
    yield race.figure("send 64 tasks p99", "ours", p99, "ms")
    yield from race.against_all("send 64 tasks", "ours", rate, "/s", dict.fromkeys(peers, at_least(4)))


def _one_thread(bench: Bench) -> Iterator[Figure]:
    work: Options = {"count": bench.size(3000, 100), "tasks": 1}
    race = bench.race(
        {
            "ours": ours("send", "blocking", **work),
            "insert": ceiling("send", "insert", **work),
            "send_v1": ceiling("send", "function", **work),
        }
    )
    bars = {"insert": at_most(1.25), "send_v1": None}
    yield from race.against_all("send 1 thread p50", "ours", p50, "ms", bars)
    yield from race.against_all("send 1 thread p99", "ours", p99, "ms", {"insert": None})


def _threads(bench: Bench, threads: int) -> Iterator[Figure]:
    work: Options = {"count": bench.size(20_000, 500), "tasks": threads}
    peers = bench.peers("send", mode="blocking", **{**work, "count": bench.size(_OF_PEERS, 500)})
    race = bench.race(
        {
            "ours": ours("send", "blocking", **work),
            "insert": ceiling("send", "insert", **work),
            "send_v1": ceiling("send", "function", **work),
            **peers,
        }
    )
    name = f"send {threads} threads"
    bars = {"insert": at_least(1.5), "send_v1": None, **dict.fromkeys(peers, at_least(5))}
    yield from race.against_all(name, "ours", rate, "/s", bars)
    yield race.figure(f"{name} p99", "ours", p99, "ms", against="insert", bar=at_most(1))
    yield race.figure(f"{name} sending at once", "ours", itemgetter("sending"), "", bar=at_most(4, "value"))


def _processes(bench: Bench) -> Iterator[Figure]:
    processes = bench.size(16, 2)
    work: Options = {"count": bench.size(1000, 20), "tasks": 1}
    senders = {"ours": ours("send", "blocking", **work), "insert": ceiling("send", "insert", **work)}
    race = bench.race({name: partial(_together, bench, sender, processes) for name, sender in senders.items()})
    yield race.figure("send 16 processes", "ours", rate, against="insert", bar=at_least(0.8), processes=processes)


def _together(bench: Bench, sender: Contender, processes: int) -> Answer:
    """Let all processes send at once: from the first one's start to the last one's end."""
    with bench.database() as dsn:
        bench.run(Contender(sender.program, "setup"), dsn)
        at = time.monotonic() + _START_SECONDS * processes
        answers = [answer_of(process) for process in [bench.start(sender, dsn, start_at=at) for _ in range(processes)]]
    seconds = max(each["ended"] for each in answers) - min(each["began"] for each in answers)
    return {"count": sum(each["count"] for each in answers), "seconds": seconds}
