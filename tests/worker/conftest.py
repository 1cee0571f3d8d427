"""Every test here ends with an event loop that has nothing to complain about."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _quiet_loop(quiet_loop: None) -> None:
    """Ask for the one of all tests."""
