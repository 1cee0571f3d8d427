"""How many commands go out: cut into chunks, and each told what became of it."""

from __future__ import annotations

from collections.abc import Collection

from commandbus import _calls
from commandbus._calls import Outgoing
from commandbus._connections import Steps
from commandbus._failures import refusals_of
from commandbus._limits import MAX_BYTES
from commandbus._send_buffer import MAX_ROWS
from commandbus.errors import CommandIdConflictError
from commandbus.model import Receipt


def sending(everything: list[Outgoing], *, all_or_none: bool) -> Steps[list[Receipt]]:
    """Send on a connection of the caller's, which is not ours to try again on."""
    receipts: list[Receipt] = []
    for chunk in chunks(everything):
        with refusals_of("the batch" if all_or_none else f"command {chunk[0].command_id}"):
            outcomes = yield _calls.send([outgoing.row(minted=outgoing.minted) for outgoing in chunk])
        settle(chunk, outcomes, receipts)
    return receipts


def settle(chunk: list[Outgoing], outcomes: list[str], receipts: list[Receipt]) -> None:
    """Add the receipts of a chunk; then raises the first conflict in it."""
    conflicts = []
    for outgoing, outcome in zip(chunk, outcomes, strict=True):
        try:
            receipts.append(receipt(outgoing, outcome))
        except CommandIdConflictError as conflict:
            conflicts.append(conflict)
    if conflicts:
        raise conflicts[0]


def receipt(outgoing: Outgoing, outcome: str) -> Receipt:
    """Return the receipt of a command. Raises `CommandIdConflictError`."""
    if outcome == "conflict" and not outgoing.minted:
        raise CommandIdConflictError(
            f'command {outgoing.command_id} was sent to "{outgoing.domain}" before, with another type or other data: '
            "nothing was written; use a new id",
            outgoing.command_id,
        )
    # An id made for this send is known already only when this very send was repeated on a new connection.
    return Receipt(outgoing.domain, outgoing.command_id, not outgoing.minted and outcome == "duplicate")


def chunks(everything: Collection[Outgoing]) -> list[list[Outgoing]]:
    """Cut into chunks of up to 1,000 commands or about 1 MiB."""
    cut: list[list[Outgoing]] = []
    size = MAX_BYTES
    for outgoing in everything:
        if size >= MAX_BYTES or len(cut[-1]) >= MAX_ROWS:
            cut.append([])
            size = 0
        cut[-1].append(outgoing)
        size += len(outgoing.text)
    return cut
