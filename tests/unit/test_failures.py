"""How an error is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commandbus._failures import brief, printable


@given(st.text())
def test_what_is_printed_is_printable(text: str) -> None:
    assert printable(text).isprintable()


@pytest.mark.parametrize("text", ["a plain line", "größer", "日本"])
def test_what_is_printable_stays(text: str) -> None:
    assert printable(text) == text


def test_an_error_is_one_line_without_details() -> None:
    assert brief(ValueError("first\x1b[31m\nsecond " + "x" * 1000)) == "first\\x1b[31m"
