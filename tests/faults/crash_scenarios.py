"""What a program does, where it must end, and how one run of it goes with a fault at one point.

A run has a domain of its own, so that many share a database. The program is a process, forked from a server that has
imported the library: 0.02 s, where a new interpreter takes 0.5.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

from commandbus.migrate import migrations
from tests.bus.support import complete, fail, lease, one, rows
from tests.faults import crash_programs
from tests.faults.crash_points import CallProxy, Fault, Point
from tests.faults.crash_programs import Part
from tests.processes.support import Hand
from tests.support import aeventually

Connection = psycopg.Connection
_PATIENCE = 5.0  # seconds until somebody kills what hangs on a connection of the program's own
_END_SECONDS = 90.0
_STARTED = ("LISTEN commandbus", "announce_v1", "drop_expired_v1")  # what a worker says as it starts

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload([crash_programs.__name__])


def state(db: Connection, domain: str) -> tuple[str, ...]:
    """All that a run must leave the same: the commands and the effects of their handlers, each as often as it is there.

    Not the deliveries, the attempts and the crashes: a fault may cost one.
    """
    commands = rows(
        db,
        "SELECT concat_ws(' ', command_type, data::text, status, coalesce(result::text, '-'), "
        "coalesce(error ->> 'code', '-')) FROM commandbus.commands WHERE domain = %s ORDER BY 1",
        domain,
    )
    effects = rows(
        db, "SELECT concat('effect ', count(*)) FROM public.effect WHERE domain = %s GROUP BY command_id", domain
    )
    return tuple(text for (text,) in (*commands, *effects))


def batch(db: Connection, domain: str) -> tuple[str, ...]:
    """All that a run must leave the same of a batch: its commands, the one at its end too, its counts and its end."""
    found = rows(
        db,
        "SELECT concat_ws(' ', total, completed, failed, canceled, in_trouble, open, finished_at IS NOT NULL) "
        "FROM commandbus.batches WHERE domain = %s",
        domain,
    )
    return (*state(db, domain), *(text for (text,) in found))


def course(db: Connection, domain: str) -> tuple[str, ...]:
    """All that a run must leave the same of a process: its end, its steps, and the effects of each."""
    found = rows(
        db,
        "SELECT concat_ws(' ', status, state, error ->> 'code') FROM commandbus.processes WHERE domain = %s",
        domain,
    )
    steps = rows(
        db,
        "SELECT concat_ws(' ', s.kind, s.name, s.status, (SELECT count(*) FROM public.effect e "
        "WHERE e.command_id = s.command_id)) FROM commandbus.process_steps s WHERE s.domain = %s ORDER BY s.number",
        domain,
    )
    return tuple(text for (text,) in (*found, *steps))


def schema(db: Connection, _domain: str) -> tuple[str, ...]:
    """All that a migration makes: columns, functions, and the list of migrations."""
    found = rows(
        db,
        "SELECT concat_ws(' ', c.relname, a.attname, a.atttypid::regtype) FROM pg_attribute a "
        "JOIN pg_class c ON c.oid = a.attrelid WHERE c.relnamespace = 'commandbus'::regnamespace "
        "UNION ALL SELECT concat_ws(' ', proname, md5(prosrc)) FROM pg_proc "
        "WHERE pronamespace = 'commandbus'::regnamespace "
        "UNION ALL SELECT name FROM commandbus.migration ORDER BY 1",
    )
    return tuple(text for (text,) in found)


@dataclass(frozen=True)
class Scenario:
    """A program, what it finds, and what it leaves.

    `own_deadline`: it has connections of its own, on which the library gives up nothing. `survives_kill`: started
    again, it knows what it has done; who lets the library choose the id does not.
    """

    program: str
    final: tuple[str, ...]
    prepare: Callable[[Connection, Part], None] = lambda db, part: None
    own_deadline: bool = False
    survives_kill: bool = True
    state: Callable[[Connection, str], tuple[str, ...]] = state

    @property
    def works(self) -> bool:
        """Whether it is a worker, which ends when it is told to."""
        return self.program not in crash_programs._PEOPLE

    def faults(self) -> list[Fault]:
        """Return what can happen to it."""
        return [fault for fault in Fault if self.survives_kill or not fault.kills]


def _sent(db: Connection, part: Part) -> None:
    _send(db, part, 1)


def _send(db: Connection, part: Part, count: int) -> None:
    db.execute("SELECT commandbus.send_v1(%s)", [_notes(part, *range(count))])


def _notes(part: Part, *numbers: int) -> str:
    return json.dumps(
        [{"domain": part.domain, "command_type": "Note", "command_id": str(part.id(n)), "data": n} for n in numbers]
    )


def _batch(*, parked: bool = False) -> Callable[[Connection, Part], None]:
    """A batch of three, of which the last is left to be done; or all of them are parked."""

    def prepare(db: Connection, part: Part) -> None:
        key = (part.domain, part.id(9))
        last = json.dumps({"domain": part.domain, "command_type": "Follow", "data": "all"})
        db.execute("SELECT commandbus.create_batch_v1(%s, %s, NULL, %s, '')", [*key, last])
        for numbers in ((0, 1), (2,)):  # what is added in one call is claimed in any order
            db.execute("SELECT commandbus.add_to_batch_v1(%s, %s, %s)", [*key, _notes(part, *numbers)])
        db.execute("SELECT commandbus.close_batch_v1(%s, %s)", key)
        for _ in range(3 if parked else 2):
            item = lease(db, "Note", domain=part.domain)
            if parked:
                fail(db, item, "PERMANENT", domain=part.domain)
            else:
                complete(db, item, "before", domain=part.domain)

    return prepare


def _expired(db: Connection, part: Part) -> None:
    _send(db, part, 1)
    lease(db, "Note", domain=part.domain, seconds=0.001)


def _parked(count: int) -> Callable[[Connection, Part], None]:
    def prepare(db: Connection, part: Part) -> None:
        _send(db, part, count)
        for _ in range(count):
            fail(db, lease(db, "Note", domain=part.domain), "PERMANENT", domain=part.domain)

    return prepare


def _started(db: Connection, part: Part) -> None:
    Hand(db, kind := crash_programs.three_steps(part.domain)).start(kind, crash_programs.Course())


def at_first_version(db: Connection, part: Part) -> None:
    first = migrations()[0]
    db.execute(f"CREATE SCHEMA commandbus; {first.sql}; {first.record}".encode())


_DONE = "Note 0 COMPLETED 0 -"
_OTHERS = ('Note 0 COMPLETED "before" -', 'Note 1 COMPLETED "before" -')
_TOLD = 'Follow "all" COMPLETED "all" -'
_ENDED = {
    name: (("step", f"{status} {effects}"), ("deadline", "CANCELED 0"))
    for name, status, effects in (("a", "COMPLETED", 1), ("b", "COMPLETED", 1), ("c", "FAILED", 0))
}

SCENARIOS = {
    "send": Scenario("send", ("Note 1 PENDING - -",), survives_kill=False),
    "send impatiently": Scenario("send_impatiently", ("Note 1 PENDING - -",), survives_kill=False),
    "send with id": Scenario("send_with_id", ("Note 1 PENDING - -",)),
    "send batch": Scenario("send_batch", tuple(f"Note {n} PENDING - -" for n in range(5))),
    "send in transaction": Scenario(
        "send_in_transaction",
        (*(f"Note {n} PENDING - -" for n in range(3)), "effect 1"),
        own_deadline=True,
    ),
    "cancel": Scenario("cancel", ("Note 0 CANCELED - -",), _sent),
    "operate": Scenario(
        "operate",
        ('Note "new" PENDING - -', "Note 1 CANCELED - X", 'Note 2 COMPLETED "by hand" -'),
        _parked(3),
    ),
    "operate many": Scenario("operate_many", tuple(f"Note {n} CANCELED - X" for n in range(5)), _parked(5)),
    "read": Scenario("read", ("Note 0 PENDING - -",), _sent),
    "complete": Scenario("complete", (_DONE,), _sent),
    "fail once": Scenario("fail_once", (_DONE,), _sent),
    "park": Scenario("park", ("Note 0 IN_TROUBLESHOOTING_QUEUE - BROKEN",), _sent),
    "refuse": Scenario("refuse", ("Note 0 FAILED - NO",), _sent),
    "stop": Scenario("stop", (_DONE,), _sent),
    "renew": Scenario("renew", (_DONE,), _sent),
    "take over": Scenario("complete", (_DONE,), _expired),
    "transact nothing": Scenario("transact_nothing", (_DONE,), _sent),
    "transact": Scenario("transact", ("Follow 0 COMPLETED 0 -", _DONE, "effect 1"), _sent),
    "start process": Scenario(
        "start_process",
        ('RUNNING {"ended": ""}', "step a OPEN 0", "deadline a OPEN 0"),
        state=course,
    ),
    "process": Scenario(
        "process",
        (
            'COMPENSATED {"ended": "ab"} NO',
            *(f"{kind} {name} {status}" for name in "abc" for kind, status in _ENDED[name]),
            *("undo b COMPLETED 1", "undo a COMPLETED 1"),
        ),
        _started,
        state=course,
    ),
    "end batch": Scenario(
        "complete", (_TOLD, *_OTHERS, "Note 2 COMPLETED 2 -", "3 3 0 0 0 0 t"), _batch(), state=batch
    ),
    "refuse in batch": Scenario(
        "refuse", (_TOLD, *_OTHERS, "Note 2 FAILED - NO", "3 2 1 0 0 0 t"), _batch(), state=batch
    ),
    "park in batch": Scenario(
        "park", (*_OTHERS, "Note 2 IN_TROUBLESHOOTING_QUEUE - BROKEN", "3 2 0 0 1 0 f"), _batch(), state=batch
    ),
    "operate in batch": Scenario(
        "operate",
        ('Note "new" PENDING - -', "Note 1 CANCELED - X", 'Note 2 COMPLETED "by hand" -', "3 1 0 1 0 1 f"),
        _batch(parked=True),
        state=batch,
    ),
    "operate on all of batch": Scenario(
        "operate_many",
        ('Follow "all" PENDING - -', *(f"Note {n} CANCELED - X" for n in range(3)), "3 0 0 3 0 0 t"),
        _batch(parked=True),
        state=batch,
    ),
    "complete own": Scenario("complete_own", (_DONE, "effect 1"), _sent),
}


class Run:
    """One run of a scenario, with a fault or without."""

    def __init__(
        self,
        scenario: Scenario,
        mode: str,
        dsn: str,
        folder: Path,
        case: tuple[Fault, Point] | None = None,
    ) -> None:
        self._scenario = scenario
        self._mode = mode
        self._dsn = dsn
        self._folder = folder
        self._fault = case[0] if case else None
        self._point = case[1] if case else None
        self._domain = folder.name
        self._starts = 0
        self._stopping = False
        self._process: Any = None

    async def points(self) -> list[Point]:
        """Run, and return its points; of the polls that find nothing, the first."""
        calls = (await self._run()).calls
        productive = max((call.point.number for call in calls if call.polls and call.rows > 1), default=0)
        return [call.point for call in calls if not call.polls or call.point.number <= productive + 1]

    async def reaches(self) -> bool:
        """Run, and return whether it has come to its point. Fails when the state at the end is another."""
        return (await self._run()).made_at is not None

    async def _run(self) -> CallProxy:
        self._folder.mkdir()
        with (
            psycopg.connect(self._dsn, autocommit=True) as self._db,
            CallProxy(self._dsn, self._fault, self._point) as self._proxy,
        ):
            self._proxy.kill = self._kill
            self._scenario.prepare(self._db, self._part())
            try:
                self._start()
                await aeventually(self._is_over, timeout=_END_SECONDS, what="the end")
            except AssertionError as error:
                raise AssertionError(f"{error}; its state is {self._state()}\n{self._log()}") from None
            finally:
                self._process.kill()
            found = self._state()
            assert found == self._scenario.final, f"it ends in {found}, not in {self._scenario.final}\n{self._log()}"
            return self._proxy

    def _state(self) -> tuple[str, ...]:
        return self._scenario.state(self._db, self._domain)

    def _log(self) -> str:
        return (self._folder / "log").read_text("utf-8")[-3000:]

    def _part(self) -> Part:
        return Part(self._mode, self._dsn, self._domain, self._folder, self._starts)

    def _start(self) -> None:
        self._starts += 1
        self._stopping = False
        dsn = make_conninfo(self._proxy.dsn(), connect_timeout=2)
        part = Part(self._mode, dsn, self._domain, self._folder, self._starts)
        self._process = _processes.Process(target=crash_programs.run, args=(self._scenario.program, part), daemon=True)
        self._process.start()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self._process.pid, signal.SIGKILL)

    async def _is_over(self) -> bool:
        """Do what a supervisor does; whether the program has come to its end."""
        if self._process.exitcode is None:
            if self._is_stuck():
                self._kill()
            elif self._scenario.works and not self._stopping and self._is_to_stop():
                self._stopping = True
                self._process.terminate()
            return False
        assert self._process.exitcode in self._legal_ends(), f"it ended by itself with {self._process.exitcode}"
        if self._process.exitcode == -signal.SIGKILL or (self._scenario.works and not self._is_settled()):
            self._start()
            return False
        return True

    def _legal_ends(self) -> set[int]:
        ends = set()
        if self._stopping or not self._scenario.works:
            ends.add(0)
        if self._stopping:
            ends.add(-signal.SIGTERM)  # before it had begun to listen for signals
        if self._proxy.made_at is not None and (self._scenario.own_deadline or (self._fault and self._fault.kills)):
            ends.add(-signal.SIGKILL)
        return ends

    def _is_stuck(self) -> bool:
        made_at = self._proxy.made_at
        may = self._scenario.own_deadline and self._starts == 1  # the next start meets no fault
        return may and made_at is not None and time.monotonic() - made_at > _PATIENCE

    def _is_to_stop(self) -> bool:
        """Whether the worker has done all there is, or is to stop before."""
        if self._scenario.program == "renew" and self._proxy.count("renew_v1") >= 2:
            (self._folder / "renewed").touch()
        if self._scenario.program == "stop" and self._starts == 1 and (self._folder / "begun").exists():
            return True
        started = self._proxy.count("work_v1") > 1 and all(self._proxy.count(name) for name in _STARTED)
        return (started or self._proxy.made_at is not None) and self._is_settled()

    def _is_settled(self) -> bool:
        return not one(
            self._db,
            "SELECT count(*) FROM commandbus.command WHERE domain = %s AND status <> 'IN_TROUBLESHOOTING_QUEUE'",
            self._domain,
        )
