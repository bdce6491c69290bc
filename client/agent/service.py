"""The calls of `agent.proto`, as those of a node and of what it serves. Errors become statuses in `calls.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from client.agent import agent_pb2 as pb
from client.agent.messages import (
    check_size,
    contribution_parts,
    description_message,
    instructions_of,
    joined,
    measures_message,
)
from client.agent.turns import Turns
from federation.errors import ExchangeError, NodeError
from federation.exchange import Answer, Contribution, Description, Letter, Measures, Refusal

if TYPE_CHECKING:
    from client.node import Node
    from client.serving import Serving

WAITING = 4
"""Most calls that wait for the one under way: trainings and their like, personalisations and their like."""
A = TypeVar("A", Contribution, Description, Measures)


class AgentService:
    """What the federation asks for takes turns, so does what changes personal values; all else is done beside them.

    waiting: the most calls of each kind that wait for their turn.
    """

    def __init__(self, node: Node, serving: Serving, waiting: int = WAITING) -> None:
        self._node, self._serving = node, serving
        self._federated, self._personal = Turns(waiting), Turns(waiting)

    def close(self) -> None:
        """Begins no more of this work; what is under way goes on."""
        self._federated.close()
        self._personal.close()

    # For the federation

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.Description:
        return description_message(self._answered(Letter("describe"), Description, context))

    def Keep(self, request_iterator: Iterator[pb.Chunk], context: Any) -> pb.Version:
        return pb.Version(version=self._node.keep(joined(request_iterator)))

    def KeepFile(self, request: pb.File, context: Any) -> pb.Version:
        if not context.peer().startswith("unix:"):
            raise ExchangeError(
                f"the agent opens files for callers on its Unix socket alone, this call came from {context.peer()!r}; "
                "send the pool itself"
            )
        return pb.Version(version=self._node.keep(_read(Path(request.path))))

    def Train(self, request: pb.Instructions, context: Any) -> Iterator[pb.ContributionPart]:
        with _turn(self._federated, context):
            contribution = self._answered(Letter("train", instructions_of(request)), Contribution, context)
        yield from contribution_parts(contribution)

    def Evaluate(self, request: pb.Instructions, context: Any) -> pb.Measures:
        with _turn(self._federated, context):
            return measures_message(self._answered(Letter("evaluate", instructions_of(request)), Measures, context))

    def Adopt(self, request: pb.Version, context: Any) -> pb.Description:
        self._node.adopt(request.version)
        return description_message(self._node.describe())

    # For the apps on the device

    def Personalize(self, request: pb.User, context: Any) -> pb.Personalised:
        with _turn(self._personal, context):
            return pb.Personalised(**vars(self._serving.personalize(request.user)))

    def Generate(self, request: pb.Prompt, context: Any) -> Iterator[pb.Text]:
        sampling = request.max_tokens, request.temperature, request.seed
        with closing(self._serving.generate(request.user, request.text, *sampling)) as written:
            for piece in written:
                yield pb.Text(text=piece)

    def Score(self, request: pb.Writing, context: Any) -> pb.Scored:
        return pb.Scored(**vars(self._serving.score(request.user, request.text)))

    def Forget(self, request: pb.User, context: Any) -> pb.Forgotten:
        with _turn(self._federated, context), _turn(self._personal, context):
            return pb.Forgotten(**vars(self._serving.forget(request.user)))

    def Rebase(self, request: pb.RebaseRequest, context: Any) -> pb.Rebased:
        user = request.user if request.HasField("user") else None
        with _turn(self._personal, context):
            return pb.Rebased(**vars(self._serving.rebase(request.version, user, request.margin)))

    def Status(self, request: pb.StatusRequest, context: Any) -> pb.ServingStatus:
        return pb.ServingStatus(**vars(self._serving.status()))

    def _answered(self, letter: Letter, kind: type[A], context: Any) -> A:
        """The node's answer. Raises NodeError where it refuses, and when the caller leaves before."""
        answer: Answer = self._node.answer(letter, context.is_active)
        if isinstance(answer, Refusal):
            raise NodeError(answer.fault, answer.message)
        assert isinstance(answer, kind)
        return answer


def _turn(turns: Turns, context: Any) -> AbstractContextManager[None]:
    """This call's turn, unless its caller leaves before."""
    context.add_callback(turns.wake)
    return turns.turn(context.time_remaining(), context.is_active)


def _read(path: Path) -> bytes:
    """A pool file's bytes."""
    try:
        if not path.is_file():
            raise ExchangeError(f"a pool is in a file, {path} is none; name another, or send the pool itself")
        check_size(path.stat().st_size)
        return path.read_bytes()
    except OSError as error:
        raise ExchangeError(
            f"the agent opens a pool's file itself, {path} is closed to it ({error.strerror}); send the pool itself"
        ) from error
