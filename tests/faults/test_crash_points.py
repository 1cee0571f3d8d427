"""A fault at every call to the database of every path of the protocol: in the end it makes no difference."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import TypeAlias

import psycopg
import pytest

from commandbus.embedded import EmbeddedPostgres
from tests.faults.crash_points import Fault, Point
from tests.faults.crash_programs import Part
from tests.faults.crash_scenarios import SCENARIOS, Run, Scenario, at_first_version, schema

Case: TypeAlias = tuple[Fault, Point]

pytestmark = pytest.mark.timeout(700)  # more than a look and the tries at a case can come to

_AT_ONCE = 16  # runs side by side
_TRIES = 5  # until a run has come to its point: where parts of a worker run side by side, it may end before
_LOOKS = 2  # undisturbed runs: what one of them lacks hangs on chance, as how many connections a pool makes
_SAMPLE = 2  # runs of a scenario without --long


@pytest.fixture
def dsn(dsn: str) -> str:
    """A database with a table for what handlers do, in which the clock is that of the server."""
    with psycopg.connect(dsn) as db:
        db.execute("CREATE TABLE public.effect (domain text, command_id uuid)")
    return dsn


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("mode", ["async", "sync"])
async def test_a_fault_at_any_call_makes_no_difference_in_the_end(
    mode: str, name: str, dsn: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def run(number: str, case: Case | None = None) -> AbstractContextManager[Run]:
        return nullcontext(Run(SCENARIOS[name], mode, dsn, tmp_path / number, case))

    await _sweep(run, SCENARIOS[name], request.node)


@pytest.mark.parametrize("prepare", [lambda db, part: None, at_first_version], ids=["empty", "first version"])
async def test_a_migration_is_there_whole_or_not_at_all(
    prepare: Callable[[psycopg.Connection, Part], None],
    dsn: str,
    server: EmbeddedPostgres,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    with psycopg.connect(dsn) as migrated:
        scenario = Scenario("migrate", schema(migrated, ""), prepare, own_deadline=True, state=schema)

    @contextmanager
    def run(number: str, case: Case | None = None) -> Iterator[Run]:
        name = f"migrate_{os.getpid()}_{id(scenario)}_{number}"
        with psycopg.connect(server.dsn("postgres"), autocommit=True) as admin:
            admin.execute(f'CREATE DATABASE "{name}" TEMPLATE template0'.encode())
            try:
                yield Run(scenario, "sync", server.dsn(name), tmp_path / number, case)
            finally:
                admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())

    await _sweep(run, scenario, request.node)


async def _sweep(run: Callable[..., AbstractContextManager[Run]], scenario: Scenario, test: pytest.Item) -> None:
    """Make each fault at each point; without --long, some of them."""

    async def look(number: int) -> list[Point]:
        with run(f"undisturbed-{number}") as looking:
            return await looking.points()

    undisturbed = await asyncio.gather(*map(look, range(_LOOKS)))
    points = [point for point in undisturbed[0] if all(point in other for other in undisturbed)]
    cases = list(product(scenario.faults(), points))
    if not test.config.getoption("long"):
        cases = random.Random(f"{random.random()} {test.name}").sample(cases, _SAMPLE)
    room = asyncio.Semaphore(_AT_ONCE)
    unreached: list[str] = []

    async def violation(number: int, case: Case) -> str | None:
        fault, point = case
        async with room:
            for again in range(_TRIES):
                with run(f"{number}-{again}", case) as trying:
                    try:
                        if await trying.reaches():
                            return None
                    except AssertionError as error:
                        return f"{fault.text} at {point}: {error}"
            unreached.append(str(point))
            return None

    found = await asyncio.gather(*(violation(number, case) for number, case in enumerate(cases)))
    test.user_properties += [("points", len(points)), ("cases", len(cases)), ("unreached", len(unreached))]
    violations = [text for text in found if text is not None]
    assert not violations, f"{len(violations)} of {len(cases)} cases:\n" + "\n".join(violations)
    assert len(unreached) <= max(1, len(cases) // 4), f"of {len(cases)} cases never reached: {', '.join(unreached)}"
