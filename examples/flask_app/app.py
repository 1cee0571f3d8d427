"""A web application that sends a command for each order; see README.md."""

from __future__ import annotations

from uuid import UUID

from flask import Flask, request

from commandbus import CommandNotFoundError
from commandbus.sync import SyncCommandBus

app = Flask(__name__)
bus = SyncCommandBus()  # $COMMAND_BUS_DSN; connects when it is first used, in each process anew


@app.post("/orders")
def place_order() -> tuple[dict[str, str], int]:
    """Take an order: it is durable when the answer is sent."""
    receipt = bus.send("shop", "ShipOrder", request.get_json())
    return {"command_id": str(receipt.command_id)}, 202


@app.get("/orders/<uuid:command_id>")
def show_order(command_id: UUID) -> tuple[dict[str, object], int]:
    """Say what has become of it."""
    try:
        command = bus.get_command("shop", command_id)
    except CommandNotFoundError:
        return {"error": "no such order"}, 404
    return {"status": command.status, "result": command.result}, 200
