"""`python -m benchmarks [NAME...] [--peers] [--quick] [--json]`: measures, and prints figures as they come."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import signal
import sys
import time

from benchmarks.harness import Bench, Figure
from benchmarks.machine import machine

NAMES = (
    "drain",
    "batches",
    "send",
    "batch",
    "latency",
    "replies",
    "processes",
    "process",
    "growth",
    "bloat",
    "sustained",
    "idle",
    "retention",
    "memory",
    "sync_runtime",
)


def main() -> int:
    """Measure what the command line names; returns 1 if a bar is not reached, though not with --quick."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure commandbus beside its ceilings and its peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to measure; all by default: {' '.join(NAMES)}")
    parser.add_argument("--peers", action="store_true", help="beside other libraries too, each in its own environment")
    parser.add_argument("--quick", action="store_true", help="one small round: shows that it works, measures nothing")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each figure")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"there is no {', '.join(sorted(unknown))}: choose from {', '.join(NAMES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server and its folder go, too
    missed = 0
    with Bench(quick=arguments.quick, peers=arguments.peers) as bench:
        where = machine(bench.server.dsn(), bench.folder)
        if not arguments.json:
            print("  ".join(f"{name}={value}" for name, value in where.items()))
        for name in arguments.names or NAMES:
            began = time.monotonic()
            for figure in importlib.import_module(f"benchmarks.{name}").measure(bench):
                missed += figure.reached is False
                print(_json(figure, where) if arguments.json else _row(figure), flush=True)
            print(f"-- {name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if missed and not arguments.quick else 0


def _json(figure: Figure, where: dict[str, object]) -> str:
    found = {
        "name": figure.name,
        "value": round(figure.value, 3),
        "unit": figure.unit,
        "ratio": None if figure.ratio is None else round(figure.ratio, 3),
        "against": figure.against,
        "runs": [round(run, 3) for run in figure.runs],
        "against_runs": [round(run, 3) for run in figure.others],
        "against_settings": figure.other_settings,
        "ratios": [round(ratio, 3) for ratio in figure.ratios],
        "bar": None if figure.bar is None else dataclasses.asdict(figure.bar),
        "reached": figure.reached,
        "settings": figure.settings,
        "machine": where,
    }
    return json.dumps(found)


def _row(figure: Figure) -> str:
    ratio = ""
    if figure.ratio is not None:
        low, high = min(figure.ratios), max(figure.ratios)
        ratio = f"{figure.ratio:.2f}x {figure.against} ({low:.2f}-{high:.2f})"
    bar = "" if figure.bar is None else f"{figure.bar}: {'reached' if figure.reached else 'NOT REACHED'}"
    settings = ", ".join(f"{name} {value}" for name, value in figure.settings.items())
    value = f"{figure.value:,.0f}" if abs(figure.value) >= 100 else f"{figure.value:,.2f}"  # noqa: PLR2004
    return f"{figure.name:44} {value:>10} {figure.unit:4} {ratio:48} {bar:32} n={len(figure.runs)}  {settings}"


if __name__ == "__main__":
    sys.exit(main())
