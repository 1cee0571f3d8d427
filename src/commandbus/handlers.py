"""What runs a command: the registry of handlers, and what a handler is given."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

import psycopg

from commandbus._connections import drive
from commandbus._database import execute
from commandbus.errors import ConfigurationError, LeaseLostError
from commandbus.model import REPLY, Command, Json
from commandbus.policy import RetryPolicy
from commandbus.process import TIMER, Process, applying

if TYPE_CHECKING:
    from commandbus.bus import CommandBus  # noqa: F401 - it stands in a string below


class _Lease(Protocol):
    """What a context asks of the lease that its handler runs under."""

    wakes: frozenset[str]

    @property
    def cancelled(self) -> bool: ...


B = TypeVar("B")
C = TypeVar("C")


class Context(Generic[B, C]):
    """What the two kinds of context have in common: `HandlerContext` and `commandbus.sync.SyncHandlerContext`."""

    __slots__ = ("_complete", "_lease", "attempt", "bus", "command", "connection", "delivery")

    def __init__(
        self, command: Command, lease: _Lease, bus: B, connection: C | None, complete: Callable[[object, Json], Any]
    ) -> None:
        self.command = command
        self.delivery = command.delivery
        self.attempt = command.attempts + 1
        self.bus = bus
        self.connection = connection
        self._lease = lease
        self._complete = complete

    @property
    def headers(self) -> dict[str, str]:
        """The headers that the command was sent with."""
        return dict(self.command.headers)

    @property
    def cancelled(self) -> bool:
        """Whether the outcome can no longer be recorded: the lease is lost, or the handler's time is over."""
        return self._lease.cancelled

    def raise_if_cancelled(self) -> None:
        """Raise `LeaseLostError` when `cancelled`. Call it between the steps of a long handler."""
        if self.cancelled:
            raise LeaseLostError(
                f"command {self.command.command_id}: delivery {self.delivery} cannot record its outcome any more; stop"
            )


class HandlerContext(Context["CommandBus", psycopg.AsyncConnection[Any]]):
    """What a handler is told besides its command.

    `delivery` counts the claims of this command and never goes back: use it as fencing token in other systems, with
    `command.command_id` as idempotency key. `attempt` is the number of this attempt, from 1. `bus` is the worker's, to
    send what comes next. `connection` is, in a transactional handler, the open transaction that the completion will
    join, also for `bus.send(..., connection=context.connection)`; otherwise None.
    """

    __slots__ = ()

    async def complete_on(self, connection: object, result: Json = None) -> None:
        """Complete the command in a transaction of your own, as its last statement: both commit, or neither.

        `connection` is anything that `CommandBus.send` takes as one. What the handler returns is not looked at then.
        Raises `LeaseLostError`: let it end your transaction. That should be READ COMMITTED: in a stricter one this
        fails when the lease was renewed since it began, every third of it.
        """
        await self._complete(connection, result)


class BlockingContext(Context[B, psycopg.Connection[Any]]):
    """What a `def` handler is told: the same, with a blocking `connection`.

    In a `SyncWorker` it is a `SyncHandlerContext`, whose `bus` is the blocking one.
    """

    __slots__ = ()

    def complete_on(self, connection: object, result: Json = None) -> None:
        """Complete the command in a transaction of your own, as its last statement: both commit, or neither.

        `connection` is anything blocking that `CommandBus.send` takes as one: of psycopg, SQLAlchemy or Django. What
        the handler returns is not looked at then. Raises `LeaseLostError`: let it end your transaction. That should be
        READ COMMITTED: in a stricter one this fails when the lease was renewed since it began, every third of it.
        """
        self._complete(connection, result)


AsyncFunction: TypeAlias = Callable[[Command, HandlerContext], Awaitable[Json]]
BlockingFunction: TypeAlias = Callable[[Command, Any], Json]
Middleware: TypeAlias = Callable[[Command, Any], AbstractContextManager[object]]
"""What is entered around a `def` handler, in its thread: called with the command and the handler's context."""
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Handler:
    """A registered handler. `blocking` (a plain `def`) was decided at registration."""

    domain: str
    command_type: str
    function: AsyncFunction | BlockingFunction
    blocking: bool
    transactional: bool
    retry: RetryPolicy
    timeout: timedelta | None


@dataclass(frozen=True, slots=True)
class _Mark:
    """What `handler(...)` writes on a method until `register_instance` reads it."""

    domain: str
    command_type: str
    transactional: bool
    retry: RetryPolicy | None
    timeout: timedelta | None


def handler(
    domain: str,
    command_type: str,
    *,
    transactional: bool = False,
    retry: RetryPolicy | None = None,
    timeout: timedelta | None = None,
) -> Callable[[F], F]:
    """Mark a method as the handler of a command type; `HandlerRegistry.register_instance` registers it."""

    def mark(function: F) -> F:
        function.__commandbus_handler__ = _Mark(domain, command_type, transactional, retry, timeout)  # type: ignore[attr-defined]
        return function

    return mark


