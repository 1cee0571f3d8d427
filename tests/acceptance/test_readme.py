"""Reads the documents as a newcomer does: does what they say, looks at what comes out, follows their links.

On a page that is run, a `python` block begins with a comment that names its file and is saved there; the lines of a
`shell` block are run one after another; a `text` block is what the shell block before it prints; a `sql` block is
executed. A worker runs until the next one is started or the page ends, and then gets a SIGTERM.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import psycopg
import pytest
import typer.core
import typer.main

from commandbus import errors, sync, testing
from commandbus._failures import rights
from commandbus.cli import app
from tests.support import PYTEST, eventually

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "tutorial.md",
    ROOT / "docs" / "syncronous-python-design.md",
    ROOT / "docs" / "reference" / "sql-functions.md",
    *sorted(ROOT.glob("docs/how-to/*.md")),
]
SQL = ROOT / "src" / "commandbus" / "sql"

# What a newcomer runs and this test does not, with the reason.
ELSEWHERE = {
    "scripts/demo": "the demo has a test of its own",
    "scripts/test": "it runs this test",
    "pip install": "what is tested is installed already",
    "commandbus dev": "the fixture `dsn` stands for its database",
    "commandbus migrate --print >": "tests/sql/test_migrate.py runs what it prints",
    "psql": "it need not be installed",
    "gunicorn": "tests/acceptance/test_examples.py runs one",
    "curl": "as gunicorn",
    "commandbus doctor": "it finds that the server of the tests runs without fsync",
}
WORKERS = ("commandbus worker ", "python worker.py", "python manage.py runworker")
LOOKS = ("commandbus show", "commandbus troubleshooting list")  # a newcomer looks again until it is there

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:\.\d+)?(?:\+\d\d:\d\d|Z)?")
_WORKER = re.compile(r"[\w.-]+-\d+-[0-9a-f]{8}\b(?!-)")


class Block(NamedTuple):
    """A fenced block of a page, and where it begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


class Newcomer:
    """Does what a page says, in an empty folder with a fresh database."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self._folder = folder
        self._dsn = dsn
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._environment = os.environ | PYTEST | {"COMMAND_BUS_DSN": dsn, "PATH": path}
        self._ids: dict[str, str] = {}  # an id that the page shows, and the one that came out here
        self._worker: subprocess.Popen[bytes] | None = None

    def follow(self, page: list[Block]) -> None:
        try:
            for block, following in zip(page, [*page[1:], None], strict=True):
                self._do(block, following.text if following and following.language == "text" else None)
            self._stop_worker()
        finally:
            if self._worker is not None:
                self._worker.kill()
                self._worker.wait()

    def _do(self, block: Block, expected: str | None) -> None:
        match block.language:
            case "python":
                name = re.match(r"# ([\w./]+\.py)\n", block.text)
                assert name, f"line {block.line}: the first line does not name the file, as in `# payments.py`"
                (self._folder / name[1]).parent.mkdir(parents=True, exist_ok=True)
                (self._folder / name[1]).write_text(block.text, "utf-8")
            case "shell":
                commands = block.text.replace("\\\n", " ").splitlines()
                run = [command for command in commands if not command.startswith(tuple(ELSEWHERE))]
                for command in run[:-1]:
                    self._run(command, None)
                if run:
                    self._run(run[-1], expected)
            case "sql":
                with psycopg.connect(self._dsn, autocommit=True) as connection:
                    connection.execute(block.text.encode())
            case _:
                assert block.language in {"text", "mermaid"}, f"line {block.line}: what is to be done with this?"

    def _run(self, command: str, expected: str | None) -> None:
        for shown, here in self._ids.items():
            command = command.replace(shown, here)
        arguments = shlex.split(command)
        if command.startswith(WORKERS):
            self._start_worker(arguments)
        elif command.startswith(LOOKS) and expected is not None:
            eventually(
                lambda: self._is(expected, self._output(arguments)),
                timeout=60,
                what=f"{command!r} printing\n{expected}",
            )
        else:
            output = self._output(arguments)
            assert expected is None or self._is(expected, output), f"{command!r} printed\n{output}"

    def _output(self, arguments: list[str]) -> str:
        done = subprocess.run(
            arguments, cwd=self._folder, env=self._environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def _is(self, expected: str, output: str) -> bool:
        found = re.fullmatch(_pattern(expected), _essence(output))
        if found is not None:
            self._ids |= {name[1:].replace("_", "-"): here for name, here in found.groupdict().items()}
        return found is not None

    def _start_worker(self, arguments: list[str]) -> None:
        self._stop_worker()
        with (self._folder / "worker.log").open("ab") as log:
            self._worker = subprocess.Popen(
                arguments, cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _stop_worker(self) -> None:
        if self._worker is not None:
            self._worker.send_signal(signal.SIGTERM)
            code = self._worker.wait(60)
            self._worker = None
            assert code == 0, (self._folder / "worker.log").read_text("utf-8")


def _essence(output: str) -> str:
    """Return the text without the layout of its tables."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    return "".join(f"{line}\n" for line in lines if line.strip("─ "))


