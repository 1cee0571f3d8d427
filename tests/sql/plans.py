"""The plans of what runs inside functions, as auto_explain tells them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import psycopg

from tests.sql.support import Connection

Node = dict[str, Any]

_FEW = 100  # rows: to read all of a table that has no more is no fault

_SETTINGS = {
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_nested_statements": "on",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_buffers": "on",
    "auto_explain.log_timing": "off",
    "auto_explain.log_format": "json",
    "auto_explain.log_level": "notice",
    "client_min_messages": "notice",
}


def plans_of(connection: Connection, call: Callable[[], object]) -> list[Node]:
    """Return the plans of all statements that this call runs on this connection, the inner ones too."""
    found: list[Node] = []

    def keep(diagnostic: psycopg.errors.Diagnostic) -> None:
        _, separator, text = (diagnostic.message_primary or "").partition("plan:\n")
        if separator:
            told = json.loads(text)
            found.append({**told["Plan"], "JIT": "JIT" in told})

    connection.execute("LOAD 'auto_explain'")
    for name, value in _SETTINGS.items():
        connection.execute("SELECT set_config(%s, %s, false)", [name, value])
    connection.add_notice_handler(keep)
    try:
        call()
    finally:
        connection.remove_notice_handler(keep)
        connection.execute("SET auto_explain.log_min_duration = -1")
    return found


def nodes(plan: Node) -> Iterator[Node]:
    """A plan's nodes, from the top."""
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def _reads_all(node: Node, table: str) -> bool:
    """Whether a scan of this table lies below, with no LIMIT in between."""
    if node["Node Type"] in {"Limit", "Tid Scan"}:  # a few rows, whatever is below
        return False
    scans = node["Node Type"].endswith("Scan") and node.get("Relation Name") == table
    return scans or any(_reads_all(below, table) for below in node.get("Plans", []))


def _rows_read(node: Node) -> float:
    return float(node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)))


def faults(plans: list[Node]) -> set[str]:
    """What no plan may have: a walk over a whole table, a sort of the queue, or a compiler's 100 ms."""
    found = {"compiled" for plan in plans if plan["JIT"]}
    for node in (node for plan in plans for node in nodes(plan)):
        kind, table = node["Node Type"], str(node.get("Relation Name", ""))
        if table == "command" or table.startswith(("command_history", "audit_")):
            if kind in {"Seq Scan", "Bitmap Heap Scan"} and _rows_read(node) > _FEW:
                found.add(f"{kind} on {table}")
            elif kind.startswith("Index") and "Index Cond" not in node:
                found.add(f"{kind} on {table} without a condition")
        if kind in {"Sort", "Incremental Sort"} and _reads_all(node, "command"):
            found.add(f"{kind} of command")
    return found


def indexes(plans: list[Node]) -> set[str]:
    """The indexes that these plans use; those of a week of the history under the name of their table."""
    names = (node.get("Index Name") for plan in plans for node in nodes(plan))
    return {"history" if "history" in name else str(name) for name in names if name}


def tid_scans(plans: list[Node]) -> int:
    """How many accesses by place on the page there are."""
    return sum(node["Node Type"] == "Tid Scan" for plan in plans for node in nodes(plan))


def buffers(plans: list[Node]) -> int:
    """How many pages of tables and indexes these statements touched; not those that planning an inner one took."""
    return sum(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans if "Plans" in plan)
