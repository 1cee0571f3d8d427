"""A command-line tool that does one thing and exits at once; nothing in it is closed: `python shop.py --help`."""

from __future__ import annotations

import argparse

from commandbus.sync import SyncCommandBus, SyncTroubleshootingQueue

bus = SyncCommandBus()


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description="Orders of the shop.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("order", help="place an order").add_argument("item")
    commands.add_parser("parked", help="list the orders that could not be shipped")
    arguments = parser.parse_args()
    if arguments.command == "order":
        print(bus.send("shop", "ShipOrder", {"item": arguments.item}).command_id)
    else:
        for order in SyncTroubleshootingQueue(bus).list_troubleshooting("shop"):
            print(order.command_id, order.data["item"], order.error.code if order.error else "")


if __name__ == "__main__":
    main()
