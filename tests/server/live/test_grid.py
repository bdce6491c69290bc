"""Nodes over Flower's grid: whatever comes back under a ticket, it is the matter of the node that the ticket is for."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from threading import Event, Thread
from threading import enumerate as enumerate_threads

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from federation.exchange import Answer, Contribution, Description, Instructions, Letter, Refusal, Work
from federation.records import answer_record, letter_of
from server.live.grid import GridNodes
from server.nodes import Parcel

DESCRIPTION = Description({"train": 2})
LETTER = Letter("train", Instructions("f1", 1, 1, "v", "train", (0,), 0, "{}"), b"pool")
Reply = Callable[[Message], Message | None]


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's runtime says to a ServerApp's process before it starts: without it there are no messages."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def answering(content: RecordDict | Error | Answer) -> Reply:
    record = content if isinstance(content, RecordDict | Error) else answer_record(content)
    return lambda letter: Message(record, reply_to=letter)


class FakeGrid:
    """A SuperLink whose nodes reply as `replies` says; a reply is given once. pulled: the tickets of each pull."""

    def __init__(self, replies: dict[int, Reply]) -> None:
        self.replies = replies
        self.letters: dict[str, Message] = {}
        self.pulled: list[list[str]] = []
        self._posted: Counter[int] = Counter()

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.replies, reverse=True)

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        return [self._push(message) for message in messages]

    def _push(self, message: Message) -> str | None:
        node = message.metadata.dst_node_id
        if node not in self.replies:
            return None
        self._posted[node] += 1
        ticket = f"to-{node}-{self._posted[node]}"
        message.metadata.__dict__["_message_id"] = ticket
        self.letters[ticket] = message
        return ticket

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulled.append(list(message_ids))
        replies = [(ticket, self._reply(ticket)) for ticket in self.pulled[-1] if ticket in self.letters]
        for ticket, reply in replies:
            if reply is not None:
                del self.letters[ticket]
        return [reply for _, reply in replies if reply is not None]

    def _reply(self, ticket: str) -> Message | None:
        letter = self.letters[ticket]
        return self.replies[letter.metadata.dst_node_id](letter)


def reached(grid: FakeGrid) -> GridNodes:
    return GridNodes(grid, patience_seconds=0.01)


def posted(nodes: GridNodes, *wanted: int) -> dict[int, str]:
    return dict(nodes.post(dict.fromkeys(wanted, LETTER), 5.0))


def came(nodes: GridNodes, tickets: Iterable[str], count: int) -> dict[int, Parcel]:
    """As many parcels, by node, however many looks it takes."""
    parcels: dict[int, Parcel] = {}
    tickets = list(tickets)
    pause = Event()
    for _ in range(1000):
        parcels |= {parcel.node: parcel for parcel in nodes.collect(tickets)}
        if len(parcels) >= count:
            return parcels
        pause.wait(0.01)
    raise AssertionError(f"{len(parcels)} of {count} parcels came")


def test_an_answer_comes_once_under_its_ticket() -> None:
    contribution = Contribution(Work("f1", 1, 1, "v"), {"train": 1}, b"12345")
    nodes = reached(FakeGrid({7: answering(contribution), 5: answering(DESCRIPTION)}))
    assert nodes.online() == [5, 7]
    tickets = posted(nodes, 7, 5)
    assert came(nodes, tickets.values(), 2) == {
        7: Parcel(tickets[7], 7, contribution, 5),
        5: Parcel(tickets[5], 5, DESCRIPTION, 0),
    }
    assert nodes.collect(list(tickets.values())) == []


def test_a_letter_goes_to_its_node_and_lasts_until_its_reply_is_fetched() -> None:
    grid = FakeGrid({7: answering(DESCRIPTION)})
    ticket = posted(reached(grid), 7)[7]
    metadata = grid.letters[ticket].metadata
    assert (metadata.dst_node_id, metadata.message_type, metadata.ttl) == (7, "train", 10.0)
    assert letter_of(grid.letters[ticket].content) == LETTER


def test_a_node_that_flower_does_not_know_has_no_ticket(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert posted(reached(FakeGrid({7: answering(DESCRIPTION)})), 6, 7).keys() == {7}
    assert "no letter for node 6" in caplog.text


def test_nothing_comes_while_a_node_is_at_work() -> None:
    grid = FakeGrid({7: lambda letter: None})
    nodes = reached(grid)
    tickets = posted(nodes, 7)
    for _ in range(3):
        assert nodes.collect(list(tickets.values())) == []
    grid.replies[7] = answering(DESCRIPTION)
    assert came(nodes, tickets.values(), 1)[7].answer == DESCRIPTION


def foreign(letter: Message) -> Message:
    reply = Message(answer_record(DESCRIPTION), reply_to=letter)
    reply.metadata.__dict__["_reply_to_message_id"] = "to-5-1"
    reply.metadata.__dict__["_src_node_id"] = 5
    return reply


def malformed(letter: Message) -> Message:
    raise IndexError("list index out of range")


def infinite(letter: Message) -> Message:
    record = answer_record(DESCRIPTION)
    record["fedquilt"] = ConfigRecord({**record["fedquilt"], "order": float("inf")})
    return Message(record, reply_to=letter)


BAD: dict[str, tuple[Reply, Answer | str]] = {
    "an error": (
        answering(Error(3, "\n  out of memory\nin line 3\n")),
        Refusal("failed", "node 7 failed: out of memory"),
    ),
    "an endless error": (answering(Error(3, "x" * 1000)), Refusal("failed", "node 7 failed: " + "x" * 200)),
    "an error of a blank": (answering(Error(3, " \n ")), Refusal("failed", "node 7 failed: no reason")),
    "an error of no words": (answering(Error(3, "")), Refusal("failed", "node 7 failed: error 3")),
    "an endless number": (infinite, "not as agreed"),
    "a reply to another": (foreign, DESCRIPTION),
    "a malformed object": (malformed, "the reply of node 7 is unreadable (IndexError)"),
    "records of another app": (answering(RecordDict({"x": ConfigRecord({})})), "a message has the records"),
}


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_its_own_nodes(kind: str, place: int) -> None:
    reply, expected = BAD[kind]
    order = [3, 5]
    order.insert(place, 7)
    nodes = reached(FakeGrid({3: answering(DESCRIPTION), 5: answering(DESCRIPTION), 7: reply}))
    tickets = posted(nodes, *order)
    parcels = came(nodes, tickets.values(), 3)
    assert {node: parcel.ticket for node, parcel in parcels.items()} == tickets
    assert parcels[3].answer == parcels[5].answer == DESCRIPTION
    found = parcels[7].answer
    assert found == expected or (isinstance(expected, str) and isinstance(found, str) and expected in found)


@pytest.fixture
def gate() -> Iterator[Event]:
    """Whoever waits for it goes on at the end of the test at the latest."""
    event = Event()
    yield event
    event.set()


def hanging(gate: Event, then: Reply) -> Reply:
    """A reply some of whose parts have not been uploaded until the gate opens."""

    def reply(letter: Message) -> Message | None:
        assert gate.wait(60)
        return then(letter)

    return reply


def test_a_reply_that_hangs_holds_up_no_other_and_comes_when_it_is_whole(gate: Event) -> None:
    grid = FakeGrid({3: answering(DESCRIPTION), 7: hanging(gate, answering(DESCRIPTION)), 9: answering(DESCRIPTION)})
    nodes = reached(grid)
    tickets = posted(nodes, 7, 3, 9)
    assert came(nodes, tickets.values(), 2).keys() == {3, 9}
    assert nodes.collect([tickets[7]]) == []
    gate.set()
    assert came(nodes, tickets.values(), 1).keys() == {7}
    assert sorted(grid.pulled) == sorted([ticket] for ticket in tickets.values())


def test_a_node_whose_replies_hang_holds_one_pull(gate: Event) -> None:
    grid = FakeGrid({7: hanging(gate, answering(DESCRIPTION))})
    nodes = reached(grid)
    for _ in range(5):
        ticket = posted(nodes, 7)[7]
        assert nodes.collect([ticket]) == []
        nodes.drop([ticket])
    assert len(grid.pulled) == 1
    last = posted(nodes, 7)[7]
    gate.set()
    assert came(nodes, [last], 1)[7].ticket == last
    assert grid.pulled[1:] == [[last]]


def pulling() -> list[Thread]:
    return [thread for thread in enumerate_threads() if thread.name == "pull"]


def test_what_a_dropped_ticket_brings_is_not_kept(gate: Event) -> None:
    nodes = reached(FakeGrid({7: hanging(gate, answering(DESCRIPTION))}))
    ticket = posted(nodes, 7)[7]
    assert nodes.collect([ticket]) == []
    nodes.drop([ticket])
    assert all(thread.daemon for thread in pulling())  # the end of the process waits for none
    gate.set()
    for thread in pulling():
        thread.join(60)
    nodes.collect([])
    assert not [kept for kept in gc.get_objects() if isinstance(kept, Parcel) and kept.ticket == ticket]


def test_what_came_under_one_ticket_does_not_keep_a_node_from_answering_under_another(gate: Event) -> None:
    grid = FakeGrid({7: hanging(gate, answering(DESCRIPTION))})
    nodes = reached(grid)
    early, late = posted(nodes, 7)[7], posted(nodes, 7)[7]
    assert nodes.collect([early]) == []
    gate.set()
    assert came(nodes, [late], 1)[7].ticket == late
    assert came(nodes, [early], 1)[7].ticket == early


def test_a_dropped_ticket_brings_nothing() -> None:
    grid = FakeGrid({3: answering(DESCRIPTION), 7: answering(DESCRIPTION)})
    nodes = reached(grid)
    tickets = posted(nodes, 3, 7)
    nodes.drop([tickets[7], "unknown"])
    assert came(nodes, tickets.values(), 1).keys() == {3}
    assert grid.pulled == [[tickets[3]]]
    assert nodes.collect(list(tickets.values())) == []


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), RunNotRunningException()])
def test_what_is_wrong_with_flower_itself_is_no_nodes_fault(error: BaseException) -> None:
    def failing(letter: Message) -> Message:
        raise error

    nodes = reached(FakeGrid({7: failing}))
    tickets = posted(nodes, 7)
    with pytest.raises(type(error)):
        came(nodes, tickets.values(), 1)
