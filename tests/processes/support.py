"""What the tests of processes share: the engine on a real database, with a hand in place of the workers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

import psycopg

from commandbus import Process, ProcessReceipt
from commandbus._calls import complete, fail, held, work
from commandbus._connections import adopt, drive_blocking
from commandbus._ids import new_id
from commandbus.model import REPLY
from commandbus.process import TIMER, applying, starting
from tests.support import ROOT
from tests.worker.support import HOUR

Connection = psycopg.Connection[Any]

_EVERYWHERE = (-1, (201 << 54) - 1)
REFUSED = '{"code":"NO","message":"not allowed"}'
BROKEN = '{"code":"BROKEN","message":"a person has to look"}'


def load_example() -> Any:  # noqa: ANN401 - a module
    """The program of the example."""
    path = ROOT / "examples" / "fulfilment" / "fulfilment.py"
    spec = importlib.util.spec_from_file_location("fulfilment", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fulfilment"] = module
    spec.loader.exec_module(module)
    return module


class Hand:
    """Does what workers do, one command at a time, in the order that a test wants."""

    def __init__(self, db: Connection, *kinds: type[Process[Any]]) -> None:
        self.db = db
        self.own = adopt(db)
        self.kinds: Mapping[str, type[Process[Any]]] = {kind.type: kind for kind in kinds}
        self.domain = kinds[0].domain
        self._offset = timedelta(0)

    def start(self, kind: type[Process[Any]], state: object, process_id: UUID | None = None) -> ProcessReceipt:
        new = process_id or new_id()
        call, _ = starting(kind, state, new, {}, 1 << 18)
        return ProcessReceipt(kind.domain, new, self.own.execute(call) == "duplicate")

    def claim(self, domain: str, *types: str) -> Any:  # noqa: ANN401 - a Claimed
        """Lease one command of these types."""
        segments = [(name, *_EVERYWHERE) for name in types]
        (claimed,) = self.own.execute(work(domain, segments, 1, "hand", HOUR)).commands
        return claimed

    def do(
        self, domain: str, command_type: str, verdict: str = "complete", result: str = "null", error: str | None = None
    ) -> UUID:
        """Lease a command and end its delivery: complete, refuse or park."""
        claimed = self.claim(domain, command_type)
        lease = (claimed.command_id, claimed.delivery, claimed.lease_token)
        if verdict == "complete":
            answers = self.own.execute(complete(domain, [held(*lease, f',"result":{result}')]))
        else:
            kind, said = ("BUSINESS", REFUSED) if verdict == "refuse" else ("PERMANENT", BROKEN)
            more = f',"kind":"{kind}","error":{error or said},"retry_in":0,"max_attempts":1'
            answers = self.own.execute(fail(domain, [held(*lease, more)]))
        assert answers == {claimed.command_id: "done"}
        found: UUID = claimed.command_id
        return found

    def park_and(self, verb: str, domain: str, command_type: str, result: str = "null") -> None:
        """Park a command, and let an operator retry it, so that it succeeds, or cancel it."""
        command_id = self.do(domain, command_type, "park")
        if verb == "fix":
            self.db.execute("SELECT commandbus.operator_retry_v1(%s, %s, 'ann', 'fixed')", (domain, command_id))
            self.do(domain, command_type, result=result)
        else:
            self.db.execute("SELECT commandbus.operator_cancel_v1(%s, %s, 'ann', 'given up')", (domain, command_id))

    def apply(self, count: int = 1) -> None:
        """Handle so many replies and timers of the processes' domain, as the registered handler does."""
        for _ in range(count):
            claimed = self.claim(self.domain, REPLY, TIMER)
            command = claimed.command("hand")
            with self.db.transaction():
                drive_blocking(applying(self.kinds, command, 1 << 18), self.own.execute)
                item = held(claimed.command_id, claimed.delivery, claimed.lease_token, ',"result":null')
                assert set(self.own.execute(complete(self.domain, [item])).values()) == {"done"}

    def pending(self) -> list[tuple[str, str]]:
        """Domain and type of what could be claimed now."""
        return self.db.execute(
            "SELECT domain, command_type FROM commandbus.command WHERE status = 'PENDING' ORDER BY place"
        ).fetchall()

    def settle(self) -> None:
        """Complete all that there is to do, in the order of the queue."""
        while pending := self.pending():
            domain, command_type = pending[0]
            if domain == self.domain and command_type in (REPLY, TIMER):
                self.apply()
            else:
                self.do(domain, command_type)

    def wait(self, duration: timedelta) -> None:
        """Let so much time pass, and promote what is due."""
        self._offset += duration
        self.db.execute("UPDATE commandbus.setting SET value = 'on' WHERE name = 'test_clock'")
        self.db.execute(
            "SELECT set_config('commandbus.clock_offset', %s, false)", (f"{self._offset.total_seconds()} s",)
        )
        for domain in {row[0] for row in self.db.execute("SELECT domain FROM commandbus.command")}:
            self.own.execute(work(domain, [], 0, "hand", HOUR))

    def status(self, receipt: ProcessReceipt) -> tuple[str, str | None]:
        """The status of a process, and the code of its error."""
        found = self.db.execute(
            "SELECT status, error ->> 'code' FROM commandbus.processes WHERE process_id = %s", (receipt.process_id,)
        ).fetchone()
        assert found is not None
        return found[0], found[1]

    def steps(self, receipt: ProcessReceipt) -> list[str]:
        """What a process has sent, in order: `step reserve COMPLETED`."""
        return [
            " ".join(row)
            for row in self.db.execute(
                "SELECT kind, name, status FROM commandbus.process_steps WHERE process_id = %s ORDER BY number",
                (receipt.process_id,),
            )
        ]
