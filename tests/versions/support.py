"""Processes of either version: clients that are told what to do, workers, senders under load."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from uuid import uuid4

import psycopg

from tests.support import eventually

DOMAIN = "payments"
BOOKING = "CREATE TABLE public.booking (command_id uuid NOT NULL, worker text NOT NULL)"
"""What the transactional handlers write to."""

_APPS = Path(__file__).with_name("apps")
_ORDINARY = re.compile(r" attempt \d+ failed with (BUSY: again|BAD_DATA: it is parked)")
_MISTAKEN = " the lease is lost"  # 0.1.0 says so when it claims a retry before it learns that the failure is recorded

P = TypeVar("P", bound="Process")


class Version(NamedTuple):
    """A version of the library, and the folder that its processes import it from, if it is not the installed one."""

    name: str
    folder: Path | None

    @property
    def environment(self) -> dict[str, str]:
        """The variables of its processes."""
        return os.environ | ({} if self.folder is None else {"PYTHONPATH": str(self.folder)})


def run(version: Version, *arguments: str) -> str:
    """Run Python with this version to its end; returns what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments], env=version.environment, capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Process:
    """A program of `apps/` with this version. What it logs, warnings and worse, is read in `log`."""

    def __init__(self, version: Version, log: Path, app: str, *arguments: str) -> None:
        self.version = version
        self.log = log
        with log.open("wb") as errors:
            self.popen = subprocess.Popen(
                [sys.executable, str(_APPS / app), *arguments],
                env=version.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def line(self) -> str:
        """The next line that it prints; fails with its log if it has ended."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, self.log.read_text()
        return line

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.popen.send_signal(number)

    def end(self) -> str:
        """Stop it as a deployment does; returns what it printed meanwhile. It must end well."""
        self.signal(signal.SIGTERM)
        printed, _ = self.popen.communicate(timeout=60)
        assert self.popen.returncode == 0, self.log.read_text()
        return printed

    def unexpected(self) -> list[str]:
        """The lines of its log that do not tell of the failures that handlers here are asked for."""
        lines = [line for line in self.log.read_text().splitlines() if not _ORDINARY.search(line)]
        return [line for line in lines if not (self.version.name == "0.1.0" and line.endswith(_MISTAKEN))]


class Client(Process):
    """A bus and an operator's desk in a process of that version: `client("send", "payments", "Echo", {})`.

    Returns what the method returns as JSON, or `["ClassOfTheError", message]`.
    """

    def __call__(self, method: str, *arguments: object, **more: object) -> Any:  # noqa: ANN401 - any JSON
        """Call a method of `CommandBus`, or of `TroubleshootingQueue`."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps([method, arguments, more]) + "\n")
        self.popen.stdin.flush()
        return json.loads(self.line())


class Sent(NamedTuple):
    """A receipt, and what it was for."""

    command_id: str
    command_type: str
    number: int
    duplicate: bool


class Sender(Process):
    """Sends until it is told to end. `sent`: its receipts then; `waits`: when each send began, and what it took."""

    sent: list[Sent]
    waits: list[tuple[float, float]]

    def has_sent(self, more: int) -> None:
        """Come back when it has sent so many more, in hundreds."""
        for _ in range(more // 100):
            self.line()

    def end(self) -> str:
        """Stop it, and learn what it did."""
        printed = super().end()
        told = json.loads(printed.splitlines()[-1])
        self.sent = [Sent(*each) for each in told["sent"]]
        self.waits = [(began, took) for began, took in told["waits"]]
        return printed


class Crew:
    """Starts processes on one database. Those that are left at the end are killed."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self._folder = folder
        self._shared = str(uuid4())
        self.processes: list[Process] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            process.popen.kill()
            process.popen.communicate()

    def client(self, version: Version) -> Client:
        """A bus that does what it is told."""
        return self._start(Client, version, "client.py")

    def worker(self, version: Version, kind: str = "async", lease: float = 300) -> Process:
        """A worker that has started; `kind` is async or sync."""
        worker = self._start(Process, version, "worker.py", kind, f"{version.name} {kind}", str(lease))
        worker.line()
        return worker

    def sender(self, version: Version, kind: str, rate: int) -> Sender:
        """A sender of so many commands a second. Every other one is the same command for all senders of this crew."""
        return self._start(Sender, version, "sender.py", kind, str(rate), self._shared)

    def _start(self, kind: Callable[..., P], version: Version, app: str, *arguments: str) -> P:
        log = self._folder / f"{len(self.processes)} {version.name} {app}.log"
        process = kind(version, log, app, self.dsn, *arguments)
        self.processes.append(process)
        return process


def rows(dsn: str, query: str) -> list[tuple[Any, ...]]:
    """The rows of a query."""
    with psycopg.connect(dsn) as db:
        return db.execute(query.encode()).fetchall()


def all_handled(dsn: str) -> None:
    """Come back when nothing is left but what waits for an operator."""
    query = "SELECT status, count(*) FROM commandbus.command WHERE parked_at IS NULL GROUP BY status"
    eventually(lambda: not rows(dsn, query), timeout=90, what="the end of every command")
