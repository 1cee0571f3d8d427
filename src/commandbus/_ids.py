"""Ids for commands."""

from __future__ import annotations

import os
import secrets
import threading
import time
from uuid import UUID

_COUNTER_BITS = 12
_lock = threading.Lock()
_last = [0, 0]  # milliseconds, counter
if hasattr(os, "register_at_fork"):  # else, in a child, a lock that another thread held would never be free again
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def new_id() -> UUID:
    """Make a UUIDv7 (RFC 9562, 6.2 method 1): milliseconds, a counter, random bits.

    Ids of one process grow, so that the rows of a burst lie side by side in the index.
    """
    with _lock:
        now = time.time_ns() // 1_000_000
        if now > _last[0]:
            _last[:] = now, secrets.randbits(_COUNTER_BITS - 1)
        elif _last[1] + 1 < 1 << _COUNTER_BITS:
            _last[1] += 1
        else:
            _last[:] = _last[0] + 1, 0
        milliseconds, counter = _last
    return UUID(int=milliseconds << 80 | 0x7 << 76 | counter << 64 | 0b10 << 62 | secrets.randbits(62))
