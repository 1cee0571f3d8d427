"""`scripts/bench` runs, and says what it promises to say; how fast anything was is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.harness import Bar, Bench, Contender, Figure, ProgramError, at_least, at_most
from benchmarks.program import Answer

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)


@pytest.mark.parametrize("name", ["batch", "idle", "memory"])
def test_a_question_is_answered_with_a_line_of_json_a_figure(name: str) -> None:
    done = bench(name, "--quick", "--json")

    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert figures
    for figure in figures:
        assert {"name", "value", "unit", "ratio", "against", "runs"} <= figure.keys()
        assert len(figure["runs"]) == 1
        assert figure["value"] == figure["runs"][0] >= 0
        assert (figure["ratio"] is None) == (figure["against"] == "")
        assert figure["settings"]
        assert figure["machine"]["fsync"] == figure["machine"]["synchronous_commit"] == "on"


def test_an_unknown_question_is_refused_with_the_known_ones() -> None:
    done = bench("dran")

    assert done.returncode == 2
    assert "there is no dran: choose from drain, " in done.stderr


def turn(log: list[str], name: str, *seconds: float) -> Callable[[], Answer]:
    remaining = iter(seconds)

    def run() -> Answer:
        log.append(name)
        return {"count": 1, "seconds": next(remaining)}

    return run


def test_contenders_take_turns_and_figures_are_ratios_of_medians() -> None:
    log: list[str] = []
    three = Bench(quick=False)
    three.rounds = 3

    race = three.race({"a": turn(log, "a", 1, 2, 9), "b": turn(log, "b", 4, 4, 3)})
    figure = race.figure("speed", "a", lambda answer: answer["seconds"], "s", against="b", bar=at_most(0.5))

    assert log == ["a", "b", "a", "b", "a", "b"]
    assert (figure.value, figure.ratio, figure.ratios, figure.reached) == (2, 0.5, [0.25, 0.5, 3], True)


@pytest.mark.parametrize(
    ("bar", "reached"),
    [
        (at_least(5, "value"), True),
        (at_least(6, "value"), False),
        (at_most(2), False),
        (at_most(3), True),
        (None, None),
    ],
    ids=str,
)
def test_a_bar_bounds_the_value_or_the_ratio(bar: Bar | None, reached: bool | None) -> None:  # noqa: FBT001
    figure = Figure("x", "ms", [5], bar, "y", [2])
    assert figure.reached is reached


def test_a_peer_that_fails_drops_out_and_a_contender_of_ours_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    fails = (sys.executable, "-c", "raise SystemExit('no such table')")
    with Bench(quick=True) as one:
        race = one.race({"peer": Contender(fails, "send", is_peer=True)})
        assert race.answers == {}
        assert "peer drops out" in capsys.readouterr().err
        with pytest.raises(ProgramError, match="no such table"):
            one.race({"ours": Contender(fails, "send")})
