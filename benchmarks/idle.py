"""What a worker costs that has nothing to do."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from benchmarks.harness import Bench, Figure, answer_of, at_most, ours
from benchmarks.ours import wait_for_workers
from benchmarks.program import Answer

_SETTLE_SECONDS = 5  # until its pauses are as long as they become
_STATEMENT = re.compile(r"LOG:  (?:execute [^:]*|statement):")


def measure(bench: Bench) -> Iterator[Figure]:
    """Statements, counted in the server's log, and processor time."""
    race = bench.race({"ours": partial(_idle, bench, bench.size(30, 2))})
    yield race.figure("idle: statements", "ours", itemgetter("statements"), bar=at_most(2, "value"))
    yield race.figure("idle: share of a core", "ours", itemgetter("percent"), "%", bar=at_most(1, "value"))


def _idle(bench: Bench, seconds: float) -> Answer:
    with bench.database() as dsn:
        bench.administer("alter database {} set log_statement = 'all'", str(conninfo_to_dict(dsn)["dbname"]))
        with bench.running(ours("serve"), dsn) as worker:
            wait_for_workers(dsn)
            time.sleep(bench.size(_SETTLE_SECONDS, 0))
            logged, used = len(bench.log()), _processor_seconds(worker.pid)
            time.sleep(seconds)
            statements = len(_STATEMENT.findall(bench.log()[logged:]))
            used = _processor_seconds(worker.pid) - used
            worker.terminate()
            done = answer_of(worker)
    return {"statements": statements / seconds, "percent": 100 * used / seconds, "settings": done["settings"]}


def _processor_seconds(process: int) -> float:
    """Return how much processor time a process has used, in its own code and the kernel's."""
    fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
