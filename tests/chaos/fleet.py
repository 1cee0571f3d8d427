"""The processes of a run, each started again when a fault has ended it; one that ends by itself is to blame."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from tests.chaos.behaviour import POISONED
from tests.chaos.journal import read
from tests.chaos.worker import NOT_STARTED

ROOT = Path(__file__).parents[2]

Blame = Callable[[str, str], None]

_LOOK = 0.02  # seconds between two looks at who has ended
_TAIL = 2000  # characters of a log


class Member:
    """A process with a place in the fleet. Any thread may send it signals."""

    def __init__(self, name: str, folder: Path, program: str, *arguments: str) -> None:
        self.name = name
        self.folder = folder
        self.log = folder / f"{name}.log"
        self._command = [sys.executable, "-m", f"tests.chaos.{program}", *arguments]
        self._lock = threading.RLock()
        self.start()

    def start(self) -> None:
        """Start it, anew."""
        with self._lock, self.log.open("ab") as log:
            self.killed, self.asked = False, 0
            self.popen = subprocess.Popen(
                self._command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def send(self, number: signal.Signals, pid: int | None = None) -> int:
        """Send a signal, unless it is another process by now than this one; returns to whom."""
        with self._lock:
            if pid in (None, self.pid):
                self.killed |= number == signal.SIGKILL
                self.asked += number == signal.SIGTERM
                self.popen.send_signal(number)
            return self.pid

    def ended(self) -> int | None:
        """Its exit code, None while it runs."""
        return self.popen.poll()

    def tail(self) -> str:
        """How its log ends."""
        return self.log.read_text("utf-8", "replace")[-_TAIL:]


class WorkerMember(Member):
    """A worker: it ends when it is killed, poisoned or asked to, and never otherwise."""

    def notes(self) -> list[str]:
        """What it has noted so far."""
        return [note["what"] for note in read(self.folder, f"worker-{self.pid}")]

    def restart(self, seconds: float) -> None:
        """Ask it to stop, and come back when its successor works; TimeoutError when that takes longer."""
        pid, end = self.send(signal.SIGTERM), time.monotonic() + seconds
        while self.pid == pid or "started" not in self.notes():
            if time.monotonic() > end:
                raise TimeoutError(f"{self.name} ({pid}) was asked to stop, and no other works after {seconds:g} s")
            time.sleep(_LOOK)

    def may_end(self, code: int) -> bool:
        """Whether what has been done to it explains this end."""
        notes = self.notes()
        return (
            (self.killed and code == -signal.SIGKILL)
            or (self.asked and code == 0)
            or (self.asked and code == -signal.SIGTERM and "started" not in notes)
            or (
                self.asked > 1 and code == -signal.SIGTERM
            )  # by two rolls at once: the second came when `run` had ended
            or code == POISONED
            or (code == NOT_STARTED and "started" not in notes)
            or notes.count("hog") > notes.count("hogged")
        )


class SenderMember(Member):
    """A sender: it ends when it is killed, or has sent all."""

    def may_end(self, code: int) -> bool:
        """As above."""
        return code == 0 or (self.killed and code == -signal.SIGKILL)


class Fleet:
    """Keeps its members running, inside `with`; none of them outlives that."""

    def __init__(self, blame: Blame) -> None:
        self.workers: list[WorkerMember] = []
        self.senders: list[SenderMember] = []
        self.others: list[Member] = []
        self._blame = blame
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="supervisor")

    def _supervise(self) -> None:
        try:
            while not self._closing.wait(_LOOK):
                for worker in self.workers:
                    self._look_after(worker, done=False)
                for sender in self.senders:
                    self._look_after(sender, done=sender.ended() == 0)
        except Exception as error:  # noqa: BLE001 - nobody would start the others again, and nobody would say so
            self._blame("supervisor_ended", repr(error))

    def _look_after(self, member: WorkerMember | SenderMember, *, done: bool) -> None:
        code = member.ended()
        if code is None or done:
            return
        if not member.may_end(code):
            name = member.name.split("-")[0]
            self._blame(f"{name}_exited", f"{member.name} ({member.pid}) ended with {code}:\n{member.tail()}")
        if code == NOT_STARTED:
            time.sleep(10 * _LOOK)
        member.start()

    def stop_workers(self, seconds: float) -> None:
        """Ask all workers to stop; who does not end well in this time is to blame."""
        self._closing.set()
        self._thread.join()
        for worker in self.workers:
            worker.send(signal.SIGTERM)
        end = time.monotonic() + seconds
        for worker in self.workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.popen.wait(max(0.1, end - time.monotonic()))
            code = worker.ended()
            if code is None or not worker.may_end(code):
                self._blame("unclean_stop", f"{worker.name} ({worker.pid}) ended with {code}:\n{worker.tail()}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        members: list[Member] = [*self.workers, *self.senders, *self.others]
        for member in members:
            member.send(signal.SIGKILL)
        for member in members:
            member.popen.wait()
