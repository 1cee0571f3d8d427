"""Does what an operator does: looks at the parked transfers, corrects their data and retries them.

    python repair.py

It uses the command line, as a person would, and the database that $COMMAND_BUS_DSN names.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

AT_ONCE = 4


def troubleshooting(*arguments: str) -> str:
    """Run `commandbus troubleshooting ...`; returns what it prints, and ends the program if it fails."""
    command = [sys.executable, "-m", "commandbus", "troubleshooting", *arguments]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)  # noqa: S603
    if ended.returncode != 0:
        sys.exit(f"troubleshooting {arguments[0]} ended with {ended.returncode}: {ended.stderr}")
    return ended.stdout


def corrected(parked: dict[str, Any]) -> dict[str, str]:
    """Return the data of a parked command as it was meant. Ends the program where that cannot be known."""
    data: dict[str, str] = parked["data"]
    match parked["error"]["code"]:
        case "UNKNOWN_ACCOUNT" if "O" in data["source"] + data["target"]:  # a letter O for a zero
            return data | {side: data[side].replace("O", "0") for side in ("source", "target")}
        case "MALFORMED_AMOUNT" if data["cents"].count(",") == 1:  # 12,50 instead of 1250
            whole, _, fraction = data["cents"].partition(",")
            return data | {"cents": whole + fraction}
    sys.exit(f"nobody knows what was meant by {parked['command_id']}: {parked['error']}")


def retry(parked: dict[str, Any]) -> str:
    """Retry one command with its data corrected; returns the code of its error."""
    code: str = parked["error"]["code"]
    data = json.dumps(corrected(parked))
    reason = f"{code}: corrected"
    troubleshooting("retry", "ledger", parked["command_id"], "--data", data, "--operator", "ana", "--reason", reason)
    return code


def main() -> None:
    """Repair all that is parked."""
    parked = json.loads(troubleshooting("list", "ledger", "--limit", "1000", "--json"))["items"]
    with ThreadPoolExecutor(AT_ONCE) as operators:
        for code, count in Counter(operators.map(retry, parked)).items():
            print(f"{count} parked for {code}: corrected and retried")


if __name__ == "__main__":
    main()
