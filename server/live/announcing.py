"""Tells nodes which release to serve."""

from __future__ import annotations

from federation.exchange import Work
from federation.pool.file import PoolFile
from server.live.errand import Errand
from server.live.session import Head, Session


class Announcer:
    """Sends a release to nodes that serve another one: once, whatever a node says to it. Nobody waits for that."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._told: dict[int, str] = {}
        self._under_way: Errand | None = None
        self._silent: set[int] = set()

    def announce(self, release: PoolFile, head: Head) -> None:
        """Tells the nodes that are present of a release, unless they were told last of it, or came with it."""
        self._listen()
        version = release.version
        present = self._session.roster.present()
        untold = [node for node, said in present.items() if self._told.get(node, said.release) != version]
        if not untold:
            return
        work = Work(self._session.federation, head.state.round_index, 1, version)
        wish = self._session.instructions(work, "train", (), head.durable_round)
        self._under_way = Errand(self._session, "release", dict.fromkeys(untold, wish), release.to_bytes())
        self._silent = set(untold)
        self._told |= dict.fromkeys(untold, version)

    def _listen(self) -> None:
        """Whoever says that it lacks the version is sent it now."""
        if self._under_way is not None:
            self._silent -= {parcel.node for parcel in self._under_way.came(sorted(self._silent))}
