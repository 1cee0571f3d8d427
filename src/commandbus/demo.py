"""The demo: 10,000 transfers, a worker killed in the midst of them, and the proof that each was booked once.

It runs the example in `examples/ledger`, which the wheel carries as `_ledger`, on a private PostgreSQL. Sender,
workers, operator and proof are processes of their own, as in real life. Whatever it cannot explain is a failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, TextIO
from uuid import UUID

import psycopg
from psycopg import sql

from commandbus import _queries
from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrate
from commandbus.model import CommandStatus

_LEASE = "2s"  # short, so that the takeover is soon; a worker renews it three times in that
_KILL_AT = 0.3  # of the transfers
_LOOK_SECONDS = 0.2
_LINE_SECONDS = 2.0  # between two lines of progress where there is no terminal
_PATIENCE_SECONDS = 30.0
_FINISHED = tuple(status for status in CommandStatus if status.terminal)
_RUNNABLE = (CommandStatus.PENDING, CommandStatus.SCHEDULED, CommandStatus.IN_PROGRESS)

_STATUS = "SELECT status, count(*) FROM commandbus.commands WHERE domain = 'ledger' GROUP BY status"
_HAD_EVENT = (
    "SELECT count(DISTINCT command_id) FROM commandbus.audit_trail WHERE domain = 'ledger' AND event = %(event)s"
)
_LEASES_OF = """
SELECT command_id FROM commandbus.commands WHERE domain = 'ledger' AND status = 'IN_PROGRESS' AND worker LIKE %s"""

# Of the commands that the killed worker held: how many came to another, and how many of them after a lease ran out.
_TAKEN_OVER = """
SELECT count(*), count(*) FILTER (WHERE EXISTS (
           SELECT FROM commandbus.audit_trail AS a WHERE a.domain = 'ledger' AND a.command_id = c.command_id
              AND a.event = 'CRASHED' AND a.worker LIKE %(victim)s))
