"""Programs that end in different ways: `python ends.py NAME DSN`. Each writes the ids that it knows to be sent."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

hooks: list[Callable[[], None]] = []
atexit.register(lambda: [hook() for hook in hooks])  # before the import, so it runs after the library's own hook

from commandbus import Command, HandlerRegistry, Receipt  # noqa: E402
from commandbus.errors import ClosedError  # noqa: E402
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncRuntime, SyncWorker  # noqa: E402

DOMAIN = "payments"
bus = SyncCommandBus(sys.argv[2])
registry = HandlerRegistry()
begun = threading.Event()
ended = threading.Event()


@registry.handler(DOMAIN, "Quick")
def quick(command: Command, context: SyncHandlerContext) -> None:
    """Send what comes next, once."""
    if command.data == "first":
        send(context.bus, "Quick", "last")
    else:
        ended.set()


@registry.handler(DOMAIN, "Hang")
def hang(command: Command, context: SyncHandlerContext) -> None:
    """Never return."""
    begun.set()
    threading.Event().wait()


def send(bus: SyncCommandBus, command_type: str = "Debit", data: str = "") -> Receipt:
    """Send a command; when that is durable, write its id."""
    receipt = bus.send(DOMAIN, command_type, data)
    os.write(1, f"{receipt.command_id}\n".encode())
    return receipt


def leave_it_open() -> None:
    """End."""
    send(bus)


def end_in_a_with_block() -> NoReturn:
    """End by sys.exit, with code 3."""
    with bus:
        send(bus)
        sys.exit(3)


def raise_an_exception() -> NoReturn:
    """End by an exception."""
    send(bus)
    raise LookupError("the third shelf")


def exit_in_a_thread() -> None:
    """Call sys.exit in a thread, which ends that thread."""

    def work() -> NoReturn:
        send(bus)
        sys.exit(3)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    send(bus)


def send_on_in_a_thread() -> None:
    """End the main thread before another one."""

    def work() -> None:
        threading.main_thread().join()
        for _ in range(20):
            send(bus)

    send(bus)
    threading.Thread(target=work).start()


def hammer_in_daemon_threads() -> None:
    """End while eight threads send."""
    enough = threading.Barrier(9)

    def work() -> None:
        with contextlib.suppress(ClosedError):
            for number in range(1_000_000):
                send(bus)
                if number == 20:
                    enough.wait()

    for _ in range(8):
        threading.Thread(target=work, daemon=True).start()
    enough.wait()


def work_in_the_background() -> None:
    """End with a worker that has worked, and would go on."""
    SyncWorker(bus, DOMAIN, registry).start()
    send(bus, "Quick", "first")
    ended.wait()


def hang_in_a_handler() -> None:
    """End with a handler that does not."""
    SyncWorker(bus, DOMAIN, registry).start()
    send(bus, "Hang")
    begun.wait()


def send_at_exit() -> None:
    """Send in a hook of its own."""
    atexit.register(send, bus)
    send(bus)


def begin_at_exit() -> None:
    """Use the library for the first time in a hook."""
    atexit.register(send, bus)


def send_after_the_end() -> None:
    """Send in a hook that runs after the library's."""

    def try_to() -> None:
        for late in bus, SyncCommandBus(sys.argv[2]):
            with contextlib.suppress(ClosedError):
                send(late)
                os._exit(4)

    hooks.append(try_to)
    send(bus)


def use_several_runtimes() -> None:
    """End with three runtimes, one shut down, one never used."""
    SyncRuntime()
    with SyncRuntime() as runtime:
        send(SyncCommandBus(sys.argv[2], runtime=runtime))
    send(bus)


def end_in_a_forked_child_too() -> None:
    """Send on both sides of a fork, and end both in the ordinary way."""
    send(bus)
    child = os.fork()
    send(bus)
    if child:
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    # Debug mode also tells of each callback that takes 0.1 s, which happens on a busy machine.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    globals()[sys.argv[1]]()
