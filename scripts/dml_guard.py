"""Finds statements that write to commandbus' tables outside `src/commandbus/sql/functions`.

Those functions are the one home for every change of a command's state. Looked at are SQL files and the
strings of Python files under `src`, `examples`, `scripts` and `benchmarks`; tests may spoil rows to see what
then happens. `migrate.py`, the migrations and `testing.py`, which opens the clock of a test database, may write to
`migration` and `setting`, which hold no commands.
`benchmarks/stock.py` may fill a database of its own: 10,000,000 commands through the functions take too long.

A table is known by the schema before its name, or by a `CREATE TABLE` among the migrations. A name that is
filled in later (`{}`, `%s`, `%I`) counts as one of ours: nobody can tell that it is not.

Prints a line per finding and returns 1 if there is any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("src", "examples", "scripts", "benchmarks")
HOME = Path("src/commandbus/sql/functions")
MIGRATIONS = Path("src/commandbus/sql/migrations")
BOOKKEEPERS = (Path("src/commandbus/migrate.py"), Path("src/commandbus/testing.py"))
STOCK = Path("benchmarks/stock.py")
BOOKKEEPING = frozenset({"migration", "setting"})

_COMMENT = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_TABLE = r'(?:"?(?P<schema>\w+)"?\s*\.\s*)?(?P<table>"?[\w]+"?|\{[^{}]*\}(?:\s*\.\s*\{[^{}]*\})?|%\w)'
_CREATE = re.compile(rf"\bcreate\s+(?:unlogged\s+)?table\s+(?:if\s+not\s+exists\s+)?{_TABLE}", re.IGNORECASE)
_WRITES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:insert|merge)\s+into\s+(?:only\s+)?{_TABLE}",
        rf"\bdelete\s+from\s+(?:only\s+)?{_TABLE}",
        rf"\bupdate\s+(?:only\s+)?{_TABLE}(?:\s*\*)?(?:\s+(?:as\s+)?\w+)?\s+set\b",
        rf"\btruncate\s+(?:table\s+)?(?:only\s+)?{_TABLE}\s*(?:;|,|$|cascade|restart|continue|restrict)",
        rf"\bcopy\s+{_TABLE}\s*(?:\([^)]*\))?\s+from\b",
    )
]


class Write(NamedTuple):
    """A statement that writes to one of our tables."""

    path: Path
    line: int
    statement: str


def table_names(migrations: list[str]) -> frozenset[str]:
    """The names, without schema, of the tables that these migrations create."""
    return frozenset(
        found["table"].strip('"').lower() for text in migrations for found in _CREATE.finditer(_without_comments(text))
    )


def writes_in_sql(text: str, tables: frozenset[str]) -> Iterator[tuple[int, str, str]]:
    """The writes to our tables in a text: the line counted from 0, the table, the statement's beginning."""
    text = _without_comments(text)
    for pattern in _WRITES:
        for found in pattern.finditer(text):
            schema, table = (found["schema"] or "").lower(), found["table"].strip('"').lower()
            if schema == "commandbus" or (not schema and (table in tables or table[0] in "{%")):
                yield text.count("\n", 0, found.start()), table, " ".join(found[0].split())


def writes_in_python(source: str, tables: frozenset[str]) -> Iterator[tuple[int, str, str]]:
    """The same for the strings of a Python file; what an f-string fills in stands there as `{}`."""
    tree = ast.parse(source)
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(
                part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "{}"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            text = node.value
        else:
            continue
        for line, table, statement in writes_in_sql(text, tables):
            yield node.lineno - 1 + line, table, statement


def writes(root: Path) -> Iterator[Write]:
    """The writes that do not stand where they belong, in the project at `root`."""
    tables = table_names([path.read_text("utf-8") for path in sorted((root / MIGRATIONS).glob("*.sql"))])
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()):
        relative = path.relative_to(root)
        if relative.suffix not in {".py", ".sql"} or relative.is_relative_to(HOME) or relative == STOCK:
            continue
        find = writes_in_python if relative.suffix == ".py" else writes_in_sql
        bookkeeper = relative in BOOKKEEPERS or relative.is_relative_to(MIGRATIONS)
        for line, table, statement in find(path.read_text("utf-8"), tables):
            if not (bookkeeper and table in BOOKKEEPING):
                yield Write(relative, line + 1, statement)


def _without_comments(text: str) -> str:
    return _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text)


def main() -> int:
    """Look through the project this file belongs to."""
    found = list(writes(Path(__file__).resolve().parent.parent))
    for path, line, statement in found:
        print(f"{path}:{line}: {statement}: writes to commandbus' tables belong in {HOME}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
