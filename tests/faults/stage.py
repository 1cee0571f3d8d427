"""A bus and a worker for Hypothesis to play with, and how many examples it draws by which seed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, seed, settings

from commandbus import Command, CommandBus, HandlerRegistry, RetryPolicy, SendRequest
from tests import blocking
from tests.bus.support import Connection, one, until
from tests.faults.payloads import ASYNC, BLOCKING, DOMAIN, TRANSACTIONAL, Case
from tests.support import Route

Test = TypeVar("Test", bound=Callable[..., None])

EACH = 20  # commands of one example
SAMPLE = 25  # examples; of each test and half, 500 commands
LONG = 1250
_numbers = itertools.count()


def fuzzed(config: pytest.Config, examples: int) -> Callable[[Test], Test]:
    """Let Hypothesis draw so many examples, by the seed that pytest prints."""
    how = settings(
        max_examples=examples, phases=(Phase.explicit, Phase.generate), deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    def decorate(test: Test) -> Test:
        return seed(config.getoption("randomly_seed", 0))(how(test))

    return decorate


class Stage:
    """A bus and a worker on a loop of their own, which runs while an example does."""

    def __init__(self, route: Route, db: Connection, half: str) -> None:
        self.db = db
        self.runner = asyncio.Runner()
        self.seen: dict[str | None, Command] = {}
        self._route = route
        self._kinds = blocking.kinds(half)
        self._plans: dict[str | None, Case] = {}

    def _registry(self) -> HandlerRegistry:
        registry = HandlerRegistry()
        policy = RetryPolicy(1)

        def end(command: Command) -> object:
            self.seen[command.reply_to] = command
            plan = self._plans.get(command.reply_to)
            if plan is None:
                return command.data
            if plan.error is not None:
                raise plan.error
            return plan.result

        @registry.handler(DOMAIN, ASYNC, retry=policy)
        async def on_the_loop(command: Command, context: object) -> object:
            return end(command)

        @registry.handler(DOMAIN, BLOCKING, retry=policy)
        def in_a_thread(command: Command, context: object) -> object:
            return end(command)

        @registry.handler(DOMAIN, TRANSACTIONAL, transactional=True, retry=policy)
        async def in_a_transaction(command: Command, context: object) -> object:
            return end(command)

        return registry

    async def start(self) -> None:
        self.bus: CommandBus = self._kinds.CommandBus(**self._route)
        self._worker = self._kinds.Worker(self.bus, DOMAIN, self._registry(), concurrency=50, thread_pool_size=4)
        await self.bus.open()
        self._work = asyncio.ensure_future(self._worker.run())

    async def end(self) -> None:
        assert not self._work.done(), "the worker has ended by itself"
        self._worker.stop()
        await asyncio.wait_for(self._work, 40)
        await self.bus.close()

    async def play(self, cases: Sequence[Case], *, as_batch: bool) -> list[Command]:
        """Send these, let them be handled, and return what became of each; a good one that follows is handled, too."""
        requests = []
        for case in cases:
            name = f"case-{next(_numbers)}"
            self._plans[name] = case
            requests.append(SendRequest(**case.given, reply_to=name))
        if as_batch:
            receipts = await self.bus.send_batch(requests)
        else:
            receipts = await asyncio.gather(*(self.bus.send(**case_of(request)) for request in requests))
        good = await self.bus.send(DOMAIN, ASYNC, "good")
        await until(self.is_idle, "the end of all commands", timeout=60)
        assert (await self.bus.get_command(good)).result == "good"
        return [await self.bus.get_command(receipt) for receipt in receipts]

    def is_idle(self) -> bool:
        """Whether all commands are finished or parked, but for the replies, which nobody handles."""
        unfinished = "SELECT count(*) FROM commandbus.command WHERE domain = %s AND parked_at IS NULL"
        return bool(one(self.db, unfinished, DOMAIN) == 0)


def case_of(request: SendRequest) -> dict[str, Any]:
    """The arguments of `send` that say the same."""
    return {name: getattr(request, name) for name in request.__slots__}
