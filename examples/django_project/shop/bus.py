"""The bus of this project, shared by all threads of a process."""

from __future__ import annotations

from commandbus.sync import SyncCommandBus

bus = SyncCommandBus()  # $COMMAND_BUS_DSN; connects when it is first used, in each process anew
