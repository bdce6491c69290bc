"""Nodes over Flower: letters are pushed to the SuperLink, answers pulled from it a few at a time.

The SuperLink keeps what was not pulled yet, so a server holds no more replies than it asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from federation.errors import ExchangeError
from federation.exchange import Contribution, Letter, Refusal
from federation.records import MESSAGE_TYPES, answer_of, letter_record
from server.nodes import Parcel

_log = logging.getLogger("fedquilt")


class GridNodes:
    """The SuperNodes that a Flower run reaches through its grid (`server/nodes.py`)."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._node_of: dict[str, int] = {}

    def online(self) -> Sequence[int]:
        """As `Nodes` says."""
        return sorted(self._grid.get_node_ids())

    def post(self, letters: Mapping[int, Letter], seconds: float) -> Mapping[int, str]:
        """As `Nodes` says. One push for each node: together, large pools would not fit into a request.

        The SuperLink drops replies of letters that are too old, and what has come in time is fetched when time is over:
        so letters last twice as long.
        The SuperLink takes no letter for a node that it does not know any more: that node has no ticket.
        """
        tickets: dict[int, str] = {}
        for node, letter in letters.items():
            message = Message(letter_record(letter), node, MESSAGE_TYPES[letter.kind], ttl=2 * seconds)
            posted = [ticket for ticket in self._grid.push_messages([message]) if ticket]
            if posted:
                tickets[node] = posted[0]
                self._node_of[posted[0]] = node
            else:
                _log.warning("Flower's SuperLink took no letter for node %d", node)
        return tickets

    def collect(self, tickets: Sequence[str]) -> Sequence[Parcel]:
        """As `Nodes` says. A reply belongs to the node that was asked, whatever it says of itself."""
        awaited = [ticket for ticket in tickets if ticket in self._node_of]
        return [self._parcel(message) for message in self._grid.pull_messages(awaited)] if awaited else []

    def _parcel(self, message: Message) -> Parcel:
        ticket = message.metadata.reply_to_message_id
        node = self._node_of.pop(ticket)
        if message.has_error():
            reason = message.error.reason or f"error {message.error.code}"
            return Parcel(ticket, node, Refusal("failed", f"node {node} failed: {_first_line(reason)}"))
        try:
            answer = answer_of(message.content)
        except ExchangeError as error:
            return Parcel(ticket, node, str(error))
        size_bytes = len(answer.payload) if isinstance(answer, Contribution) else 0
        return Parcel(ticket, node, answer, size_bytes)


def _first_line(reason: str) -> str:
    return reason.strip().splitlines()[0][:200]
