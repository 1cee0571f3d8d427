"""How an error is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commandbus._failures import _roles_for, brief, printable, rights


@given(st.text())
def test_what_is_printed_is_printable(text: str) -> None:
    assert printable(text).isprintable()


@pytest.mark.parametrize("text", ["a plain line", "größer", "日本"])
def test_what_is_printable_stays(text: str) -> None:
    assert printable(text) == text


def test_an_error_is_one_line_without_details() -> None:
    assert brief(ValueError("first\x1b[31m\nsecond " + "x" * 1000)) == "first\\x1b[31m"


@pytest.mark.parametrize(
    ("said", "roles"),
    [
        ("permission denied for function send_v1", ["commandbus_sender"]),
        ("keine Berechtigung für Sicht stats", ["commandbus_operator", "commandbus_reader"]),
        ("permission denied for schema commandbus", rights()["schema_v1"]),
        ("permission denied for table account", []),
    ],
)
def test_a_refusal_names_the_roles_that_may_in_whatever_language(said: str, roles: list[str]) -> None:
    assert _roles_for(said) == roles
