"""Errors travel between processes whole, and what raises them names what is wrong."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from commandbus import Command, ConfigurationError, HandlerContext, HandlerRegistry, Receipt, RetryPolicy, errors
from commandbus.errors import CommandBusError, CommandError

ID = UUID(int=7)
SECOND = timedelta(seconds=1)
FURTHER: dict[str, Any] = {
    "command_id": ID,
    "receipts": (Receipt("d", ID), Receipt("d", ID, duplicate=True)),
    "details": {"a": [1, None]},
}


def every_class(cls: type[CommandBusError] = CommandBusError) -> Iterator[type[CommandBusError]]:
    yield cls
    for sub in cls.__subclasses__():
        if sub.__module__ == errors.__name__:
            yield from every_class(sub)


CLASSES = sorted({cls for cls in every_class() if not cls.__name__.startswith("_")}, key=lambda cls: cls.__name__)


def instance(cls: type[CommandBusError]) -> CommandBusError:
    """An error with everything its class takes."""
    if "__init__" not in {name for base in cls.__mro__ if issubclass(base, CommandBusError) for name in vars(base)}:
        return cls("what happened")
    parameters = list(inspect.signature(cls).parameters)
    return cls(*(FURTHER.get(name, f"the {name}") for name in parameters))


def reraised(error: CommandBusError) -> CommandBusError:
    try:
        raise error
    except CommandBusError as caught:
        return caught


def test_every_error_is_among_them() -> None:
    public = {name for name, value in vars(errors).items() if inspect.isclass(value) and not name.startswith("_")}
    assert {cls.__name__ for cls in CLASSES} == public
    assert len(CLASSES) > 15


def pickled(error: Any, protocol: int) -> Any:  # noqa: ANN401 - any error
    return pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle {n}": partial(pickled, protocol=n) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_survives(cls: type[CommandBusError], way: str) -> None:
    error = reraised(instance(cls))
    error.add_note("a note")
    found = WAYS[way](error)
    assert type(found) is cls
    assert found is not error
    assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
    assert str(found)


def test_the_attributes_are_what_was_given() -> None:
    kept = {cls.__name__: vars(instance(cls)) for cls in CLASSES if vars(instance(cls))}
    verdict = {"code": "the code", "message": "the message", "details": FURTHER["details"]}
    named = {"command_id": ID}
    awaited = {**named, "domain": "the domain"}
    assert kept == {
        "BusinessRuleError": verdict,
        "CommandError": verdict,
        "CommandIdConflictError": named,
        "CommandParkedError": awaited,
        "OutcomeUnknownError": named,
        "PartialSendError": {"receipts": FURTHER["receipts"]},
        "PermanentCommandError": verdict,
        "ReplyTimeoutError": awaited,
        "SendTimeoutError": named,
        "TransientCommandError": verdict,
    }


class _OwnError(CommandError):
    """A user's verdict with a constructor of its own kind."""


def test_a_verdict_without_more_than_a_code_survives() -> None:
    for error in (CommandError("X"), _OwnError("X", "m")):
        found = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own
        assert (str(found), found.code, found.message, found.details) == (str(error), "X", error.message, None)


# --------------------------------------------------------------------------------------- what is refused


async def no_parameters() -> None: ...


async def one_parameter(command: Command) -> None: ...


def three_parameters(command: Command, context: HandlerContext, more: int) -> None: ...


def only_by_name(*, command: Command, context: HandlerContext) -> None: ...


class Methods:
    async def method(self, command: Command, context: HandlerContext) -> None: ...


WRONG: list[Any] = [no_parameters, one_parameter, three_parameters, only_by_name, Methods.method, None, "handler", 5]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: getattr(wrong, "__name__", repr(wrong)))
def test_a_handler_that_cannot_be_called_with_a_command_and_a_context(wrong: Any) -> None:  # noqa: ANN401 - anything
    registry = HandlerRegistry()
    with pytest.raises(ConfigurationError, match='"Debit" cannot be called with a command and a context'):
        registry.handler("d", "Debit")(wrong)
    assert registry.domains == []


def default(command: Command, context: HandlerContext, more: int = 1) -> None: ...


def anything(*args: object, **more: object) -> None: ...


@pytest.mark.parametrize("right", [default, anything, Methods().method, lambda _command, _context: None, max])
def test_a_handler_that_can(right: Callable[..., Any]) -> None:
    registry = HandlerRegistry()
    registry.handler("d", "Debit")(right)
    assert registry.find("d", "Debit").function == right


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("max_attempts", 0),
        ("max_attempts", 1_000_001),
        ("max_attempts", sys.maxsize),
        ("backoff", []),
        ("backoff", [5]),
        ("backoff", [SECOND, None]),
        ("backoff", [-SECOND]),
        ("backoff", [timedelta(days=366)]),
        ("backoff", [timedelta.max]),
        ("jitter", 1.5),
        ("jitter", float("nan")),
    ],
)
def test_a_policy_that_the_database_could_not_keep(field: str, wrong: Any) -> None:  # noqa: ANN401 - anything
    with pytest.raises(ConfigurationError, match=field):
        RetryPolicy(**{field: wrong})


def test_a_policy_at_its_bounds() -> None:
    policy = RetryPolicy(1_000_000, [timedelta(0), timedelta(days=365)], jitter=1)
    assert policy.wait_after(1) == timedelta(0)
    assert timedelta(0) <= policy.wait_after(2) <= timedelta(days=730)
