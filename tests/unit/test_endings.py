"""Every ending of a handler becomes a value that can be recorded."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commandbus import BusinessRuleError, PermanentCommandError, RetryPolicy, TransientCommandError
from commandbus._limits import MAX_BYTES
from commandbus.handlers import Handler
from commandbus.worker.endings import (
    MAX_TEXT,
    Completed,
    Failed,
    completed,
    failed,
    storable,
    unreadable,
    without_words,
)
from tests.support import nested


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


class Forgetful(BusinessRuleError):  # noqa: N818 - a name for a test
    """A verdict that does not call the constructor of its base class."""

    def __init__(self) -> None:
        pass


def test_a_verdict_without_words_stands() -> None:
    ending = failed(Forgetful(), HANDLER, 1)
    assert (ending.kind, error_of(ending)) == ("BUSINESS", {"code": "Forgetful", "message": ""})
    assert not str(Forgetful())


def test_the_policy_goes_along() -> None:
    ending = failed(ValueError(), HANDLER, 2)
    assert (ending.retry_in, ending.max_attempts) == (timedelta(seconds=7), 5)


def test_the_words_of_a_verdict_are_kept() -> None:
    error = error_of(failed(BusinessRuleError("NO", "money", {"n": [1]}), HANDLER, 1))
    assert error == {"code": "NO", "message": "money", "details": {"n": [1]}}
    error = error_of(failed(KeyError("k"), HANDLER, 1))
    assert (error["code"], error["message"]) == ("KeyError", "'k'")


_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(st.recursive(st.none() | st.booleans() | st.integers() | _TEXT, st.lists, max_leaves=10))
def test_a_result_of_json_is_completed(result: object) -> None:
    ending = completed(result)
    assert isinstance(ending, Completed)
    assert json.loads(ending.result) == result


class Unreadable(dict[str, object]):
    """What cannot even be looked at."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def items(self) -> NoReturn:
        raise RuntimeError("no items")


@pytest.mark.parametrize(
    ("result", "reason", "text"),
    [
        ({"n": [1, {2, 3}]}, "result.n[1] is of the class set", "{'n': [1, {2, 3}]}"),
        ({"n": float("inf")}, "result.n is not a finite number", '{"n": Infinity}'),
        (b"x", "result is of the class bytes", "b'x'"),
        (["a\0b"], "result[0] has a NUL character", '["a\\u0000b"]'),
        (["a\ud800b"], "result[0] has a lone surrogate", '["a\N{REPLACEMENT CHARACTER}b"]'),
        (10**5000, "result is an integer of more than 4,300 digits", "<int that cannot be shown: ValueError>"),
        (nested(65), f"result{'[0]' * 64} is nested deeper than 64", "[" * 65 + "]" * 65),
        ("x" * MAX_BYTES, "result has 1,048,578 bytes", '"' + "x" * 4082 + "... (cut off)"),
        (Unreadable(a=1), "result cannot be read: RuntimeError", "<Unreadable that cannot be shown: RuntimeError>"),
    ],
    ids=["set", "inf", "bytes", "NUL", "surrogate", "integer", "deep", "large", "unreadable"],
)
def test_a_result_that_cannot_be_kept_is_replaced_by_a_note(result: object, reason: str, text: str) -> None:
    ending = completed(result)
    assert ending.replaced
    note = json.loads(ending.result)
    assert note["commandbus"] == "result replaced"
    assert note["reason"].startswith(reason)
    assert note["text"] == text


@pytest.mark.parametrize("result", [{7: "a", None: "b", True: "c", 1.5: "d"}, "x" * (MAX_BYTES - 2), nested(64)])
def test_a_result_at_the_edge_is_kept(result: object) -> None:
    """Keys that are no strings become strings, as they did in 0.1.0."""
    ending = completed(result)
    assert ending == Completed(json.dumps(result, separators=(",", ":")))


def test_an_error_that_is_too_long_says_that_it_was_cut_off() -> None:
    def ping(n: int) -> None:
        if n == 0:
            raise ValueError("x" * 5000)
        pong(n - 1)

    def pong(n: int) -> None:
        ping(n)

    with pytest.raises(ValueError, match="x") as caught:
        ping(50)
    error = error_of(failed(caught.value, HANDLER, 1))
    assert error["message"] == "x" * 4083 + "... (cut off)"
    assert error["details"]["traceback"].startswith("... (cut off)\n")
    assert "raise ValueError" in error["details"]["traceback"]
    error = error_of(failed(BusinessRuleError("C" * 200), HANDLER, 1))
    assert error["code"] == "C" * 115 + "... (cut off)"


@pytest.mark.parametrize("details", [{"a": {1}}, {"a": "\0"}, ["x" * 20_000], nested(65), Unreadable(a=1)])
def test_details_that_cannot_be_kept_are_replaced_by_a_note(details: object) -> None:
    note = error_of(failed(TransientCommandError("X", "m", details), HANDLER, 1))["details"]
    assert note["commandbus"] == "details replaced"
    assert note["reason"].startswith("details")


def test_an_error_that_the_database_refuses_keeps_its_verdict() -> None:
    ending = failed(BusinessRuleError("NEIN", "\N{LATIN SMALL LETTER SHARP S}\N{HIRAGANA LETTER A}"), HANDLER, 1)
    found = without_words(ending, ValueError("no such character: \N{HIRAGANA LETTER A}"))
    assert (found.kind, found.replaced) == ("BUSINESS", True)
    error = error_of(found)
    assert error["code"] == "UNSTORABLE"
    assert "NEIN" in error["details"]["text"]
    assert not re.search("[^\0-\x7f]", str(error))


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
    assert len(text) < 20 * MAX_TEXT
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
