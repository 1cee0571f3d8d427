"""The example in every order in which it can go wrong, with the real functions: how it ends, what is undone.

A step succeeds, is refused by a business rule, is parked and put right by an operator, or is parked and given up; the
parcel may also be too late. The two steps that run side by side end in both orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import product

import psycopg
import pytest

from tests.processes.support import Hand, load_example

example = load_example()

DONE, REFUSED, FIXED, GIVEN_UP, LATE = OUTCOMES = ("done", "refused", "fixed", "given up", "late")
PARCEL = '{"parcel":"P-1"}'
COMMANDS = {
    "reserve": ("stock", "Reserve"),
    "charge": ("cards", "Charge"),
    "confirm": ("mail", "Confirm"),
    "ship": ("shipping", "Ship"),
}
GOOD = (DONE, FIXED)


def courses() -> Iterator[tuple[tuple[str, str], ...]]:
    """Every course of a fulfilment: the steps in the order in which they end, and how."""
    for reserve in OUTCOMES[:4]:
        if reserve not in GOOD:
            yield (("reserve", reserve),)
            continue
        for charge, confirm, first in product(OUTCOMES[:4], OUTCOMES[:4], ("charge", "confirm")):
            both = (("charge", charge), ("confirm", confirm))
            begin = (("reserve", reserve), *(both if first == "charge" else both[::-1]))
            if charge in GOOD:
                yield from ((*begin, ("ship", ship)) for ship in OUTCOMES)
            else:
                yield begin


def act(hand: Hand, name: str, how: str) -> None:
    """Let a step end so, and its reply be applied."""
    domain, command_type = COMMANDS[name]
    result = PARCEL if name == "ship" else "null"
    match how:
        case "done":
            hand.do(domain, command_type, result=result)
        case "refused":
            hand.do(domain, command_type, "refuse")
        case "fixed" | "given up":
            hand.park_and("fix" if how == FIXED else "cancel", domain, command_type, result)
        case "late":
            hand.wait(timedelta(days=2, minutes=1))
            hand.apply()  # the deadline, which cancels the command
    hand.apply()


def expected(course: tuple[tuple[str, str], ...]) -> tuple[str, str | None, list[str]]:
    """The end of a course: status, error, and what is undone."""
    done: list[str] = []
    for position, (name, how) in enumerate(course):
        if how in GOOD:
            done.append(name)
        elif name != "confirm":
            # When the card fails first, the mail that nobody has begun is not sent any more.
            running = [] if name != "charge" else course[position + 1 :]
            assert all(other == "confirm" for other, _ in running)
            code = {REFUSED: "NO", GIVEN_UP: "BROKEN", LATE: "DEADLINE"}[how]
            return "COMPENSATED", code, [each for each in reversed(done) if each != "ship"]
    return "COMPLETED", None, []


def run(hand: Hand, course: tuple[tuple[str, str], ...]) -> tuple[str, str | None, list[str]]:
    """Take a process through a course, and what is left of it to its end."""
    process = hand.start(example.Fulfilment, example.Order("1", "teapot", "4242"))
    for name, how in course:
        if hand.status(process)[0] != "RUNNING":
            break
        act(hand, name, how)
    hand.settle()
    undone = [step.split()[1] for step in hand.steps(process) if step.startswith("undo")]
    return (*hand.status(process), undone)


COURSES = list(courses())


def test_every_course_is_there() -> None:
    assert len(set(COURSES)) == len(COURSES) == 2 + 2 * (2 * 4 * 2) * 5 + 2 * (2 * 4 * 2)


def group(course: tuple[tuple[str, str], ...]) -> str:
    """The courses that one test takes, in one database."""
    return ", ".join(f"{name} {how}" for name, how in course if name in ("charge", "ship")) or "no stock"


@pytest.mark.parametrize("chosen", sorted(set(map(group, COURSES))))
def test_every_course_ends_as_it_must(chosen: str, db: psycopg.Connection) -> None:
    hand = Hand(db, example.Fulfilment)
    for course in COURSES:
        if group(course) == chosen:
            assert run(hand, course) == expected(course), course
            assert hand.pending() == [], course
            assert db.execute("SELECT count(*) FROM commandbus.command").fetchone() == (0,), course
