"""The tables of the shop."""

from __future__ import annotations

from django.db import models


class Product(models.Model):
    """What is sold. `left` counts what can still be ordered; the database keeps it from falling below 0."""

    name = models.CharField(max_length=50, unique=True)
    left = models.PositiveIntegerField()
    shipped = models.PositiveIntegerField(default=0)

    def __str__(self) -> str:
        return str(self.name)
