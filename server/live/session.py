"""What a server process works with, round after round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from federation.config import RunConfig
from federation.exchange import Instructions, Work
from federation.pool.file import PoolFile
from federation.streams import Streams
from server.admission.desk import Desk
from server.admission.lifting import Lifter
from server.live.clock import Clock
from server.live.patience import Patience
from server.live.roster import Roster
from server.nodes import Nodes
from server.round import Rules, ServerState


@dataclass(frozen=True)
class Head:
    """The state that nodes work with, and what they are told of it.

    pool: a `PoolFile` as bytes. durable_round: of the oldest checkpoint.
    """

    state: ServerState
    version: str
    pool: bytes
    durable_round: int


@dataclass(frozen=True)
class Session:
    """One federation's work in one process. federation: its id."""

    federation: str
    config: RunConfig
    rules: Rules
    nodes: Nodes
    roster: Roster
    desk: Desk
    lifter: Lifter
    clock: Clock
    patience: Patience

    @property
    def streams(self) -> Streams:
        return Streams(self.config.seed)

    @cached_property
    def _task(self) -> str:
        return self.config.task.model_dump_json()

    def left_out(self, round_index: int) -> frozenset[int]:
        """Who is not asked in a round: nodes in quarantine, and those that rest. Nobody rests where fewer than
        `deployment.nodes` would be left."""
        quarantined = self.desk.quarantined(round_index)
        resting = quarantined | self.patience.resting(round_index)
        enough = len(self.roster.present().keys() - resting) >= self.config.deployment.nodes
        return resting if enough else quarantined

    def head(self, state: ServerState, durable_round: int) -> Head:
        """A state as nodes see it."""
        file = PoolFile(state.round_index, state.values, self.config.task)
        return Head(state, file.version, file.to_bytes(), durable_round)

    def work(self, head: Head, round_index: int, attempt: int = 1) -> Work:
        """The name of work with this head."""
        return Work(self.federation, round_index, attempt, head.version)

    def instructions(self, work: Work, split: str, positions: tuple[int, ...], durable_round: int) -> Instructions:
        """What one node is asked to do."""
        return Instructions(
            **vars(work), split=split, positions=positions, durable_round=durable_round, task=self._task
        )
