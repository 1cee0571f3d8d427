"""The chaos run: `scripts/chaos --help`. Ends with its figures as a line of JSON, and with 0 only without violations.

What came later than promised is told, and is no violation: how fast a machine is, is not for a test to say. Only what
does not come about at all within minutes is one.
"""

from __future__ import annotations

import argparse
import secrets
import signal
import sys
import time
from collections import Counter

from tests.chaos import director, plan, report
from tests.chaos.check import Found, check
from tests.chaos.director import say
from tests.sql.mutants import MUTANTS

_SHOWN = 20


def main(arguments: list[str]) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/chaos", description="Runs the bus under faults, and looks for what they broke."
    )
    parser.add_argument("--seed", type=int, default=None, help="what decides everything that is drawn; printed")
    parser.add_argument("--nightly", action="store_true", help="50,000 commands and 520 faults, in about 17 minutes")
    parser.add_argument("--commands", type=int, help="how many commands are sent; default: 2,000")
    parser.add_argument("--faults", type=int, help="how many faults strike; default: 32")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="run against a broken variant of the SQL functions")
    given = parser.parse_args(arguments)
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    commands = given.commands or (50_000 if given.nightly else 2_000)
    drawn = plan.make(seed, commands, given.faults or (520 if given.nightly else 32))
    say(f"seed {seed}: {commands:,} commands and {len(drawn.faults)} faults in {drawn.seconds:.0f} s")
    began = time.monotonic()
    try:
        with director.run(drawn, given.mutant) as db:
            found = check(db)
            figures = report.figures(db, drawn, found, time.monotonic() - began)
    except KeyboardInterrupt:
        say("interrupted; all that was started has ended")
        return 130
    _tell(found, figures)
    sys.stdout.write(f"{report.line(figures)}\n")
    return 1 if found else 0


def _tell(found: list[Found], figures: dict[str, dict[str, object]]) -> None:
    for violation in found[:_SHOWN]:
        say(f"VIOLATION {violation.violation}: {violation.detail}")
    for name, count in Counter(violation.violation for violation in found).items():
        say(f"{count} times {name}")
    for name in ("takeover_seconds", "noticed_seconds", "restart_to_first_claim_seconds"):
        if figures[name]["late"]:
            say(f"late, which may be this machine: {name} {figures[name]}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that everything is ended
    sys.exit(main(sys.argv[1:]))
