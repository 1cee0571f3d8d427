"""The command line's `troubleshooting` over groups and filters, and its `show` and `edit`."""

from __future__ import annotations

import json
import re
import signal
import stat
import sys
import uuid
from pathlib import Path

import psycopg
import pytest

from tests.acceptance.cli_support import CommandLine, Park, running
from tests.support import eventually

PARKED = "IN_TROUBLESHOOTING_QUEUE"


def test_groups(cli: CommandLine, park: Park) -> None:
    assert cli("troubleshooting", "groups", "shop").stdout == 'nothing is parked in "shop"\n'
    assert cli.json("troubleshooting", "groups", "shop") == []
    first = park(message="order 17 lacks 'shoes'")
    park(message="order 18 lacks 'hats'")
    park(code="LATE", message="too late")

    text = cli("troubleshooting", "groups", "shop").stdout
    assert re.fullmatch(
        r'parked in "shop": 3\n'
        r"  2  Buy  NO_STOCK  group=[0-9a-f]{12}  oldest=\S+Z  newest=\S+Z\n    order 17 lacks 'shoes'\n"
        r"  1  Buy  LATE  group=[0-9a-f]{12}  oldest=\S+Z  newest=\S+Z\n    too late\n",
        text,
    )
    groups = cli.json("troubleshooting", "groups", "shop", "--code", "NO_STOCK")
    assert [(group["count"], group["sample_ids"][0]) for group in groups] == [(2, first)]
    assert groups[0]["fingerprint"] in text
    assert "nothing that is chosen is parked" in cli("troubleshooting", "groups", "shop", "--text", "boots").stdout


def test_list_takes_the_options_of_a_filter(cli: CommandLine, park: Park) -> None:
    late, sold = park(code="LATE"), park('{"what": "shoes"}')
    group = cli.json("troubleshooting", "groups", "shop", "--code", "LATE")[0]["fingerprint"]

    def listed(*options: str) -> list[str]:
        items = cli.json("troubleshooting", "list", "shop", *options)["items"]
        return [item["command_id"] for item in items]

    assert listed("--code", "LATE") == listed("--group", group) == [late]
    assert listed("--text", "SHOES") == [sold]
    assert listed("--parked-for", "0s") == [late, sold]
    assert listed("--parked-for", "1h") == []


def test_show(cli: CommandLine, park: Park) -> None:
    command_id, _, pending = park(details={"traceback": "Traceback: here"}), park(), cli.send("other", "Buy")
    text = cli("troubleshooting", "show", command_id).stdout
    assert text.startswith(cli("show", command_id).stdout)
    assert "  | Traceback: here\n" in text
    assert re.search(r"\ngroup\n  2  Buy  NO_STOCK  group=[0-9a-f]{12} ", text)
    story = cli.json("troubleshooting", "show", command_id)
    assert story.pop("group")["count"] == 2
    assert story == cli.json("show", command_id)
    refused = cli("troubleshooting", "show", pending, code=1).stderr
    assert f"command {pending} is PENDING, not parked" in refused


# -- over a filter -----------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_the_count_and_changes_nothing(cli: CommandLine, park: Park) -> None:
    ids = [park(), park(), park(code="LATE")]
    text = cli("troubleshooting", "cancel", "shop", "--code", "NO_STOCK", "--reason", "r", "--dry-run").stdout
    assert text.startswith("2 would be canceled\n  2  Buy  NO_STOCK  group=")
    assert text.endswith("\nto do it: --count 2 instead of --dry-run\n")
    preview = cli.json("troubleshooting", "retry", "shop", "--dry-run")
    assert (preview["count"], [group["count"] for group in preview["groups"]]) == (3, [2, 1])
    assert preview["oldest_parked_at"] < preview["newest_parked_at"]
    assert cli("troubleshooting", "retry", "shop", "--type", "Sell", "--dry-run").stdout.startswith("nothing of type")
    assert {cli.status(command_id) for command_id in ids} == {PARKED}


