"""Tests of the application and its handlers together, on a database of each test's own; see README.md."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from commandbus.sync import SyncCommandBus
from commandbus.testing import SyncHarness


@pytest.fixture
def harness(commandbus_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncHarness]:
    """Let the application send to the database of this test."""
    monkeypatch.setenv("COMMAND_BUS_DSN", commandbus_dsn)  # read when `app` is imported for the first time
    import app
    import worker

    with SyncCommandBus(commandbus_dsn) as bus:
        monkeypatch.setattr(app, "bus", bus)
        yield SyncHarness(bus, worker.registry)


def test_an_order_is_shipped(harness: SyncHarness) -> None:
    import app

    client = app.app.test_client()
    order = client.post("/orders", json={"item": "lamp"}).get_json()
    harness.assert_sent("shop", "ShipOrder", {"item": "lamp"})
    harness.run_until_idle()
    answer = client.get(f"/orders/{order['command_id']}").get_json()
    assert answer == {"status": "COMPLETED", "result": {"shipped": "lamp"}}
