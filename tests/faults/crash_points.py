"""A proxy that knows where each call of a client to PostgreSQL begins and ends, and makes one fault at one of them.

A call is what a client sends up to its Sync, or a simple query, or the start of a connection; its answer ends with
ReadyForQuery. A point is a call by its name and number: `fail_v1 1` is the first that calls this function.
"""

from __future__ import annotations

import re
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from tests.faults.proxy import Link, Proxy

_CANCEL_REQUEST = 80877102


class Fault(Enum):
    """What happens at a call, before the server has seen it or after it has answered; the client gets no answer."""

    FAIL = "fail", False, False, False
    DO_AND_FAIL = "do, then fail", True, False, False
    HANG = "hang", False, True, False
    DO_AND_HANG = "do, then hang", True, True, False
    KILL = "kill -9", False, False, True
    DO_AND_KILL = "do, then kill -9", True, False, True

    def __init__(self, text: str, done: bool, hangs: bool, kills: bool) -> None:  # noqa: FBT001 - a row of the table
        """`done`: the server does what it was asked; `hangs`: the connection stays open, and silent."""
        self.text = text
        self.done = done
        self.hangs = hangs
        self.kills = kills  # the client's process


class Point(NamedTuple):
    """The so many-th call of this name."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name} {self.number}"


@dataclass
class Called:
    """A call that was seen. `rows`: how many its answer had."""

    point: Point
    rows: int = 0

    @property
    def polls(self) -> bool:
        """Whether it looks for work; one row more than it has found says when to look again."""
        return self.point.name == "work_v1"


@dataclass
class _Session:
    """What is known of a connection, and what has come of a message that is not complete."""

    started: bool = False
    silent: bool = False  # nothing is passed on any more
    statements: dict[bytes, str] = field(default_factory=dict)
    from_client: bytearray = field(default_factory=bytearray)
    from_server: bytearray = field(default_factory=bytearray)
    request: list[bytes] = field(default_factory=list)
    called: Called | None = None
    faulty: bool = False  # the answer to its call is not passed on


class CallProxy(Proxy):
    """Makes a fault at a point. `kill` is called, on the proxy's thread, to kill the client."""

    def __init__(self, dsn: str, fault: Fault | None = None, point: Point | None = None) -> None:
        super().__init__(dsn)
        self.calls: list[Called] = []
        self.made_at: float | None = None
        """When the fault was made, by the monotonic clock."""
        self.kill: Callable[[], None] = lambda: None
        self._fault = fault
        self._point = point
        self._counts: Counter[str] = Counter()
        self._sessions: dict[Link, _Session] = {}
        self._lock = threading.Lock()

    def count(self, name: str) -> int:
        """How many calls of this name have begun."""
        with self._lock:
            return self._counts[name]

    async def passing(self, link: Link, *, to_server: bool, data: bytes) -> bytes:
        """Pass whole requests and whole messages on. A silent client's end still gets through to the server."""
        session = self._sessions.setdefault(link, _Session())
        if session.silent:
            return b""
        return self._to_server(link, session, data) if to_server else self._to_client(link, session, data)

    def _to_server(self, link: Link, session: _Session, data: bytes) -> bytes:
        session.from_client += data
        passed = b""
        for message in _messages(session.from_client, typed=session.started):
            if not session.started:
                session.started = True
                if struct.unpack_from("!I", message, 4) == (_CANCEL_REQUEST,):
                    return message
                complete = True
            else:
                complete = message[:1] in b"SQ"
            if message[:1] in b"pX":  # a password, the end
                passed += message
                continue
            session.request.append(message)
            if complete:
                request, session.request = session.request, []
                passed += self._begin(link, session, request)
        return passed

    def _begin(self, link: Link, session: _Session, request: list[bytes]) -> bytes:
        name = _name(request, session.statements)
        with self._lock:
            self._counts[name] += 1
            session.called = Called(Point(name, self._counts[name]))
        self.calls.append(session.called)
        if self._fault is not None and session.called.point == self._point:
            if not self._fault.done:
                self._make_fault(link, session)
                return b""
            session.faulty = True
        return b"".join(request)

    def _to_client(self, link: Link, session: _Session, data: bytes) -> bytes:
        session.from_server += data
        passed = b""
        for message in _messages(session.from_server, typed=True):
            if message[:1] == b"D" and session.called is not None:
                session.called.rows += 1
            if not session.faulty:
                passed += message
            elif message[:1] == b"Z":
                self._make_fault(link, session)
                return b""
        return passed

    def _make_fault(self, link: Link, session: _Session) -> None:
        assert self._fault is not None
        session.silent = True
        self.made_at = time.monotonic()
        if self._fault.kills:
            self.kill()
        if not self._fault.hangs:
            link.cut()


def _messages(buffer: bytearray, *, typed: bool) -> Iterator[bytes]:
    """Take the complete messages out of the buffer. The first of a client has no type, only a length."""
    while True:
        head = 1 if typed else 0
        if len(buffer) < head + 4:
            return
        end = head + struct.unpack_from("!I", buffer, head)[0]
        if len(buffer) < end:
            return
        message = bytes(buffer[:end])
        del buffer[:end]
        yield message
        typed = True


def _name(request: list[bytes], statements: dict[bytes, str]) -> str:
    """Name a call by what it calls; remembers what is prepared under which name."""
    name = "connect"
    for message in request:
        match message[:1]:
            case b"Q":
                name = _said(message[5:-1])
            case b"P":
                statement, text, _ = message[5:].split(b"\0", 2)
                statements[statement] = _said(text)
                name = f"prepare {statements[statement]}"
            case b"B":
                _, statement, _ = message[5:].split(b"\0", 2)
                name = statements[statement]
            case b"C":
                name = "close"
            case _:
                pass
    return name


def _said(text: bytes) -> str:
    """The function or the view of ours in a statement, else how it begins."""
    found = re.search(r"commandbus\.(\w+)", text.decode())
    return found[1] if found else " ".join(re.findall(r"\w+", text.decode())[:3])
