"""Ctrl-C, an exception out of a signal handler, or a timeout, at 200 random moments: nothing is done without a word."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bus.support import Connection, ids

APP = Path(__file__).with_name("apps") / "interrupted.py"
TIMES = 200

UNKNOWN, SENT, NOT_SENT = "unknown", "sent", "not sent"
WORDS = {
    "may have been sent": UNKNOWN,
    "may or may not have been sent": UNKNOWN,
    "was sent": SENT,
    "the call had succeeded": SENT,
    "may still end": SENT,
    "was not sent": NOT_SENT,
    "did not end within": NOT_SENT,
}


@pytest.mark.parametrize("by", ["KeyboardInterrupt", "Late", "timeout"])
@pytest.mark.parametrize("call", ["send", "send_batch", "call", "run"])
def test_what_is_done_was_acknowledged_or_is_told(dsn: str, db: Connection, call: str, by: str) -> None:
    seed = str(random.randrange(10**9))
    command = [sys.executable, "-X", "dev", "-W", "error", str(APP), dsn, call, by, str(TIMES), seed]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stderr) == (0, ""), seed
    told = json.loads(ended.stdout)
    done = set(told["runs"]) if call == "run" else {str(command_id) for command_id in ids(db)}
    said: dict[str, set[str]] = {UNKNOWN: set(), SENT: set(), NOT_SENT: set()}
    for sent, notes in told["interrupted"]:
        said[_meaning(notes, names=sent[0] if call != "run" else "")] |= set(sent)
    assert len(told["interrupted"]) == TIMES
    assert done - set(told["acknowledged"]) - said[SENT] - said[UNKNOWN] == set(), f"silent extras, seed {seed}"
    assert set(told["acknowledged"]) | said[SENT] <= done, f"seed {seed}"


def _meaning(notes: list[str], *, names: str) -> str:
    """What the notes on an exception, or its message, say of the commands that begin with this id."""
    for note in notes:
        for words, meaning in WORDS.items():
            if words in note:
                assert names in note or meaning == SENT
                return meaning
    assert all("durable before it" in note for note in notes), notes
    return NOT_SENT  # it had not even begun