def _pattern(expected: str) -> str:
    """Return the regular expression for what a page shows: ids, moments and workers are others each time.

    An id becomes a group, so that it can be told what it is here. `...` stands for anything, alone for any lines.
    """
    seen: set[str] = set()

    def differs(found: re.Match[str]) -> str:
        text = found[0]
        if text == "...\n":
            return "(?:.*\n)*"
        if text == "...":
            return ".*"
        if not _UUID.fullmatch(text):
            return (_MOMENT if _MOMENT.fullmatch(text) else _WORKER).pattern
        name = "i" + text.replace("-", "_")
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{_UUID.pattern})"

    variable = re.compile(rf"(?m:^\.\.\.\n)|\.\.\.|{_UUID.pattern}|{_MOMENT.pattern}|{_WORKER.pattern}")
    parts, end, text = [], 0, _essence(expected)
    for found in variable.finditer(text):
        parts += [re.escape(text[end : found.start()]), differs(found)]
        end = found.end()
    return "".join([*parts, re.escape(text[end:])])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_is_what_happens(page: Path, dsn: str, tmp_path: Path) -> None:
    Newcomer(tmp_path, dsn).follow(blocks(page))


def test_python_in_the_other_documents_compiles() -> None:
    for page in DOCUMENTS:
        for block in blocks(page):
            if block.language == "python":
                compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)


# -- links and names ---------------------------------------------------------------------------------------------------


def _prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", _prose(page)):
        there = (page.parent / target).resolve() if target else page
        assert there.exists(), f"{target} is not there"
        assert not anchor or anchor in _anchors(there), f"{target} has no heading #{anchor}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_the_project_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:src|tests|scripts|docs|examples|requirements)/[\w./*-]*)`", _prose(page)):
        assert list(ROOT.glob(name.rstrip("/"))), f"{name} is not there"


def test_every_document_is_linked_from_another() -> None:
    linked = {
        (page.parent / target).resolve()
        for page in DOCUMENTS
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", _prose(page))
    }
    assert [page for page in DOCUMENTS if page not in linked and page != ROOT / "README.md"] == []


# -- what the documents say of the code --------------------------------------------------------------------------------

Edge = tuple[str, str, str]  # from, letter, to

UNFINISHED = ("PENDING", "SCHEDULED", "IN_PROGRESS", "IN_TROUBLESHOOTING_QUEUE")


def _edges_in_sql() -> Iterator[Edge]:
    text = (SQL / "functions" / "command.sql").read_text("utf-8")
    for begin, letters, end in re.findall(r"^-- +(\S.*?) --([\w,]+)--> (\w+)", text, re.MULTILINE):
        for letter in letters.split(","):
            for start in UNFINISHED if begin == "any unfinished" else [begin]:
                yield start, letter, end


def _edges_in_the_diagram(page: Path) -> Iterator[Edge]:
    (diagram,) = [block.text for block in blocks(page) if block.language == "mermaid"]
    for begin, end, letters in re.findall(r"^ +(\S+) --> (\S+): (.*)$", diagram, re.MULTILINE):
        for letter in letters.split(", "):
            yield begin.replace("[*]", "(sent)"), letter, end


def test_the_diagram_of_states_is_that_of_the_functions() -> None:
    page = ROOT / "docs" / "explanation" / "states.md"
    edges = set(_edges_in_sql())
    assert set(_edges_in_the_diagram(page)) == edges
    rows = re.findall(r"^\| (\w) \| .* \| (.*) \| (.*) \|$", page.read_text("utf-8"), re.MULTILINE)
    assert {letter for letter, _, _ in rows} == {letter for _, letter, _ in edges}
    sql = "".join(path.read_text("utf-8") for path in SQL.rglob("*.sql"))
    for _, functions, events in rows:
        for function in re.findall(r"`(\w+)`", functions):
            assert f"FUNCTION commandbus.{function}(" in sql
        for event in re.findall(r"`(\w+)`", events):
            assert f"'{event}'" in sql


def test_the_reference_of_errors_names_each_class_and_its_code() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text("utf-8")
    classes = [
        value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and not name.startswith("_")
    ]
    rows = dict(re.findall(r"^\| `(\w+Error)` \| ([^|]*?) ?\|", page, re.MULTILINE))
    for cls in classes:
        if cls is not errors.CommandBusError:
            assert cls.__name__ in rows
            sqlstate = getattr(cls, "sqlstate", None)
            assert sqlstate is None or rows[cls.__name__] == f"`{sqlstate}`"
    assert set(rows) <= {cls.__name__ for cls in classes}


