"""The command line's `troubleshooting`, as processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.acceptance.cli_support import CommandLine, Park, environment, on_terminal


def test_list(cli: CommandLine, park: Park) -> None:
    assert cli("troubleshooting", "list", "shop").stdout == 'nothing is parked in "shop"\n'
    assert 'of type "Buy" is parked in' in cli("troubleshooting", "list", "shop", "--type", "Buy").stdout
    assert cli.json("troubleshooting", "list", "shop") == {"items": [], "next_cursor": None}
    first, second, third = park(), park(), park(code="LATE")
    text = cli("troubleshooting", "list", "shop").stdout
    assert text.index(first) < text.index(second) < text.index(third)
    assert "NO_STOCK: none left" in text
    page = cli.json("troubleshooting", "list", "shop", "--limit", "2")
    assert [item["command_id"] for item in page["items"]] == [first, second]
    assert page["items"][0]["error"] == {"code": "NO_STOCK", "message": "none left", "details": None}
    rest = cli.json("troubleshooting", "list", "shop", "--limit", "2", "--cursor", page["next_cursor"])
    assert [item["command_id"] for item in rest["items"]] == [third]
    assert f"--cursor {page['next_cursor']}" in cli("troubleshooting", "list", "shop", "--limit", "2").stdout
    assert cli.json("troubleshooting", "list", "shop", "--type", "Other")["items"] == []
    assert len(cli.json("troubleshooting", "list", "shop", "--type", "Buy")["items"]) == 3


LONG = "NO_ACCOUNT", "anna has no account yet, \u8d26\u6237\u4e0d\u5b58\u5728 " + "x" * 250 + " the-end"


@pytest.mark.parametrize("columns", [60, 79, 80, 120, 200])
def test_on_a_terminal_nothing_is_lost(cli: CommandLine, park: Park, columns: int) -> None:
    code, message = LONG
    command_id = park(code=code, message=message, details={"traceback": message, "more": message})
    park(code=code, message=message)
    cli("troubleshooting", "retry", "shop", command_id, "--reason", message, "--data", json.dumps([message]))
    for arguments in (["troubleshooting", "list", "shop"], ["show", command_id]):
        piped = cli(*arguments).stdout
        shown = on_terminal(columns, *arguments, dsn=cli.dsn)
        assert max(cell_len(line) for line in shown) <= columns
        assert "".join("".join(shown).split()) == "".join(piped.split()).replace("\n", "")
        assert not re.search(r" $", piped, re.MULTILINE)
        assert f"{code}: {message}\n" in piped
        assert "attempts=1  parked=20" in piped or '{"new_data"' in piped


def test_retry_with_edited_data(cli: CommandLine, park: Park, tmp_path: Path) -> None:
    command_id = park('{"n": 1}')
    (tmp_path / "new.json").write_text('{"n": 2}')
    done = cli(
        "troubleshooting", "retry", "shop", command_id, "--data", f"@{tmp_path / 'new.json'}", "--operator", "ana"
    )
    assert done.stdout == f"retried {command_id}\n"
    command = cli.json("show", command_id)["command"]
    assert (command["status"], command["data"]) == ("PENDING", {"n": 2})


def test_retry_of_several_keeps_their_data(cli: CommandLine, park: Park) -> None:
    ids = [park('{"n": 1}'), park('{"n": 2}')]
    assert cli("troubleshooting", "retry", "shop", *ids).stdout == "".join(f"retried {i}\n" for i in ids)
    assert [cli.json("show", i)["command"]["data"] for i in ids] == [{"n": 1}, {"n": 2}]


def test_cancel_and_complete(cli: CommandLine, park: Park) -> None:
    given_up, done_by_hand = park(), park()
    result = cli.json("troubleshooting", "cancel", "shop", given_up, "--reason", "gone", env={"LOGNAME": "maria"})
    assert result == {"domain": "shop", "command_id": given_up, "outcome": "canceled", "message": None}
    found = cli.json("show", given_up)
    assert found["command"]["status"] == "CANCELED"
    assert (found["audit_trail"][-1]["operator"], found["audit_trail"][-1]["reason"]) == ("maria", "gone")

    options = ["--reason", "by hand", "--operator", "ana", "--result", '{"by": "hand"}']
    assert cli.json("troubleshooting", "complete", "shop", done_by_hand, *options)["outcome"] == "completed"
    command = cli.json("show", done_by_hand)["command"]
    assert (command["status"], command["result"]) == ("COMPLETED", {"by": "hand"})


def test_one_that_cannot_be_acted_on_holds_up_no_other(cli: CommandLine, park: Park) -> None:
    pending, unknown, parked = cli.send("other", "Buy"), str(uuid.uuid4()), park()
    result = cli("troubleshooting", "cancel", "shop", unknown, parked, "--reason", "r", "--json", code=1)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["command_id"], line["outcome"]) for line in lines] == [(unknown, "refused"), (parked, "canceled")]
    assert unknown in lines[0]["message"]
    assert result.stderr.count("\n") == 1
    assert unknown in result.stderr
    refused = cli("troubleshooting", "retry", "other", pending, code=1)
    assert f"command {pending} is PENDING: cannot retry it" in refused.stderr


def test_of_two_rivals_one_wins_and_the_other_is_told(cli: CommandLine, park: Park) -> None:
    command_id = park()
    rivals = [
        subprocess.Popen(
            [sys.executable, "-m", "commandbus", "troubleshooting", *action, "shop", command_id, "--reason", "r"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(cli.dsn),
        )
        for action in (["cancel"], ["complete"])
    ]  # fmt: skip
    said = [(*rival.communicate(timeout=60), rival.returncode) for rival in rivals]
    (winner, loser) = sorted(said, key=lambda each: each[2])
    assert (winner[1:], loser[0], loser[2]) == (("", 0), "", 1)
    assert re.fullmatch(rf"commandbus: command {command_id} is (CANCELED|COMPLETED): cannot \w+ it.*\n", loser[1])


def test_the_operator_needs_a_name(cli: CommandLine, park: Park) -> None:
    command_id = park()
    assert "operator" in cli("troubleshooting", "retry", "shop", command_id, "--operator", "", code=2).stderr
    assert cli.status(command_id) == "IN_TROUBLESHOOTING_QUEUE"
