"""A bus that is told what to do: `python client.py DSN`.

A line of stdin is a call, `[method, arguments, keywords]`; a line of stdout is what it returned, or its error.
Written for 0.1.0 and for what came later.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from datetime import timedelta
from typing import Any
from uuid import UUID

from commandbus import AuditEvent, Command, CommandBus, CommandBusError, Page, Receipt, TroubleshootingQueue


def plain(value: Any) -> object:  # noqa: ANN401 - what a method returns
    """What JSON can hold of a result: a list of a page, a dict of a command."""
    if isinstance(value, list | Page):
        return [plain(item) for item in value]
    if not isinstance(value, Command | AuditEvent | Receipt):
        return value
    return {name: each for name, each in dataclasses.asdict(value).items() if name != "batch_id"}  # new in 0.2.0


def given(name: str | int, value: Any) -> Any:  # noqa: ANN401 - any JSON
    """What a call takes of what JSON can hold."""
    if name == "delay":
        return timedelta(seconds=value)
    return UUID(value) if isinstance(value, str) and len(value) == 36 else value


async def main(dsn: str) -> None:
    """Answer each line of stdin until it ends."""
    async with CommandBus(dsn) as bus:
        desk = TroubleshootingQueue(bus)
        while line := await asyncio.to_thread(sys.stdin.readline):
            method, arguments, keywords = json.loads(line)
            function = getattr(desk, method, None) or getattr(bus, method)
            try:
                answer = plain(
                    await function(
                        *(given(place, value) for place, value in enumerate(arguments)),
                        **{name: given(name, value) for name, value in keywords.items()},
                    )
                )
            except CommandBusError as error:
                answer = [type(error).__name__, str(error)]
            sys.stdout.write(json.dumps(answer, default=str) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
