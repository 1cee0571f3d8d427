"""The values: frozen, comparable, and what little they do."""

from __future__ import annotations

import dataclasses
import pickle
from uuid import uuid4

import pytest

from commandbus import CommandStatus, Error, Page, Receipt, SendRequest


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


def test_options_of_a_request_are_named() -> None:
    with pytest.raises(TypeError):
        SendRequest("d", "A", {}, uuid4())  # type: ignore[call-arg]
