"""The values: frozen, comparable, and what little they do."""

from __future__ import annotations

import dataclasses
import pickle
from datetime import datetime, timedelta, timezone
from uuid import uuid4

import pytest

from commandbus import CommandStatus, Error, Page, Receipt, SendRequest, Waiting, WaitingReason


def test_three_statuses_are_terminal() -> None:
    assert {status for status in CommandStatus if status.terminal} == {"COMPLETED", "FAILED", "CANCELED"}
    assert {status for status in CommandStatus if not status.terminal} == {
        "PENDING",
        "SCHEDULED",
        "IN_PROGRESS",
        "IN_TROUBLESHOOTING_QUEUE",
    }


def test_a_status_is_its_name() -> None:
    assert all(status == status.name == str(status) for status in CommandStatus)
    assert CommandStatus("PENDING") is CommandStatus.PENDING


def test_a_page_is_iterable_and_has_a_length() -> None:
    page = Page((1, 2, 3), "next")
    assert (list(page), len(page), page.items, page.next_cursor) == ([1, 2, 3], 3, (1, 2, 3), "next")
    assert not Page((), None).items


def test_values_are_frozen_and_compare() -> None:
    receipt = Receipt("d", uuid4())
    assert receipt == dataclasses.replace(receipt)
    assert receipt != dataclasses.replace(receipt, duplicate=True)
    assert pickle.loads(pickle.dumps(receipt)) == receipt  # noqa: S301 - our own
    with pytest.raises(dataclasses.FrozenInstanceError):
        receipt.duplicate = True  # type: ignore[misc]
    assert Error("X") == Error("X", "", None)


DAWN = datetime(2026, 11, 23, 7, 0, tzinfo=timezone(timedelta(hours=1)))
SENTENCES = {
    Waiting(WaitingReason.DELAY, DAWN, None, None, 1): "it is delayed until 2026-11-23T06:00:00Z",
    Waiting(WaitingReason.DELAY, DAWN, None, None, 0): (
        "it is delayed until 2026-11-23T06:00:00Z; no living worker knows its type"
    ),
    Waiting(WaitingReason.BACK_OFF, DAWN, None, None, 1): (
        "an attempt failed: it is tried again at 2026-11-23T06:00:00Z"
    ),
    Waiting(WaitingReason.NO_WORKER, None, None, None, 0): "no worker for its domain is alive",
    Waiting(WaitingReason.NO_WORKER_FOR_TYPE, None, None, None, 0): "no living worker knows its type",
    Waiting(WaitingReason.ALONE, None, None, None, 1): "it crashed twice: it waits until a worker can run it alone",
    Waiting(WaitingReason.BEHIND, None, 0, None, 1): "it waits in line, behind no other",
    Waiting(WaitingReason.BEHIND, None, 1, None, 1): "it waits in line, behind 1 other",
    Waiting(WaitingReason.BEHIND, None, 9_999, None, 1): "it waits in line, behind 9,999 others",
    Waiting(WaitingReason.BEHIND, None, 10_000, None, 1): "it waits in line, behind 10,000 or more others",
    Waiting(WaitingReason.IN_PROGRESS, DAWN, None, "w1", 0): "w1 runs it, under a lease until 2026-11-23T06:00:00Z",
    Waiting(WaitingReason.PARKED, None, None, None, 0): "it is parked: an operator has to decide",
}


@pytest.mark.parametrize("waiting", SENTENCES, ids=str)
def test_why_it_waits_is_said_in_a_sentence(waiting: Waiting) -> None:
    assert str(waiting) == SENTENCES[waiting]


def test_each_reason_has_a_sentence() -> None:
    assert {waiting.reason for waiting in SENTENCES} == set(WaitingReason)


def test_options_of_a_request_are_named() -> None:
    with pytest.raises(TypeError):
        SendRequest("d", "A", {}, uuid4())  # type: ignore[call-arg]
