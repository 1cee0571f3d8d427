"""The remembered places: a claim starts behind them, and misses nothing that is not settled."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise
from uuid import uuid4

from hypothesis import given
from hypothesis import strategies as st

from commandbus._calls import LAST_PLACE, SEQUENCE_BITS, Claimed, Segment
from commandbus.worker.trail import SETTLE_SECONDS, Trail

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def claimed(command_type: str, place: int | None) -> Claimed:
    """A command that stood at this place."""
    return Claimed("d", uuid4(), command_type, "{}", "{}", None, None, 0, None, 0, 0, 1, uuid4(), place, NOW)


def place(level: int, number: int) -> int:
    """The place with this number, in the line of this level of priority."""
    return (level << SEQUENCE_BITS) + number


def is_in(segments: list[Segment], command_type: str, at: int) -> bool:
    """Whether a claim of these segments looks at this place."""
    return any(name == command_type and after < at <= up_to for name, after, up_to in segments)


def test_at_first_everything_is_looked_at() -> None:
    trail = Trail(["B", "A"])
    assert trail.rest() == trail.whole() == [("A", -1, LAST_PLACE), ("B", -1, LAST_PLACE)]


def test_what_was_seen_is_passed_over_only_when_it_has_settled() -> None:
    """Concurrent senders commit out of order: a smaller place may still appear, for a while."""
    trail = Trail(["A"])
    trail.saw([claimed("A", place(100, 50))], 100.0)
    assert is_in(trail.rest(), "A", place(100, 49))
    trail.saw([], 100.0 + SETTLE_SECONDS * 0.9)
    assert is_in(trail.rest(), "A", place(100, 49))
    trail.saw([], 100.0 + 2 * SETTLE_SECONDS)
    assert not is_in(trail.rest(), "A", place(100, 49))
    assert is_in(trail.rest(), "A", place(100, 51))


def test_looking_often_does_not_settle_it_sooner() -> None:
    trail = Trail(["A"])
    trail.saw([], 99.0)
    for step in range(19):
        trail.saw([claimed("A", place(100, step))], 100.0 + step * SETTLE_SECONDS / 20)
        assert is_in(trail.rest(), "A", place(100, 0))


def test_a_command_without_a_place_leaves_none() -> None:
    trail = Trail(["A"])
    for now in (100.0, 110.0, 120.0):
        trail.saw([claimed("A", None)], now)
    assert trail.rest() == trail.whole()


levels = st.integers(0, 200)
places = st.tuples(st.sampled_from("AB"), levels, st.integers(0, 1 << 40))


@given(seen=st.lists(places), probe=places)
def test_nothing_is_missed_but_what_lies_before_a_place_of_its_own_line(
    seen: list[tuple[str, int, int]], probe: tuple[str, int, int]
) -> None:
    trail = Trail(["A", "B"])
    commands = [claimed(name, place(level, number)) for name, level, number in seen]
    for now, now_seen in ((100.0, commands), (110.0, []), (120.0, [])):
        trail.saw(now_seen, now)
    name, level, number = probe
    passed = [n for seen_name, seen_level, n in seen if (seen_name, seen_level) == (name, level)]
    assert is_in(trail.rest(), name, place(level, number)) == (number > max(passed, default=-1))


@given(seen=st.lists(places))
def test_segments_are_in_order_and_do_not_overlap(seen: list[tuple[str, int, int]]) -> None:
    trail = Trail(["A", "B"])
    for now in (100.0, 110.0, 120.0):
        trail.saw([claimed(name, place(level, number)) for name, level, number in seen], now)
    for name in "AB":
        segments = [(after, up_to) for own, after, up_to in trail.rest() if own == name]
        assert all(after <= up_to for after, up_to in segments)
        assert all(one[1] <= two[0] for one, two in pairwise(segments))
        assert segments[-1][1] == LAST_PLACE


def test_what_committed_late_is_looked_at_again() -> None:
    """A transaction that sends for longer than what is remembered trails: its commands stand below, all of them."""
    trail = Trail(["A"])
    trail.saw([claimed("A", place(100, 50))], 100.0)
    trail.saw([], 103.0)
    assert not is_in(trail.rest(), "A", place(100, 11))
    trail.saw([claimed("A", place(100, 10))], 104.0)  # by a claim from the start
    assert is_in(trail.rest(), "A", place(100, 11))
