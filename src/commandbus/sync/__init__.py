"""The blocking half of the library, for code without an event loop: Flask, Django, scripts, command-line tools.

The same names, parameters, defaults, results and errors as the async half, on the same core.
"""

from commandbus.sync.bus import SyncCommandBus
from commandbus.sync.defaults import configure
from commandbus.sync.middleware import django_connections, scoped_session
from commandbus.sync.processes import SyncProcesses
from commandbus.sync.runtime import SyncRuntime
from commandbus.sync.troubleshooting import SyncTroubleshootingQueue
from commandbus.sync.worker import SyncHandlerContext, SyncWorker

__all__ = [
    "SyncCommandBus",
    "SyncHandlerContext",
    "SyncProcesses",
    "SyncRuntime",
    "SyncTroubleshootingQueue",
    "SyncWorker",
    "configure",
    "django_connections",
    "scoped_session",
]
