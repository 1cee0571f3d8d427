"""Runs the programs of `apps/`, as strictly as Python can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import UUID

_STRICT = ["-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning"]  # Python 3.12 about any fork


def run_program(app: str, *arguments: str) -> tuple[int, list[UUID], str]:
    """Run one to its end; returns its code, the ids of the commands that it knows to be sent, and what it said."""
    ended = subprocess.run(
        [sys.executable, *_STRICT, str(Path(__file__).with_name("apps") / app), *arguments],
        env=os.environ | {"PYTHONASYNCIODEBUG": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    return ended.returncode, [UUID(line) for line in ended.stdout.split()], ended.stderr
