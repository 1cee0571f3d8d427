"""Every test here ends with an event loop that has nothing to complain about."""

from __future__ import annotations

from typing import Any

import pytest

from commandbus import _connections


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drop what pairs the blocking bus with an async connection: it refuses those, see `tests/sync`."""
    items[:] = [item for item in items if not _is_odd_pair(item)]


def _is_odd_pair(item: pytest.Item) -> bool:
    given: dict[str, Any] = (
        item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    )
    connection = " ".join([*given.get("way", ()), given.get("caller", "")]).replace("asyncpg", "").lower()
    return given.get("route") == "sync" and "async" in connection


@pytest.fixture(autouse=True)
def _quiet_loop(quiet_loop: None) -> None:
    """Ask for the one of all tests."""


@pytest.fixture(autouse=True)
def _nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which kinds of connections were warned of in this process."""
    monkeypatch.setattr(_connections, "_warned", set())
