"""What components of this process use unless they are told otherwise."""

from __future__ import annotations

from commandbus.sync.runtime import SyncRuntime
from commandbus.worker.threads import pool_size

_runtimes: dict[str, SyncRuntime] = {}
_sizes: dict[str, int] = {}


def configure(*, runtime: SyncRuntime | None = None, thread_pool_size: int | None = None) -> None:
    """Set the defaults of this process, for what is made from now on.

    `runtime`: of buses that are given none; without it they share one that is made when the first needs it.
    `thread_pool_size`: of workers that are given none; it goes before `$COMMAND_BUS_SYNC_THREADS`. None leaves a
    default as it is. Raises `ConfigurationError` for a size below 1.
    """
    if runtime is not None:
        _runtimes["default"] = runtime
    if thread_pool_size is not None:
        _sizes["default"] = pool_size(thread_pool_size)


def default_runtime() -> SyncRuntime:
    """Return the runtime of this process; a new one when it was shut down."""
    found = _runtimes.get("default")
    if found is not None and not found.closed:
        return found
    if found is not None:
        _runtimes.pop("default", None)
    return _runtimes.setdefault("default", SyncRuntime())


def default_pool_size() -> int | None:
    """Return what `configure` was told; None leaves it to the environment."""
    return _sizes.get("default")
