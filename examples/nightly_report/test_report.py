"""Tests of the report from the batch to its end, on a database of each test's own: `python -m pytest`."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from make_sales import make
from nightly import create, watch
from report import registry

from commandbus.testing import SyncHarness

DAY = "2026-01-05"
WHO = {"operator": "ana", "reason": "the letter O is a zero"}


@pytest.fixture
def harness(commandbus_dsn: str) -> Iterator[SyncHarness]:
    """Give a database with the sales of 20 shops."""
    make(commandbus_dsn, DAY, 20)
    with SyncHarness(commandbus_dsn, registry) as harness:
        yield harness


def test_a_night_is_one_batch_however_often_it_is_started(harness: SyncHarness) -> None:
    assert [create(harness.bus, DAY, 20).duplicate for _ in range(3)] == [False, True, True]
    assert len(harness.sent("reports", "TotalShop")) == 20


def test_what_cannot_be_read_waits_for_a_person(harness: SyncHarness, commandbus_dsn: str) -> None:
    batch = create(harness.bus, DAY, 20)
    harness.run_until_idle()
    batch = watch(harness.bus, batch)
    assert (batch.completed, batch.in_trouble, batch.done) == (19, 1, False)
    assert harness.sent("reports", "Assemble") == []

    with psycopg.connect(commandbus_dsn) as connection:
        connection.execute("UPDATE nightly.sale SET amount = '10.00' WHERE amount = '1O.00'")
    harness.bus.retry_batch("reports", batch.batch_id, **WHO)
    harness.run_until_idle()
    assert watch(harness.bus, batch).done
    (report,) = harness.sent("reports", "Assemble")
    assert report.result == {"total": "250.00", "shops": 20, "missing": 0}


def test_the_report_tells_what_is_missing(harness: SyncHarness) -> None:
    batch = create(harness.bus, DAY, 20)
    harness.run_until_idle()
    harness.bus.cancel_batch("reports", batch.batch_id, **WHO)
    harness.run_until_idle()
    (report,) = harness.sent("reports", "Assemble")
    assert report.result == {"total": "237.50", "shops": 19, "missing": 1}
