"""A worker process with one thread, which looks ahead: `python ahead_app.py ROUTE_AS_JSON LEASE_SECONDS`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import timedelta

from commandbus import Command, CommandBus, HandlerRegistry, Worker
from commandbus.worker import blocking

DOMAIN = "payments"
registry = HandlerRegistry()


@registry.handler(DOMAIN, "Short")
def short(command: Command, context: object) -> None:
    """Take no time."""


@registry.handler(DOMAIN, "Poison")
def poison(command: Command, context: object) -> None:
    """Kill the process."""
    os._exit(9)


async def main(route: str, lease: str) -> None:
    """Work until a signal."""
    blocking._AHEAD_SECONDS = 1e6  # every handler is a short one
    async with CommandBus(**json.loads(route)) as bus:
        await Worker(bus, DOMAIN, registry, lease=timedelta(seconds=float(lease)), thread_pool_size=1).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
