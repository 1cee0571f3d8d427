"""What is told of a write that failed, from how each of its tries did."""

from __future__ import annotations

from uuid import UUID

import psycopg
import pytest

from commandbus._database import DeadlineError
from commandbus.batches import insist
from commandbus.errors import DatabaseUnavailableError, OutcomeUnknownError

ID = UUID(int=7)
LOST = psycopg.OperationalError("lost")
SLOW = DeadlineError("slow")
ROLLED_BACK = psycopg.errors.SerializationFailure("rolled back")
NO_CONNECTION = DatabaseUnavailableError("no connection")


@pytest.mark.parametrize(
    ("tries", "expected"),
    [
        ([LOST, ROLLED_BACK], "done"),
        ([NO_CONNECTION], NO_CONNECTION),
        ([ROLLED_BACK, NO_CONNECTION], NO_CONNECTION),
        ([ROLLED_BACK] * 3, DatabaseUnavailableError("PostgreSQL cannot do it now, nothing was done: rolled back")),
        ([LOST] * 3, OutcomeUnknownError("it may or may not have been written: lost", ID)),
        ([LOST, NO_CONNECTION], OutcomeUnknownError("it may or may not have been written: lost", ID)),
        ([SLOW], OutcomeUnknownError("it may or may not have been written: slow", ID)),
        ([psycopg.errors.CheckViolation("refused")], psycopg.errors.CheckViolation("refused")),
    ],
    ids=["in the end", "no connection", "none in the end", "rolled back", "lost", "lost, then none", "slow", "refused"],
)
async def test_what_is_told(tries: list[Exception], expected: Exception | str) -> None:
    left = iter(tries)

    async def do() -> str:
        for error in left:
            raise error
        return "done"

    try:
        told: object = await insist(do, "it", ID)
    except Exception as error:  # noqa: BLE001 - compared
        told = error
    assert (type(told), str(told)) == (type(expected), str(expected))
    assert list(left) == [], "it tries no more often, and no less"
