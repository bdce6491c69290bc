"""Nodes over Flower: letters are pushed to the SuperLink, answers pulled from it one by one.

The SuperLink keeps what was not pulled yet, so a server holds no more replies than it asks for.

Flower's pull is not safe from a node: what the node uploaded is put together by code that may raise, and may wait for
hours for parts that were announced and never come. So each ticket is pulled alone, in a thread of its own: whatever
goes wrong there is the fault of the node that the ticket belongs to, and holds up no other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from federation.errors import ExchangeError
from federation.exchange import Contribution, Letter, Refusal
from federation.records import MESSAGE_TYPES, answer_of, letter_record
from server.nodes import Parcel

_REASON_LENGTH = 200

_log = logging.getLogger("fedquilt")

T = TypeVar("T")


@dataclass(frozen=True)
class _Pull:
    node: int
    found: Future[Parcel | None]


class GridNodes:
    """The SuperNodes that a Flower run reaches through its grid (`server/nodes.py`).

    patience_seconds: how long `collect` waits for the pulls that it starts. A healthy one is done in milliseconds.
    """

    def __init__(self, grid: Grid, patience_seconds: float = 1.0) -> None:
        self._grid, self._patience_seconds = grid, patience_seconds
        self._node_of: dict[str, int] = {}
        self._pulls: dict[str, _Pull] = {}

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
        """As `Nodes` says. A reply belongs to the node that was asked, whatever it says of itself.

        A pull that takes longer than the patience stays under way, and a later call gives what it brings.
        Raises httpx.HTTPError when the SuperLink fails: that is no node's fault.
        """
        awaited = [ticket for ticket in tickets if ticket in self._node_of]
        wait(self._started([ticket for ticket in awaited if ticket not in self._pulls]), self._patience_seconds)
        return [parcel for ticket in awaited if (parcel := self._taken(ticket))]

    def drop(self, tickets: Collection[str]) -> None:
        """As `Nodes` says. A pull that is under way goes on, and what it brings is lost."""
        for ticket in tickets:
            self._node_of.pop(ticket, None)

    def _started(self, tickets: Sequence[str]) -> list[Future[Parcel | None]]:
        """New pulls. A node has one under way at a time, so a node whose replies hang holds one thread."""
        self._pulls = {t: pull for t, pull in self._pulls.items() if t in self._node_of or not pull.found.done()}
        busy = {pull.node for pull in self._pulls.values() if not pull.found.done()}
        started = []
        for ticket in tickets:
            node = self._node_of[ticket]
            if node not in busy:
                busy.add(node)
                started.append(_in_thread(partial(_pulled, self._grid, ticket, node)))
                self._pulls[ticket] = _Pull(node, started[-1])
        return started

    def _taken(self, ticket: str) -> Parcel | None:
        """What the ticket's pull has brought, if it is done; None as well while the node is at work."""
        if ticket not in self._pulls or not self._pulls[ticket].found.done():
            return None
        parcel = self._pulls.pop(ticket).found.result()
        if parcel is not None:
            del self._node_of[ticket]
        return parcel


def _pulled(grid: Grid, ticket: str, node: int) -> Parcel | None:
    """The answer under a ticket; None while there is none."""
    try:
        messages = list(grid.pull_messages([ticket]))
        return _parcel(ticket, node, messages[0]) if messages else None
    except httpx.HTTPError:
        raise
    except Exception as error:  # Flower's code on a node's bytes: it may raise anything
        return Parcel(ticket, node, f"the reply of node {node} is unreadable ({type(error).__name__})")


def _parcel(ticket: str, node: int, message: Message) -> Parcel:
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
    return next(iter(reason.strip().splitlines()), "no reason")[:_REASON_LENGTH]


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """Does the work in a thread that the end of the process does not wait for: an executor's would be waited for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="pull", daemon=True).start()
    return future
