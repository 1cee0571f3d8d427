"""The leases that a worker holds, from the claim until the outcome is recorded."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

from commandbus import _calls
from commandbus._calls import Claimed
from commandbus.handlers import Handler

_NONE: frozenset[str] = frozenset()


class Lease:
    """One command under lease. `deadline` is when this process stops trusting it, by its monotonic clock."""

    __slots__ = (
        "cancelled",
        "charged",
        "claimed",
        "completing",
        "deadline",
        "handler",
        "held",
        "lost",
        "task",
        "wakes",
    )

    def __init__(self, claimed: Claimed, handler: Handler, deadline: float) -> None:
        self.claimed = claimed
        self.handler = handler
        self.deadline = deadline
        self.task: asyncio.Task[None] | None = None
        self.held = False  # and not replaced by a newer lease of the same command
        self.lost = False
        self.charged = False  # what fails in its transaction is the handler's doing, not a statement of the library's
        self.completing = False  # the completion stands in a transaction that may commit
        # The domains to which commands have gone when this is over: the reply, and what its transaction has sent.
        self.wakes = _NONE if (to := claimed.reply_to) is None or to.startswith("?") else frozenset([to])
        self.cancelled = False  # the handler's outcome can no longer be recorded; any thread may say so

    def wait(self, seconds: float) -> bool:
        """Sleep so long in this thread; whether it is `cancelled` then."""
        time.sleep(seconds)
        return self.cancelled

    def item(self, more: str = "") -> str:
        """Return the JSON that names this lease in a call."""
        return _calls.held(self.claimed.command_id, self.claimed.delivery, self.claimed.lease_token, more)

    def log_extra(self, worker: str) -> dict[str, Any]:
        """Return the stable keys under which log records name this delivery."""
        return {
            "domain": self.claimed.domain,
            "command_type": self.claimed.command_type,
            "command_id": str(self.claimed.command_id),
            "delivery": self.claimed.delivery,
            "attempt": self.claimed.attempts + 1,
            "worker": worker,
        }


class Leases:
    """All leases of one worker. The loop adds and removes; the renewer's thread reads, renews and ends them."""

    def __init__(self, worker: str, duration: timedelta) -> None:
        self.worker = worker
        self.duration = duration
        # Two seconds or a tenth: what a late stop may cost on top of the lease.
        self._margin = min(2.0, duration.total_seconds() / 10)
        self._held: dict[tuple[str, UUID], Lease] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Lease]:
        with self._lock:
            return iter(list(self._held.values()))

    def deadline(self, asked_at: float) -> float:
        """Return until when a lease is to be trusted that was asked for at this monotonic time."""
        return asked_at + self.duration.total_seconds() - self._margin

    def add(self, lease: Lease) -> Lease | None:
        """Hold a lease. Returns the older one of the same command that it replaces: that one is lost."""
        key = lease.claimed.domain, lease.claimed.command_id
        with self._lock:
            older = self._held.get(key)
            self._held[key] = lease
            lease.held = True
            if older is not None:
                older.held = False
        return older

    def remove(self, leases: Iterable[Lease]) -> None:
        """Let go of leases whose outcome is recorded or lost."""
        with self._lock:
            for lease in leases:
                if lease.held:
                    del self._held[lease.claimed.domain, lease.claimed.command_id]
                    lease.held = False

    def overdue(self) -> list[Lease]:
        """Return the leases whose deadline has passed and that nobody has ended yet."""
        now = time.monotonic()
        return [lease for lease in self if now >= lease.deadline and not lease.cancelled]
