"""Runs a plan: starts the processes, lets the faults strike, waits until all is settled, and keeps what was seen."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg

from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrate
from tests.chaos import journal, records
from tests.chaos.faults import Scene, Struck, strike
from tests.chaos.fleet import Fleet, Member, SenderMember, WorkerMember
from tests.chaos.operators import STOP
from tests.chaos.plan import DOMAIN, OPERATORS, SENDERS, WORKERS, Fault, Plan
from tests.chaos.records import Db
from tests.chaos.sender import BEGIN
from tests.faults.proxy import Proxy
from tests.sql.mutants import MUTANTS

SETTLE_SECONDS = 300.0
"""After the faults: how long at most nothing may be sent or finished while there is something left to do."""

_START_SECONDS = 120.0  # a few where nothing else runs
_STOP_SECONDS = 300.0
_GONE_SECONDS = 60.0  # from the end of the processes until no session of theirs is left
_LOOK = 0.1
_SAY_EVERY = 5.0
_AT_ONCE = 16  # faults
_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}

_FINISHED = """
SELECT (SELECT count(*) FROM commandbus.command_history),
       (SELECT count(*) FROM commandbus.command) + (SELECT count(*) FROM commandbus.batch WHERE finished_at IS NULL)
           + (SELECT count(*) FROM commandbus.process WHERE finished_at IS NULL)"""
_PROGRESS = f"SELECT status, count(*) FROM commandbus.commands WHERE domain = '{DOMAIN}' GROUP BY 1 ORDER BY 1"
_SESSIONS = """
SELECT pid || ' ' || state || ': ' || left(query, 80) FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"""


def say(text: str) -> None:
    """Tell a person how far it is."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def run(plan: Plan, mutant: str | None = None) -> Iterator[Db]:
    """Run it on a server of its own; the database that is left, with all that is known of the run."""
    with (
        tempfile.TemporaryDirectory(prefix="commandbus-chaos-") as folder,
        EmbeddedPostgres(Path(folder, "data"), settings=_SETTINGS) as server,
    ):
        journals = Path(folder, "journals")
        journals.mkdir()
        dsn = server.dsn()
        migrate(dsn)
        with psycopg.connect(dsn, autocommit=True) as db:
            if mutant:
                db.execute(MUTANTS[mutant].sql().encode())
            records.make(db)
        director = _Director(plan, server, dsn, journals)
        director.play()
        with psycopg.connect(dsn, autocommit=True) as db:
            records.keep_plan(db, plan)
            records.keep_faults(db, director.struck)
            records.keep_notes(db, journal.read(journals))
            records.keep_blame(db, director.blamed)
            yield db


