"""The disk of the server is full for a while: what was acknowledged is there afterwards, and settles by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.timeout(450)  # more than its waits can come to

# A mount that nobody else sees, and that is gone with the process. Who is not root is it in a user namespace.
_UNSHARED = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]


@pytest.fixture(scope="module", autouse=True)
def _mounts() -> None:
    """Fail with what to do where no tmpfs can be mounted."""
    mounting = [*_UNSHARED, "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        subprocess.run(mounting, check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.fail(
            f"no tmpfs can be mounted here: {error} {getattr(error, 'stderr', '')}\n"
            "These tests need util-linux, and root or user namespaces. Run them as root, or allow those: "
            "sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0",
            pytrace=False,
        )


def become_of(folder: Path, half: str, disk: str) -> dict[str, Any]:
    """What has become of the scenario in `apps/disk_full.py`."""
    ended = subprocess.run(
        [*_UNSHARED, sys.executable, "-m", "tests.faults.apps.disk_full", folder, half, disk],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=420,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("half", ["async", pytest.param("sync", marks=pytest.mark.long)])
def test_while_the_data_have_no_room_nothing_is_lost_and_nothing_charged(tmp_path: Path, half: str) -> None:
    """PostgreSQL refuses what needs room. It has charged nobody with that, not even a transactional handler."""
    found = become_of(tmp_path, half, "data")
    assert set(found["errors"]) <= {"SendTimeoutError", "OutcomeUnknownError"}
    assert found["errors"]
    assert found["settled"] == found["acknowledged"] >= 6
    assert found["ends"] == [
        ["Book", "COMPLETED", 1, 0],
        ["Debit", "COMPLETED", 1, 0],
        ["Fail", "IN_TROUBLESHOOTING_QUEUE", 1, 0],
        ["Wait", "COMPLETED", 1, 0],
    ]
    assert found["most runs"] == 1
    assert found["booked"] == [2, 2]
    assert found["violations"] == 0


@pytest.mark.long
@pytest.mark.parametrize("half", ["async", "sync"])
def test_when_the_write_ahead_log_has_no_room_the_server_dies_and_nothing_is_lost(tmp_path: Path, half: str) -> None:
    """Somebody has to start it again. What a transactional handler had under way is an attempt: its session died."""
    found = become_of(tmp_path, half, "wal")
    assert set(found["errors"]) <= {"SendTimeoutError", "OutcomeUnknownError"}
    assert found["errors"]
    assert found["settled"] == found["acknowledged"] >= 6
    ends = {command_type: (status, crashes) for command_type, status, _, crashes in found["ends"]}
    assert ends == {
        "Book": ("COMPLETED", 0),
        "Debit": ("COMPLETED", 0),
        "Fail": ("IN_TROUBLESHOOTING_QUEUE", 0),
        "Wait": ("COMPLETED", 0),
    }
    assert {attempts for command_type, _, attempts, _ in found["ends"] if command_type != "Book"} == {1}
    assert found["most runs"] == 1
    assert found["booked"] == [2, 2]
    assert found["violations"] == 0
