"""How an error is told."""

from __future__ import annotations

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commandbus._failures import _roles_for, brief, is_connection_lost, printable, rights


@given(st.text())
def test_what_is_printed_is_printable(text: str) -> None:
    assert printable(text).isprintable()


@pytest.mark.parametrize("text", ["a plain line", "größer", "日本"])
def test_what_is_printable_stays(text: str) -> None:
    assert printable(text) == text


def test_an_error_is_one_line_without_details() -> None:
    assert brief(ValueError("first\x1b[31m\nsecond " + "x" * 1000)) == "first\\x1b[31m"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (psycopg.OperationalError("the connection is lost"), True),
        (psycopg.errors.AdminShutdown(), True),
        (psycopg.errors.ProtocolViolation(), True),  # what PgBouncer says of all its troubles
        (psycopg.InternalError("received 2 results from command 'COMMIT'"), True),  # behind PgBouncer
        (psycopg.errors.IdleInTransactionSessionTimeout(), True),
        (psycopg.errors.InFailedSqlTransaction(), False),
        (psycopg.errors.LockNotAvailable(), False),
        (psycopg.errors.UniqueViolation(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_connection_that_is_lost_is_known(error: psycopg.Error, lost: bool) -> None:  # noqa: FBT001 - an example
    assert is_connection_lost(error) == lost


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
