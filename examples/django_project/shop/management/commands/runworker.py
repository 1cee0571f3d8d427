"""The worker, as a management command."""

from __future__ import annotations

from django.core.management.base import BaseCommand

from commandbus.sync import SyncWorker, django_connections
from shop.bus import bus
from shop.handlers import registry


class Command(BaseCommand):
    """Runs a worker for the domain of the shop."""

    help = "Ship what was ordered, until SIGTERM or Ctrl-C."

    def handle(self, **_: object) -> None:
        """Work until a signal; then let running handlers finish."""
        SyncWorker(bus, "shop", registry, thread_pool_size=4, middleware=[django_connections]).run()
