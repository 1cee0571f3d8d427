"""Every ending of a handler becomes a value that can be recorded."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commandbus import BusinessRuleError, PermanentCommandError, RetryPolicy, TransientCommandError
from commandbus._calls import MAX_BYTES
from commandbus.handlers import Handler
from commandbus.worker.endings import MAX_TEXT, Completed, Failed, completed, failed, storable, unreadable


async def _function(*_: object) -> None:
    return None


HANDLER = Handler(
    domain="d",
    command_type="A",
    function=_function,
    blocking=False,
    transactional=False,
    retry=RetryPolicy(5, [timedelta(seconds=2), timedelta(seconds=7)], jitter=0),
    timeout=None,
)


def error_of(ending: Completed | Failed) -> dict[str, Any]:
    """The error that is recorded."""
    assert isinstance(ending, Failed)
    found: dict[str, Any] = json.loads(ending.error)
    return found


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TransientCommandError("X"), "TRANSIENT"),
        (PermanentCommandError("X"), "PERMANENT"),
        (BusinessRuleError("X"), "BUSINESS"),
        (ValueError("x"), "TRANSIENT"),
        (SystemExit(1), "TRANSIENT"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_exception_is_a_verdict(error: BaseException, kind: str) -> None:
    assert failed(error, HANDLER, 1).kind == kind


def test_the_policy_goes_along() -> None:
    ending = failed(ValueError(), HANDLER, 2)
    assert (ending.retry_in, ending.max_attempts) == (timedelta(seconds=7), 5)


def test_the_words_of_a_verdict_are_kept() -> None:
    error = error_of(failed(BusinessRuleError("NO", "money", {"n": [1]}), HANDLER, 1))
    assert error == {"code": "NO", "message": "money", "details": {"n": [1]}}
    error = error_of(failed(KeyError("k"), HANDLER, 1))
    assert (error["code"], error["message"]) == ("KeyError", "'k'")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=10))
def test_a_result_of_json_is_completed(result: object) -> None:
    ending = completed(result)
    assert isinstance(ending, Completed)
    assert json.loads(ending.result) == result


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (object(), "RESULT_NOT_JSON"),
        ({1, 2}, "RESULT_NOT_JSON"),
        (float("inf"), "RESULT_NOT_JSON"),
        (b"x", "RESULT_NOT_JSON"),
        ("x" * MAX_BYTES, "RESULT_TOO_LARGE"),
    ],
    ids=["object", "set", "inf", "bytes", "too large"],
)
def test_any_other_result_is_a_permanent_failure(result: object, code: str) -> None:
    with pytest.raises(PermanentCommandError) as caught:
        completed(result)
    assert caught.value.code == code


def test_data_that_cannot_be_read_are_a_permanent_failure_that_says_why() -> None:
    ending = failed(unreadable(ValueError("too many digits")), HANDLER, 1)
    error = {"code": "UNREADABLE", "message": "the data cannot be read: too many digits"}
    assert (ending.kind, error_of(ending)) == ("PERMANENT", error)


@given(st.text(st.characters(), max_size=50), st.integers(0, MAX_TEXT * 2))
def test_text_is_made_storable(text: str, length: int) -> None:
    found = storable(text + "x" * length)
    assert len(found) <= MAX_TEXT
    assert "\0" not in found
    found.encode("utf-8")


@given(st.text(), st.text(), st.recursive(st.none() | st.floats() | st.text(), st.lists, max_leaves=10))
def test_an_error_is_always_json_that_postgresql_keeps(code: str, message: str, details: object) -> None:
    text = failed(TransientCommandError(code, message, details), HANDLER, 1).error
    assert text.isascii()
    assert "\\u0000" not in text.replace("\\\\u0000", "")
    assert len(text) < 10 * MAX_TEXT
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
