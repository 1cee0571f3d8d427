"""Ships the orders that the web application takes, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import logging

from commandbus import Command, HandlerRegistry
from commandbus.sync import SyncCommandBus, SyncHandlerContext, SyncWorker

registry = HandlerRegistry()


@registry.handler("shop", "ShipOrder")
def ship_order(command: Command, context: SyncHandlerContext) -> dict[str, str]:
    """Ship what was ordered."""
    return {"shipped": command.data["item"]}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    with SyncCommandBus() as bus:
        SyncWorker(bus, "shop", registry, thread_pool_size=8).run()
