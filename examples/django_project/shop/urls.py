"""Addresses of the shop."""

from django.urls import path

from .views import place_order

urlpatterns = [path("products/<str:name>/orders", place_order)]