def test_the_reference_of_errors_names_each_code_that_the_library_gives() -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text("utf-8")
    named = re.findall(r"^\| `([A-Z_]+)` \| [^|]* \|$", page, re.MULTILINE)
    python = [*(SQL.parent / "worker").glob("*.py"), SQL.parent / "model.py", SQL.parent / "process.py"]
    worker = "".join(path.read_text("utf-8") for path in python)
    sql = "".join(path.read_text("utf-8") for path in SQL.rglob("*.sql"))
    given = re.findall(r'(?:Error|__init__)\(\s*"([A-Z_]+)"', worker) + re.findall(r"'code', '([A-Z_]+)'", sql)
    assert sorted(named) == sorted(set(given))


@pytest.mark.parametrize("module", [sync, testing], ids=["sync", "testing"])
def test_the_reference_names_all_of_the_module(module: ModuleType) -> None:
    page = (ROOT / "docs" / "reference" / f"{module.__name__.rpartition('.')[2]}.md").read_text("utf-8")
    table = page[: page.index("\n## ")]
    named = [
        name for cell in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    ]
    assert sorted(named) == sorted(module.__all__)


def test_the_reference_of_views_names_each_column(db: psycopg.Connection) -> None:
    page = (ROOT / "docs" / "reference" / "views.md").read_text("utf-8")
    described = {}
    for view, text in re.findall(r"^## `commandbus\.(\w+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL):
        cells = "".join(re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE))
        described[view] = set(re.findall(r"`(\w+)`", cells))
    for view in ("troubleshooting", "batch_commands"):
        described[view] |= described["commands"]  # as the page says
    rows = db.execute(
        "select table_name, array_agg(column_name::text) from information_schema.columns "
        "join information_schema.views using (table_schema, table_name) "
        "where table_schema = 'commandbus' group by table_name"
    )
    assert described == {view: set(columns) for view, columns in rows}


def test_the_reference_of_sql_functions_names_their_parameters(db: psycopg.Connection) -> None:
    page = (ROOT / "docs" / "reference" / "sql-functions.md").read_text("utf-8")
    for name, parameters in re.findall(r"^## `(\w+_v\d+)\(([^)]*)\)", page, re.MULTILINE):
        row = db.execute(
            "select proargnames[:pronargs], proargtypes::regtype[]::text[] from pg_proc "
            "where pronamespace = 'commandbus'::regnamespace and proname = %s",
            [name],
        ).fetchone()
        assert row is not None, name
        names, types = row[0] or [], row[1] or []
        expected = [f"{given.removeprefix('p_')} {kind}" for given, kind in zip(names, types, strict=True)]
        assert parameters.split(", ") == expected if parameters else not expected


def test_the_reference_of_roles_is_the_list_of_rights() -> None:
    page = (ROOT / "docs" / "reference" / "roles.md").read_text("utf-8")
    kinds = ("sender", "worker", "operator", "reader")
    assert f"| | {' | '.join(kinds)} |" in page
    described = {
        name: [f"commandbus_{kind}" for kind, cell in zip(kinds, cells.split("|"), strict=True) if cell.strip()]
        for name, cells in re.findall(r"^\| `(\w+)` \|((?:(?: yes)? \|){3}(?: yes)?) \|$", page, re.MULTILINE)
    }
    assert described == rights()


def test_the_reference_of_sql_functions_names_each_violation() -> None:
    page = (ROOT / "docs" / "reference" / "sql-functions.md").read_text("utf-8")
    first_cells = re.findall(r"^\| (`[a-z_]+`(?:, `[a-z_]+`)*) \| [A-Z]", page, re.MULTILINE)
    named = {name for cell in first_cells for name in re.findall(r"\w+", cell) if "_" in name}
    checker = "".join(path.read_text("utf-8") for path in (SQL / "functions").glob("*verify.sql"))
    assert named == set(re.findall(r"(?:\(|SELECT )'([a-z]+_[a-z_]+)', ", checker))


def test_the_reference_of_the_command_line_names_each_option() -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text("utf-8")
    described: dict[str, set[str]] = {}
    for heading, text in re.findall(r"^## (`[^\n]*)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL):
        for name in re.findall(r"`(\w+)`", heading):
            described[name] = set(re.findall(r"^\| `(--[\w-]+)`", text, re.MULTILINE))
    everywhere = {"--dsn", "--json", "--help"}
    assert described == {name: options - everywhere for name, options in _options(typer.main.get_command(app._app))}


def _options(group: object) -> Iterator[tuple[str, set[str]]]:
    """The options of each subcommand; those of a group in a group are put together."""
    assert isinstance(group, typer.core.TyperGroup)
    for name, command in group.commands.items():
        parts = command.commands.values() if isinstance(command, typer.core.TyperGroup) else [command]
        yield name, {option for part in parts for given in part.params for option in given.opts if option[:2] == "--"}
