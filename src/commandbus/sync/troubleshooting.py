"""The blocking troubleshooting queue."""
