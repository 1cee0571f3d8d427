"""Says where the figures come from: the machine, the versions, the settings that matter."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from pathlib import Path

import psycopg
import psycopg.pq

_SETTINGS = ("server_version", "shared_buffers", "fsync", "synchronous_commit", "max_wal_size")
_SYNCS = 200


def machine(dsn: str, folder: Path) -> dict[str, object]:
    """Return what belongs beside each figure. `folder`: where the server keeps its data."""
    with psycopg.connect(dsn) as connection:
        server = {name: connection.execute("SELECT current_setting(%s)", [name]).fetchall()[0][0] for name in _SETTINGS}
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    return {
        "cpu": f"{os.cpu_count()} x {model[1] if model else platform.processor()}",
        "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "psycopg": f"{psycopg.__version__} {psycopg.pq.__impl__}",
        "fdatasync_ms": round(_sync_ms(folder), 3),
        "load": os.getloadavg()[0],
        **server,
    }


def _sync_ms(folder: Path) -> float:
    """Return how long it takes to make 8 KiB durable, as a commit does."""
    path = folder / "sync"
    found = []
    with path.open("wb", buffering=0) as file:
        for _ in range(_SYNCS):
            file.write(b"\0" * 8192)
            began = time.monotonic()
            os.fdatasync(file.fileno())
            found.append((time.monotonic() - began) * 1000)
    path.unlink()
    return statistics.median(found)
