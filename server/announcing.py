"""Tells nodes which release to serve."""

from __future__ import annotations

from federation.exchange import Work
from federation.pool.file import PoolFile
from server.errand import Errand
from server.session import Head, Session


class Announcer:
    """Sends a release to nodes that do not serve it: each release once to each node, whatever the node says to it."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._told: set[tuple[int, str]] = set()
        self._under_way: Errand | None = None
        self._silent: set[int] = set()

    def announce(self, release: PoolFile, head: Head) -> None:
        """Takes in what was said since the last time, and tells those who have not been told. Does not wait."""
        self._listen()
        version = release.version
        untold = [
            node
            for node, said in self._session.roster.present().items()
            if said.release != version and (node, version) not in self._told
        ]
        if not untold:
            return
        work = Work(self._session.federation, head.state.round_index, 1, version)
        wish = self._session.instructions(work, "train", (), head.durable_round)
        self._under_way = Errand(self._session, "release", dict.fromkeys(untold, wish), release.to_bytes())
        self._silent = set(untold)
        self._told |= {(node, version) for node in untold}

    def _listen(self) -> None:
        if self._under_way is not None:
            self._silent -= {parcel.node for parcel in self._under_way.came(sorted(self._silent))}
