"""The sweep over the crash points ends with its figures."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many points and cases there were, over all processes of the run."""
    counts = {"points": 0, "cases": 0}
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name in counts and isinstance(value, int):
                counts[name] += value
    if counts["cases"]:
        terminalreporter.write_line(f"crash points: {counts['points']:,} points, {counts['cases']:,} cases")
