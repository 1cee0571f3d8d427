"""What a run does, drawn from its seed: which commands are sent when and how, and which fault strikes whom."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from uuid import UUID

DOMAIN = "chaos"
TOLD = "chaos.told"
"""The domain that is told: replies come here, and what batches send at their end."""

PROCESSES = "chaos.processes"
LEASE = 1.5  # seconds; at 1 s, the shortest, a busy machine loses leases without any fault
WORKERS = 6  # half [async], half [sync]
SENDERS = 2  # as well
OPERATORS = 4  # as well
MAX_ATTEMPTS = 4

_ZOMBIES = 0.12  # of the commands are held for 0.5 to 2.2 leases without renewal: 8.5 % of all outlive theirs
_FAULT_EVERY = 1.7  # seconds
_COMMANDS_PER_SECOND = 65

UNDO = "Undo"
"""The kind that undoes a step of a process."""

EFFECTS = ("Effect", "ZombieEffect", UNDO)
"""The kinds whose handlers are transactional and write one row."""

ZOMBIES = ("Zombie", "ZombieEffect")
"""The kinds whose first delivery is not renewed, and perhaps outlives its lease."""

POISONS = ("Exit", "Hog")
"""The kinds that kill their process, or try to."""

STRAY = "Stray"
"""The kind that a worker of another language takes from the workers of the library now and then."""

HOPELESS = ("Broken", "Failing")
"""The kinds that are parked until an operator has mended their data."""

_MIX = {"Effect": 0.3, "Flaky": 0.08, "Refused": 0.05, "Broken": 0.02, "Failing": 0.01, STRAY: 0.04,
        "Zombie": _ZOMBIES / 2, "ZombieEffect": _ZOMBIES / 2}  # fmt: skip
KINDS = ("Plain", *_MIX, *POISONS)

WAYS = {
    "once": 34,
    "again": 8,  # and once more when it is there: a duplicate
    "twins": 8,  # by two senders at the same moment
    "conflict": 3,  # and once more with other data: refused
    "minted": 5,  # with an id that the library makes
    "committed": 3,  # in a transaction of the caller's
    "replied": 12,  # with a reply to a domain of its own
    "called": 8,  # and its end is waited for
    "batch": 12,  # in a batch, which tells of its end
    "process": 8,  # as one of the steps of a process, each of which has an undo
}
GROUPS = {"batch": 20, "process": 3}
"""The ways in which so many are sent together; the last group of a run may be smaller."""

_REFUSED_LAST = 0.3  # of the processes end with a step that is refused
_TWIN_GROUPS = 0.25  # of them are sent by two senders at the same moment
_ROLLED_BACK = 0.03  # for each command that is sent, so many more are, in a transaction that comes to nothing

FAULTS = {
    "kill": 6,  # SIGKILL of a worker
    "stop": 5,  # SIGSTOP of one, SIGCONT after its leases ran out
    "terminate": 5,  # pg_terminate_backend of some sessions
    "freeze": 4,  # nothing passes to and from one worker until its leases ran out
    "freeze all": 1,
    "cut": 4,  # some TCP connections of all break
    "slow": 3,  # everything takes some ms longer
    "crash": 2,  # immediate shutdown of the server, and start
    "kill sender": 2,
    "roll": 1,  # SIGTERM of one worker after the other, each of which is started again
}


@dataclass(frozen=True)
class Planned:
    """A command, and how it is sent. `at` and everything in `data` are seconds, or counts."""

    number: int
    command_id: UUID
    kind: str
    way: str
    at: float
    data: dict[str, Any]
    group: UUID | None = None
    """The id of its batch or process, which is sent with the first of its commands."""
    twins: bool = False

    @property
    def senders(self) -> tuple[int, ...]:
        """Who sends it."""
        first = self.number % SENDERS
        return (first, (first + 1) % SENDERS) if self.twins else (first,)


@dataclass(frozen=True)
class Fault:
    """A fault. `victim` is the number of a worker or sender; `seconds` how long it lasts; `seed` decides the rest."""

    at: float
    kind: str
    victim: int
    seconds: float
    seed: int


@dataclass(frozen=True)
class Plan:
    """All of a run. `drawn_by`: the arguments of `make`."""

    seed: int
    drawn_by: tuple[int, int, int]
    seconds: float
    commands: tuple[Planned, ...]
    faults: tuple[Fault, ...]

    @cached_property
    def groups(self) -> dict[UUID, list[Planned]]:
        """What is sent together, in order."""
        found: dict[UUID, list[Planned]] = {}
        for each in self.commands:
            if each.group is not None:
                found.setdefault(each.group, []).append(each)
        return found


def make(seed: int, commands: int, faults: int) -> Plan:
    """Draw a plan: the same for the same arguments. Sends that are rolled back come on top."""
    chance = random.Random(f"{seed} {commands} {faults}")
    seconds = max(faults * _FAULT_EVERY, commands / _COMMANDS_PER_SECOND)
    kinds = [_kind(number, commands, chance) for number in range(commands)]
    ways = [chance.choices([*WAYS], [*WAYS.values()])[0] if kind not in POISONS else "once" for kind in kinds]
    sends = [*zip(kinds, ways, strict=True), *[("Plain", "rolled back")] * math.ceil(_ROLLED_BACK * commands)]
    chance.shuffle(sends)
    planned = [_command(number, *send, seconds, chance) for number, send in enumerate(sends)]
    for way, size in GROUPS.items():
        _group([each.number for each in planned if each.way == way], size, planned, chance)
    struck = tuple(_fault((number + 0.5) * seconds / faults, kind, chance)
                   for number, kind in enumerate(_fault_kinds(faults, chance)))  # fmt: skip
    return Plan(seed, (seed, commands, faults), seconds, tuple(planned), struck)


def _kind(number: int, commands: int, chance: random.Random) -> str:
    exits, hogs = 2 + commands // 5000, 1 + commands // 5000
    if number < exits + hogs:
        return "Exit" if number < exits else "Hog"
    return chance.choices(KINDS[: len(_MIX) + 1], [1 - sum(_MIX.values()), *_MIX.values()])[0]


def _command(number: int, kind: str, way: str, seconds: float, chance: random.Random) -> Planned:
    data: dict[str, Any] = {"number": number, "runs": round(chance.choice((0, 0, 0.01, 0.05, 0.3)), 3)}
    if kind in (*ZOMBIES, STRAY):  # the next delivery runs on for a while, so that the first one wakes beside it
        data["runs"] = round(chance.uniform(0.3, 0.8) * LEASE, 3)
    if kind in ZOMBIES:
        data |= {"outlives": round(chance.uniform(0.5, 2.2) * LEASE, 3), "fails": chance.random() < 0.3}
    if kind == "Flaky":
        data["failures"] = chance.randint(1, MAX_ATTEMPTS - 1)
    command_id = UUID(int=chance.getrandbits(128), version=4)
    latest = seconds / 2 if kind in POISONS else seconds  # three crashes take their time
    return Planned(number, command_id, kind, way, round(chance.uniform(0, latest), 3), data, twins=way == "twins")


def _group(numbers: list[int], size: int, planned: list[Planned], chance: random.Random) -> None:
    """Put these together, so many each time; a group is sent at the moment of its first."""
    for start in range(0, len(numbers), size):
        group, twins = UUID(int=chance.getrandbits(128), version=4), chance.random() < _TWIN_GROUPS
        for number in numbers[start : start + size]:
            planned[number] = replace(planned[number], at=planned[numbers[start]].at, group=group, twins=twins)
        if planned[number].way == "process" and chance.random() < _REFUSED_LAST:
            planned[number] = replace(planned[number], kind="Refused")


def _fault_kinds(faults: int, chance: random.Random) -> list[str]:
    """Each kind as often as it weighs; in a run of full size each at least once."""
    total = sum(FAULTS.values())
    least = faults >= 2 * len(FAULTS)
    found = [kind for kind, weight in FAULTS.items() for _ in range(max(least, faults * weight // total))]
    found += chance.choices([*FAULTS], [*FAULTS.values()], k=faults - len(found))
    chance.shuffle(found)
    return found


def _fault(at: float, kind: str, chance: random.Random) -> Fault:
    beyond_the_lease = chance.uniform(1.2, 2.2) * LEASE
    return Fault(at, kind, chance.randrange(WORKERS), beyond_the_lease, chance.getrandbits(32))
