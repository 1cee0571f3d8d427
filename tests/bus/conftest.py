"""Every test here ends with an event loop that has nothing to complain about."""

from __future__ import annotations

import pytest

from commandbus import _connections


@pytest.fixture(autouse=True)
def _quiet_loop(quiet_loop: None) -> None:
    """Ask for the one of all tests."""


@pytest.fixture(autouse=True)
def _nothing_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which kinds of connections were warned of in this process."""
    monkeypatch.setattr(_connections, "_warned", set())
