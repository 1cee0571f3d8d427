"""The rate of a bulk action."""

from __future__ import annotations

import pytest

from commandbus._bulk import Pace
from commandbus.errors import InvalidCommandError


@pytest.mark.parametrize(
    ("per_second", "batch"), [(None, 200), (1e9, 200), (2000, 200), (50, 5), (10, 1), (4, 1), (0.01, 1)]
)
def test_a_batch_is_a_tenth_of_a_second_and_200_at_most(per_second: float | None, batch: int) -> None:
    assert Pace(per_second).batch == batch


def test_batches_come_evenly() -> None:
    pace, now, begins = Pace(50), 100.0, []
    for _ in range(4):
        now += pace.pause(5, now)
        begins.append(now)
        now += 0.03  # what the batch itself takes
    assert begins == pytest.approx([100.0, 100.1, 100.2, 100.3])


def test_what_came_late_is_not_caught_up() -> None:
    pace = Pace(50)
    pace.pause(5, 100.0)
    assert pace.pause(5, 107.0) == 0
    assert pace.pause(5, 107.0) == pytest.approx(0.1)


def test_without_a_rate_nothing_waits() -> None:
    pace = Pace(None)
    assert [pace.pause(200, 100.0) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("per_second", [0, -1, float("nan")])
def test_a_rate_is_above_0(per_second: float) -> None:
    with pytest.raises(InvalidCommandError, match="per_second"):
        Pace(per_second)
