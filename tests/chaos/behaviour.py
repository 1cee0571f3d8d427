"""What the handlers of both colours do: all but the waiting, and the one statement of a transactional handler."""

from __future__ import annotations

import math
import os
import time
from typing import Any

from commandbus import BusinessRuleError, PermanentCommandError, TransientCommandError
from commandbus.handlers import Context
from tests.chaos.journal import Journal
from tests.chaos.plan import LEASE, ZOMBIES

POISONED = 66
"""The exit code of a worker whose handler ended the process."""

EFFECT = "INSERT INTO chaos.effect (command_id, delivery) VALUES (%s, %s)"
REPLY = "INSERT INTO chaos.reply (command_id, status) VALUES (%s, %s)"

_CHUNK, _SMALL = 64 << 20, 4096
_HELD_SECONDS = 0.1


class Delivery:
    """One call of a handler: `begin` says how long it runs, `end` how that ends."""

    def __init__(self, context: Context[Any, Any], journal: Journal) -> None:
        self._context = context
        self._journal = journal
        self._command = context.command
        self._data: dict[str, Any] = context.command.data
        self._claimed_at = time.monotonic()
        self.effect = (context.command.command_id, context.delivery)

    def begin(self) -> float:
        """Do what is to be done at once; returns for how many seconds to go on then."""
        match self._command.command_type:
            case "Exit":
                os._exit(POISONED)
            case "Hog":
                self._exhaust_memory()
            case kind if kind in ZOMBIES and self._context.delivery == 1:
                self._stop_renewing()
                return float(self._data["outlives"])
        return float(self._data["runs"])

    def end(self) -> object:
        """Return the result, or raise."""
        if time.monotonic() - self._claimed_at > LEASE:
            self._journal.note("woke", command_id=self._command.command_id, delivery=self._context.delivery)
        match self._command.command_type:
            case "Flaky" if self._context.attempt <= self._data["failures"]:
                raise TransientCommandError("FLAKY", "once more")
            case "Refused":
                raise BusinessRuleError("REFUSED", "the rule says no")
            case "Broken" if "mended" not in self._data:
                raise PermanentCommandError("BROKEN", "an operator has to mend it")
            case "Failing" if "mended" not in self._data:
                raise TransientCommandError("FAILING", "each time")
            case kind if kind in ZOMBIES and self._context.delivery == 1 and self._data["fails"]:
                raise TransientCommandError("OUTLIVED", "what a zombie says of its command")
        return {"delivery": self._context.delivery}

    def _stop_renewing(self) -> None:
        """Make this one delivery a zombie: the renewer passes over what is lost, and so does the worker's own watch.

        So nothing but the fence in the database keeps its outcome from being recorded.
        """
        lease: Any = self._context._lease
        lease.lost, lease.deadline = True, math.inf

    def _exhaust_memory(self) -> None:
        """Take all memory for a moment: MemoryError here, and for whoever else asks for some meanwhile."""
        self._journal.note("hog")
        taken: list[bytes] = []
        chunk = _CHUNK
        try:
            while True:
                try:
                    taken.append(bytes(chunk))  # addresses only: nobody writes there, so no page is made
                except MemoryError:
                    if chunk < _SMALL:
                        time.sleep(_HELD_SECONDS)
                        raise
                    chunk //= 2
        finally:
            taken.clear()
            self._journal.note("hogged")
