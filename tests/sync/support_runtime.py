"""What the tests of the runtime share: async functions to call, threads to call from."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from commandbus.sync import SyncRuntime


class Slow:
    """An async function that waits until it is let go or cancelled, and tells what happened to it."""

    def __init__(self, *, when_cancelled: Callable[[], object] | None = None) -> None:
        self.story: list[str] = []
        self.go_on = asyncio.Event()
        self._when_cancelled = when_cancelled

    async def __call__(self) -> str:
        self.story.append("began")
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            self.story.append("was cancelled")
            if self._when_cancelled is None:
                raise
            return str(self._when_cancelled())
        return "went on"

    def has_begun(self) -> bool:
        return bool(self.story)


async def add(one: int, other: int) -> int:
    await asyncio.sleep(0)
    return one + other


async def fail() -> None:
    raise LookupError("the third shelf")


@contextmanager
def in_thread(function: Callable[[], object]) -> Iterator[list[object]]:
    """Call it in a thread, and wait for that at the end; the list then has what it returned or raised."""
    ends: list[object] = []

    def call() -> None:
        try:
            ends.append(function())
        except Exception as error:  # noqa: BLE001 - the test looks at it
            ends.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    yield ends
    thread.join(20)
    assert not thread.is_alive(), "the call has never ended"


def on_loop(runtime: SyncRuntime, function: Callable[[], object]) -> None:
    """Call it on the loop."""
    runtime.start().call_soon_threadsafe(function)
