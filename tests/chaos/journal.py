"""What a process has seen, kept where neither its own death nor that of the database reaches it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Note = dict[str, Any]


class Journal:
    """A file of notes, a line each. A note is written when `note` returns, and outlives the process."""

    def __init__(self, folder: str | Path, who: str) -> None:
        self.who = who
        self._file = os.open(Path(folder, f"{who}.jsonl"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def note(self, what: str, **more: object) -> None:
        """Write down what has happened, now."""
        line = json.dumps({"what": what, "who": self.who, "at": time.time(), **more}, default=str)
        os.write(self._file, f"{line}\n".encode())


def read(folder: Path, who: str = "*") -> Iterator[Note]:
    """All notes of these, in any order. The last line of one that was killed as it wrote is left out."""
    for path in sorted(folder.glob(f"{who}.jsonl")):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                yield json.loads(line)
