"""A blocking worker as a process: signals, handlers that hang, children of its handlers."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commandbus import Receipt
from commandbus.sync import SyncCommandBus
from tests.bus.support import DOMAIN
from tests.sync.support_worker import settled, story

APP = str(Path(__file__).with_name("apps") / "worker_app.py")


@contextmanager
def process(dsn: str, grace: float) -> Iterator[subprocess.Popen[str]]:
    """A worker process that is gone afterwards."""
    command = [sys.executable, "-X", "dev", APP, dsn, str(grace)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **streams, text=True) as found:  # type: ignore[call-overload] # mypy sees no **
        try:
            yield found
        finally:
            found.kill()


def end_of(found: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code, and the report: finished, released, stuck."""
    report, _ = found.communicate(timeout=60)
    return found.returncode, report.strip()


def says(found: subprocess.Popen[str], what: str) -> None:
    """Come back when it has logged a line with this."""
    assert found.stderr is not None
    assert any(what in line for line in found.stderr), f"it has never said {what}"


def test_sigterm_drains_and_ends_with_0(bus: SyncCommandBus, dsn: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with process(dsn, 3600) as found:
        receipts = [bus.send(DOMAIN, "UntilFile", str(file)) for _ in range(3)]
        for _ in range(2):
            says(found, "begun")
        found.send_signal(signal.SIGTERM)
        says(found, "stops: 2 handlers still run")
        file.touch()
        assert end_of(found) == (0, "2 0 0")
    assert [bus.get_command(receipt).status for receipt in receipts] == ["COMPLETED", "COMPLETED", "PENDING"]


def test_a_second_signal_hurries_and_a_stuck_handler_keeps_nothing(bus: SyncCommandBus, dsn: str) -> None:
    with process(dsn, 3600) as found:
        receipt = bus.send(DOMAIN, "Stuck", None)
        says(found, "begun")
        found.send_signal(signal.SIGTERM)
        found.send_signal(signal.SIGINT)
        assert end_of(found) == (0, "0 1 1")
    assert story(bus, receipt) == ["SENT", "CLAIMED", "RELEASED"]


def test_when_the_grace_is_over_a_stuck_handler_keeps_nothing(bus: SyncCommandBus, dsn: str) -> None:
    with process(dsn, 0.1) as found:
        receipt = bus.send(DOMAIN, "Stuck", None)
        says(found, "begun")
        found.send_signal(signal.SIGTERM)
        assert end_of(found) == (0, "0 1 1")
    assert story(bus, receipt) == ["SENT", "CLAIMED", "RELEASED"]


def test_children_of_its_handlers_are_not_workers(bus: SyncCommandBus, dsn: str) -> None:
    with process(dsn, 30) as found:
        died_of = settled(bus, bus.send(DOMAIN, "Terminate", None))
        assert died_of.result == signal.SIGTERM
        assert settled(bus, bus.send(DOMAIN, "Child", None)).result == 0
        (sent,) = bus.query_commands(command_type="FromChild").items
        assert settled(bus, Receipt(DOMAIN, sent.command_id)).result == found.pid  # the parent works on
        found.send_signal(signal.SIGTERM)
        assert end_of(found) == (0, "0 0 0")
