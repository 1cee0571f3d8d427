"""A fault at every call to the database of every path of the protocol: in the end it makes no difference."""

from __future__ import annotations

import asyncio
import random
from itertools import product
from pathlib import Path

import psycopg
import pytest

from tests.faults.crash_points import Fault, Point
from tests.faults.crash_scenarios import SCENARIOS, Run

_AT_ONCE = 16  # runs side by side
_TRIES = 5  # until a run has come to its point: where parts of a worker run side by side, it may end before
_LOOKS = 3  # undisturbed runs: what one of them lacks hangs on chance, as how many connections a pool makes
_SAMPLE = 3  # runs of a scenario without --long


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
    scenario = SCENARIOS[name]
    undisturbed = [await Run(scenario, mode, dsn, tmp_path / f"undisturbed-{n}").points() for n in range(_LOOKS)]
    points = [point for point in undisturbed[0] if all(point in other for other in undisturbed)]
    cases = list(product(scenario.faults(), points))
    if not request.config.getoption("long"):
        cases = random.Random(f"{random.random()} {mode} {name}").sample(cases, _SAMPLE)
    room = asyncio.Semaphore(_AT_ONCE)

    async def violation(number: int, case: tuple[Fault, Point]) -> str | None:
        fault, point = case
        async with room:
            try:
                for again in range(_TRIES):
                    if await Run(scenario, mode, dsn, tmp_path / f"{number}-{again}", case).reaches():
                        return None
            except AssertionError as error:
                return f"{fault.value} at {point}: {error}"
            return f"{point} was not reached"

    found = await asyncio.gather(*(violation(number, case) for number, case in enumerate(cases)))
    request.node.user_properties += [("points", len(points)), ("cases", len(cases))]
    violations = [text for text in found if text is not None]
    assert not violations, f"{len(violations)} of {len(cases)} cases:\n" + "\n".join(violations)
