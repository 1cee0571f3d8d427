"""The threads of handlers, without a worker."""

from __future__ import annotations

import threading
from typing import cast

import pytest

from commandbus.worker.leases import Lease
from commandbus.worker.threads import HandlerThreads


def test_a_thread_that_cannot_be_started_is_started_when_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    threads = HandlerThreads("tester", 1, ["d"])
    lease = cast("Lease", object())

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def then(_: Lease, ending: object) -> None:
        assert ending == "ran"
        done.set()

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        assert not threads.submit([lease], lambda _: "ran", then, unfinished=1)
    assert threads.submit([], lambda _: "ran", then, unfinished=1)
    assert done.wait(30)
    threads.close()
