"""When a failed attempt is tried again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from commandbus.errors import ConfigurationError

_MAX_ATTEMPTS = 1_000_000
_MAX_WAIT = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a command of a type is attempted, and how long it waits in between.

    `max_attempts` bounds the attempts; a command's own `max_attempts` goes before it. `backoff[n]` is the wait after
    attempt n + 1; the last one repeats. Each wait is spread evenly over plus or minus `jitter` of itself, so that what
    failed together does not come back together.
    """

    max_attempts: int = 4
    backoff: Sequence[timedelta] = field(default=(timedelta(seconds=10), timedelta(seconds=60), timedelta(seconds=300)))
    jitter: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.max_attempts <= _MAX_ATTEMPTS:
            raise ConfigurationError(f"max_attempts is {self.max_attempts}: it must be 1 to {_MAX_ATTEMPTS:,}")
        waits: Sequence[object] = self.backoff
        if not waits or not all(isinstance(wait, timedelta) and timedelta(0) <= wait <= _MAX_WAIT for wait in waits):
            raise ConfigurationError(
                f"backoff must name at least one wait, each a timedelta of 0 to {_MAX_WAIT.days} days"
            )
        if not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"jitter is {self.jitter}: it must be between 0 and 1")

    def wait_after(self, attempt: int) -> timedelta:
        """Return how long to wait after this attempt, the first being 1."""
        wait = self.backoff[min(attempt, len(self.backoff)) - 1]
        return wait * (1 + random.uniform(-self.jitter, self.jitter))  # noqa: S311 - spread, not a secret
