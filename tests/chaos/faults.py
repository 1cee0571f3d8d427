"""The faults: each a function that strikes, lasts, and puts right what has to be."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import psycopg

from commandbus.embedded import EmbeddedPostgres
from tests.chaos.fleet import Fleet
from tests.chaos.plan import Fault
from tests.faults.proxy import Proxy
from tests.support import crash

_RESTART_SECONDS = 120.0  # far more than it takes; other faults strike it meanwhile
_SLOW_SECONDS = 0.03

_SOME_SESSIONS = """
SELECT count(pg_terminate_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'commandbus%%' ORDER BY random() LIMIT %s) s"""


@dataclass
class Scene:
    """What can be struck. The first proxy is that of the senders and the rest, the others of a worker each."""

    server: EmbeddedPostgres
    dsn: str
    fleet: Fleet
    proxies: list[Proxy]
    only_one_crash: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Struck:
    """A fault as it was: when, and which process alone was hit by it; None: all."""

    kind: str
    began: float
    ended: float
    pid: int | None


def strike(scene: Scene, fault: Fault) -> Struck:
    """Let it happen; returns when it is over."""
    began = time.time()
    pid = _BY_KIND[fault.kind](scene, fault)
    return Struck(fault.kind, began, time.time(), pid)


def _kill(scene: Scene, fault: Fault) -> int | None:
    return scene.fleet.workers[fault.victim].send(signal.SIGKILL)


def _stop(scene: Scene, fault: Fault) -> int | None:
    worker = scene.fleet.workers[fault.victim]
    pid = worker.send(signal.SIGSTOP)
    time.sleep(fault.seconds)
    worker.send(signal.SIGCONT, pid)
    return pid


def _terminate(scene: Scene, fault: Fault) -> int | None:
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(scene.dsn, autocommit=True) as db:
        db.execute(_SOME_SESSIONS, [1 + fault.seed % 8])
    return None


def _freeze(scene: Scene, fault: Fault) -> int | None:
    pid = scene.fleet.workers[fault.victim].pid
    with _frozen([scene.proxies[1 + fault.victim]]):
        time.sleep(fault.seconds)
    return pid


def _freeze_all(scene: Scene, fault: Fault) -> int | None:
    with _frozen(scene.proxies):
        time.sleep(fault.seconds)
    return None


@contextlib.contextmanager
def _frozen(proxies: list[Proxy]) -> Iterator[None]:
    for proxy in proxies:
        proxy.freeze()
    try:
        yield
    finally:
        for proxy in proxies:
            proxy.thaw()


def _cut(scene: Scene, fault: Fault) -> int | None:
    chance = random.Random(fault.seed)
    for proxy in scene.proxies:
        proxy.cut(chance.uniform(0.1, 0.5), chance)
    return None


def _slow(scene: Scene, fault: Fault) -> int | None:
    for proxy in scene.proxies:
        proxy.slow(_SLOW_SECONDS, random.Random(fault.seed))
    time.sleep(fault.seconds)
    for proxy in scene.proxies:
        proxy.slow(0)
    return None


def _crash(scene: Scene, fault: Fault) -> int | None:
    with scene.only_one_crash:
        crash(scene.server)
    return None


def _kill_sender(scene: Scene, fault: Fault) -> int | None:
    senders = scene.fleet.senders
    return senders[fault.victim % len(senders)].send(signal.SIGKILL)


def _roll(scene: Scene, fault: Fault) -> int | None:
    for worker in scene.fleet.workers:
        worker.restart(_RESTART_SECONDS)
    return None


_BY_KIND: dict[str, Callable[[Scene, Fault], int | None]] = {
    "kill": _kill,
    "stop": _stop,
    "terminate": _terminate,
    "freeze": _freeze,
    "freeze all": _freeze_all,
    "cut": _cut,
    "slow": _slow,
    "crash": _crash,
    "kill sender": _kill_sender,
    "roll": _roll,
}
