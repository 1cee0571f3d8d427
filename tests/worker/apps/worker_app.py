"""A worker process for tests: `python worker_app.py ROUTE_AS_JSON LEASE_SECONDS CONCURRENCY`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from datetime import timedelta
from pathlib import Path

from commandbus import Command, CommandBus, HandlerContext, HandlerRegistry, Worker

DOMAIN = "payments"
registry = HandlerRegistry()
at_work: set[str] = set()


@registry.handler(DOMAIN, "UntilFile")
async def until_file(command: Command, context: HandlerContext) -> str:
    """Run until the file exists that the data names; another one beside it says that this has begun."""
    Path(f"{command.data}.begun").touch()  # noqa: ASYNC240 - a moment
    while not Path(command.data).exists():  # noqa: ASYNC110, ASYNC240 - nobody else can tell it
        await asyncio.sleep(0.01)
    return f"delivery {context.delivery}"


@registry.handler(DOMAIN, "Poison")
async def poison(command: Command, context: HandlerContext) -> None:
    """Kill the process, as soon as there are neighbours; alone, at once."""
    if command.crashes < 2:
        while len(at_work) < command.data:  # noqa: ASYNC110 - they add themselves
            await asyncio.sleep(0.01)
    os._exit(9)


@registry.handler(DOMAIN, "Neighbour")
async def neighbour(command: Command, context: HandlerContext) -> str:
    """Work for a while."""
    at_work.add(str(command.command_id))
    await asyncio.sleep(0.5)
    at_work.discard(str(command.command_id))
    return f"delivery {context.delivery}"


async def main(route: str, lease: str, concurrency: str) -> None:
    """Work until a signal."""
    async with CommandBus(**json.loads(route)) as bus:
        await Worker(bus, DOMAIN, registry, lease=timedelta(seconds=float(lease)), concurrency=int(concurrency)).run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(main(*sys.argv[1:]))
