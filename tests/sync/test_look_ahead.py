"""What a worker claims before it has a thread for it, while `def` handlers are short."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest

from commandbus import Command, CommandStatus, HandlerContext, Receipt, SendRequest, StopReport
from commandbus.sync import SyncCommandBus, SyncWorker
from commandbus.worker import blocking
from tests.bus.support import DOMAIN
from tests.support import eventually
from tests.sync.support_worker import LEASE, Waiting, echo, registry_of, settled, story, working

FOREVER = 1e6


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every handler that has returned was a short one, and what waits may wait."""
    monkeypatch.setattr(blocking, "_AHEAD_SECONDS", FOREVER)
    monkeypatch.setattr(blocking, "_PATIENCE", FOREVER)


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    """A handler that waits; let go at the end in any case."""
    found = Waiting()
    yield found
    found.go_on.set()


@contextmanager
def one_runs_and_the_rest_wait(
    bus: SyncCommandBus, waiting: Waiting, count: int, concurrency: int = 20, lease: timedelta = LEASE
) -> Iterator[tuple[SyncWorker, list[Receipt]]]:
    """A worker with one thread that has had a short handler, and so many commands after it."""
    registry = registry_of(Short=echo, Long=waiting.handler, Async=on_the_loop)
    with working(bus, registry, thread_pool_size=1, concurrency=concurrency, lease=lease) as worker:
        settled(bus, bus.send(DOMAIN, "Short", 0))
        sent = bus.send_batch([SendRequest(DOMAIN, "Long", n) for n in range(count)])
        waiting.started()
        yield worker, sent


async def on_the_loop(command: Command, context: HandlerContext) -> None:
    return None


def leased(bus: SyncCommandBus) -> int:
    return bus.count(status=CommandStatus.IN_PROGRESS)


def test_what_waits_is_leased_up_to_the_concurrency(bus: SyncCommandBus, waiting: Waiting) -> None:
    with one_runs_and_the_rest_wait(bus, waiting, 8, concurrency=6) as (_, sent):
        eventually(lambda: leased(bus) == 6, what="five that wait")
        waiting.go_on.set()
        assert {settled(bus, receipt).delivery for receipt in sent} == {1}
    assert [context.command.data for context in waiting.contexts] == list(range(8))


def test_nothing_waits_where_the_concurrency_is_that_of_the_threads(bus: SyncCommandBus, waiting: Waiting) -> None:
    with one_runs_and_the_rest_wait(bus, waiting, 3, concurrency=1) as (_, sent):
        assert leased(bus) == 1
        waiting.go_on.set()
        assert {settled(bus, receipt).delivery for receipt in sent} == {1}


def test_what_waits_is_renewed(bus: SyncCommandBus, waiting: Waiting) -> None:
    with one_runs_and_the_rest_wait(bus, waiting, 3) as (_, sent):
        eventually(lambda: leased(bus) == 3, what="two that wait")
        ends = [bus.get_command(receipt).lease_until for receipt in sent]
        assert all(ends)
        eventually(
            lambda: all(
                (end := bus.get_command(receipt).lease_until) and before and end - before > LEASE
                for receipt, before in zip(sent, ends, strict=True)
            ),
            what="leases that are still held when the first ones would be over",
        )
        waiting.go_on.set()
        assert {settled(bus, receipt).delivery for receipt in sent} == {1}


def test_what_has_waited_for_too_long_is_given_back_and_no_more_is_claimed(
    bus: SyncCommandBus, waiting: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocking, "_PATIENCE", 0.05)
    with one_runs_and_the_rest_wait(bus, waiting, 4) as (_, sent):
        expected = ["SENT", "CLAIMED", "RELEASED"]
        eventually(lambda: [story(bus, receipt) for receipt in sent[1:]] == [expected] * 3, what="the three released")
        late = bus.send(DOMAIN, "Long", 4, priority=1)
        for n in range(10):  # the claimer goes round and round meanwhile
            settled(bus, bus.send(DOMAIN, "Async", n))
        assert story(bus, late) == ["SENT"]
        waiting.go_on.set()
        assert [settled(bus, receipt).crashes for receipt in [*sent, late]] == [0] * 5


def test_a_stop_releases_what_waits_at_once(bus: SyncCommandBus, waiting: Waiting) -> None:
    with one_runs_and_the_rest_wait(bus, waiting, 4) as (worker, sent):
        eventually(lambda: leased(bus) == 4, what="three that wait")
        reports: list[StopReport | None] = []
        stopping = threading.Thread(target=lambda: reports.append(worker.stop()))
        stopping.start()
        eventually(lambda: leased(bus) == 1, what="the release of the three")
        waiting.go_on.set()
        stopping.join(30)
    assert [story(bus, receipt)[-1] for receipt in sent] == ["COMPLETED", *["RELEASED"] * 3]
    assert len(waiting.contexts) == 1
    (report,) = reports
    assert report is not None
    assert (report.finished, report.released) == (1, 3)


def test_what_is_canceled_while_it_waits_does_not_begin(bus: SyncCommandBus, waiting: Waiting) -> None:
    with one_runs_and_the_rest_wait(bus, waiting, 3) as (worker, sent):
        eventually(lambda: leased(bus) == 3, what="two that wait")
        bus.cancel(sent[1])
        eventually(lambda: len(worker._worker._leases) == 2, what="the loss of its lease")
        waiting.go_on.set()
        assert settled(bus, sent[2]).result == "delivery 1"
    assert [context.command.data for context in waiting.contexts] == [0, 2]


def test_transactional_handlers_do_not_wait(bus: SyncCommandBus, waiting: Waiting) -> None:
    registry = registry_of(transactional=True, Short=echo, Long=waiting.handler)
    with working(bus, registry, thread_pool_size=1, concurrency=20):
        settled(bus, bus.send(DOMAIN, "Short", 0))
        sent = bus.send_batch([SendRequest(DOMAIN, "Long", n) for n in range(3)])
        waiting.started()
        assert leased(bus) == 1
        waiting.go_on.set()
        assert {settled(bus, receipt).delivery for receipt in sent} == {1}