class HandlerRegistry:
    """Which function handles which command type. A worker claims only the types that it finds here."""

    def __init__(self) -> None:
        self._handlers: dict[tuple[str, str], Handler] = {}
        self._processes: dict[str, dict[str, type[Process[Any]]]] = {}

    def handler(
        self,
        domain: str,
        command_type: str,
        *,
        transactional: bool = False,
        retry: RetryPolicy | None = None,
        timeout: timedelta | None = None,
    ) -> Callable[[F], F]:
        """Register the decorated `def` or `async def` function; it is called with the command and a context.

        What it returns is kept as the command's result. `transactional`: its writes through `context.connection`
        commit together with the completion, or not at all. `retry`: see `RetryPolicy`. `timeout`: a running handler
        that exceeds it has failed, as a transient error; an async one is cancelled.
        Raises `ConfigurationError` for a type that has a handler already.
        """

        def register(function: F) -> F:
            self._add(_Mark(domain, command_type, transactional, retry, timeout), function)
            return function

        return register

    def register_instance(self, instance: object) -> None:
        """Register the methods of `instance` that are marked with `commandbus.handler(...)`."""
        found = False
        for name, function in inspect.getmembers(type(instance), inspect.isfunction):
            mark = getattr(function, "__commandbus_handler__", None)
            if isinstance(mark, _Mark):
                self._add(mark, getattr(instance, name))
                found = True
        if not found:
            raise ConfigurationError(f"{type(instance).__name__} has no method marked with commandbus.handler(...)")

    def register_process(self, process: type[Process[Any]]) -> None:
        """Register a process class: a worker of its domain then handles the replies to its steps, and its timers.

        Raises `ConfigurationError` for a type that is registered already, or a domain whose `Reply` or `Timer` has a
        handler; nothing is registered then.
        """
        kinds = self._processes.get(process.domain)
        if kinds is None:
            kinds = {}
            for command_type in (REPLY, TIMER):
                self._check_free(process.domain, command_type)
            for command_type in (REPLY, TIMER):
                self.handler(process.domain, command_type, transactional=True)(_applier(kinds))
            self._processes[process.domain] = kinds
        if process.type in kinds:
            raise ConfigurationError(f'process "{process.type}" of "{process.domain}" is registered already')
        kinds[process.type] = process

    def find(self, domain: str, command_type: str) -> Handler:
        """Return the handler of this type. Raises `ConfigurationError` when there is none."""
        try:
            return self._handlers[domain, command_type]
        except KeyError:
            raise ConfigurationError(f'no handler for command type "{command_type}" of "{domain}"') from None

    def of_domains(self, domains: Iterable[str]) -> list[Handler]:
        """Return the handlers of these domains. Raises `ConfigurationError` for a domain without one."""
        found = []
        for domain in domains:
            here = [handler for handler in self._handlers.values() if handler.domain == domain]
            if not here:
                raise ConfigurationError(f'the registry has no handler for domain "{domain}"')
            found += here
        return found

    @property
    def domains(self) -> list[str]:
        """The domains that have a handler, sorted."""
        return sorted({domain for domain, _ in self._handlers})

    def _check_free(self, domain: str, command_type: str) -> None:
        if (domain, command_type) in self._handlers:
            raise ConfigurationError(f'command type "{command_type}" of "{domain}" has a handler already')

    def _add(self, mark: _Mark, function: Callable[..., Any]) -> None:
        self._check_free(mark.domain, mark.command_type)
        _check_parameters(mark, function)
        blocking = not (inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__))
        if mark.timeout is not None and mark.timeout <= timedelta(0):
            raise ConfigurationError(f'the timeout of "{mark.command_type}" must be above zero')
        self._handlers[mark.domain, mark.command_type] = Handler(
            mark.domain,
            mark.command_type,
            function,
            blocking,
            mark.transactional,
            mark.retry or RetryPolicy(),
            mark.timeout,
        )


def _applier(kinds: dict[str, type[Process[Any]]]) -> AsyncFunction:
    """Return the handler of replies and timers for these process classes."""

    async def apply(command: Command, context: HandlerContext) -> None:
        connection = context.connection
        assert connection is not None  # noqa: S101 - it is transactional
        steps = applying(kinds, command, context.bus.max_data_bytes)
        context._lease.wakes = await drive(steps, partial(execute, connection))  # noqa: SLF001 - the runner wakes them

    return apply


def _check_parameters(mark: _Mark, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise ConfigurationError(
            f'the handler of "{mark.command_type}" cannot be called with a command and a context: {error}'
        ) from None
    except ValueError:
        return  # a function in C that does not tell
