"""What a process class may be, what it may return, and how its state is kept; without a database."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest

from commandbus import (
    Command,
    CommandStatus,
    Compensate,
    ConfigurationError,
    Error,
    Finish,
    HandlerRegistry,
    InvalidCommandError,
    Process,
    Reply,
    Send,
    Wait,
)
from commandbus._process_calls import Taken
from commandbus.process import Next, applying, starting

NEW = UUID(int=7)


@dataclass
class State:
    """The state of the processes below."""

    value: Any = None
    names: list[str] = field(default_factory=list)


def process(then: Next, **options: Any) -> type[Process[State]]:
    """A class that begins so."""

    class Made(Process[State], domain="d", **options):
        def start(self, state: State) -> Next:
            return then

    return Made


def started(then: Next, state: State | None = None, **options: Any) -> tuple[Any, Any]:
    """What the start of a class sends to the database: the process, and what comes next."""
    call, _ = starting(process(then, **options), state or State(), NEW, {"trace": "t"}, 1 << 18)
    first, second = call.params
    return json.loads(str(first)), json.loads(str(second))


def test_a_send_becomes_a_command_and_its_undo() -> None:
    _, then = started(Send("stock", "ReserveItem", 1, undo=("stock", "Release", 2), priority=3, max_attempts=4))
    (step,) = then["send"]
    command, undo = step["command"], step["undo"]
    assert (step["kind"], step["name"]) == ("step", "reserve_item")
    assert {name: command[name] for name in ("domain", "command_type", "data", "priority", "max_attempts")} == {
        "domain": "stock", "command_type": "ReserveItem", "data": 1, "priority": 3, "max_attempts": 4,
    }  # fmt: skip
    assert (undo["command_type"], undo["data"]) == ("Release", 2)
    for row in (command, undo):
        assert (row["correlation_id"], row["reply_to"], row["headers"]) == (str(NEW), "d", {"trace": "t"})
    assert command["command_id"] != undo["command_id"]


@pytest.mark.parametrize(
    ("command_type", "name"),
    [
        ("Reserve", "reserve"),
        ("ReserveItem", "reserve_item"),
        ("HTTPCall", "http_call"),
        ("stock.take-2", "stock_take_2"),
    ],
)
def test_a_step_is_called_as_its_type(command_type: str, name: str) -> None:
    _, then = started(Send("stock", command_type))
    assert then["send"][0]["name"] == name


def test_timers() -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    row, then = started(
        [Send("a", "A", deadline=timedelta(hours=1)), Wait(timedelta(days=1)), Wait(moment, "new_year")],
        deadline=timedelta(days=9),
    )
    told = [(i["kind"], i["name"], i["command"].get("delay"), i.get("until"), i.get("whole")) for i in then["send"]]
    assert told == [
        ("step", "a", None, None, None),
        ("deadline", "a", 3600, None, None),
        ("wait", "wait", 86_400, None, None),
        ("wait", "new_year", None, moment.isoformat(), None),
        ("deadline", "Made", 777_600, None, True),
    ]
    assert row["deadline"] == 777_600


@pytest.mark.parametrize(
    ("then", "kept"),
    [
        (Finish(), {"send": [], "result": None}),
        (Finish({"n": 1}), {"send": [], "result": {"n": 1}}),
        (Compensate(Error("NO", "why")), {"send": [], "error": {"code": "NO", "message": "why", "details": None}}),
        (Compensate(), {"send": [], "error": {"code": "COMPENSATED", "message": "", "details": None}}),
        (None, {"send": []}),
    ],
    ids=["finish", "with a result", "compensate", "without an error", "nothing"],
)
def test_ends(then: Next, kept: object) -> None:
    assert started(then)[1] == kept


@pytest.mark.parametrize(
    "then",
    [
        "Reserve",
        [Finish(), Finish()],
        [Compensate(), Send("a", "A")],
        Send("a", "A", name="not a name"),
        Send("no domain", "A"),
        Send("a", "A", deadline=timedelta(days=-1)),
        Send("a", "A", undo=Send("a", "B", undo=("a", "C", None))),
        Send("a", "A", {1: 2}),
        Wait(datetime(2030, 1, 1)),  # noqa: DTZ001 - that is what is refused
        Wait(timedelta(days=4000)),
        Compensate(Error("NO", "\0")),
        Compensate(Error("NO", details={1: 2})),
    ],
    ids=str,
)
def test_what_cannot_come_next_is_refused(then: Any) -> None:  # noqa: ANN401 - wrong things
    with pytest.raises(InvalidCommandError, match=f"{NEW}|command "):
        started(then)


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, uuid4(), datetime.now(UTC), State(), float("nan")], ids=type)
def test_a_state_that_would_come_back_as_another_is_refused(value: object) -> None:
    with pytest.raises(InvalidCommandError, match=r"state\.value"):
        started(Finish(), State(value))


def test_the_state_of_another_class_is_refused() -> None:
    with pytest.raises(InvalidCommandError, match="not a State"):
        starting(process(None), "state", NEW, {}, 1)  # type: ignore[misc] # that is what is refused


def test_a_class_without_a_dataclass_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="dataclass"):

        class Wrong(Process[int], domain="d"):
            pass


def test_a_class_is_registered_once() -> None:
    registry = HandlerRegistry()
    one, other = process(None, type="One"), process(None, type="Other")
    registry.register_process(one)
    registry.register_process(other)
    with pytest.raises(ConfigurationError, match='"One" of "d" is registered already'):
        registry.register_process(one)
    assert [handler.command_type for handler in registry.of_domains(["d"])] == ["Reply", "Timer"]


@pytest.mark.parametrize("command_type", ["Reply", "Timer"])
def test_a_class_that_is_refused_leaves_nothing_registered(command_type: str) -> None:
    taken = HandlerRegistry()
    taken.handler("d", command_type)(lambda command, context: None)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=f'"{command_type}" of "d" has a handler already'):
            taken.register_process(process(None))
    assert [handler.command_type for handler in taken.of_domains(["d"])] == [command_type]


# -- replies -----------------------------------------------------------------------------------------------------------


class Versioned(Process[State], domain="d", version=3):
    """Its state was called otherwise before."""

    def on_old(self, state: State, reply: Reply) -> Next:
        state.names.append(f"{self.process_id} {','.join(self.open)} {reply.data}")
        return Send("a", "Next")

    @classmethod
    def upcast(cls, version: int, data: dict[str, Any]) -> dict[str, Any]:
        return {"value": [version, data["was"]]}


def a_reply(status: str = "COMPLETED", error: object = None) -> Command:
    told = {
        "domain": "a", "command_id": str(uuid4()), "command_type": "Old", "status": status, "result": 5, "error": error,
    }  # fmt: skip
    now = datetime.now(UTC)
    return Command(
        "d", uuid4(), "Reply", CommandStatus.IN_PROGRESS, told, {}, str(NEW), None, 0, None, 0, 0, 1, None, None, "w",
        now, None, None, None, None, None, None,
    )  # fmt: skip


def applied(
    kind: type[Process[Any]], name: str, state: str, version: int, command: Command, *still_open: str
) -> tuple[Any, int, Any]:
    """What a reply makes of a process that is kept so: its state, its version, what comes next."""
    steps = applying({kind.type: kind}, command, 1 << 18)
    next(steps)
    error = command.data["error"]
    call = steps.send(Taken(NEW, kind.type, state, version, 4, name, error and json.dumps(error), [*still_open]))
    assert call.params[:3] == ("d", NEW, 4)
    return json.loads(str(call.params[3])), int(str(call.params[4])), json.loads(str(call.params[5]))


def test_a_reply_is_given_to_the_method_of_its_step_with_the_state_of_today() -> None:
    state, version, then = applied(Versioned, "old", '{"was": 1}', 2, a_reply(), "mail", "mail")
    assert (state, version) == ({"value": [2, 1], "names": [f"{NEW} mail,mail 5"]}, 3)
    assert [step["name"] for step in then["send"]] == ["next"]


def test_a_step_without_a_method_needs_none_unless_it_fails() -> None:
    assert applied(Versioned, "other", "{}", 3, a_reply(), "mail")[2] == {"send": []}
    error = {"code": "NO", "message": "", "details": None}
    assert applied(Versioned, "other", "{}", 3, a_reply("FAILED", error))[2] == {"send": [], "error": error}


@pytest.mark.parametrize(
    ("kind", "version", "says"),
    [(Versioned, 4, "deploy the newer class"), (process(None, version=2), 1, "has no `upcast`")],
    ids=["newer", "older"],
)
def test_a_state_that_the_class_cannot_read_is_refused(kind: type[Process[Any]], version: int, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        applied(kind, "old", "{}", version, a_reply())


def test_a_process_that_the_worker_does_not_know_is_refused() -> None:
    steps = applying({}, a_reply(), 1 << 18)
    next(steps)
    with pytest.raises(ConfigurationError, match="register it"):
        steps.send(Taken(NEW, "Other", "{}", 1, 1, "old", None, []))


def test_what_no_process_waits_for_is_let_pass() -> None:
    steps = applying({}, a_reply(), 1 << 18)
    next(steps)
    with pytest.raises(StopIteration) as ended:
        steps.send(None)
    assert ended.value.value == frozenset()
