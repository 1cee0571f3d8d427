"""Every test here ends with an event loop that has nothing to complain about."""

from __future__ import annotations

import pytest

from tests import blocking


@pytest.fixture(autouse=True)
def _quiet_loop(quiet_loop: None) -> None:
    """Ask for the one of all tests."""


@pytest.fixture(autouse=True)
def _handlers_on_the_tests_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let async handlers of a blocking worker run where the events are that they wait for."""
    monkeypatch.setattr(blocking, "make_runtime", blocking.tests_loop)
