"""What is done with the commands of the shop."""

from __future__ import annotations

from django.db import connection, transaction
from django.db.models import F

from commandbus import Command, HandlerRegistry
from commandbus.sync import SyncHandlerContext

from .models import Product

registry = HandlerRegistry()


@registry.handler("shop", "ShipProduct")
def ship_product(command: Command, context: SyncHandlerContext) -> None:
    """Ship one piece. Its row and the completion of the command are one transaction."""
    with transaction.atomic():
        Product.objects.filter(name=command.data["name"]).update(shipped=F("shipped") + 1)
        context.complete_on(connection)  # the last statement
