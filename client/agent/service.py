"""The calls of `agent.proto`, as those of a node and of what it serves. Errors become statuses in `calls.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING, Any, TypeVar

from client.agent import agent_pb2 as pb
from client.agent.messages import (
    contribution_parts,
    description_message,
    instructions_of,
    joined,
    measures_message,
)
from client.agent.turns import Turns
from federation.errors import NodeError
from federation.exchange import Answer, Contribution, Description, Letter, Measures, Refusal

if TYPE_CHECKING:
    from client.node import Node
    from client.serving import Serving
    from client.writing import Writer

WAITING = 4
"""Most calls of a kind that wait for their turn."""
WRITING = 4
"""Most texts that are written or scored at a time: each has a cache of its own, or large logits."""
A = TypeVar("A", Contribution, Description, Measures)


class AgentService:
    """Whatever takes time or memory takes turns, one line for each kind of work:

    - what the federation asks for, one at a time
    - pools that arrive, one at a time: each is held in memory whole
    - what changes personal values, one at a time
    - texts, `WRITING` at a time

    waiting: the most calls of each kind that wait for their turn.
    """

    def __init__(self, node: Node, serving: Serving, writer: Writer, waiting: int = WAITING) -> None:
        self._node, self._serving, self._writer = node, serving, writer
        self._federated, self._keeping, self._personal = Turns(waiting), Turns(waiting), Turns(waiting)
        self._writing = Turns(waiting, WRITING)
        self._closing = False

    def close(self) -> None:
        """Begins no more of this work. A training under way ends after its block of users, other work goes on."""
        self._closing = True
        for turns in (self._federated, self._keeping, self._personal, self._writing):
            turns.close()

    # For the federation

    def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.Description:
        return description_message(self._answered(Letter("describe"), Description, context))

    def Keep(self, request_iterator: Iterator[pb.Chunk], context: Any) -> pb.Version:
        with _turn(self._keeping, context):
            return pb.Version(version=self._node.keep(joined(request_iterator)))

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
        with (
            _turn(self._writing, context),
            closing(self._writer.generate(request.user, request.text, *sampling)) as written,
        ):
            for piece in written:
                yield pb.Text(text=piece)

    def Score(self, request: pb.Writing, context: Any) -> pb.Scored:
        with _turn(self._writing, context):
            return pb.Scored(**vars(self._writer.score(request.user, request.text)))

    def BeginAnew(self, request: pb.User, context: Any) -> pb.BegunAnew:
        with _turn(self._personal, context):
            return pb.BegunAnew(**vars(self._serving.begin_anew(request.user)))

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
        """The node's answer. Raises NodeError where it refuses, and when the caller or the agent leaves before."""
        answer: Answer = self._node.answer(letter, lambda: context.is_active() and not self._closing)
        if isinstance(answer, Refusal):
            raise NodeError(answer.fault, answer.message)
        assert isinstance(answer, kind)
        return answer


def _turn(turns: Turns, context: Any) -> AbstractContextManager[None]:
    """This call's turn, unless its caller leaves before."""
    context.add_callback(turns.wake)
    return turns.turn(context.time_remaining(), context.is_active)