def test_what_is_chosen_is_acted_on(cli: CommandLine, park: Park) -> None:
    retried, canceled, completed = park('{"n": 1, "x": 1}'), park(code="LATE"), park(code="ODD")
    who = ["--operator", "ana", "--reason", "why"]

    def act(verb: str, *options: str) -> list[str]:
        return ["troubleshooting", verb, "shop", *options, "--count", "1", *who]

    assert cli(*act("retry", "--code", "NO_STOCK", "--patch", '{"x": null}')).stdout == "retried 1\n"
    assert cli.json(*act("cancel", "--text", "none", "--code", "LATE")) == {
        "done": 1, "changed": 0, "refused": 0, "busy": 0, "remaining": 0,
    }  # fmt: skip
    assert cli(*act("complete", "--result", "7")).stdout == "completed 1\n"

    assert [cli.status(one) for one in (retried, canceled, completed)] == ["PENDING", "CANCELED", "COMPLETED"]
    assert (cli.look("data", retried), cli.look("result", completed)) == ({"n": 1}, 7)
    for command_id in (retried, canceled, completed):
        event = cli.json("show", command_id)["audit_trail"][-1]
        assert (event["operator"], event["reason"]) == ("ana", "why")


def test_another_count_does_nothing_and_is_1(cli: CommandLine, park: Park) -> None:
    command_id = park()
    refused = cli("troubleshooting", "retry", "shop", "--count", "2", code=1)
    assert 'finds 1 parked commands in "shop", not 2: nothing was done' in refused.stderr
    assert cli.status(command_id) == PARKED


def test_what_stays_locked_is_told_and_is_1(cli: CommandLine, park: Park, dsn: str) -> None:
    locked, other = park(), park()
    with psycopg.connect(dsn) as holder:
        holder.execute("SELECT commandbus.operator_cancel_v1('shop', %s, 'bob', 'no')", [locked])
        result = cli("troubleshooting", "retry", "shop", "--count", "2", code=1)
        holder.rollback()
    assert result.stdout == "retried 1\n"
    assert result.stderr == "commandbus: 1 were left alone: another transaction keeps them locked; try again\n"
    assert (cli.status(locked), cli.status(other)) == (PARKED, "PENDING")


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_ends_it_after_the_batch_and_tells_how_far_it_came(
    cli: CommandLine, park: Park, tmp_path: Path, *, as_json: bool
) -> None:
    ids = [park() for _ in range(3)]
    arguments = ["troubleshooting", "retry", "shop", "--count", "3", "--rate", "0.01", *["--json"] * as_json]
    with running(*arguments, dsn=cli.dsn, folder=tmp_path) as process:
        eventually(lambda: cli.status(ids[0]) == "PENDING", timeout=30, what="the first command of the set")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert (tmp_path / "err").read_text() == "commandbus: interrupted: 1 of 3 commands are done, 2 are not\n"
    out = (tmp_path / "out").read_text()
    assert json.loads(out) == {"done": 1, "changed": 0, "refused": 0, "busy": 0, "remaining": 2} if as_json else not out
    assert [cli.status(command_id) for command_id in ids] == ["PENDING", PARKED, PARKED]


