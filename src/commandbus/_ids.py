"""Ids for commands."""

from __future__ import annotations

import os
import struct
import threading
import time
from uuid import UUID

_COUNTER_BITS = 12
_lock = threading.Lock()
_last = [0, 0]  # milliseconds, counter
_drawn: list[int] = []
"""Random numbers of 64 bits. Each call of the system lets another thread run first; 64 that send pay 14 % for one."""
_drawn_in = 0  # which process: a server written in C may fork without a word to Python
if hasattr(os, "register_at_fork"):  # else, in a child, a lock that another thread held would never be free again
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def new_id() -> UUID:
    """Make a UUIDv7 (RFC 9562, 6.2 method 1): milliseconds, a counter, random bits.

    Ids of one process grow, so that the rows of a burst lie side by side in the index.
    """
    with _lock:
        now = time.time_ns() // 1_000_000
        if now > _last[0]:
            _last[:] = now, _random() >> 64 - (_COUNTER_BITS - 1)
        elif _last[1] + 1 < 1 << _COUNTER_BITS:
            _last[1] += 1
        else:
            _last[:] = _last[0] + 1, 0
        milliseconds, counter = _last
        random = _random() >> 2
    return UUID(int=milliseconds << 80 | 0x7 << 76 | counter << 64 | 0b10 << 62 | random)


def _random() -> int:
    global _drawn_in
    if not _drawn or _drawn_in != os.getpid():
        _drawn[:], _drawn_in = struct.unpack("512Q", os.urandom(4096)), os.getpid()
    return _drawn.pop()
