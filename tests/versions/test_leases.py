"""A worker of one version dies or sleeps beyond its lease: one of the other takes its command over."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support import eventually
from tests.versions.support import DOMAIN, Client, Crew, Version, all_handled

_TAKEN_OVER = ["SENT", "CLAIMED", "CRASHED", "CLAIMED"]


class Delivered:
    """A command whose handlers wait, each for a file of its delivery."""

    def __init__(self, crew: Crew, client: Client, folder: Path) -> None:
        self._crew = crew
        self._client = client
        self._file = folder / "delivery"
        self._id = client("send", DOMAIN, "Wait", {"n": 7, "file": str(self._file)})["command_id"]

    def begun(self, delivery: int) -> None:
        """Come back when the handler of this delivery runs."""
        eventually(Path(f"{self._file}.{delivery}.begun").exists, timeout=60, what=f"delivery {delivery}")

    def go_on(self, delivery: int) -> None:
        """Let the handler of this delivery return."""
        Path(f"{self._file}.{delivery}").touch()

    def expire(self) -> None:
        """Let the lease run out in the database, and its holder believe in it."""
        with psycopg.connect(self._crew.dsn) as db:
            db.execute("UPDATE commandbus.command SET lease_until = clock_timestamp() - interval '1 s'")

    def now(self) -> tuple[str, int, Any, list[str]]:
        """Its status, its delivery, its result and its events."""
        command = self._client("get_command", DOMAIN, self._id)
        events = [event["event"] for event in self._client("get_audit_trail", DOMAIN, self._id)]
        return command["status"], command["delivery"], command["result"], events


@pytest.fixture(params=["old-async", "old-sync", "async-old", "sync-old"])
def pair(request: pytest.FixtureRequest, old: Version, new: Version) -> list[tuple[Version, str]]:
    """Who loses the lease, and who takes over: a version, and a kind of worker."""
    return [(old, "async") if name == "old" else (new, name) for name in request.param.split("-")]


@pytest.fixture
def command(crew: Crew, new: Version, tmp_path: Path) -> Delivered:
    """A command that nobody has claimed yet."""
    return Delivered(crew, crew.client(new), tmp_path)


def result_of(version: Version, kind: str) -> dict[str, object]:
    """What a handler of this worker returns."""
    return {"n": 7, "by": f"{version.name} {kind}"}


def test_a_lease_of_a_killed_worker_passes_to_the_other_version(
    crew: Crew, pair: list[tuple[Version, str]], command: Delivered
) -> None:
    first = crew.worker(*pair[0])
    command.begun(1)
    first.signal(signal.SIGKILL)
    command.expire()
    second = crew.worker(*pair[1])
    command.go_on(2)
    all_handled(crew.dsn)
    assert command.now() == ("COMPLETED", 2, result_of(*pair[1]), [*_TAKEN_OVER, "COMPLETED"])
    second.end()
    assert second.unexpected() == []


def test_a_paused_worker_changes_nothing_when_the_other_version_has_the_lease(
    crew: Crew, pair: list[tuple[Version, str]], command: Delivered
) -> None:
    """It does not know that it has slept, and presents its lease with a result."""
    first = crew.worker(*pair[0])
    command.begun(1)
    first.signal(signal.SIGSTOP)
    command.expire()
    second = crew.worker(*pair[1])
    command.begun(2)
    command.go_on(1)
    first.signal(signal.SIGCONT)
    eventually(lambda: "lease" in first.log.read_text(), timeout=60, what="the paused worker to learn it")
    assert command.now() == ("IN_PROGRESS", 2, None, _TAKEN_OVER)
    command.go_on(2)
    all_handled(crew.dsn)
    assert command.now() == ("COMPLETED", 2, result_of(*pair[1]), [*_TAKEN_OVER, "COMPLETED"])
    for worker in (first, second):
        worker.end()
    assert second.unexpected() == []
