"""The chaos run: a small one finds nothing, and with a weakened fence it does; `--long` has those of full size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import plan
from tests.chaos.fleet import ROOT

COMMAND = [sys.executable, "-m", "tests.chaos"]
SMALL = ("--commands", "300", "--faults", "8")
OF_THE_FENCE = {"stale_write_accepted", "double_effect", "effect_without_completion", "verify: wrong_lease"}

pytestmark = pytest.mark.timeout(600)  # a minute at most where nothing else runs; it waits for every process


def chaos(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Run it; returns its exit code and its figures."""
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    print(done.stderr)  # noqa: T201 - what pytest shows when an assertion fails
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_the_same_seed_draws_the_same_plan() -> None:
    assert plan.make(7, 100, 10) == plan.make(7, 100, 10)
    assert plan.make(7, 100, 10) != plan.make(8, 100, 10)


def test_a_full_plan_has_every_kind_way_and_fault_and_enough_zombies() -> None:
    drawn = plan.make(1, 2000, 32)
    assert {each.kind for each in drawn.commands} == set(plan.KINDS)
    assert {each.kind for each in drawn.faults} == set(plan.FAULTS)
    assert {each.way for each in drawn.commands} == {*plan.WAYS, "rolled back"}
    outliving = [each for each in drawn.commands if each.data.get("outlives", 0) > plan.LEASE]
    assert len(outliving) > 0.07 * len(drawn.commands)


def test_a_small_run_breaks_nothing() -> None:
    code, figures = chaos("--seed", "1", *SMALL)
    assert (code, figures["violations_by_name"]) == (0, {})
    assert (figures["seed"], figures["commands"], figures["faults"]) == (1, 300, 8)
    assert figures["zombies"] > 5
    assert figures["stale_writes_refused"] > 5


def test_with_a_fence_that_looks_at_the_status_only_a_small_run_ends_in_violations() -> None:
    code, figures = chaos("--seed", "1", *SMALL, "--mutant", "fence-by-status")
    assert code == 1
    assert figures["violations_by_name"].keys() & OF_THE_FENCE


@pytest.mark.long
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_a_run_of_full_size_breaks_nothing(seed: str) -> None:
    code, figures = chaos("--seed", seed)
    assert (code, figures["violations_by_name"]) == (0, {})
    assert (figures["commands"], figures["faults"]) == (2000, 32)


@pytest.mark.long
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_with_a_fence_that_looks_at_the_status_only_a_run_of_full_size_ends_in_violations(seed: str) -> None:
    code, figures = chaos("--seed", seed, "--mutant", "fence-by-status")
    assert code == 1
    assert figures["violations_by_name"].keys() & OF_THE_FENCE


def test_an_interrupt_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*COMMAND, *SMALL], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as running:  # fmt: skip
        assert running.stderr is not None
        assert any("COMPLETED" in line for line in running.stderr)  # it is in the midst of it
        running.send_signal(signal.SIGINT)
        _, said = running.communicate()
    assert (running.returncode, said.splitlines()[-1]) == (130, "interrupted; all that was started has ended")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
