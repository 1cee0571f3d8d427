"""Each mutant is killed by the test that it names; with --long, also by which others: that is kept in MUTANTS.md.

A mutant runs in a pytest of its own, two at a time. It is killed by a test that fails; a fixture that fails, or SQL
that PostgreSQL cannot read, kills nobody.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from tests.sql.mutants import MUTANTS, Mutant

HERE = Path(__file__).parent
TABLE = HERE / "MUTANTS.md"
MACHINE = "test_state_machine.py::test_random_lives_are_as_the_model_says"

# What these have no part in: the schema as it is installed, plans, and this file.
OTHERS = ("test_migrate.py", "test_plans.py", "test_mutants.py")
# In these, rivals meet or they do not: whether a mutant makes them fail is a matter of luck.
LUCK = re.compile("bulk_verbs_in_any_order|claims_at_once|sends_and_completions_of_the_same|senders_of_the_same_ids")

HEAD = """\
# Mutants of the SQL functions

Each mutant is one guard less; `mutants.py` has their texts.
Every run of `tests/sql/test_mutants.py` shows that the named test fails against its mutant.
`scripts/test tests/sql/test_mutants.py --long` runs the other tests against every mutant, and writes this page.
"Model" says whether the random lives of `test_state_machine.py` alone see it, with one seed.

| Mutant | What is wrong | Named test | Model | Other tests that fail |
|---|---|---|---|---|
"""


def killers(mutant: Mutant, *arguments: str) -> frozenset[str]:
    """Run tests against a mutant; returns those that fail, without their parameters."""
    command = [sys.executable, "-m", "pytest", "--mutant", mutant.name, "-p", "no:randomly", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-q", "--tb=no", "-rfE", *arguments],
        cwd=HERE.parents[1], env=os.environ | {"COLUMNS": "1000"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    summary = re.findall(r"^(FAILED|ERROR) tests/sql/(\w+\.py::\w+)(.*)$", done.stdout, re.MULTILINE)
    unreadable = re.compile(r"errors\.(Undefined|Syntax|Ambiguous|Datatype)|'42(?!501)\w{3}'")
    assert not [line for line in summary if line[0] == "ERROR" or unreadable.search(line[2])], done.stdout
    return frozenset(test for _, test, _ in summary)


@pytest.fixture(scope="module")
def named(request: pytest.FixtureRequest) -> Iterator[Mapping[str, Future[frozenset[str]]]]:
    """What the test that a mutant names says about it; for the mutants of this run."""
    cases = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = [MUTANTS[str(case["mutant"])] for case in cases if "mutant" in case]  # in the order of the tests
    quick = ("-p", "no:hypothesispytest")  # half of the start

    def look(one: Mutant) -> frozenset[str]:
        for _ in range(6 if LUCK.search(one.killer) else 1):
            if found := killers(one, *quick, f"tests/sql/{one.killer}"):
                return found
        return frozenset()

    with ThreadPoolExecutor(2) as pool:
        yield {one.name: pool.submit(look, one) for one in asked}


def test_every_edit_finds_its_text() -> None:
    for mutant in MUTANTS.values():
        assert mutant.sql()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_killed_by_the_test_that_it_names(named: Mapping[str, Future[frozenset[str]]], mutant: str) -> None:
    assert named[mutant].result() == {MUTANTS[mutant].killer.partition("[")[0]}


def test_the_page_of_mutants_is_of_these_mutants() -> None:
    page = TABLE.read_text("utf-8")
    assert page.startswith(HEAD)
    assert [line.split(" | ")[:3] for line in page.removeprefix(HEAD).splitlines()] == [
        line.split(" | ")[:3] for line in map(partial(table_row, killed_by=frozenset()), MUTANTS.values())
    ]


@pytest.mark.long
def test_the_page_of_mutants_says_what_kills_them() -> None:
    """It is written anew. If this fails, look at the difference."""
    ignored = [f"--ignore=tests/sql/{name}" for name in OTHERS]
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda mutant: killers(mutant, "tests/sql", *ignored), MUTANTS.values())
        rows = map(table_row, MUTANTS.values(), found)
        page = HEAD + "".join(f"{row}\n" for row in rows)
    before = TABLE.read_text("utf-8")
    TABLE.write_text(page, "utf-8")
    assert page == before


def table_row(mutant: Mutant, killed_by: frozenset[str]) -> str:
    """The line of the page."""
    test = mutant.killer.partition("[")[0]
    others = sorted(name for name in killed_by - {test, MACHINE} if not LUCK.search(name))
    told = ", ".join(f"`{name.partition('::')[2].removeprefix('test_')}`" for name in others)
    return f"| `{mutant.name}` | {mutant.wrong} | `{test}` | {'yes' if MACHINE in killed_by else 'no'} | {told} |"
