"""Commands that are more than one send: calls, batches, and processes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from commandbus import Compensate, Finish, Process, Processes, Reply, ReplyTimeoutError, Send, SendRequest
from commandbus.process import Next
from tests import blocking
from tests.chaos.plan import DOMAIN, PROCESSES, TOLD, UNDO, Planned

ANNOUNCE = "Announce"
"""What a batch sends at its end."""

_PATIENCE = timedelta(seconds=5)  # of a call; a good part of those that are parked outlives it, and is waited for again


async def call(bus: Any, domain: str, kind: str, data: dict[str, Any], command_id: UUID) -> Reply:  # noqa: ANN401 - of either half
    """Call, and wait again when that took too long."""
    try:
        reply: Reply = await bus.call(domain, kind, data, command_id=command_id, timeout=_PATIENCE)
    except ReplyTimeoutError as error:
        reply = await bus.wait(error.domain, error.command_id, timeout=None)
    return reply


async def create_batch(bus: Any, batch_id: UUID, members: list[Planned]) -> tuple[UUID, bool]:  # noqa: ANN401 - as above
    """Create the batch of these; returns its id, and whether it was there already."""
    requests = [SendRequest(DOMAIN, each.kind, each.data, command_id=each.command_id) for each in members]
    end = SendRequest(TOLD, ANNOUNCE, {})
    batch = await bus.create_batch(DOMAIN, requests, batch_id=batch_id, on_complete=end)
    return batch.batch_id, batch.duplicate


async def start_process(bus: Any, process_id: UUID, members: list[Planned]) -> tuple[UUID, bool]:  # noqa: ANN401 - as above
    """Start the process whose steps these are; returns the same of it."""
    processes = blocking.Processes(bus) if isinstance(bus, blocking.CommandBus) else Processes(bus)
    steps = Steps([each.kind for each in members], [each.data for each in members])
    receipt = await processes.start_process(Chain, steps, process_id=process_id)
    return receipt.process_id, receipt.duplicate


SEND = {"batch": create_batch, "process": start_process}


@dataclass
class Steps:
    """The commands of a process, and how many of them are completed."""

    kinds: list[str]
    data: list[dict[str, Any]]
    done: int = 0


class Chain(Process[Steps], domain=PROCESSES):
    """One step after the other; the first that fails undoes those before."""

    def start(self, state: Steps) -> Next:
        """Send the first."""
        data = state.data[state.done]
        return Send(DOMAIN, state.kinds[state.done], data, name="step", undo=(DOMAIN, UNDO, data | {"runs": 0}))

    def on_step(self, state: Steps, reply: Reply) -> Next:
        """Send the next."""
        if reply.failed:
            return Compensate(reply.error)
        state.done += 1
        return self.start(state) if state.done < len(state.kinds) else Finish(state.done)
