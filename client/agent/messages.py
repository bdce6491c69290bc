"""The values of `federation/exchange.py` as messages of `agent.proto`, and payloads as chunks. Neither torch nor gRPC.

Messages are of this machine's own processes: what they say is read as agreed, what they weigh is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from client.agent import agent_pb2 as pb
from federation.errors import ExchangeError
from federation.exchange import Contribution, Description, Instructions, Measures, Work

CHUNK_BYTES = 1 << 20
MOST_BYTES = 1 << 30
"""Most that a pool, or a node's contribution to one round, may weigh."""


def chunks(payload: bytes) -> Iterator[pb.Chunk]:
    """The payload, cut; an empty one is one empty chunk. Raises ExchangeError for more than `MOST_BYTES`."""
    check_size(len(payload))
    starts = range(0, max(1, len(payload)), CHUNK_BYTES)
    return (pb.Chunk(total_bytes=len(payload), data=payload[start : start + CHUNK_BYTES]) for start in starts)


def joined(parts: Iterable[pb.Chunk]) -> bytes:
    """What `chunks` cut. Raises ExchangeError as soon as a chunk is not of a payload that `chunks` cuts."""
    payload, total = bytearray(), -1
    for part in parts:
        if total < 0:
            check_size(part.total_bytes)
            total = part.total_bytes
        if part.total_bytes != total or len(part.data) > CHUNK_BYTES or len(payload) + len(part.data) > total:
            raise ExchangeError(
                f"a chunk has at most {CHUNK_BYTES} bytes of the {total} announced, got {len(part.data)} after "
                f"{len(payload)}, of {part.total_bytes}; is the other side of this version of fedquilt?"
            )
        payload += part.data
    if len(payload) != total:
        raise ExchangeError(f"a payload of {max(total, 0)} bytes was announced, got {len(payload)}; send it again")
    return bytes(payload)


def check_size(size_bytes: int) -> None:
    """Raises ExchangeError for a payload of more than `MOST_BYTES`."""
    if not 0 <= size_bytes <= MOST_BYTES:
        raise ExchangeError(
            f"a payload has at most {MOST_BYTES} bytes, got {size_bytes}; use a smaller pool, or fewer users per node"
        )


def instructions_message(asked: Instructions) -> pb.Instructions:
    """For `instructions_of`."""
    return pb.Instructions(**vars(asked))


def instructions_of(message: pb.Instructions) -> Instructions:
    """Raises ExchangeError for values that no server sends."""
    return Instructions(
        federation=message.federation,
        round_index=message.round_index,
        attempt=message.attempt,
        version=message.version,
        split=message.split,
        positions=tuple(message.positions),
        durable_round=message.durable_round,
        task=message.task,
    )


def contribution_parts(contribution: Contribution) -> Iterator[pb.ContributionPart]:
    """For `contribution_of`. Raises ExchangeError for a payload of more than `MOST_BYTES`."""
    head = pb.ContributionHead(work=_work_message(contribution.work), users=contribution.users)
    yield pb.ContributionPart(head=head)
    for chunk in chunks(contribution.payload):
        yield pb.ContributionPart(chunk=chunk)


def contribution_of(parts: Iterable[pb.ContributionPart]) -> Contribution:
    """What `contribution_parts` cut. Raises ExchangeError for anything else."""
    remaining = iter(parts)
    first = next(remaining, None)
    if first is None or not first.HasField("head"):
        raise ExchangeError("a contribution begins with its head, got none; is the agent of this version of fedquilt?")
    payload = joined(part.chunk for part in remaining)
    return Contribution(_work_of(first.head.work), dict(first.head.users), payload)


def measures_message(measures: Measures) -> pb.Measures:
    """For `measures_of`."""
    return pb.Measures(
        work=_work_message(measures.work), users=measures.users, measured=measures.measured, sums=measures.sums
    )


def measures_of(message: pb.Measures) -> Measures:
    """What `measures_message` wrote."""
    return Measures(_work_of(message.work), dict(message.users), message.measured, dict(message.sums))


def description_message(description: Description) -> pb.Description:
    """For `description_of`."""
    return pb.Description(**vars(description))


def description_of(message: pb.Description) -> Description:
    """What `description_message` wrote."""
    versions = tuple(message.versions)
    return Description(dict(message.users), message.order, versions, message.release, message.software)


def _work_message(work: Work) -> pb.Work:
    return pb.Work(**vars(work))


def _work_of(message: pb.Work) -> Work:
    return Work(message.federation, message.round_index, message.attempt, message.version)
