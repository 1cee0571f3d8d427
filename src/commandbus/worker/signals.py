"""SIGTERM and SIGINT stop the workers of this process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_stops: dict[int, Callable[[], None]] = {}  # of the workers that run
_before: dict[int, Any] = {}  # what the signals did before the first of them


@contextlib.contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at each signal; when the last worker has ended, signals do again what they did before the first.

    In a thread other than the main one nothing changes: Python handles signals there only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _stops:
        _before.update({number: signal.signal(number, _stop_all) for number in _SIGNALS})
    _stops[id(stop)] = stop
    try:
        yield
    finally:
        _stops.pop(id(stop), None)
        if not _stops:
            for number, handler in _before.items():
                signal.signal(number, handler)


def _stop_all(_number: int, _frame: object) -> None:
    for stop in list(_stops.values()):
        stop()


def _after_fork() -> None:
    """Let signals do here what they did before: the workers are the parent's, and `terminate()` would pass unheard."""
    if _stops:
        _stops.clear()
        for number, handler in _before.items():
            signal.signal(number, handler)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
