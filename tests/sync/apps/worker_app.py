"""A blocking worker that is a process: `python worker_app.py DSN GRACE_SECONDS`.

It logs to stderr, also that a handler has begun, and prints its report at its end.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

from commandbus import Command, HandlerRegistry
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncWorker

DOMAIN = "payments"
logger = logging.getLogger(__name__)
registry = HandlerRegistry()
bus = SyncCommandBus(sys.argv[1])


@registry.handler(DOMAIN, "UntilFile")
def until_file(command: Command, context: SyncHandlerContext) -> str:
    """Run until the file exists that the data names."""
    logger.info("begun")
    while not Path(command.data).exists():
        time.sleep(0.01)
    return "saw it"


@registry.handler(DOMAIN, "Stuck")
def stuck(command: Command, context: SyncHandlerContext) -> None:
    """Never return."""
    logger.info("begun")
    threading.Event().wait()


@registry.handler(DOMAIN, "Terminate")
def terminate(command: Command, context: SyncHandlerContext) -> int:
    """Fork a child, terminate it, and return the signal that it died of."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(there, b".")
        signal.pause()
        os._exit(0)  # a signal was handled, and that was all
    os.read(here, 1)  # it is on its way
    os.kill(child, signal.SIGTERM)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@registry.handler(DOMAIN, "Child")
def child(command: Command, context: SyncHandlerContext) -> int:
    """Fork a child that stops the worker it has inherited and sends a command; return its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            stopped = worker.stop()
            bus.send(DOMAIN, "FromChild", None)
            code = 0 if stopped is None else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@registry.handler(DOMAIN, "FromChild")
def from_child(command: Command, context: SyncHandlerContext) -> int:
    """Return the process that runs it."""
    return os.getpid()


worker = SyncWorker(bus, DOMAIN, registry, thread_pool_size=2, grace=timedelta(seconds=float(sys.argv[2])))

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    report = worker.run()
    print(report.finished, report.released, len(report.stuck))  # noqa: T201 - the test reads it
