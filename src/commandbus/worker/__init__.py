"""The worker: claims commands, runs their handlers, records what came of it."""

from commandbus.worker.worker import Worker

__all__ = ["Worker"]
