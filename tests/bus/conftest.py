"""An open bus, and an event loop that has nothing to complain about."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Iterator

import pytest

from commandbus import CommandBus


@pytest.fixture(autouse=True)
def _quiet_loop(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A task that nobody waited for, an exception that nobody took: asyncio only logs these."""
    yield
    gc.collect()
    records = caplog.get_records("call") + caplog.get_records("teardown")
    assert [r.getMessage() for r in records if r.name == "asyncio" and r.levelno >= logging.ERROR] == []


@pytest.fixture
async def bus(dsn: str) -> AsyncIterator[CommandBus]:
    """An open bus on this test's database."""
    async with CommandBus(dsn) as bus:
        yield bus
