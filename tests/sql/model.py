"""What the SQL functions promise, as plain Python for one caller: no rows, no locks, no indexes.

Time is counted in ticks. A lease or a delay of n ticks is over when the clock has ticked n times; the tests make a
tick an hour and let everything end half an hour before one, so that the time a test takes does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from uuid import UUID

PARKED = "IN_TROUBLESHOOTING_QUEUE"
TERMINAL = ("COMPLETED", "FAILED", "CANCELED")
UNFINISHED = ("PENDING", "SCHEDULED", "IN_PROGRESS", PARKED)

# What people decide: from which statuses, what the trail calls it, to which status.
DECISIONS = {
    "cancel": (UNFINISHED, "CANCELED", "CANCELED"),
    "operator_cancel": ((PARKED,), "OPERATOR_CANCELED", "CANCELED"),
    "operator_complete": ((PARKED,), "OPERATOR_COMPLETED", "COMPLETED"),
    "operator_retry": ((PARKED,), "OPERATOR_RETRIED", "PENDING"),
}

Key = tuple[str, str]  # domain and id
Step = tuple[str, str | None, str, int | None, int | None, str | None, str | None]
"""One line of the audit trail: event, from, to, delivery, attempt, lease token, operator."""


@dataclass(frozen=True)
class Lease:
    """What a worker presents; perhaps no lease that was ever given."""

    domain: str
    command_id: str
    delivery: int
    token: str = field(repr=False)

    def near_misses(self, other: Lease) -> list[Lease]:
        """Presentations that are near to this lease and are not it."""
        return [
            replace(self, token=other.token),
            replace(self, delivery=other.delivery, token=other.token),
            replace(self, delivery=self.delivery + 1),
            replace(self, delivery=self.delivery - 1),
            replace(self, command_id=other.command_id),
            replace(self, domain=other.domain),
        ]


@dataclass(kw_only=True, eq=False)
class Command:
    """A command as the views show it, and its trail."""

    domain: str
    command_id: str
    command_type: str
    data: int
    sent: tuple[str, int]  # type and data as first sent
    status: str
    priority: int
    max_attempts: int | None
    due: int | None
    attempts: int = 0
    crashes: int = 0
    delivery: int = 0
    token: str | None = None
    lease_until: int | None = None
    ahead: bool = False  # claimed before it could start
    finished_by: str | None = None
    error: str | None = None
    result: int | None = None
    rank: int = 0  # in which call it came into line
    waits_since: int = 0
    trail: list[Step] = field(default_factory=list)

    @property
    def key(self) -> Key:
        return self.domain, self.command_id

    @property
    def alone(self) -> bool:
        """Whether it is claimed with nothing else."""
        return self.crashes >= 2

    @property
    def place(self) -> tuple[int, int]:
        """Smaller is claimed first; commands that came into line in the same call are in any order."""
        return (0 if self.alone else -self.priority, self.rank)

    def move(self, event: str, to: str, *, attempt: int | None = None, operator: str | None = None) -> None:
        """Change the status, and tell the trail."""
        token = self.token if "IN_PROGRESS" in {self.status, to} else None
        self.trail.append((event, self.status, to, self.delivery, attempt, token, operator))
        self.status = to


class Model:
    """The commands of some domains. Each verb answers what its SQL function must answer."""

    def __init__(self) -> None:
        self.now = 0
        self.calls = 0
        self.commands: dict[Key, Command] = {}
        self.leases: list[Lease] = []  # all that were ever given

    def having(self, *statuses: str) -> list[Command]:
        """The commands of these statuses."""
        return [command for command in self.commands.values() if command.status in statuses]

    def live(self) -> list[Lease]:
        """The leases that nobody has ended; their time may be over."""
        return [lease for lease in self.leases if self.holds(lease)]

    def holds(self, lease: Lease) -> bool:
        """The fence."""
        command = self.commands.get((lease.domain, lease.command_id))
        return (
            command is not None
            and command.status == "IN_PROGRESS"
            and (command.delivery, command.token) == (lease.delivery, lease.token)
        )

    # ------------------------------------------------------------------------ what a caller may choose from

    def known(self) -> list[Key]:
        """What may be sent again; more often a command whose data is not what was sent."""
        edited = [key for key, command in self.commands.items() if command.data != command.sent[1]]
        return [*self.commands, *(edited * 9)]

    def ready(self) -> list[Command]:
        """What a claim may find."""
        return [*self._due(), *self.having("PENDING")]

    def presentable(self) -> list[Lease]:
        """Live leases, old ones, those of finished commands, and near misses."""
        near = [miss for lease in self.live()[-3:] for other in self.leases[-3:] for miss in lease.near_misses(other)]
        return [*self.leases, *near]

    def refusals(self) -> list[tuple[str, Key]]:
        """Decisions that come too early or too late, and one about nothing."""
        return [
            ("cancel", ("d", str(UUID(int=0)))),
            *(
                (verb, command.key)
                for verb, (statuses, *_) in DECISIONS.items()
                for command in self.commands.values()
                if command.status not in statuses
            ),
        ]

    def _due(self) -> list[Command]:
        return [command for command in self.having("SCHEDULED") if command.due is not None and command.due <= self.now]

    # ------------------------------------------------------------------------------------------- sending

    def send(
        self, *, domain: str, command_id: str, command_type: str, data: int, delay: int = 0, priority: int = 0,
        max_attempts: int | None = None, minted: bool = False,
    ) -> str:  # fmt: skip
        """A new command, or one whose id is known; where the id comes from makes no difference here."""
        sent = (command_type, data)
        if known := self.commands.get((domain, command_id)):
            return "duplicate" if known.sent == sent else "conflict"
        status = "SCHEDULED" if delay else "PENDING"
        self.commands[domain, command_id] = Command(
            domain=domain, command_id=command_id, command_type=command_type, data=data, sent=sent, status=status,
            priority=priority, max_attempts=max_attempts, due=self.now + delay if delay else None, rank=self.calls,
            trail=[("SENT", None, status, None, None, None, None)],
        )  # fmt: skip
        return "accepted"

    # ------------------------------------------------------------------------------------------ claiming

    def sweep(self, domain: str) -> None:
        """Count a crash for each lease whose time is over, but for what had not started."""
        for command in self.having("IN_PROGRESS"):
            if command.domain == domain and command.lease_until is not None and command.lease_until <= self.now:
                if command.ahead:
                    command.move("EXPIRED", "PENDING")
                    self._wait(command)
                    continue
                command.crashes += 1
                command.error = "CRASHED"
                command.move("CRASHED", "PENDING" if command.crashes < 3 else PARKED)
                self._wait(command)
        self.calls += 1

    def promote(self, domain: str) -> None:
        """Let everything that is due wait in line."""
        for command in self._due():
            if command.domain == domain:
                command.status, command.due = "PENDING", None
                self._wait(command)
        self.calls += 1

    def next_due(self, domain: str) -> int | None:
        """In how many ticks the next scheduled command is due."""
        due = [c.due for c in self.having("SCHEDULED") if c.domain == domain and c.due is not None]
        return min(due) - self.now if due else None

    def line(self, domain: str, types: Iterable[str], *, alone: bool) -> list[Command]:
        """What can be claimed, the first first."""
        line = [
            command
            for command in self.having("PENDING")
            if (command.domain, command.alone) == (domain, alone) and command.command_type in types
        ]
        return sorted(line, key=lambda command: command.place)

    def first(self, domain: str, types: Iterable[str], limit: int, *, alone: bool) -> list[Command]:
        """The first of the line, and who came into it together with the last of them: of those, any may be taken."""
        line = self.line(domain, types, alone=alone)
        return [command for command in line if limit and command.place <= line[:limit][-1].place]

    def claim(self, command: Command, token: str, ticks: int, *, ahead: bool = False) -> None:
        """Lease a command; the token is the database's choice."""
        command.delivery += 1
        command.ahead = ahead
        command.token, command.lease_until = token, self.now + ticks
        command.move("CLAIMED", "IN_PROGRESS")
        self.leases.append(Lease(command.domain, command.command_id, command.delivery, token))

    def ahead(self, domain: str, types: Iterable[str]) -> tuple[list[Command], list[Command]]:
        """What may be claimed to wait: first deliveries, up to the first command that was delivered before.

        Returns what stands before all that came into line together with that one, and what stands among them.
        """
        line = self.line(domain, types, alone=False)
        end = next((command.place for command in line if command.delivery), None)
        sure = [command for command in line if end is None or command.place < end]
        return sure, [command for command in line if command.place == end and not command.delivery]

    def _wait(self, command: Command) -> None:
        command.rank, command.waits_since = self.calls, self.now

    # -------------------------------------------------------------------------------------- holding a lease

    def _fenced(self, lease: Lease, act: Callable[[Command], None]) -> str:
        command = self.commands.get((lease.domain, lease.command_id))
        if command is None:
            return "lost"
        if not self.holds(lease):
            return "done" if command.finished_by == lease.token else "lost"
        act(command)
        return "done"

    def renew(self, lease: Lease, ticks: int) -> str:
        def act(command: Command) -> None:
            command.lease_until = self.now + ticks

        return self._fenced(lease, act)

    def complete(self, lease: Lease, result: int) -> str:
        def act(command: Command) -> None:
            self._verdict(command, "COMPLETED", "COMPLETED")
            command.error, command.result = None, result

        return self._fenced(lease, act)

    def fail(self, lease: Lease, kind: str, code: str, retry_in: int, max_attempts: int) -> str:
        def act(command: Command) -> None:
            command.error = code
            if kind == "BUSINESS":
                self._verdict(command, "FAILED", "FAILED")
            elif kind == "TRANSIENT" and command.attempts + 1 < (command.max_attempts or max_attempts):
                self._verdict(command, "ATTEMPT_FAILED", "SCHEDULED")
                command.due = self.now + retry_in
            else:
                self._verdict(command, "PARKED", PARKED)

        return self._fenced(lease, act)

    def release(self, lease: Lease) -> str:
        def act(command: Command) -> None:
            command.move("RELEASED", "PENDING")
            self._wait(command)

        return self._fenced(lease, act)

    def _verdict(self, command: Command, event: str, to: str) -> None:
        command.attempts += 1
        command.move(event, to, attempt=command.attempts)
        if to in TERMINAL:
            command.finished_by, command.lease_until = command.token, None

    # ----------------------------------------------------------------------------------- people's verbs

    def decide(self, verb: str, key: Key, value: int | None = None) -> str:
        """What a person decides. `value`: the result, or the edited data."""
        statuses, event, to = DECISIONS[verb]
        command = self.commands.get(key)
        if command is None:
            return "CB002"
        if command.status not in statuses:
            return "CB003"
        self.calls += 1
        command.move(event, to, operator="ana")
        command.due = None
        if verb == "operator_retry":
            command.attempts = command.crashes = 0
            command.error = None
            command.data = command.data if value is None else value
            self._wait(command)
        else:
            command.lease_until = None
        if verb == "operator_complete":
            command.error, command.result = None, value
        return "ok"
