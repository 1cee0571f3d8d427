"""The command line of a Python peer's program: `program.py ACTION JSON` prints one JSON object on one line.

`setup` wants an empty database, which is the peer's alone from then on. Every other action begins with empty
tables, except `drain` without `fill`: it takes what a `batch` before it left.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import statistics
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import psycopg

SAMPLE_SECONDS = 0.1
SEARCH_ROUNDS = 3

Answer = dict[str, Any]
Settings = dict[str, Any]


@dataclass
class Request:
    """What the harness asks for, and the settings of the peer to do it with."""

    dsn: str
    count: int = 1000
    mode: str = "async"
    tasks: int = 1  # or threads
    fill: bool = False
    payload: dict[str, Any] = field(default_factory=dict)  # of each job: all peers carry the same
    pause_ms: float = 20.0  # mean time from the handling of one single send to the next send
    settings: Settings = field(default_factory=dict)

    def connect(self) -> psycopg.Connection[Any]:
        """Return a connection of the benchmark, not of the peer."""
        return psycopg.connect(self.dsn, autocommit=True, application_name="benchmark")

    def run_sql(self, *statements: str) -> None:
        """Run statements, each in a transaction of its own."""
        with self.connect() as connection:
            for statement in statements:
                connection.execute(statement.encode())


Action = Callable[[Request], Coroutine[Any, Any, Answer]]


class Connections:
    """Counts, ten times a second, the sessions that others have in the database; `most` is the most seen."""

    def __init__(self, request: Request) -> None:
        self.most = 0
        self._request = request
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND backend_type = 'client backend' AND application_name <> 'benchmark'"
        )
        with self._request.connect() as connection:
            pause = SAMPLE_SECONDS / 64  # short runs are seen too
            while not self._left.wait(pause):
                pause = min(2 * pause, SAMPLE_SECONDS)
                row = connection.execute(query).fetchone()
                self.most = max(self.most, row[0] if row else 0)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()


def _cost(answer: Answer) -> float:
    if "seconds" in answer:
        return float(answer["seconds"])
    return float(statistics.median(answer.get("latencies_ms", [0.0])))


def _run(action: Action, request: Request) -> Answer:
    factory = importlib.import_module("uvloop").new_event_loop if request.settings.get("uvloop") else None
    with Connections(request) as connections, asyncio.Runner(loop_factory=factory) as runner:
        answer = runner.run(action(request))
    return {"count": request.count, **answer, "connections": connections.most, "settings": request.settings}


def _search(action: Action, requests: Sequence[Request]) -> Answer:
    """Return the best answer of the settings with the best median; the rounds are interleaved."""
    rounds = [[_run(action, request) for request in requests] for _ in range(SEARCH_ROUNDS)]
    medians = [statistics.median(map(_cost, answers)) for answers in zip(*rounds, strict=True)]
    best = min(range(len(requests)), key=medians.__getitem__)
    tried = [{"cost": cost, "settings": request.settings} for cost, request in zip(medians, requests, strict=True)]
    return min((answers[best] for answers in rounds), key=_cost) | {"tried": tried}


def main(actions: Mapping[str, Action | str], settings: Mapping[str, Sequence[Settings]]) -> None:
    """Run the action; a text instead of one says why the peer has none.

    `settings` has those to try, preferred first, by action; for `send` by `send async` and `send blocking`. The
    first are taken, `search` tries all and answers with the best, `settings` in the request names others.
    """
    name, wanted = sys.argv[1], json.loads(sys.argv[2])
    action = actions.get(name, f"there is no action {name}")
    kind = f"send {wanted.get('mode', 'async')}" if name == "send" else name
    candidates = [wanted["settings"]] if "settings" in wanted else settings.get(kind, [{}])
    known = {key: value for key, value in wanted.items() if key in Request.__dataclass_fields__}
    if isinstance(action, str):
        answer: Answer = {"unsupported": action}
    else:
        requests = [Request(**known | {"settings": each}) for each in candidates]
        answer = _search(action, requests) if wanted.get("search") else _run(action, requests[0])
    print(json.dumps(answer))
