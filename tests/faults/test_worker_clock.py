"""The wall clock of a worker is wrong, and jumps: nothing depends on it."""

from __future__ import annotations

import ast
import contextlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

import commandbus
from commandbus import CommandBus, CommandStatus
from tests.bus.support import DOMAIN, Connection, one, rows
from tests.support import ROOT
from tests.worker.support import all_settled, has_status, renewed, settled

LEASE = 5  # seconds; a slow machine must not lose it by itself
HOUR = 3600
DAY = 24 * HOUR
NOW = time.time()
CLOCKS = {
    "an hour ahead": NOW + HOUR,
    "an hour behind": NOW - HOUR,
    "a day ahead": NOW + DAY,
    "a day behind": NOW - DAY,
    "1970": 10.0,
    "2100": 4_102_444_800.0,
    "right again": NOW,
}
LONGEST = "SELECT max(lease_until) - clock_timestamp() FROM commandbus.command WHERE status = 'IN_PROGRESS'"


@contextlib.contextmanager
def worker_process(dsn: str, half: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that is a process; ends with a signal and with 0."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.apps.clock", dsn, half, str(LEASE)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stderr=output,
        )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("half", ["async", pytest.param("sync", marks=pytest.mark.long)])
async def test_a_clock_that_jumps_changes_nothing(dsn: str, db: Connection, tmp_path: Path, half: str) -> None:
    log = tmp_path / "log"
    minted: list[str] = []
    async with CommandBus(dsn) as bus:
        with worker_process(dsn, half, log):
            held = [await bus.send(DOMAIN, command_type, None) for command_type in ("Hold", "HoldInThread")]
            for receipt in held:
                await has_status(bus, receipt, CommandStatus.IN_PROGRESS)
            for clock in CLOCKS.values():
                jumped = await settled(bus, await bus.send(DOMAIN, "Jump", clock))
                assert isinstance(jumped.result, list)
                assert all(abs(shown - clock) < HOUR / 2 for shown in jumped.result)
                await renewed(db)
                assert one(db, LONGEST) < timedelta(seconds=LEASE)  # for the time that the worker asked for
                again = await settled(bus, await bus.send(DOMAIN, "Again", None))
                assert (again.status, again.attempts, again.delivery) == ("COMPLETED", 2, 2)
                sent = await settled(bus, await bus.send(DOMAIN, "Send", None))
                assert isinstance(sent.result, list), sent.error
                minted += [str(command_id) for command_id in sent.result]
            await settled(bus, await bus.send(DOMAIN, "GoOn", None))
            for command in await all_settled(bus, held):
                assert (command.status, command.delivery, command.crashes) == ("COMPLETED", 1, 0)
    assert max(Counter(minted).values()) == 1
    assert (
        one(db, "SELECT count(*) FROM commandbus.commands WHERE command_type = 'Minted'")
        == len(minted)
        == 110 * len(CLOCKS)
    )
    assert_told_by_the_database(db)
    assert "lease" not in log.read_text("utf-8")


def assert_told_by_the_database(db: Connection) -> None:
    """Every moment is the server's, and every delay is counted from there."""
    moments = "SELECT count(*) FROM commandbus.audit_trail WHERE occurred_at NOT BETWEEN %s AND clock_timestamp()"
    (began,) = rows(db, "SELECT backend_start FROM pg_stat_activity WHERE pid = pg_backend_pid()")[0]
    assert one(db, moments, began) == 0
    delays = "SELECT DISTINCT due_at - sent_at FROM commandbus.command WHERE command_type = 'Later'"
    assert rows(db, delays) == [(timedelta(hours=1),)]


# ---------------------------------------------------------------------------------------------- the source

WALL_CLOCK = {"time", "time_ns", "ctime", "localtime", "gmtime", "strftime", "now", "utcnow", "today"}
ALLOWED = {
    "_ids.py": "where a minted id stands among others; a wrong one is as new as a right one",
    "cli/doctor.py": "compared with the server's, to say that it is wrong",
}


def reads_a_wall_clock(node: ast.AST) -> bool:
    """Whether this is `time.time`, `datetime.now` or the like; the `time()` of a loop is monotonic."""
    match node:
        case ast.Attribute(value=ast.Name(id="time" | "datetime" | "date" | "dt"), attr=name):
            return name in WALL_CLOCK
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="datetime"))):
            return node.attr in WALL_CLOCK
        case ast.ImportFrom(module="time", names=names):
            return any(alias.name in WALL_CLOCK for alias in names)
    return False


@pytest.mark.parametrize(
    "line",
    ["time.time()", "time.time_ns", "from time import time", "datetime.now(UTC)", "datetime.datetime.utcnow()"],
)
def test_a_line_that_reads_a_wall_clock_is_found(line: str) -> None:
    assert any(map(reads_a_wall_clock, ast.walk(ast.parse(line))))


def test_the_library_reads_a_wall_clock_where_nothing_depends_on_it_only() -> None:
    source = Path(commandbus.__file__).parent
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*.py")
        if any(map(reads_a_wall_clock, ast.walk(ast.parse(path.read_text("utf-8")))))
    }
    assert found == set(ALLOWED)
