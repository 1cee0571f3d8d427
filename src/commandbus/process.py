"""Process managers: classes that say which command follows which, and what undoes it. Pure: nothing here does I/O.

The engine is two statements around a method: `take_reply_v1` locks the process and tells what has ended, the method of
that step decides, `advance_process_v1` keeps the state and sends what comes next; all in the transaction that completes
the reply. Compensation needs no class: it is in `sql/functions/process.sql`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar, get_args, get_origin
from uuid import UUID

from commandbus import _process_calls
from commandbus._calls import MAX_DELAY, Call, checked_name, outgoing
from commandbus._ids import new_id
from commandbus._limits import encode
from commandbus._process_calls import Taken
from commandbus._queries import json_of
from commandbus.errors import CommandStateError, ConfigurationError, InvalidCommandError, PermanentCommandError
from commandbus.model import Command, CommandStatus, Error, Json, Reply, SendRequest

S = TypeVar("S")

TIMER = "Timer"
"""The type of the commands that tell a process of a moment; it handles these and replies in its own domain."""

_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[-.:]")


# -- what a method returns ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """A step: one command. Its reply is given to `on_<name>`; the name is the command type in snake_case by default.

    `undo`: the command that undoes it once it was completed. `undo_if_canceled`: also when it was canceled after a
    handler had begun, so that its effect may be there; a transactional handler never leaves one then. `deadline`: how
    long it may take until it is canceled, with the code `DEADLINE`.
    """

    domain: str
    command_type: str
    data: Json = None
    undo: Send | tuple[str, str, Json] | None = field(default=None, kw_only=True)
    undo_if_canceled: bool = field(default=False, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    deadline: timedelta | None = field(default=None, kw_only=True)
    delay: timedelta | None = field(default=None, kw_only=True)
    priority: int = field(default=0, kw_only=True)
    max_attempts: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Wait:
    """A step that is over after so long, or at a moment; `on_<name>` is called then."""

    until: timedelta | datetime
    name: str = "wait"


@dataclass(frozen=True, slots=True)
class Finish:
    """End the process with this result, as soon as no step is open. Waits end at once."""

    result: Json = None


@dataclass(frozen=True, slots=True)
class Compensate:
    """Undo what is done, the last completed first, each awaited; then the process ends with this error."""

    error: Error | None = None


Action: TypeAlias = Send | Wait | Finish | Compensate
Next: TypeAlias = Action | Sequence[Action] | None
"""What comes next; several sends run side by side. None: nothing yet, another step is open."""


class Process(Generic[S]):
    """A process manager: `class Fulfilment(Process[FulfilmentState], domain="orders")`, registered with
    `HandlerRegistry.register_process`. The state is a dataclass of JSON values.

    `start(self, state)` returns the first step, `on_<step>(self, state, reply)` what follows it. What they change in
    the state is kept with what they return, in one transaction. They do no I/O, and may be called again. A step without
    a method needs none when it succeeds; when it fails, the process is compensated with its error.

    `type`: default, the name of the class. `version`: of the state; what an older one has kept goes through `upcast`.
    `deadline`: how long the process may take until it is compensated.
    """  # noqa: D205

    domain: ClassVar[str]
    type: ClassVar[str]
    version: ClassVar[int]
    deadline: ClassVar[timedelta | None]
    state_type: ClassVar[Any]

    process_id: UUID
    """The id of the process; the correlation id of its commands."""
    open: tuple[str, ...] = ()
    """The names of the steps that have not ended yet; empty: all that was sent is done."""

    def __init_subclass__(
        cls,
        *,
        domain: str,
        type: str | None = None,  # noqa: A002 - the word of the library for it
        version: int = 1,
        deadline: timedelta | None = None,
    ) -> None:
        super().__init_subclass__()
        what = f"process {cls.__name__}"
        cls.domain, cls.type = checked_name("domain", domain, what), checked_name("type", type or cls.__name__, what)
        cls.version, cls.deadline = version, deadline
        given = [get_args(base) for base in getattr(cls, "__orig_bases__", ()) if get_origin(base) is Process]
        cls.state_type = given[0][0] if given else getattr(cls, "state_type", None)
        if not dataclasses.is_dataclass(cls.state_type):
            raise ConfigurationError(f"{what}: give the dataclass of its state, as in Process[State]")
        if deadline is not None:
            _check_duration("deadline", deadline, what)

    def start(self, state: S) -> Next:
        """Return the first step, or several."""
        raise NotImplementedError

    @classmethod
    def upcast(cls, version: int, data: dict[str, Json]) -> dict[str, Json]:  # noqa: ARG003 - for who has one
        """Return the fields of the state as this version has them, from those that an older one has kept."""
        raise ConfigurationError(f"process {cls.type}: version {version} of its state is kept, and has no `upcast`")

    def decide(self, name: str, state: S, reply: Reply) -> Next:
        """Return what follows this step: what its method says, or what is done without one."""
        method = getattr(self, f"on_{name}", None)
        if method is not None:
            then: Next = method(state, reply)
            return then
        return Compensate(reply.error) if reply.failed else None


# -- the engine --------------------------------------------------------------------------------------------------------


def starting(
    kind: type[Process[S]], state: S, process_id: UUID, headers: Mapping[str, str], max_bytes: int
) -> tuple[Call[str], frozenset[str]]:
    """Return the call that starts a process, and the domains that it sends to."""
    what = f"process {process_id}"
    if not isinstance(state, kind.state_type):
        raise InvalidCommandError(f"{what}: the state is a {type(state).__name__}, not a {kind.state_type.__name__}")
    given = _encode_state(state, what)
    process = kind()
    process.process_id = process_id
    then = _Then(process, headers, max_bytes)
    then.take(process.start(state))
    seconds = "null"
    if kind.deadline is not None:
        then.time("deadline", kind.type, kind.deadline, ',"whole":true')
        seconds = str(kind.deadline.total_seconds())
    row = (
        f'{{"domain":"{kind.domain}","process_id":"{process_id}","process_type":"{kind.type}","given":{given},'
        f'"state":{_encode_state(state, what)},"state_version":{kind.version},"deadline":{seconds}}}'
    )
    return _process_calls.start(row, then.text()), frozenset(then.domains)


def applying(
    kinds: Mapping[str, type[Process[Any]]], command: Command, max_bytes: int
) -> Generator[Call[Any], Any, frozenset[str]]:
    """Apply a reply, or a timer that is due; returns the domains that were sent to.

    What a method raises is raised: the reply is tried again as any command is, and parked.
    """
    timer = Reply(command.domain, command.command_id, TIMER, CommandStatus.COMPLETED, None, None, None)
    reply = timer if command.command_type == TIMER else Reply.of(command)
    taken: Taken | None = yield _process_calls.take(command.domain, reply)
    if taken is None:
        return frozenset()
    kind = kinds.get(taken.process_type)
    if kind is None:
        raise ConfigurationError(
            f'process {taken.process_id} is a "{taken.process_type}", which this worker does not know: register it'
        )
    process = kind()
    process.process_id, process.open = taken.process_id, tuple(taken.open)
    state = _decode_state(kind, taken)
    reply = dataclasses.replace(reply, error=Error.of(json_of(taken.error)))
    then = _Then(process, command.headers, max_bytes, reply.error)
    then.take(process.decide(taken.name, state, reply))
    text = _encode_state(state, f"process {taken.process_id}")
    try:
        yield _process_calls.advance(command.domain, taken, text, kind.version, then.text())
    except CommandStateError as error:  # the class says nothing that the process could wait for: trying again is vain
        raise PermanentCommandError("NO_NEXT_STEP", str(error)) from None
    return frozenset(then.domains)


class _Then:
    """What a method has decided, as `_follow` takes it."""

    def __init__(
        self, process: Process[Any], headers: Mapping[str, str], max_bytes: int, kept: Error | None = None
    ) -> None:
        self.domains: set[str] = set()
        self._kept = kept
        self._process = process
        self._headers = headers
        self._max_bytes = max_bytes
        self._what = f"process {process.process_id}"
        self._items: list[str] = []
        self._end = ""

    def take(self, then: Next) -> None:
        actions = [] if then is None else list(then) if isinstance(then, Sequence) else [then]
        for action in actions:
            match action:
                case Send():
                    self._send(action)
                case Wait():
                    self.time("wait", _step_name(action.name, self._what), action.until)
                case Finish() if not self._end:
                    self._end = f',"result":{encode(action.result, f"{self._what}: result")}'
                case Compensate() if len(actions) == 1:
                    self._end = f',"error":{self._error(action.error or Error("COMPENSATED"))}'
                case _:
                    raise InvalidCommandError(
                        f"{self._what}: {type(action).__name__} is not what can come next here: give Send, Wait, "
                        "one Finish, or Compensate by itself"
                    )

    def _error(self, error: Error) -> str:
        if error is not self._kept:  # what the database has told is not checked again: it may be wrapped, and deeper
            for name in ("code", "message", "details"):
                encode(getattr(error, name), f"{self._what}: error.{name}")
        return _process_calls.error_text(error)

    def _send(self, send: Send) -> None:
        name = _step_name(send.name or _WORD.sub("_", send.command_type).lower(), self._what)
        undo = send.undo if send.undo is None or isinstance(send.undo, Send) else Send(*send.undo)
        more = ""
        if undo is not None:
            if undo.undo is not None or undo.deadline is not None:
                raise InvalidCommandError(f"{self._what}: the undo of {name} can have no undo and no deadline")
            more = f',"undo":{self._command(undo)}'
            more += ',"undo_begun":true' if send.undo_if_canceled else ""
        self._items.append(f'{{"kind":"step","name":"{name}","command":{self._command(send)}{more}}}')
        if send.deadline is not None:
            self.time("deadline", name, send.deadline)

    def time(self, kind: str, name: str, until: timedelta | datetime, more: str = "") -> None:
        """Add a timer."""
        delay = None
        if isinstance(until, datetime):
            if until.tzinfo is None:
                raise InvalidCommandError(f"{self._what}: {name} ends at a moment without a time zone")
            more += f',"until":"{until.isoformat()}"'
        else:
            delay = _check_duration(name, until, self._what)
        row = self._command(Send(self._process.domain, TIMER, name, delay=delay), reply_to=None)
        self._items.append(f'{{"kind":"{kind}","name":"{name}","command":{row}{more}}}')

    def _command(self, send: Send, reply_to: str | None = "") -> str:
        self.domains.add(send.domain)
        request = SendRequest(
            send.domain,
            send.command_type,
            send.data,
            correlation_id=str(self._process.process_id),
            reply_to=self._process.domain if reply_to == "" else reply_to,
            max_attempts=send.max_attempts,
            delay=send.delay,
            priority=send.priority,
        )
        return outgoing(request, self._headers, new_id(), self._max_bytes).row(minted=True)

    def text(self) -> str:
        return f'{{"send":[{",".join(self._items)}]{self._end}}}'


def _step_name(name: str, what: str) -> str:
    if not name.isidentifier() or not name.isascii():
        raise InvalidCommandError(f"{what}: a step is called {name!r:.60}: the name of a method cannot end with that")
    return name


def _check_duration(name: str, value: timedelta, what: str) -> timedelta:
    given: object = value
    if not isinstance(given, timedelta) or not timedelta(0) <= given <= MAX_DELAY:
        raise InvalidCommandError(f"{what}: {name} must be a timedelta of 0 to {MAX_DELAY.days} days")
    return value


def _encode_state(state: Any, what: str) -> str:  # noqa: ANN401 - a dataclass
    """Return the state as JSON text. Raises `InvalidCommandError` for what would not come back as it went."""
    fields = {each.name: getattr(state, each.name) for each in dataclasses.fields(state)}
    text = encode(fields, f"{what}: state")
    if (back := json.loads(text)) != fields:
        changed = next(name for name, value in fields.items() if back[name] != value)
        raise InvalidCommandError(
            f"{what}: state.{changed} does not come back from JSON as it went: use dict, list, str, int, float, bool"
        )
    return text


def _decode_state(kind: type[Process[S]], taken: Taken) -> S:
    data = json.loads(taken.state)
    if taken.state_version > kind.version:
        raise ConfigurationError(
            f"process {taken.process_id}: its state has version {taken.state_version}, this worker knows "
            f"{kind.version}: deploy the newer class"
        )
    if taken.state_version < kind.version:
        data = kind.upcast(taken.state_version, data)
    state: S = kind.state_type(**data)
    return state
