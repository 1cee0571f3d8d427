"""What one version sent, ended or parked, the other knows: in the schema of the new one, in both directions."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from tests.versions.support import DOMAIN, Client, Crew, Version, all_handled


@pytest.fixture
def clients(crew: Crew, versions: tuple[Version, Version]) -> tuple[Client, Client]:
    """A client of each version."""
    first, second = versions
    return crew.client(first), crew.client(second)


def send(client: Client, command_type: str = "Echo", **more: object) -> str:
    """Send a command; returns its id."""
    return str(client("send", DOMAIN, command_type, {"n": 1}, **more)["command_id"])


def trail(client: Client, command_id: str) -> list[Any]:
    """The events of a command, in order."""
    return [event["event"] for event in client("get_audit_trail", DOMAIN, command_id)]


def test_an_id_that_the_other_version_sent_is_a_duplicate(clients: tuple[Client, Client]) -> None:
    first, second = clients
    command_id = send(first, headers={"a": "b"})
    again = second("send", DOMAIN, "Echo", {"n": 1}, command_id=command_id)
    assert again == {"domain": DOMAIN, "command_id": command_id, "duplicate": True}


@pytest.mark.parametrize(("command_type", "number"), [("Echo", 2), ("Book", 1)], ids=["other data", "other type"])
def test_an_id_that_the_other_version_sent_is_a_conflict_with_another_command(
    clients: tuple[Client, Client], command_type: str, number: int
) -> None:
    first, second = clients
    command_id = send(first, command_id=str(uuid4()))
    error, _ = second("send", DOMAIN, command_type, {"n": number}, command_id=command_id)
    assert error == "CommandIdConflictError"
    assert first("get_command", DOMAIN, command_id)["data"] == {"n": 1}


def test_either_cancels_what_the_other_sent(clients: tuple[Client, Client]) -> None:
    first, second = clients
    command_id = send(first, delay=3600)
    assert second("cancel", DOMAIN, command_id, operator="ada", reason="not needed") is None
    error, _ = first("cancel", DOMAIN, command_id)
    assert error == "CommandStateError"
    assert trail(first, command_id) == ["SENT", "CANCELED"]


def test_what_one_version_parked_an_operator_of_the_other_retries(
    crew: Crew, clients: tuple[Client, Client], versions: tuple[Version, Version]
) -> None:
    sender, operator = clients
    parking = crew.worker(versions[0])
    command_id = send(sender, "Park")
    all_handled(crew.dsn)
    parking.end()
    assert [parked["command_id"] for parked in operator("list_troubleshooting", DOMAIN)] == [command_id]
    operator("operator_retry", DOMAIN, command_id, data={"n": 1, "mended": True}, operator="ada", reason="mended")
    worker = crew.worker(versions[1])
    all_handled(crew.dsn)
    worker.end()
    seen = [client("get_command", DOMAIN, command_id) for client in clients]
    assert seen[0] == seen[1]
    assert (seen[0]["status"], seen[0]["result"]["by"]) == ("COMPLETED", f"{versions[1].name} async")
    parked = ["SENT", "CLAIMED", "PARKED", "OPERATOR_RETRIED", "CLAIMED", "COMPLETED"]
    assert trail(sender, command_id) == trail(operator, command_id) == parked


@pytest.mark.parametrize(("verb", "status"), [("operator_cancel", "CANCELED"), ("operator_complete", "COMPLETED")])
def test_what_one_version_parked_an_operator_of_the_other_ends(
    crew: Crew, clients: tuple[Client, Client], versions: tuple[Version, Version], verb: str, status: str
) -> None:
    sender, operator = clients
    worker = crew.worker(versions[0])
    command_id = send(sender, "Park")
    all_handled(crew.dsn)
    worker.end()
    assert operator(verb, DOMAIN, command_id, operator="ada", reason="by hand") is None
    assert sender("get_command", DOMAIN, command_id)["status"] == status
    last = sender("get_audit_trail", DOMAIN, command_id)[-1]
    assert (last["operator"], last["reason"]) == ("ada", "by hand")
