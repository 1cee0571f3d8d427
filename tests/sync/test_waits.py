"""Waiting for replies in threads: many at once, after a fork, and where nobody is left to answer."""

from __future__ import annotations

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from commandbus import Command, HandlerRegistry, ReplyTimeoutError
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncWorker
from tests.bus.support import DOMAIN
from tests.support import eventually

LONG = timedelta(seconds=30)


def test_sixty_four_threads_call_at_once(bus: SyncCommandBus) -> None:
    registry = HandlerRegistry()

    @registry.handler(DOMAIN, "Square")
    def square(command: Command, context: SyncHandlerContext) -> int:
        return int(command.data) ** 2

    def call(number: int) -> object:
        return bus.call(DOMAIN, "Square", number, timeout=LONG).data

    with SyncWorker(bus, DOMAIN, registry), ThreadPoolExecutor(64) as pool:
        assert list(pool.map(call, range(500))) == [number**2 for number in range(500)]


def nested_calls(bus: SyncCommandBus, threads: int, timeout: timedelta) -> list[str]:
    """Let so many handlers call each a command that their own worker would have to run; returns how that ended."""
    registry, ended = HandlerRegistry(), []
    together = threading.Barrier(threads)

    @registry.handler(DOMAIN, "Outer")
    def outer(command: Command, context: SyncHandlerContext) -> None:
        together.wait(30)
        try:
            ended.append(bus.call(DOMAIN, "Inner", None, timeout=timeout).status.value)
        except ReplyTimeoutError:
            ended.append("late")

    @registry.handler(DOMAIN, "Inner")
    def inner(command: Command, context: SyncHandlerContext) -> None: ...

    for _ in range(threads):
        bus.send(DOMAIN, "Outer", None)
    with SyncWorker(bus, DOMAIN, registry, thread_pool_size=2):
        eventually(lambda: len(ended) == threads, timeout=30, what="the end of the outer handlers")
    return ended


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "commandbus.worker" and r.levelno == logging.WARNING]


def test_a_worker_whose_threads_all_wait_for_itself_warns(
    bus: SyncCommandBus, caplog: pytest.LogCaptureFixture
) -> None:
    assert nested_calls(bus, 2, timedelta(seconds=1)) == ["late", "late"]
    (warning,) = [text for text in warnings(caplog) if "all 2 handler threads" in text]
    assert "thread_pool_size" in warning


def test_a_worker_with_a_thread_left_does_not_warn(bus: SyncCommandBus, caplog: pytest.LogCaptureFixture) -> None:
    assert nested_calls(bus, 1, LONG) == ["COMPLETED"]
    assert [text for text in warnings(caplog) if "handler threads" in text] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_the_child_of_a_fork_has_an_address_of_its_own(bus: SyncCommandBus) -> None:
    with pytest.raises(ReplyTimeoutError):
        bus.call(DOMAIN, "Debit", None, timeout=timedelta(milliseconds=50))
    address = bus.opened()._waits.address
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.write(writing, bus._local()._waits.address.encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 100).decode() not in {"", address}
    os.close(reading)
    os.close(writing)
