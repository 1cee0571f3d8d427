"""Takes orders."""

from __future__ import annotations

from django.db import IntegrityError, connection, transaction
from django.db.models import F
from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from .bus import bus
from .models import Product


@csrf_exempt
@require_POST
def place_order(request: HttpRequest, name: str) -> JsonResponse:
    """Take one piece from the stock and send the command to ship it: both, or neither."""
    try:
        with transaction.atomic():
            receipt = bus.send("shop", "ShipProduct", {"name": name}, connection=connection)
            Product.objects.filter(name=name).update(left=F("left") - 1)  # below 0 it fails: nothing is sent
    except IntegrityError:
        return JsonResponse({"error": "sold out"}, status=409)
    return JsonResponse({"command_id": str(receipt.command_id)}, status=202)