class _Director:
    def __init__(self, plan: Plan, server: EmbeddedPostgres, dsn: str, journals: Path) -> None:
        self.struck: list[Struck] = []
        self.blamed: list[tuple[str, str]] = []
        self._plan = plan
        self._server = server
        self._dsn = dsn
        self._journals = journals
        self._said_at = 0.0

    def play(self) -> None:
        """Play it to its end; no process is left then."""
        with contextlib.ExitStack() as stack:
            proxies = [stack.enter_context(Proxy(self._dsn)) for _ in range(1 + WORKERS)]
            fleet = stack.enter_context(Fleet(self._blame))
            self._start(fleet, [proxy.dsn() for proxy in proxies])
            self._strike_all(Scene(self._server, self._dsn, fleet, proxies))
            say("the faults are over")
            self._settle(fleet)
            say("all is settled; everything is asked to stop")
            Path(self._journals, STOP).touch()
            for other in fleet.others:
                self._wait_for_end(other)
            fleet.stop_workers(_STOP_SECONDS)
        self._look_for_sessions()

    def _start(self, fleet: Fleet, dsns: list[str]) -> None:
        journals, plan = str(self._journals), self._plan
        drawn = [str(number) for number in plan.drawn_by]
        for number in range(WORKERS):
            colour = "sync" if number % 2 else "async"
            name, dsn = f"worker-{number}-{colour}", dsns[1 + number]
            fleet.workers.append(WorkerMember(name, self._journals, "worker", colour, dsn, journals))
        for number in range(SENDERS):
            name = f"sender-{number}"
            fleet.senders.append(SenderMember(name, self._journals, "sender", str(number), dsns[0], journals, *drawn))
        for program in ("operators", "foreign"):
            fleet.others.append(Member(program, self._journals, program, dsns[0], journals, str(plan.seed)))
        self._wait_for_all(WORKERS + SENDERS + OPERATORS + 1)
        self._began = time.time() + _LOOK
        begin = self._journals / BEGIN
        begin.with_suffix(".new").write_text(str(self._began), "utf-8")
        begin.with_suffix(".new").rename(begin)  # whole or not there

    def _wait_for_all(self, count: int) -> None:
        end = time.monotonic() + _START_SECONDS
        while sum(note["what"] == "started" for note in journal.read(self._journals)) < count:
            if time.monotonic() > end:
                raise TimeoutError(f"not all {count} have started within {_START_SECONDS:g} s")
            time.sleep(_LOOK)

    def _strike_all(self, scene: Scene) -> None:
        with ThreadPoolExecutor(_AT_ONCE, "fault") as threads:
            for fault in self._plan.faults:
                self._sleep_until(self._began + fault.at)
                threads.submit(self._strike, scene, fault)
            self._sleep_until(self._began + self._plan.seconds)

    def _strike(self, scene: Scene, fault: Fault) -> None:
        try:
            self.struck.append(strike(scene, fault))
        except Exception as error:  # noqa: BLE001 - whatever keeps a fault from being one is told
            self._blame("fault_failed", f"{fault.kind} of {fault.victim}: {type(error).__name__}: {error}")

    def _sleep_until(self, moment: float) -> None:
        while (left := moment - time.time()) > 0:
            time.sleep(min(left, _LOOK))
            if time.monotonic() > self._said_at + _SAY_EVERY:
                self._say_progress()

    def _settle(self, fleet: Fleet) -> None:
        """Wait until all is sent and finished. How long that takes is the machine's affair, but it has to go on."""
        before, moved_at = None, time.monotonic()
        while True:
            counts = self._ask(_FINISHED)
            if all(sender.ended() == 0 for sender in fleet.senders) and counts[0][1] == 0:
                return
            if counts != before:
                before, moved_at = counts, time.monotonic()
            if time.monotonic() > moved_at + SETTLE_SECONDS:
                self._blame("unsettled", f"nothing has moved for {SETTLE_SECONDS:g} s: {self._ask(_PROGRESS)}")
                return
            if time.monotonic() > self._said_at + _SAY_EVERY:
                self._say_progress()
            time.sleep(_LOOK)

    def _wait_for_end(self, other: Member) -> None:
        try:
            code: int | None = other.popen.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        if code != 0:
            self._blame("unclean_stop", f"{other.name} ({other.pid}) ended with {code}:\n{other.tail()}")

    def _look_for_sessions(self) -> None:
        """A session that its client has left, or a lock that is still held by one."""
        end = time.monotonic() + _GONE_SECONDS
        while sessions := self._ask(_SESSIONS):
            if time.monotonic() > end:
                for (session,) in sessions:
                    self._blame("session_left", str(session))
                return
            time.sleep(_LOOK)

    def _say_progress(self) -> None:
        self._said_at = time.monotonic()
        counts = ", ".join(f"{count} {status}" for status, count in self._ask(_PROGRESS))
        say(f"{time.time() - self._began:6.1f} s  {len(self.struck)} faults; {counts}")

    def _ask(self, query: str) -> list[tuple[object, ...]]:
        """The answer of the server, as soon as it is there."""
        while True:
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self._dsn, autocommit=True) as db:
                return db.execute(query.encode()).fetchall()
            time.sleep(_LOOK)

    def _blame(self, violation: str, detail: str) -> None:
        say(f"{violation}: {detail}")
        self.blamed.append((violation, detail))