FROM commandbus.commands AS c
WHERE domain = 'ledger' AND command_id = ANY (%(held)s) AND worker NOT LIKE %(victim)s"""

_UNEXPLAINED = {
    "commands failed for another reason than insufficient funds": """
        SELECT count(*) FROM commandbus.commands WHERE domain = 'ledger' AND status = 'FAILED'
           AND error ->> 'code' IS DISTINCT FROM 'INSUFFICIENT_FUNDS'""",
    "commands are completed and not booked, or booked and not completed": """
        SELECT count(*) FROM (SELECT data ->> 'transfer_id' AS id FROM commandbus.commands
                              WHERE domain = 'ledger' AND status = 'COMPLETED') AS told
        FULL JOIN (SELECT DISTINCT transfer_id AS id FROM ledger.entry) AS booked USING (id)
        WHERE told.id IS NULL OR booked.id IS NULL""",
}


class _UnexplainedError(Exception):
    """Something happened that the demo cannot account for."""


@dataclass
class _Figures:
    """What happened; all count commands, none counts events. `parked`: also those that were retried later."""

    sent: int = 0
    completed: int = 0
    failed: int = 0
    parked: int = 0
    retried: int = 0
    taken_over: int = 0
    balanced: bool = False


def run(*, json_output: bool, data_dir: Path | None, transfers: Path | None = None) -> int:
    """Run the demo; returns the exit code: 0 only if all is explained and the ledger balances, 130 if interrupted.

    With `json_output` stdout gets one line of JSON, and stderr all else. `data_dir` is the folder of the server, by
    default a temporary one; the database is new in any case, and dropped at the end. `transfers` is a folder with
    other accounts.csv and transfers.csv. Ends every process that it started, also on SIGINT and SIGTERM.
    """
    screen, figures, code = _Screen(sys.stderr if json_output else sys.stdout), _Figures(), 1
    try:
        with (
            _sigterm_as_sigint(),
            tempfile.TemporaryDirectory(prefix="commandbus-demo-") as scratch,
            _database(data_dir or Path(scratch, "data"), screen) as dsn,
        ):
            _Demo(dsn, transfers or example(), Path(scratch, "workers.log"), screen, figures).play()
            code = 0
    except KeyboardInterrupt:
        screen.say("interrupted; all that was started has ended")
        code = 130
    except (_UnexplainedError, psycopg.Error, OSError) as error:
        screen.say(f"FAILED: {error}")
    if json_output:
        sys.stdout.write(json.dumps(asdict(figures)) + "\n")
    return code


def example() -> Path:
    """Return the folder of the example: in the installed package, else in the clone."""
    package = Path(str(files("commandbus")))
    installed, cloned = package / "_ledger", package.parent.parent / "examples" / "ledger"
    return installed if installed.exists() else cloned


@dataclass
class _Demo:
    """One run: sends, kills, repairs, proves. Raises `_UnexplainedError` at once when something is not explained."""

    dsn: str
    transfers: Path
    log: Path
    screen: _Screen
    figures: _Figures

    def __post_init__(self) -> None:
        # What the programs get leads to our database, and to none of the caller's.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("COMMAND_BUS_")}
        self._environment = {**kept, "COMMAND_BUS_DSN": self.dsn}
        self._connection: psycopg.Connection[Any]

    def play(self) -> None:
        """Do it all."""
        with (
            psycopg.connect(self.dsn, autocommit=True) as self._connection,
            _Crew(self._environment, self.log) as crew,
        ):
            self._run("load.py", str(self.transfers))
            self.figures.sent = self._status().total()
            victim = crew.start()
            crew.start()
            self.screen.say("two workers start")
            self._follow(crew, lambda status: _sum(status, _FINISHED) >= _KILL_AT * status.total())
            held = self._kill_with_leases(crew, victim)
            self.screen.say(f"killed worker 1 (SIGKILL), which held {len(held)} leases; a third starts in its place")
            crew.start()
            self._follow(crew, lambda status: not _sum(status, _RUNNABLE))
            self.screen.say("all are finished or parked; the operator goes to work")
            self._run("repair.py")
            self._follow(crew, lambda status: not _sum(status, _RUNNABLE))
            crew.stop()
            self._account(_name(victim), held)
            self._verify()
        self._run("proof.py", self.dsn, str(self.transfers))
        self.figures.balanced = True

    def _run(self, program: str, *arguments: str) -> None:
        """Run a program of the example and show what it says; raises if it does not end well."""
        with subprocess.Popen(  # noqa: S603 - our own
            [sys.executable, example() / program, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                said = process.communicate()[0]
            except BaseException:
                _end([process], signal.SIGINT)
                raise
        for line in said.splitlines():
            self.screen.say(f"{program}: {line}")
        if process.returncode != 0:
            raise _UnexplainedError(f"{program} ended with {process.returncode}")

    def _status(self) -> Counter[str]:
        return Counter(dict(self._connection.execute(_STATUS).fetchall()))

    def _follow(self, crew: _Crew, enough: Callable[[Counter[str]], bool]) -> None:
        """Show progress until it is enough. Raises if nothing moves any more, or a worker ends by itself."""
        before: Counter[str] = Counter()
        moved_at = time.monotonic()
        while not enough(status := self._status()):
            crew.check()
            if status != before:
                before, moved_at = status, time.monotonic()
            elif time.monotonic() - moved_at > _PATIENCE_SECONDS:
                raise _UnexplainedError(f"nothing has moved for {_PATIENCE_SECONDS:g} s: {dict(status)}")
            self.screen.progress(status)
            time.sleep(_LOOK_SECONDS)

    def _kill_with_leases(self, crew: _Crew, victim: subprocess.Popen[bytes]) -> list[UUID]:
        """Kill a worker while it holds leases; returns their commands.

        It holds each for some milliseconds only. So it is stopped first: what it holds then, it holds when it dies.
        """
        while self._status()[CommandStatus.PENDING]:
            victim.send_signal(signal.SIGSTOP)
            time.sleep(0.25)  # what it asked of the database before is done by then
            if held := [row[0] for row in self._connection.execute(_LEASES_OF, (_name(victim),))]:
                crew.kill(victim)
                return held
            victim.send_signal(signal.SIGCONT)
            time.sleep(0.01)
        raise _UnexplainedError("all was done before worker 1 was seen with a lease: nothing was killed")

    def _account(self, victim: str, held: list[UUID]) -> None:
        """Account for every command, by what the bus says."""
        figures, status = self.figures, self._status()
        figures.completed, figures.failed = status[CommandStatus.COMPLETED], status[CommandStatus.FAILED]
        events = ("PARKED", "OPERATOR_RETRIED")
        figures.parked, figures.retried = (self._row(_HAD_EVENT, event=event)[0] for event in events)
        came_to_another, figures.taken_over = self._row(_TAKEN_OVER, victim=victim, held=held)
        self.screen.say(
            f"{figures.sent:,} sent: {figures.completed:,} completed, {figures.failed} failed; {figures.parked} parked,"
            f" {figures.retried} of them retried; {figures.taken_over} were taken over from the killed worker"
        )
        if figures.completed + figures.failed != figures.sent or figures.parked != figures.retried:
            raise _UnexplainedError(f"the figures do not add up: {dict(status)}")
        if figures.taken_over == 0 or figures.taken_over != came_to_another:
            came = f"{came_to_another} came to another worker, {figures.taken_over} by running out"
            raise _UnexplainedError(f"of {len(held)} leases of the killed worker {came}")
        for what, query in _UNEXPLAINED.items():
            if count := self._row(query)[0]:
                raise _UnexplainedError(f"{count} {what}")

    def _verify(self) -> None:
        """Look for what the bus cannot have written."""
        call = _queries.verify()
        violations = call.read(self._connection.execute(call.sql.encode()).fetchall())
        self.screen.say(f"verify: {len(violations)} violations in all that the bus has kept")
        if violations:
            raise _UnexplainedError(f"verify found {len(violations)} violations, the first: {violations[0]}")

    def _row(self, query: str, **parameters: object) -> tuple[int, ...]:
        return self._connection.execute(query.encode(), parameters).fetchone() or ()


class _Crew:
    """The worker processes. None outlives the `with` block."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        self._environment = environment
        self._log = log
        self._workers: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        """Start a worker; what it says goes to the log."""
        with self._log.open("ab") as log:
            worker = subprocess.Popen(  # noqa: S603 - our own command line
                [sys.executable, "-m", "commandbus", "worker", "ledger:registry", "--lease", _LEASE],
                cwd=example(),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._workers.append(worker)
        return worker

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        """End this one with SIGKILL."""
        _end([worker], signal.SIGKILL)
        self._workers.remove(worker)

    def check(self, good: int | None = None) -> None:
        """Raise if a worker that was not killed has ended, or with `good` otherwise than with that code."""
        if wrong := [worker for worker in self._workers if worker.poll() != good]:
            end = self._log.read_text("utf-8", "replace")[-3000:]
            raise _UnexplainedError(f"worker {wrong[0].pid} ended with {wrong[0].returncode}. The log ends:\n{end}")

    def stop(self) -> None:
        """Ask the workers to stop, and wait. Raises if one does not end well."""
        _end(self._workers, signal.SIGTERM)
        self.check(good=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._workers, signal.SIGKILL)


class _Screen:
    """Where the demo talks: lines, and on a terminal a last one that changes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._began = time.monotonic()
        self._line_at = 0.0

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self._write(f"{time.monotonic() - self._began:5.1f} s  {text}\n")

    def progress(self, status: Counter[str]) -> None:
        """Show how far it is; without a terminal only now and then."""
        counts = ", ".join(f"{status[name]:,} {name}" for name in CommandStatus if status[name])
        if self._live:
            filled = 24 * _sum(status, _FINISHED) // max(1, status.total())
            self._write(f"[{'#' * filled}{'.' * (24 - filled)}] {counts}")
        elif time.monotonic() - self._line_at >= _LINE_SECONDS:
            self._line_at = time.monotonic()
            self.say(counts)

    def _write(self, text: str) -> None:
        self._stream.write(f"\r\x1b[K{text}" if self._live else text)
        self._stream.flush()


def _end(processes: list[subprocess.Popen[Any]], number: signal.Signals) -> None:
    """Send the signal to those that run and wait for them; kill the one that takes too long."""
    for process in processes:
        process.send_signal(number)  # nothing happens to one that has ended
    for process in processes:
        try:
            process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _sum(status: Counter[str], names: Sequence[str]) -> int:
    return sum(status[name] for name in names)


def _name(worker: subprocess.Popen[bytes]) -> str:
    """Return the pattern that the name of this worker matches."""
    return f"{socket.gethostname()}-{worker.pid}-%"


@contextlib.contextmanager
def _database(data_dir: Path, screen: _Screen) -> Iterator[str]:
    """Make a database with the schema of the bus on a private server; drop it afterwards."""
    name = f"demo_{secrets.token_hex(4)}"
    with EmbeddedPostgres(data_dir) as postgres, psycopg.connect(postgres.dsn(), autocommit=True) as administrator:
        screen.say(f"a private PostgreSQL {postgres.major} runs")
        administrator.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            migrate(postgres.dsn(name))
            yield postgres.dsn(name)
        finally:
            administrator.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@contextlib.contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that what was started is ended."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
