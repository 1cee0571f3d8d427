"""Ids that the library makes: UUIDv7, growing, unique among threads."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from uuid import RFC_4122

import pytest

from commandbus._ids import new_id


def test_an_id_is_a_uuid_of_version_7_and_of_now() -> None:
    before = time.time_ns() // 1_000_000
    made = new_id()
    assert (made.version, made.variant) == (7, RFC_4122)
    assert before <= made.int >> 80 <= time.time_ns() // 1_000_000 + 1000


def test_ids_grow() -> None:
    made = [new_id() for _ in range(20_000)]
    assert made == sorted(set(made))


def test_ids_grow_when_the_clock_stands_still_or_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_id()
    monkeypatch.setattr("commandbus._ids.time.time_ns", lambda: 1_000_000)
    made = [first, *(new_id() for _ in range(10_000))]
    assert made == sorted(set(made))


def test_threads_do_not_share_an_id() -> None:
    with ThreadPoolExecutor(8) as pool:
        made = [one for many in pool.map(lambda _: [new_id() for _ in range(2000)], range(8)) for one in many]
    assert len(set(made)) == 16_000


def test_a_child_of_a_fork_does_not_draw_what_its_parent_will() -> None:
    new_id()  # there are random numbers in store
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writing, b"".join(new_id().bytes[8:] for _ in range(100)))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pipe.read()
    theirs = {found[at : at + 8] for at in range(0, len(found), 8)}
    assert len(theirs) == 100
    assert theirs.isdisjoint({new_id().bytes[8:] for _ in range(100)})
