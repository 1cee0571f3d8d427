"""The blocking half has the names, parameters, defaults and annotations of the async one; exceptions have reasons."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from commandbus import (
    Command,
    CommandBus,
    CommandStateError,
    HandlerContext,
    HandlerRegistry,
    Process,
    Processes,
    ReplyTimeoutError,
    TroubleshootingFilter,
    TroubleshootingQueue,
    Wait,
    Worker,
)
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncProcesses, SyncTroubleshootingQueue, SyncWorker
from commandbus.testing import Harness, SyncHarness, open_clock
from tests.bus.support import DOMAIN
from tests.support import eventually

TWINS: dict[type, type] = {
    CommandBus: SyncCommandBus,
    HandlerContext: SyncHandlerContext,
    Harness: SyncHarness,
    Processes: SyncProcesses,
    TroubleshootingQueue: SyncTroubleshootingQueue,
    Worker: SyncWorker,
}

WITH = "`with` and `async with` have methods of their own"
PARTS = "for the other parts of the library"
EXCEPTIONS = {
    "CommandBus.__init__(dsn)": "takes a CommandBus as well, which may be open on a loop that runs elsewhere",
    "CommandBus.__init__(runtime)": "an async bus lives on the loop of its caller",
    "CommandBus.__aenter__": WITH,
    "CommandBus.__aexit__": WITH,
    "CommandBus.__enter__": WITH,
    "CommandBus.__exit__": WITH,
    "CommandBus.database": PARTS,
    "CommandBus.sending": PARTS,
    "CommandBus.creating": PARTS,
    "CommandBus.watch_batch(return)": "an ordinary iterator",
    "CommandBus.opened": PARTS,
    "CommandBus.max_data_bytes": "an attribute of the async one",
    "Harness.__aenter__": WITH,
    "Harness.__aexit__": WITH,
    "Harness.__enter__": WITH,
    "Harness.__exit__": WITH,
    "Worker.__enter__": "`start` and `stop`; in asyncio a task of `run` is that",
    "Worker.__exit__": "`start` and `stop`; in asyncio a task of `run` is that",
    "Worker.start": "in asyncio a task of `run` is that",
    "Worker.stop(return)": "waits and reports, where the async one lets `run` do so",
    "Worker.name": "an attribute of the async one",
}
"""What one half lacks or has otherwise: a member, one of its parameters, or what it returns."""

SPECIAL = {"__init__", "__enter__", "__exit__", "__aenter__", "__aexit__"}


def members(cls: type) -> dict[str, Callable[..., Any]]:
    """The functions of the public methods and properties of a class."""
    found = {
        name: inspect.getattr_static(cls, name) for name in dir(cls) if name in SPECIAL or not name.startswith("_")
    }
    found = {name: member.fget if isinstance(member, property) else member for name, member in found.items()}
    return {name: member for name, member in found.items() if inspect.isfunction(member)}


def parameters(function: Callable[..., Any]) -> dict[str, tuple[object, ...]]:
    """Kind, default and annotation of each parameter, and what is returned, each under the names of the async half."""
    signature = inspect.signature(function)
    found: dict[str, tuple[object, ...]] = {
        name: (each.kind, each.default, _async_names(each.annotation)) for name, each in signature.parameters.items()
    }
    return found | {"return": (_async_names(signature.return_annotation),)}


def _async_names(annotation: object) -> str:
    return re.sub("|".join(rf"\b{twin.__name__}\b" for twin in TWINS.values()), lambda m: m[0][4:], str(annotation))


def differences() -> Iterator[str]:
    for cls, twin in TWINS.items():
        ours, theirs = members(cls), members(twin)
        for name in sorted(ours.keys() ^ theirs.keys()):
            yield f"{cls.__name__}.{name}"
        for name in sorted(ours.keys() & theirs.keys()):
            one, other = parameters(ours[name]), parameters(theirs[name])
            for parameter in sorted(one.keys() | other.keys()):
                if one.get(parameter) != other.get(parameter):
                    yield f"{cls.__name__}.{name}({parameter})"
            common = one.keys() & other.keys()
            if [key for key in one if key in common] != [key for key in other if key in common]:
                yield f"{cls.__name__}.{name}: the order"


def test_the_halves_differ_where_the_table_says_and_nowhere_else() -> None:
    assert sorted(differences()) == sorted(EXCEPTIONS)


@pytest.mark.parametrize("cls", TWINS.values())
def test_everything_has_a_docstring(cls: type) -> None:
    silent = [name for name, member in members(cls).items() if name not in SPECIAL and not member.__doc__]
    assert silent == []
    assert cls.__doc__


@pytest.mark.parametrize("cls", TWINS.values())
def test_nothing_is_declared_to_return_an_awaitable(cls: type) -> None:
    for name, member in members(cls).items():
        assert not inspect.iscoroutinefunction(member), name
        assert not re.search("Awaitable|Coroutine|Future|Async", str(inspect.signature(member).return_annotation)), name


def called(thing: object, **given: object) -> dict[str, object]:
    """Call all methods with what they require, by the names of their parameters; returns their results."""
    results: dict[str, object] = {}
    for name in sorted(methods(type(thing)), key=lambda name: (name == "close", name)):
        method = getattr(thing, name)
        required = [each for each in inspect.signature(method).parameters.values() if each.default is each.empty]
        positional = [given[each.name] for each in required if each.kind is each.POSITIONAL_OR_KEYWORD]
        keyword = {each.name: given[each.name] for each in required if each.kind is each.KEYWORD_ONLY}
        try:
            results[name] = method(*positional, **keyword)
        except (CommandStateError, ReplyTimeoutError) as error:  # after another action; no worker is there any more
            results[name] = error
    return results


def methods(cls: type) -> set[str]:
    return {name for name in members(cls) if name not in SPECIAL and callable(getattr(cls, name))}


@dataclass
class Days:
    """The state of the process below."""

    count: int


class Patient(Process[Days], domain=DOMAIN):
    """Waits."""

    def start(self, state: Days) -> Wait:
        return Wait(timedelta(days=state.count))


def test_nothing_that_is_called_returns_an_awaitable(bus: SyncCommandBus, dsn: str) -> None:
    results: dict[type, dict[str, object]] = {}
    registry = HandlerRegistry()

    @registry.handler(DOMAIN, "Debit")
    def call_all(command: Command, context: SyncHandlerContext) -> None:
        with psycopg.connect(dsn) as connection:
            results[SyncHandlerContext] = called(context, connection=connection)

    receipt = bus.send(DOMAIN, "Debit", {})
    batch = bus.create_batch(DOMAIN, [], growing=True)
    worker, stopped = SyncWorker(bus, DOMAIN, registry), SyncWorker(bus, DOMAIN, registry)
    stopped.stop()  # before it runs
    started = worker.start()  # type: ignore[func-returns-value] # that is what is tried
    eventually(lambda: bus.get_command(receipt).status.terminal, what="the end of the handler")
    results[SyncWorker] = {"start": started, "stop": worker.stop(), "run": stopped.run()}
    sample: dict[str, object] = {"which": TroubleshootingFilter(DOMAIN), "expected_count": 0}
    sample |= {
        "domain": DOMAIN,
        "command_type": "Debit",
        "data": {},
        "requests": [],
        "commands": [],
        "batch_id": batch.batch_id,
        "operator": "ana",
        "reason": "why",
        "timeout": timedelta(milliseconds=50),
    }
    queue = SyncTroubleshootingQueue(bus)
    results[SyncTroubleshootingQueue] = called(queue, **sample, command_id=receipt.command_id)
    open_clock(dsn)
    results[SyncHarness] = called(SyncHarness(bus, registry), **sample, by=timedelta(0))
    processes = SyncProcesses(bus)
    process_id = processes.start_process(Patient, Days(1)).process_id
    started_again: dict[str, object] = {"process": Patient, "state": Days(1), "process_id": process_id}
    results[SyncProcesses] = called(processes, **sample, **started_again)
    results[SyncCommandBus] = called(bus, **sample, command=receipt)
    for cls in TWINS.values():
        assert results[cls].keys() == methods(cls)
        assert [name for name, result in results[cls].items() if inspect.isawaitable(result)] == []


def test_the_tests_for_the_async_half_only_are_counted() -> None:
    root = Path(__file__).parents[2]
    tests = "".join(path.read_text() for path in (root / "tests").glob("*/test_*.py"))
    marked = Counter(re.findall(r'^@async_only\("(.+?)"', tests, re.MULTILINE))
    table = (root / "CONTRIBUTING.md").read_text().partition("| Reason to run with the async half only |")[2]
    listed = re.findall(r"^\| (\w.+) \| (\d+) \|$", table.partition("\n\n")[0], re.MULTILINE)
    assert {reason: int(count) for reason, count in listed} == marked
