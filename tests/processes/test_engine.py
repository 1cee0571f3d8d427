"""What follows from an outcome: through the SQL functions and the classes, one command at a time."""

from __future__ import annotations

import pytest

from tests.processes.support import Connection, Hand, load_example

example = load_example()


@pytest.fixture
def hand(db: Connection) -> Hand:
    return Hand(db, example.Fulfilment)


def order() -> object:
    return example.Order("1", "teapot", "4242")


def test_all_goes_well(hand: Hand) -> None:
    process = hand.start(example.Fulfilment, order())
    hand.do("stock", "Reserve")
    hand.apply()
    hand.do("cards", "Charge")
    hand.do("mail", "Confirm")
    hand.apply(2)
    hand.do("shipping", "Ship", result='{"parcel":"P-1"}')
    hand.apply()
    assert hand.status(process) == ("COMPLETED", None)
    assert hand.pending() == []
