"""The registry: which function handles what, decided and checked at registration."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from commandbus import (
    Command,
    ConfigurationError,
    HandlerContext,
    HandlerRegistry,
    RetryPolicy,
    handler,
)


async def on_the_loop(command: Command, context: HandlerContext) -> None:
    return None


def in_a_thread(command: Command, context: HandlerContext) -> None:
    return None


class CallableObject:
    async def __call__(self, command: Command, context: HandlerContext) -> None:
        return None


def test_the_colour_is_decided_at_registration() -> None:
    registry = HandlerRegistry()
    functions: dict[str, Any] = {"Async": on_the_loop, "Def": in_a_thread, "Partial": partial(on_the_loop)}
    for name, function in functions.items():
        assert registry.handler("d", name)(function) is function
    assert [registry.find("d", name).blocking for name in functions] == [False, True, False]


def test_the_options_are_kept() -> None:
    registry = HandlerRegistry()
    retry, timeout = RetryPolicy(max_attempts=9), timedelta(seconds=3)
    registry.handler("d", "A", transactional=True, retry=retry, timeout=timeout)(on_the_loop)
    found = registry.find("d", "A")
    assert (found.domain, found.command_type, found.function) == ("d", "A", on_the_loop)
    assert (found.transactional, found.retry, found.timeout) == (True, retry, timeout)
    registry.handler("d", "B")(on_the_loop)
    assert registry.find("d", "B").retry == RetryPolicy()


def test_a_type_has_one_handler() -> None:
    registry = HandlerRegistry()
    registry.handler("d", "A")(on_the_loop)
    with pytest.raises(ConfigurationError, match='"A" of "d"'):
        registry.handler("d", "A")(in_a_thread)
    registry.handler("e", "A")(in_a_thread)
    assert registry.find("d", "A").function is on_the_loop


def test_what_cannot_work_is_refused() -> None:
    registry = HandlerRegistry()
    with pytest.raises(ConfigurationError, match="timeout"):
        registry.handler("d", "A", timeout=timedelta(0))(on_the_loop)
    with pytest.raises(ConfigurationError, match='"X"'):
        registry.find("d", "X")
    with pytest.raises(ConfigurationError, match='"d"'):
        registry.of_domains(["d"])


def test_domains_are_listed() -> None:
    registry = HandlerRegistry()
    for domain, command_type in (("b", "A"), ("a", "A"), ("b", "B")):
        registry.handler(domain, command_type)(on_the_loop)
    assert registry.domains == ["a", "b"]
    assert [found.command_type for found in registry.of_domains(["b"])] == ["A", "B"]


class Ledger:
    """Two marked methods, and one that is none."""

    @handler("d", "Debit", timeout=timedelta(seconds=1))
    async def debit(self, command: Command, context: HandlerContext) -> None:
        return None

    @handler("d", "Credit")
    def credit(self, command: Command, context: HandlerContext) -> None:
        return None

    def other(self) -> None:
        return None


class Book(Ledger):
    """Inherits one mark, overrides the other."""

    @handler("d", "Debit")
    def debit(self, command: Command, context: HandlerContext) -> None:  # type: ignore[override]
        return None


def test_marked_methods_are_registered_with_their_instance() -> None:
    registry = HandlerRegistry()
    ledger = Ledger()
    registry.register_instance(ledger)
    assert registry.find("d", "Debit").function == ledger.debit
    assert (registry.find("d", "Debit").blocking, registry.find("d", "Credit").blocking) == (False, True)
    assert registry.find("d", "Debit").timeout == timedelta(seconds=1)
    assert len(registry.of_domains(["d"])) == 2


def test_marks_are_inherited_and_overridden() -> None:
    registry = HandlerRegistry()
    registry.register_instance(book := Book())
    assert registry.find("d", "Debit").function == book.debit
    assert registry.find("d", "Debit").blocking
    assert registry.find("d", "Credit").blocking


def test_an_instance_without_marks_is_a_mistake() -> None:
    with pytest.raises(ConfigurationError, match="object"):
        HandlerRegistry().register_instance(object())


def test_a_registry_is_no_global() -> None:
    HandlerRegistry().handler("d", "A")(on_the_loop)
    assert HandlerRegistry().domains == []


def test_an_object_with_an_async_call_is_async() -> None:
    """Decided wrongly, it would be run in a thread and its coroutine thrown away."""
    registry = HandlerRegistry()
    registry.handler("d", "A")(CallableObject())
    assert not registry.find("d", "A").blocking
