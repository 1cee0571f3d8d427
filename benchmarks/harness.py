"""Runs contenders in turn on one private server, and makes figures of what they answer.

Contenders of a figure are interleaved, A B C A B C ..., each turn in a process and a database of its own, so that
what the machine does meanwhile meets all of them; figures are medians. Production settings: fsync and
synchronous_commit stay on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg import sql

from benchmarks.program import Answer, Options, percentile
from commandbus.embedded import EmbeddedPostgres
from commandbus.migrate import migrate

ROOT = Path(__file__).resolve().parent.parent
PEERS = ("pgqueuer", "procrastinate", "dbos", "graphile-worker")
PYTHON_PEERS = PEERS[:3]
_SLOW = PYTHON_PEERS[1:]

SERVER_SETTINGS = {
    "max_connections": "200",
    "shared_buffers": "512MB",
    "max_wal_size": "8GB",  # no checkpoint falls into the turn of one contender only
    "log_lock_waits": "on",
    "deadlock_timeout": "100ms",
}


class ProgramError(Exception):
    """A contender did not answer."""


@dataclass(frozen=True)
class Contender:
    """A program, what it is asked to do, and with what."""

    program: tuple[str, ...]
    action: str
    options: Options = field(default_factory=dict)
    is_peer: bool = False

    def command(self, dsn: str, **more: object) -> list[str]:
        """Return the command line."""
        return [*self.program, self.action, json.dumps({**self.options, "dsn": dsn, **more})]


def ours(action: str, mode: str = "async", **options: object) -> Contender:
    """Return commandbus as a contender."""
    return Contender((sys.executable, "-m", "benchmarks.ours"), action, {"mode": mode, **options})


def ceiling(action: str, way: str, **options: object) -> Contender:
    """Return what PostgreSQL and psycopg can do as a contender."""
    return Contender((sys.executable, "-m", "benchmarks.ceilings"), action, {"way": way, **options})


@dataclass(frozen=True)
class Bar:
    """What a figure must reach: its ratio, or its value."""

    limit: float
    least: bool = True
    of: str = "ratio"

    def __str__(self) -> str:
        return f"{self.of} {'>=' if self.least else '<='} {self.limit:g}"

    def reached(self, figure: Figure) -> bool:
        """Whether this figure reaches it."""
        found = figure.value if self.of == "value" else figure.ratio
        return found is not None and (found >= self.limit if self.least else found <= self.limit)


def at_least(limit: float, of: str = "ratio") -> Bar:
    """Bound from below."""
    return Bar(limit, of=of)


def at_most(limit: float, of: str = "ratio") -> Bar:
    """Bound from above."""
    return Bar(limit, least=False, of=of)


@dataclass(frozen=True)
class Figure:
    """One answer to a question: the median of the runs, and its ratio to the median of another's runs."""

    name: str
    unit: str
    runs: Sequence[float]
    bar: Bar | None = None
    against: str = ""
    others: Sequence[float] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    other_settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median of the runs."""
        return statistics.median(self.runs)

    @property
    def ratio(self) -> float | None:
        """The ratio of the medians; None without another."""
        return self.value / other if self.others and (other := statistics.median(self.others)) else None

    @property
    def ratios(self) -> list[float]:
        """The ratio in each round."""
        return [mine / other for mine, other in zip(self.runs, self.others, strict=False) if other]

    @property
    def reached(self) -> bool | None:
        """Whether the bar is reached; None without one."""
        return None if self.bar is None else self.bar.reached(self)


Measure = Callable[[Answer], float]


def rate(answer: Answer) -> float:
    """Commands a second."""
    return float(answer["count"] / answer["seconds"])


def p50(answer: Answer) -> float:
    """The median latency in ms."""
    return percentile(answer["latencies_ms"], 0.5)


def p99(answer: Answer) -> float:
    """The latency in ms that one of a hundred exceeds."""
    return percentile(answer["latencies_ms"], 0.99)


class Race:
    """What the contenders answered, round by round."""

    def __init__(self, answers: dict[str, list[Answer]]) -> None:
        self.answers = answers

    def figure(
        self,
        name: str,
        who: str,
        measure: Measure,
        unit: str = "/s",
        *,
        against: str = "",
        bar: Bar | None = None,
        **settings: object,
    ) -> Figure:
        """Return the figure of one contender, against another that took part."""
        runs, others = ([measure(each) for each in self.answers.get(one, ())] for one in (who, against))
        shown = {**self._settings(who), **settings}
        return Figure(name, unit, runs, bar, against, others, shown, self._settings(against))

    def _settings(self, who: str) -> dict[str, object]:
        first = next(iter(self.answers.get(who, ())), {})
        connections = {"connections": first["connections"]} if "connections" in first else {}
        return {**first.get("settings", {}), **connections}

    def against_all(
        self, name: str, who: str, measure: Measure, unit: str, rivals: Mapping[str, Bar | None]
    ) -> Iterator[Figure]:
        """Return a figure for each of these rivals that took part."""
        for against, bar in rivals.items():
            if against in self.answers:
                yield self.figure(name, who, measure, unit, against=against, bar=bar)


class Bench:
    """The server, and how much is measured: `rounds`, and sizes that `quick` makes small."""

    def __init__(self, *, quick: bool = False, peers: bool = False) -> None:
        self.quick = quick
        self.with_peers = peers
        self.rounds = 1 if quick else 5
        self._exit = contextlib.ExitStack()
        self._numbers = itertools.count(1)

    def __enter__(self) -> Self:
        self.folder = Path(self._exit.enter_context(tempfile.TemporaryDirectory(prefix="commandbus-bench-")))
        self.server = self._exit.enter_context(EmbeddedPostgres(self.folder / "data", settings=SERVER_SETTINGS))
        self.administer("create database migrated")
        migrate(self.server.dsn("migrated"))
        self.administer("alter database migrated with is_template true allow_connections false")
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def size(self, full: int, quick: int) -> int:
        """Return how many it should be."""
        return quick if self.quick else full

    def administer(self, statement: str, *names: str) -> None:
        """Run a statement that no transaction may hold; `{}` stands for names."""
        with psycopg.connect(self.server.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))

    @contextlib.contextmanager
    def database(self, template: str = "migrated") -> Iterator[str]:
        """Make a database, and drop it after use."""
        name = f"bench_{next(self._numbers)}"
        self.administer("create database {} template {}", name, template)
        try:
            yield self.server.dsn(name)
        finally:
            self.administer("drop database {} with (force)", name)

    def log(self) -> str:
        """Return what the server has logged."""
        (path,) = self.server.data_dir.glob("pg*/server.log")
        return path.read_text("utf-8", errors="replace")

    # -- running -------------------------------------------------------------------------------------------------------

    def start(self, contender: Contender, dsn: str, **more: object) -> subprocess.Popen[str]:
        """Start a contender, and go on."""
        return subprocess.Popen(  # noqa: S603 - programs of this folder
            contender.command(dsn, **more), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    @contextlib.contextmanager
    def running(self, contender: Contender, dsn: str, **more: object) -> Iterator[subprocess.Popen[str]]:
        """Start a contender that works until it is terminated, at the latest when this is left."""
        with self.start(contender, dsn, **more) as process:
            try:
                yield process
            finally:
                process.terminate()

    def run(self, contender: Contender, dsn: str, **more: object) -> Answer:
        """Run a contender to its end. Raises `ProgramError` with what it complained of."""
        return answer_of(self.start(contender, dsn, **more))

    def turn(self, contender: Contender) -> Answer:
        """Run a contender in a fresh database."""
        with self.database("template0" if contender.is_peer else "migrated") as dsn:
            if contender.is_peer:
                self.run(Contender(contender.program, "setup"), dsn)
            answer = self.run(contender, dsn)
        if "unsupported" in answer:
            raise ProgramError(answer["unsupported"])
        return answer

    def race(self, turns: Mapping[str, Contender | Callable[[], Answer]]) -> Race:
        """Let them run in turn, so many rounds. A peer that fails drops out, and is told of."""
        answers: dict[str, list[Answer]] = {name: [] for name in turns}
        for _ in range(self.rounds):
            for name in list(answers):
                turn = turns[name]
                try:
                    answers[name].append(self.turn(turn) if isinstance(turn, Contender) else turn())
                except ProgramError as error:
                    if not (isinstance(turn, Contender) and turn.is_peer):
                        raise
                    print(f"{name} drops out: {error}", file=sys.stderr)
                    del answers[name]
        return Race(answers)

    def peers(self, action: str, *, among: Sequence[str] = PEERS, **options: Any) -> dict[str, Contender]:
        """Return the peers, each with its environment made; none unless they are asked for.

        Those of a thousand commands a second get an eighth of the commands, which is enough for a rate of theirs.
        """
        if not self.with_peers:
            return {}
        fewer = {"count": max(500, options["count"] // 8)} if action in {"drain", "batch"} else {}
        return {
            name: Contender(_peer_program(name), action, {**options, **(fewer if name in _SLOW else {})}, is_peer=True)
            for name in among
        }


def answer_of(process: subprocess.Popen[str]) -> Answer:
    """Return what a program prints at its end."""
    output, complaint = process.communicate()
    if process.returncode or not output.strip():
        raise ProgramError(f"it ended with code {process.returncode}:\n{complaint[-2000:]}")
    done: dict[str, Any] = json.loads(output.splitlines()[-1])
    return done


def _peer_program(name: str) -> tuple[str, ...]:
    made = subprocess.run(  # noqa: S603 - a program of this folder
        [sys.executable, ROOT / "benchmarks" / "peers" / "setup.py", name],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return tuple(shlex.split(made.stdout))
