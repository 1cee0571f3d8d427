"""What the measured programs share, and the contract with the harness.

`PROGRAM ACTION JSON` prints one line of JSON. Actions: setup, send, batch, drain, latency. What it is given: dsn,
count, mode ("async" or "blocking"), tasks (or threads), concurrency, payload; for drain fill: whether it sends first
what it then drains, unmeasured; for latency pause_ms, the mean pause between two sends. What it answers: seconds and
count; of single calls latencies_ms; connections, the most that were seen on the server; settings, whatever belongs
beside the figure; or unsupported, and why. It looks at the clock after it has
connected: starting an interpreter is not what is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import random
import re
import signal
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import psycopg

DOMAIN, TYPE = "bench", "Work"
PAYLOAD = {"account": "ACC-0001042", "amount": 42, "currency": "EUR", "note": "x" * 64}

Options: TypeAlias = dict[str, Any]
Answer: TypeAlias = dict[str, Any]
Action: TypeAlias = Callable[[Options], Answer]

_SESSIONS = (
    "SELECT state = 'active' AND query LIKE '%send_v1%' FROM pg_stat_activity"
    " WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
)
_LOOK_SECONDS = 0.1
_WARM_UP = 5  # sends of each thread that are not measured
_PR_SET_PDEATHSIG = 1


def main(actions: Mapping[str, Action]) -> None:
    """Do what the command line says; not longer than the harness lives, whatever ends it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    action, text = sys.argv[1:]
    options: Options = {"payload": PAYLOAD, "tasks": 1, "concurrency": 100, **json.loads(text)}
    print(json.dumps(actions[action](options)))


def started(options: Options) -> float:
    """Wait for the common start of several processes, if there is one; returns the time."""
    time.sleep(max(0.0, options.get("start_at", 0.0) - time.monotonic()))
    return time.monotonic()


def answer(count: int, began: float, **more: object) -> Answer:
    """Return what a measurement brought that has ended now; the clock is the same in all processes."""
    ended = time.monotonic()
    return {"seconds": ended - began, "count": count, "began": began, "ended": ended, **more}


class Sessions:
    """The most sessions that were seen at once, and the most of them that were sending."""

    most = sending = 0


@contextlib.contextmanager
def watching(dsn: str) -> Iterator[Sessions]:
    """Count the sessions in the database while this is open, ten times a second and at the end."""
    seen, over = Sessions(), threading.Event()

    def watch() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            ending = False
            while not ending:
                ending = over.wait(_LOOK_SECONDS)
                sessions = connection.execute(_SESSIONS).fetchall()
                seen.most = max(seen.most, len(sessions))
                seen.sending = max(seen.sending, sum(bool(sends) for (sends,) in sessions))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def send_in_threads(options: Options, sender: Callable[[], AbstractContextManager[Callable[[], object]]]) -> Answer:
    """Send so many commands from so many threads, each with a `sender()` of its own."""
    numbers = iter(range(options["count"]))
    latencies: list[float] = []
    pause = options.get("pause_ms", 0) / 1000
    ready = threading.Barrier(options["tasks"] + 1)

    def work() -> None:
        with sender() as send:
            for _ in range(_WARM_UP):
                send()  # connects and prepares; plans, caches and code are cold
            ready.wait(60)
            for _ in numbers:
                if pause:  # a sleep of nothing gives the interpreter lock away
                    time.sleep(random.uniform(0.5, 1.5) * pause)  # noqa: S311 - out of step
                began = time.monotonic()
                send()
                latencies.append((time.monotonic() - began) * 1000)

    threads = [threading.Thread(target=work) for _ in range(options["tasks"])]
    with watching(options["dsn"]) as seen:
        for thread in threads:
            thread.start()
        began = started(options)
        ready.wait(60)
        for thread in threads:
            thread.join()
        done = answer(len(latencies), began, latencies_ms=latencies, settings={"threads": options["tasks"]})
    return {**done, "connections": seen.most, "sending": seen.sending}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Latencies:
    """Latencies as they arrive, told per period; only those of the period under way are kept. Of 0 s: of each one."""

    def __init__(self, period_seconds: float) -> None:
        self.periods: list[dict[str, float]] = []
        self._period = period_seconds
        self._began = time.monotonic()
        self._values = array("d")

    def add(self, seconds: float, now: float) -> None:
        """Take one that ended now."""
        if now - self._began >= self._period:
            self.close()
            self._began = now
        self._values.append(seconds * 1000)

    def close(self) -> None:
        """End the period."""
        if self._values:
            told = {"p50": percentile(self._values, 0.5), "p99": percentile(self._values, 0.99)}
            self.periods.append({"began": self._began, "count": len(self._values), **told, "max": max(self._values)})
        self._values = array("d")


def memory_mb(process: int | str = "self", *, peak: bool = False) -> float:
    """Return how much memory a process has, or had at most. Not `getrusage`: it counts the parent's before exec."""
    status = Path(f"/proc/{process}/status").read_text("utf-8")
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status)
    return int(found[1]) / 1024 if found else 0.0
