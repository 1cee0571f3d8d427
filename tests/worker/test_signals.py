"""SIGTERM and SIGINT, with one worker and with several in a process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

import pytest

from commandbus.worker.signals import stopping_on_signals

pytestmark = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


def test_a_signal_stops_every_worker_of_the_process(number: signal.Signals) -> None:
    stopped: list[str] = []
    with stopping_on_signals(lambda: stopped.append("one")), stopping_on_signals(lambda: stopped.append("two")):
        os.kill(os.getpid(), number)
        assert sorted(stopped) == ["one", "two"]


def test_who_ends_first_does_not_take_the_signal_from_the_other(number: signal.Signals) -> None:
    stopped: list[str] = []
    with contextlib.ExitStack() as second:
        with stopping_on_signals(lambda: stopped.append("one")):
            second.enter_context(stopping_on_signals(lambda: stopped.append("two")))
        os.kill(os.getpid(), number)
    assert stopped == ["two"]


def test_afterwards_it_does_what_it_did_before(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stopping_on_signals(lambda: None):
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before


def test_another_thread_leaves_signals_alone(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    seen = []

    def run() -> None:
        with stopping_on_signals(lambda: None):
            seen.append(signal.getsignal(number))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
