"""What the tests of the blocking worker share: registries, a worker in the background, handlers that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from commandbus import Command, CommandStatus, HandlerRegistry, Receipt, RetryPolicy
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncWorker
from tests.bus.support import DOMAIN
from tests.support import eventually

HOUR = timedelta(hours=1)
LEASE = timedelta(seconds=1)  # the shortest there is
AT_ONCE = RetryPolicy(max_attempts=3, backoff=[timedelta(milliseconds=5)])
PARKED = CommandStatus.IN_TROUBLESHOOTING_QUEUE

Function = Callable[[Command, Any], Any]


def registry_of(
    domain: str = DOMAIN, /, *, transactional: bool = False, timeout: timedelta | None = None, **handlers: Function
) -> HandlerRegistry:
    """A registry with these functions: `registry_of(Debit=debit)`."""
    registry = HandlerRegistry()
    for command_type, function in handlers.items():
        registry.handler(domain, command_type, retry=AT_ONCE, transactional=transactional, timeout=timeout)(function)
    return registry


def echo(command: Command, context: SyncHandlerContext) -> object:
    """A `def` handler that returns its data."""
    return command.data


@contextmanager
def working(bus: SyncCommandBus, registry: HandlerRegistry, **options: Any) -> Iterator[SyncWorker]:
    """A worker in the background."""
    with SyncWorker(bus, DOMAIN, registry, **options) as worker:
        yield worker


def settled(bus: SyncCommandBus, receipt: Receipt, timeout: float = 30) -> Command:
    """The command, once it is finished or parked."""

    def look() -> Command | None:
        command = bus.get_command(receipt)
        return command if command.status.terminal or command.status == PARKED else None

    found = eventually(look, timeout=timeout, what=f"the end of {receipt.command_id}")
    assert found is not None
    return found


def all_settled(bus: SyncCommandBus, receipts: Iterable[Receipt]) -> list[Command]:
    """The commands, once all are finished or parked."""
    return [settled(bus, receipt) for receipt in receipts]


def story(bus: SyncCommandBus, receipt: Receipt) -> list[str]:
    """The events of a command, in order."""
    return [event.event for event in bus.get_audit_trail(receipt)]


class Waiting:
    """A `def` handler that waits until it is let go, whatever becomes of its lease."""

    def __init__(self) -> None:
        self.contexts: list[SyncHandlerContext] = []
        self.go_on = threading.Event()

    def handler(self, command: Command, context: SyncHandlerContext) -> str:
        """Wait, and say which delivery this was."""
        self.contexts.append(context)
        assert self.go_on.wait(60)
        return f"delivery {context.delivery}"

    def started(self, count: int = 1) -> None:
        """Come back when it was called so many times."""
        eventually(lambda: len(self.contexts) >= count, what=f"{count} calls of the handler", timeout=30)


def run_in_thread(function: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """Call it in a thread; the list gets what it returns or raises."""
    ends: list[Any] = []

    def call() -> None:
        try:
            ends.append(function())
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            ends.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    return thread, ends


def result_of(run: tuple[threading.Thread, list[Any]]) -> Any:  # noqa: ANN401 - whatever was returned
    """What the call in that thread has returned or raised, once it has."""
    thread, ends = run
    thread.join(30)
    assert not thread.is_alive(), "the call has never ended"
    return ends[0]
