"""The guard of the one home for changes of state sees what it should, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.dml_guard import Write, table_names, writes, writes_in_python, writes_in_sql

TABLES = frozenset({"command", "history"})


@pytest.mark.parametrize(
    "statement",
    [
        "insert into commandbus.command (id) values (1)",
        "INSERT\n  INTO command VALUES (1)",
        'update "commandbus"."command" c set status = 1',
        "update only history as h set x = 1",
        "with gone as (delete from command where true returning *) select * from gone",
        "merge into commandbus.command using x on true when matched then do nothing",
        "truncate commandbus.anything",
        "truncate table history cascade",
        "copy command (id) from stdin",
        "insert into {} values (1)",
        "delete from {}.{}",
        "update %s set x = 1",
        "execute format('delete from commandbus.%I', partition)",
    ],
)
def test_a_write_is_found(statement: str) -> None:
    assert len(list(writes_in_sql(statement, TABLES))) == 1


@pytest.mark.parametrize(
    "statement",
    [
        "select * from commandbus.command for update skip locked",
        "insert into ledger.command (id) values (1)",
        "update account set balance = 0",
        "-- insert into command values (1)\n/* delete from\n command */ select 1",
        "An operator may update command data; we delete from time to time and truncate history texts.",
        "insert into t values (1) on conflict (id) do update set x = 1",
        "copy command to stdout",
    ],
)
def test_anything_else_is_not(statement: str) -> None:
    assert list(writes_in_sql(statement, TABLES)) == []


def test_strings_of_python_are_read_with_their_lines() -> None:
    source = 'a = 1\nb = f"""\n  insert into {a} values (1)"""\nc = ("delete "\n  "from command")\n'
    assert [(line, table) for line, table, _ in writes_in_python(source, TABLES)] == [
        (2, "{}"),
        (3, "command"),
    ]


def test_tables_are_known_from_the_migrations() -> None:
    migration = "create table commandbus.command (id int);\nCREATE UNLOGGED TABLE IF NOT EXISTS lease (id int);"
    assert table_names([migration]) == {"command", "lease"}


def test_only_functions_write_and_migrations_keep_their_books(tmp_path: Path) -> None:
    for name, text in {
        "src/commandbus/sql/functions/command.sql": "insert into commandbus.command values (1);",
        "src/commandbus/sql/migrations/0001.sql": (
            "create table commandbus.command (id int);\ninsert into commandbus.setting values (1);\n"
            "delete from command;\n"
        ),
        "src/commandbus/migrate.py": "a = 'insert into commandbus.migration values (1)'\n",
        "src/commandbus/bus.py": "a = 1\nb = 'insert into commandbus.migration values (1)'\n",
        "examples/ledger/app.py": "a = 'insert into account values (1)'\n",
        "benchmarks/stock.py": "a = 'insert into commandbus.command_history values (1)'\n",
        "benchmarks/drain.py": "a = 'delete from commandbus.command_history'\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    assert list(writes(tmp_path)) == [
        Write(Path("benchmarks/drain.py"), 1, "delete from commandbus.command_history"),
        Write(Path("src/commandbus/bus.py"), 2, "insert into commandbus.migration"),
        Write(Path("src/commandbus/sql/migrations/0001.sql"), 3, "delete from command"),
    ]