# -- edit --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def editor(tmp_path: Path) -> Path:
    """A program that notes what it is given, then does what the file `does` says."""
    program = tmp_path / "editor"
    program.write_text(f'#!/bin/sh\ncp "$2" "{tmp_path}/seen"\necho "$2" > "{tmp_path}/path"\n. "{tmp_path}/does"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def edit_by(editor: Path, does: str) -> dict[str, str]:
    (editor.parent / "does").write_text(does)
    return {"EDITOR": f"{editor} --wait", "VISUAL": ""}


def test_edit_in_an_editor(cli: CommandLine, park: Park, editor: Path) -> None:
    command_id = park('{"to": "Änne", "n": 1}')
    env = edit_by(editor, """sed -i 's/1/2/' "$2" """)
    shown = cli("troubleshooting", "edit", "shop", command_id, "--operator", "ana", "--reason", "typo", env=env).stdout
    assert (editor.parent / "seen").read_text() == '{\n    "n": 1,\n    "to": "Änne"\n}\n'
    assert shown.splitlines()[2:] == [
        "@@ -1,4 +1,4 @@", " {", '-    "n": 1,', '+    "n": 2,', '     "to": "Änne"', " }", f"retried {command_id}",
    ]  # fmt: skip
    assert not Path((editor.parent / "path").read_text().strip()).parent.exists()
    story = cli.json("show", command_id)
    assert (story["command"]["status"], story["command"]["data"]) == ("PENDING", {"to": "Änne", "n": 2})
    event = story["audit_trail"][-1]
    assert (event["operator"], event["reason"], event["details"]["old_data"]["n"]) == ("ana", "typo", 1)


def test_edit_with_new_data_or_a_patch(cli: CommandLine, park: Park) -> None:
    first, second = park('{"n": 1, "x": {"y": 1, "z": 1}}'), park('{"n": 1}')
    patched = cli.json("troubleshooting", "edit", "shop", first, "--patch", '{"n": null, "x": {"y": 2}}')
    assert patched["new_data"] == cli.look("data", first) == {"x": {"y": 2, "z": 1}}
    assert patched["old_data"] == {"n": 1, "x": {"y": 1, "z": 1}}
    cli("troubleshooting", "edit", "shop", second, "--data", "-", stdin="[1]")
    assert cli.look("data", second) == [1]


def as_sent_by_sql(db: psycopg.Connection, command_id: str, data: str) -> str:
    """Give the command the data that only SQL could have sent; returns its id."""
    sql = "UPDATE commandbus.command SET data = %(data)s, data_hash = commandbus._data_hash(command_type, %(data)s)"
    db.execute(sql, {"data": data})
    return command_id


EXACT = '{"amount": 12345678901234567.25, "price": 1.10, "n": 1}'


@pytest.mark.parametrize("by", ["patch", "data", "editor"])
def test_numbers_keep_the_digits_that_nobody_edited(
    cli: CommandLine, park: Park, db: psycopg.Connection, editor: Path, by: str
) -> None:
    command_id = as_sent_by_sql(db, park(), EXACT)
    options = {"patch": ("--patch", '{"n": 2}'), "data": ("--data", EXACT.replace(": 1}", ": 2}")), "editor": ()}
    env = edit_by(editor, """sed -i 's/: 1,/: 2,/' "$2" """)
    shown = cli("troubleshooting", "edit", "shop", command_id, *options[by], env=env).stdout
    (text,) = (
        db.execute("SELECT data::text FROM commandbus.commands WHERE command_id = %s", [command_id]).fetchone() or ()
    )
    assert text == '{"n": 2, "price": 1.10, "amount": 12345678901234567.25}'
    assert '-    "n": 1' in shown


@pytest.mark.parametrize("big", ["9" * 5001, "1" + "0" * 5000])
def test_what_python_cannot_read_can_be_edited(cli: CommandLine, park: Park, db: psycopg.Connection, big: str) -> None:
    command_id = as_sent_by_sql(db, park(), f'{{"keep": "me", "big": {big}}}')
    cli("troubleshooting", "edit", "shop", command_id, "--patch", '{"big": 2}')
    assert cli.look("data", command_id) == {"keep": "me", "big": 2}


def test_an_edit_shows_a_change_of_one_end_of_line_for_another(cli: CommandLine, park: Park) -> None:
    command_id = park('{"n": "a\u2028b"}')
    shown = cli("troubleshooting", "edit", "shop", command_id, "--data", '{"n": "a\u2029b"}').stdout
    assert '-    "n": "a\\u2028b"\n+    "n": "a\\u2029b"\n' in shown


def test_an_edit_of_what_is_locked_is_told(cli: CommandLine, park: Park) -> None:
    command_id = park('{"n": 1}')
    with psycopg.connect(cli.dsn) as other:
        other.execute("SELECT commandbus.operator_cancel_v1('shop', %s, 'bob', 'why')", [command_id])
        refused = cli("troubleshooting", "edit", "shop", command_id, "--patch", '{"n": 2}', code=1).stderr
        other.rollback()
    assert "is locked by another transaction: nothing was done" in refused
    assert cli.look("data", command_id) == {"n": 1}


@pytest.mark.parametrize(
    ("does", "code", "says"),
    [
        ("exit 3", 1, "the editor ended with 3: nothing was done"),
        (":", 2, "would keep its data"),
        ('rm "$2"', 4, "the editor cannot be used"),
    ],
)
def test_an_edit_that_comes_to_nothing_changes_nothing(  # noqa: PLR0917
    cli: CommandLine, park: Park, editor: Path, does: str, code: int, says: str
) -> None:
    command_id = park('{"n": 1}')
    assert says in cli("troubleshooting", "edit", "shop", command_id, code=code, env=edit_by(editor, does)).stderr
    assert (cli.status(command_id), cli.look("data", command_id)) == (PARKED, {"n": 1})
    assert not Path((editor.parent / "path").read_text().strip()).parent.exists()


@pytest.mark.parametrize("left", ['{"n": canary', "null", '"canary \\ud800"', "[" * 65 + "]" * 65, '"can\udce4ry"'])
def test_what_cannot_be_the_data_is_kept_in_its_file(cli: CommandLine, park: Park, editor: Path, left: str) -> None:
    command_id = park('{"n": 1}')
    (editor.parent / "left").write_text(left, errors="surrogateescape")
    env = edit_by(editor, f'cat "{editor.parent}/left" > "$2"')
    refused = cli("troubleshooting", "edit", "shop", command_id, code=2, env=env).stderr
    path = Path((editor.parent / "path").read_text().strip())
    assert f"--data @{path}" in refused
    assert "canary" not in refused
    kept = path.read_text(errors="surrogateescape")
    assert (kept, path.parent.stat().st_mode & 0o077) == (left, 0)
    assert cli.status(command_id) == PARKED


def test_an_editor_that_is_not_there_is_4(cli: CommandLine, park: Park) -> None:
    command_id = park()
    refused = cli("troubleshooting", "edit", "shop", command_id, code=4, env={"VISUAL": "/does/not/exist"})
    assert "set EDITOR" in refused.stderr
    assert cli.status(command_id) == PARKED


def test_an_edit_of_what_somebody_else_has_retried_meanwhile(cli: CommandLine, park: Park, editor: Path) -> None:
    """Even when it is parked again: the new failure may be another, and the data is what the other made of it."""
    command_id = park('{"n": 1}')
    again = "claim_v1('shop', '[[\"Buy\", -1, 3620000000000000000]]', 1, 'w', 60)"
    sql = f"""
        SELECT commandbus.operator_retry_v1('shop', '{command_id}', 'bob', 'mine', '{{"n": 7}}');
        SELECT commandbus.fail_v1('shop', json_build_array(to_jsonb(c) || '{{"kind": "PERMANENT"}}')::text)
        FROM commandbus.{again} c WHERE c.command_id IS NOT NULL;"""
    program = f"import psycopg; psycopg.connect({cli.dsn!r}, autocommit=True).execute({sql!r})"
    (editor.parent / "meanwhile.py").write_text(program)
    env = edit_by(editor, f"""sed -i 's/1/2/' "$2"; {sys.executable} "{editor.parent}/meanwhile.py" """)
    refused = cli("troubleshooting", "edit", "shop", command_id, code=1, env=env).stderr
    assert "was parked anew while you edited it: nothing was done" in refused
    assert Path((editor.parent / "path").read_text().strip()).exists()
    assert (cli.status(command_id), cli.look("data", command_id)) == (PARKED, {"n": 7})


def test_edit_of_what_is_not_parked_is_1(cli: CommandLine) -> None:
    pending, unknown = cli.send("shop", "Buy"), str(uuid.uuid4())
    assert "is PENDING: cannot edit it" in cli("troubleshooting", "edit", "shop", pending, code=1).stderr
    assert unknown in cli("troubleshooting", "edit", "shop", unknown, code=1).stderr
