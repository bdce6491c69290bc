"""Values to messages and back, and chunks that lie about what they are of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.agent import agent_pb2 as pb
from client.agent import messages
from federation.errors import ExchangeError
from federation.exchange import Contribution, Description, Instructions, Measures, Work

WORK = Work("fed", 3, 2, "r2-00ff")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 bytes and payloads of at most 10."""
    monkeypatch.setattr(messages, "CHUNK_BYTES", 4)
    monkeypatch.setattr(messages, "MOST_BYTES", 10)


@given(st.binary(max_size=10))
def test_a_payload_is_read_as_it_was_cut(payload: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "CHUNK_BYTES", 4)
        cut = list(messages.chunks(payload))
        assert [len(chunk.data) for chunk in cut] == [
            len(payload[at : at + 4]) for at in range(0, len(payload), 4)
        ] or [0]
        assert messages.joined(cut) == payload


@pytest.mark.usefixtures("small_chunks")
def test_a_payload_that_is_too_large_is_never_sent() -> None:
    with pytest.raises(ExchangeError, match="at most 10 bytes, got 11; use a smaller pool"):
        list(messages.chunks(bytes(11)))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ([], "0 bytes was announced, got 0; send it again"),
        ([(8, 4)], "8 bytes was announced, got 4"),
        ([(11, 4)], "at most 10 bytes, got 11"),
        ([(-1, 0)], "at most 10 bytes, got -1"),
        ([(2, 4)], "of the 2 announced, got 4 after 0"),
        ([(8, 5)], "at most 4 bytes of the 8 announced, got 5 after 0"),
        ([(6, 4), (6, 4)], "of the 6 announced, got 4 after 4"),
        ([(8, 4), (4, 4)], "got 4 after 4, of 4; is the other side"),
    ],
)
def test_chunks_that_are_not_of_one_payload_are_refused(sent: list[tuple[int, int]], words: str) -> None:
    with pytest.raises(ExchangeError, match=words):
        messages.joined(pb.Chunk(total_bytes=total, data=bytes(size)) for total, size in sent)


@pytest.mark.usefixtures("small_chunks")
def test_a_stream_is_read_no_further_than_its_first_wrong_chunk() -> None:
    endless = iter(lambda: pb.Chunk(total_bytes=8, data=b"1234"), None)
    with pytest.raises(ExchangeError, match="got 4 after 8"):
        messages.joined(endless)


def read_back(message):
    """What the other side parses from the message's bytes."""
    return type(message).FromString(message.SerializeToString())


def test_values_are_read_as_they_were_written() -> None:
    asked = Instructions("fed", 3, 2, "r2-00ff", "train", (0, 2, 5), 1, '{"seed": 4}')
    assert messages.instructions_of(read_back(messages.instructions_message(asked))) == asked
    measures = Measures(WORK, {"train": 5, "new": 0}, 3, {"tuned_loss": 1.25, "base_loss": 0.1})
    assert messages.measures_of(read_back(messages.measures_message(measures))) == measures
    for description in (Description({}), Description({"train": 5}, 1, ("r1-a", "r2-b"), "r1-a", "0.1.0")):
        assert messages.description_of(read_back(messages.description_message(description))) == description
    contribution = Contribution(WORK, {"train": 5}, bytes(range(256)) * 10_000)
    parts = [read_back(part) for part in messages.contribution_parts(contribution)]
    assert messages.contribution_of(parts) == contribution
    assert max(part.ByteSize() for part in parts) < messages.CHUNK_BYTES + 64


def test_instructions_that_no_server_sends_are_refused() -> None:
    with pytest.raises(ExchangeError, match="positions ascend"):
        messages.instructions_of(pb.Instructions(federation="fed", attempt=1, positions=[2, 1]))


def test_a_contribution_begins_with_its_head() -> None:
    for parts in ([], [pb.ContributionPart(chunk=pb.Chunk())]):
        with pytest.raises(ExchangeError, match="begins with its head"):
            messages.contribution_of(parts)
