"""The command line's `process`, as a process."""

from __future__ import annotations

import re

import psycopg
import pytest

from tests.acceptance.cli_support import CommandLine
from tests.processes.support import Hand, load_example

example = load_example()


@pytest.fixture
def hand(db: psycopg.Connection) -> Hand:
    return Hand(db, example.Fulfilment)


@pytest.fixture
def parked(hand: Hand) -> str:
    """A process whose first step is parked."""
    process = hand.start(example.Fulfilment, example.Order("1", "teapot", "4242"))
    hand.do("stock", "Reserve", "park")
    return str(process.process_id)


def test_what_there_is_to_see(cli: CommandLine, parked: str) -> None:
    text = cli("process", "list").stdout
    assert re.fullmatch(rf"  20\S+  orders  {parked}  Fulfilment  RUNNING  waits_for=reserve  parked=1\n", text)
    (item,) = cli.json("process", "list", "--domain", "orders", "--status", "running", "--type", "Fulfilment")["items"]
    assert (item["process_id"], item["open"], item["parked"]) == (parked, ["reserve"], 1)
    assert cli("process", "list", "--type", "Other").stdout == "no such processes\n"

    assert re.search(r'^state +\{.*"order_id": "1"', cli("process", "show", "orders", parked).stdout, re.MULTILINE)
    assert cli.json("process", "show", "orders", parked)["state"]["card"] == "4242"

    text = cli("process", "timeline", "orders", parked).stdout
    assert re.search(r"1  20\S+  step  reserve  IN_TROUBLESHOOTING_QUEUE  parked_at=20\S+  stock  ", text)
    assert "BROKEN: a person has to look" in text
    assert [step["kind"] for step in cli.json("process", "timeline", "orders", parked)] == ["step", "deadline"]


def test_retry_and_cancel(cli: CommandLine, hand: Hand, parked: str) -> None:
    assert cli("process", "retry", "orders", parked).stdout == f"retried 1 of {parked}\n"
    assert cli("process", "retry", "orders", parked, code=1).stderr.startswith(
        f"commandbus: nothing of process {parked} is parked: cannot retry it."
    )
    hand.do("stock", "Reserve")
    hand.apply()
    done = cli("process", "cancel", "orders", parked, "--reason", "the customer asked")
    assert done.stdout == f"canceled {parked}: what it has done is being undone\n"
    hand.settle()
    assert cli.json("process", "show", "orders", parked)["status"] == "COMPENSATED"


def test_resume_what_waits_for_nothing(cli: CommandLine, parked: str) -> None:
    said = cli("process", "resume", "orders", parked, code=1).stderr
    assert said.startswith(f"commandbus: process {parked} waits for no moment: cannot resume it.")
