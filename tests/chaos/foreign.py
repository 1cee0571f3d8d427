"""A worker of another language: `python -m tests.chaos.foreign DSN JOURNALS SEED`. Works until the file `stop`.

It claims by the SQL functions, renews nothing, has no watch of its own, and says at last what it has to say.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import psycopg

from tests.chaos.journal import Journal
from tests.chaos.operators import STOP
from tests.chaos.plan import DOMAIN, LEASE, STRAY

_MOST = 4  # leases at once
_PAUSE = 0.1  # seconds
_CLAIM = "SELECT command_id::text, delivery, lease_token::text FROM commandbus.claim_v1(%s, %s, 1, 'foreign', %s)"
_SEGMENTS = json.dumps([[STRAY, -1, 201 << 54]])
_ERROR = {"error": {"code": "FOREIGN", "message": "no"}, "retry_in": 0.05, "max_attempts": 4}
_VERBS: dict[str, dict[str, Any]] = {
    "complete": {"result": "foreign"},
    "fail TRANSIENT": {"kind": "TRANSIENT", **_ERROR},
    "fail PERMANENT": {"kind": "PERMANENT", **_ERROR},
    "fail BUSINESS": {"kind": "BUSINESS", **_ERROR},
    "release": {},
    "renew": {},
}


class Foreigner:
    """Holds a few leases, each for 0.5 to 2.2 times its length."""

    def __init__(self, journal: Journal, seed: int) -> None:
        self._journal = journal
        self._chance = random.Random(f"{seed} foreign")
        self._held: list[tuple[float, dict[str, Any]]] = []

    def work(self, dsn: str, until: Path) -> None:
        """Work until this file exists; when the connection breaks, on another one."""
        while not until.exists():
            try:
                with psycopg.connect(dsn, autocommit=True, connect_timeout=5) as db:
                    self._journal.note("started")
                    while not until.exists():
                        self._say_what_is_due(db)
                        self._claim(db)
                        time.sleep(_PAUSE)
            except psycopg.OperationalError:
                time.sleep(_PAUSE)

    def _claim(self, db: psycopg.Connection[Any]) -> None:
        if len(self._held) < _MOST:
            command_id, delivery, token = db.execute(_CLAIM, (DOMAIN, _SEGMENTS, LEASE)).fetchall()[0]
            if command_id is not None:
                item = {"command_id": command_id, "delivery": delivery, "lease_token": token}
                # One crash is enough: a second would keep workers from other work until the command has run alone.
                held = self._chance.uniform(0.5, 2.2) * LEASE if delivery == 1 else 0.0
                self._held.append((time.monotonic() + held, item))

    def _say_what_is_due(self, db: psycopg.Connection[Any]) -> None:
        for due, item in list(self._held):
            if due <= time.monotonic():
                self._held.remove((due, item))
                self._say(db, item, self._chance.choice([*_VERBS]) if item["delivery"] == 1 else "complete")

    def _say(self, db: psycopg.Connection[Any], item: dict[str, Any], verb: str) -> None:
        asked_at = time.time()
        function = f"{verb.split(maxsplit=1)[0]}_v1"
        arguments: list[object] = [DOMAIN, json.dumps([item | _VERBS[verb]]), *([LEASE] if verb == "renew" else [])]
        places = ", ".join(["%s"] * len(arguments))
        found = db.execute(f"SELECT outcome FROM commandbus.{function}({places})".encode(), arguments).fetchall()
        about = {"command_id": item["command_id"], "delivery": item["delivery"]}
        self._journal.note("foreign", **about, verb=verb, outcome=found[0][0], at=asked_at)


if __name__ == "__main__":
    dsn, journals, seed = sys.argv[1:]
    Foreigner(Journal(journals, "foreign"), int(seed)).work(dsn, Path(journals, STOP))
