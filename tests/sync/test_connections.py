"""`connection=` of the blocking bus: in the caller's thread, without a loop, warning at the caller's line.

`tests/bus/test_connection_kinds.py` tries every kind of connection with both halves.
"""

from __future__ import annotations

import psycopg
import pytest

from commandbus.sync import SyncCommandBus, SyncRuntime
from tests.bus.support import DOMAIN, Connection, ids


@pytest.fixture(autouse=True)
def _nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which kinds of connections were warned of in this process."""
    monkeypatch.setattr("commandbus._connections._warned", set())


def test_neither_loop_nor_thread_nor_connection_is_needed(dsn: str, db: Connection) -> None:
    def never() -> None:
        pytest.fail("a loop was asked for")

    runtime = SyncRuntime(loop_factory=never)  # type: ignore[arg-type] # that is what is tried
    bus = SyncCommandBus("host=nowhere.invalid", runtime=runtime)
    with psycopg.connect(dsn) as connection:
        receipt = bus.send(DOMAIN, "Debit", 1, connection=connection)
        assert ids(db) == []
    assert ids(db) == [receipt.command_id]


def test_the_warning_is_for_the_line_that_sends(bus: SyncCommandBus, dsn: str) -> None:
    with (
        psycopg.connect(dsn, autocommit=True) as connection,
        pytest.warns(UserWarning, match="in autocommit") as caught,
    ):
        bus.send(DOMAIN, "Debit", {}, connection=connection)
    assert [warning.filename for warning in caught] == [__file__]
