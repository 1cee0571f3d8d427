"""Programs that fork while the library is in use: `python forks.py NAME DSN`. Each writes the ids known to be sent."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import uvloop

from commandbus import Command, HandlerRegistry
from commandbus._ids import new_id
from commandbus.errors import ClosedError
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncRuntime, SyncWorker

# Debug mode also tells of each callback that takes 0.1 s, which happens on a busy machine.
logging.getLogger("asyncio").setLevel(logging.ERROR)

DOMAIN = "payments"


def send(bus: SyncCommandBus) -> None:
    """Send a command that says who sent it; when it is durable, write its id."""
    receipt = bus.send(DOMAIN, "Debit", {"pid": os.getpid()})
    os.write(1, f"{receipt.command_id}\n".encode())


@contextmanager
def four_threads_sending(bus: SyncCommandBus) -> Iterator[None]:
    """Send in four threads, without a pause, inside the block."""
    over = threading.Event()
    begun = threading.Barrier(5)

    def work() -> None:
        send(bus)
        begun.wait()
        while not over.is_set():
            send(bus)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait()
    yield
    over.set()
    for thread in threads:
        thread.join()


def fork(child: Callable[[], object]) -> int:
    """Run this in a child, which then ends in the ordinary way; returns the child's id."""
    pid = os.fork()
    if not pid:
        child()
        sys.exit()
    return pid


def wait_for(pids: list[int]) -> None:
    """See that all children have ended well."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes):
        sys.exit(f"children have ended with {codes}")


def storm(runtime: SyncRuntime | None = None, rounds: int = 10) -> None:
    """Fork four at a time while four threads send; each child sends and exits, every other one by os._exit."""
    bus = SyncCommandBus(sys.argv[2], runtime=runtime)

    def child() -> None:
        send(bus)
        if os.getpid() % 2:
            os._exit(0)

    with four_threads_sending(bus):
        for _ in range(rounds):
            wait_for([fork(child) for _ in range(4)])
    send(bus)


def storm_on_uvloop() -> None:
    """Do the same on uvloop."""
    storm(SyncRuntime(loop_factory=uvloop.new_event_loop), rounds=2)


def fork_while_it_opens() -> None:
    """Fork in the middle of the first call of another thread."""
    bus = SyncCommandBus(sys.argv[2])
    thread = threading.Thread(target=send, args=(bus,))
    thread.start()
    while bus._bus._loop is None:
        pass
    wait_for([fork(lambda: send(bus))])
    thread.join()


def make_ids() -> None:
    """Fork while another thread makes ids, and does little else."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            new_id()

    def child() -> None:
        new_id()
        os._exit(0)

    thread = threading.Thread(target=work)
    thread.start()
    wait_for([fork(child) for _ in range(40)])
    over.set()
    thread.join()


def grandchildren() -> None:
    """Fork in a forked child."""
    bus = SyncCommandBus(sys.argv[2])

    def child() -> None:
        send(bus)
        wait_for([fork(lambda: send(bus))])
        send(bus)

    send(bus)
    wait_for([fork(child)])
    send(bus)


def worker_before_the_fork() -> None:
    """Stop the worker of the parent in a child, and let both go on to send."""
    bus, registry, ended, parent = SyncCommandBus(sys.argv[2]), HandlerRegistry(), threading.Event(), os.getpid()

    @registry.handler(DOMAIN, "Debit")
    def debit(command: Command, context: SyncHandlerContext) -> None:
        if os.getpid() != parent:
            os._exit(4)
        ended.set()

    with SyncWorker(bus, DOMAIN, registry) as worker:

        def child() -> None:
            if worker.stop() is not None:
                sys.exit("the child has stopped a worker")
            send(bus)

        wait_for([fork(child)])
        ended.wait()
        ended.clear()
        send(bus)
        ended.wait()  # it still works


def terminate_the_child_of_a_worker() -> None:
    """End a process that a handler has forked, while the worker of the parent waits for signals."""
    bus, registry = SyncCommandBus(sys.argv[2]), HandlerRegistry()
    parent = os.getpid()

    @registry.handler(DOMAIN, "Debit")
    def debit(command: Command, context: SyncHandlerContext) -> int:
        lives, tell = os.pipe()

        def hang() -> None:
            os.write(tell, b"!")
            threading.Event().wait()

        child = multiprocessing.get_context("fork").Process(target=hang)
        child.start()
        os.read(lives, 1)
        child.terminate()
        child.join()
        os.kill(parent, signal.SIGTERM)
        if child.exitcode != -signal.SIGTERM:
            os._exit(4)
        return 0

    send(bus)
    SyncWorker(bus, DOMAIN, registry).run()


def foreign_loop() -> None:
    """Fork with a runtime on a loop of somebody else's: in the child it is closed."""
    loop = uvloop.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    bus = SyncCommandBus(sys.argv[2], runtime=SyncRuntime.of(loop))

    def child() -> None:
        try:
            send(bus)
        except ClosedError:
            os._exit(0)
        sys.exit("it has sent on a loop that is not there")

    send(bus)
    wait_for([fork(child)])
    send(bus)
    bus.close()
    loop.call_soon_threadsafe(loop.stop)


def multiprocessing_with_fork() -> None:
    """Send in processes that multiprocessing forks."""
    context, bus = multiprocessing.get_context("fork"), SyncCommandBus(sys.argv[2])
    run_while_four_threads_send(bus, [context.Process(target=send, args=(bus,)) for _ in range(3)])


def multiprocessing_with_spawn() -> None:
    """Send in processes that multiprocessing starts."""
    context, bus = multiprocessing.get_context("spawn"), SyncCommandBus(sys.argv[2])
    processes = [context.Process(target=send_with_a_bus_of_its_own, args=(sys.argv[2],)) for _ in range(3)]
    run_while_four_threads_send(bus, processes)


def run_while_four_threads_send(bus: SyncCommandBus, processes: Sequence[BaseProcess]) -> None:
    """Run these to their ends."""
    with four_threads_sending(bus):
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a process has failed")
    send(bus)


def send_with_a_bus_of_its_own(dsn: str) -> None:
    """Send in a process that has inherited nothing."""
    with SyncCommandBus(dsn) as bus:
        send(bus)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
