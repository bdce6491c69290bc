"""Tells nodes which release to serve."""

from __future__ import annotations

from federation.exchange import Description, Work
from federation.pool.file import PoolFile
from server.live.errand import Errand
from server.live.session import Head, Session


class Announcer:
    """Sends a release to nodes that serve another one. Nobody waits for that.

    A node is told until it says that it serves the release: again in the next round after any other answer, and after a
    round's time (`deployment.round_seconds`) if it is silent. A node whose last letter was of another release may serve
    that one, whatever it said before.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._told: dict[int, str] = {}
        self._under_way: dict[int, Errand] = {}

    def announce(self, release: PoolFile, head: Head) -> None:
        """Tells the nodes that are present of a release, as far as they need it."""
        self._listen()
        present = self._session.roster.present()
        if untold := [node for node, said in present.items() if self._is_due(node, said, release.version)]:
            self._tell(untold, release, head)

    def _is_due(self, node: int, said: Description, version: str) -> bool:
        last = self._told.get(node, said.release)
        return last != version or (said.release != version and node not in self._under_way)

    def _tell(self, nodes: list[int], release: PoolFile, head: Head) -> None:
        work = Work(self._session.federation, head.state.round_index, 1, release.version)
        wish, pool = self._session.instructions(work, "train", (), head.durable_round), release.to_bytes()
        for node in nodes:
            if node in self._under_way:
                self._under_way[node].end()
            self._under_way[node] = Errand(self._session, "release", {node: wish}, pool)
            self._told[node] = release.version

    def _listen(self) -> None:
        """Letters are no longer under way once they were answered, or their time is over. Whoever says that it lacks
        the version is sent it now."""
        for node, errand in tuple(self._under_way.items()):
            if list(errand.came([node])) or errand.is_over:
                errand.end()
                del self._under_way[node]
