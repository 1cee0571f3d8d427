"""How programs end that do not close what they use: with the code they chose, without a word, and nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from tests.bus.support import ids, rows

STRICT = [sys.executable, "-X", "dev", "-W", "error"]


def run(name: str, dsn: str) -> tuple[int, list[UUID], str]:
    """Run one of `apps/ends.py` to its end; returns its code, what it knows to be sent, and what it said."""
    program = str(Path(__file__).with_name("apps") / "ends.py")
    ended = subprocess.run(
        [*STRICT, program, name, dsn],
        env=os.environ | {"PYTHONASYNCIODEBUG": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return ended.returncode, [UUID(line) for line in ended.stdout.split()], ended.stderr


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("leave_it_open", 1),
        ("exit_in_a_thread", 2),
        ("send_on_in_a_thread", 21),
        ("send_at_exit", 2),
        ("begin_at_exit", 1),
        ("send_after_the_end", 1),
        ("use_several_runtimes", 2),
        ("end_in_a_forked_child_too", 3),
    ],
)
def test_it_ends_without_a_word_and_everything_is_there(name: str, sent: int, dsn: str, db: psycopg.Connection) -> None:
    code, known, said = run(name, dsn)
    assert (code, said) == (0, "")
    assert len(known) == sent
    assert sorted(ids(db)) == sorted(known)


def test_sys_exit_keeps_its_code(dsn: str, db: psycopg.Connection) -> None:
    code, known, said = run("end_in_a_with_block", dsn)
    assert (code, said) == (3, "")
    assert ids(db) == known


def test_an_exception_is_all_that_is_told(dsn: str, db: psycopg.Connection) -> None:
    code, known, said = run("raise_an_exception", dsn)
    assert code == 1
    assert said.startswith("Traceback")
    assert said.endswith("LookupError: the third shelf\n")
    assert said.count("Traceback") == 1
    assert "commandbus/" not in said
    assert ids(db) == known


def test_what_was_acknowledged_before_the_end_is_there(dsn: str, db: psycopg.Connection) -> None:
    code, known, said = run("hammer_in_daemon_threads", dsn)
    assert (code, said) == (0, "")
    assert len(known) >= 8 * 20
    assert set(known) <= set(ids(db))


def test_a_worker_in_the_background_has_let_go_of_everything(dsn: str, db: psycopg.Connection) -> None:
    code, known, said = run("work_in_the_background", dsn)
    assert (code, said) == (0, "")
    found = rows(db, "SELECT command_id, status FROM commandbus.commands")
    assert sorted(found) == sorted((command_id, "COMPLETED") for command_id in known)


def test_a_handler_that_hangs_does_not_keep_it_from_ending(dsn: str, db: psycopg.Connection) -> None:
    code, known, said = run("hang_in_a_handler", dsn)
    assert (code, said) == (0, "")
    assert rows(db, "SELECT command_id, status, attempts FROM commandbus.commands") == [(known[0], "PENDING", 0)]
