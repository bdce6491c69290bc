"""What the federation is worth to its users: nodes measure some of theirs, the server learns sums over each node's."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice

from federation.exchange import MEASURES, Answer, Instructions, Measures, Refusal
from server.live.errand import Errand
from server.live.lines import EvaluationLine, means
from server.live.session import Head, Session

LARGEST_LOSS = 100.0
"""Nats per target. Losses are at least 0, and a larger mean than this over a node's users is no measure: so one node
moves the mean of N users by no more than this times its share of them."""

_log = logging.getLogger("fedquilt")


def evaluate(session: Session, head: Head) -> EvaluationLine:
    """The measures of `evaluate.users` users of the nodes that would be asked in the next round: new ones if any node
    has some, else those that train. Nodes that do not answer within a round's time are left out."""
    split, positions = _chosen(session, head)
    work = session.work(head, head.state.round_index)
    asked = {node: session.instructions(work, split, p, head.durable_round) for node, p in positions.items()}
    measures, rejected = _measures(session, Errand(session, "evaluate", asked, head.pool), asked)
    users = sum(found.measured for found in measures.values())
    metrics, suppressed = means(_sums(measures), users)
    return EvaluationLine(
        round_index=head.state.round_index,
        version=head.version,
        split=split,
        users_asked=sum(map(len, positions.values())),
        users=users,
        nodes=len(measures),
        rejected=rejected,
        metrics=metrics,
        suppressed=suppressed,
    )


def dealt(holdings: Sequence[int], most: int) -> list[int]:
    """How many users of each node are measured: all nodes give one in turn, until there are `most`.

    >>> dealt([1, 5, 3], 6)
    [1, 3, 2]
    """
    turns = (place for turn in range(most) for place, users in enumerate(holdings) if users > turn)
    counts = Counter(islice(turns, most))
    return [counts[place] for place in range(len(holdings))]


def _chosen(session: Session, head: Head) -> tuple[str, dict[int, tuple[int, ...]]]:
    """The split, and the positions of each node's first users in it."""
    left_out = session.left_out(head.state.round_index + 1)
    present = {node: said.users for node, said in session.roster.present().items() if node not in left_out}
    split = "new" if any(users.get("new") for users in present.values()) else "train"
    counts = dealt([users.get(split, 0) for users in present.values()], session.config.evaluate.users)
    return split, {node: tuple(range(count)) for node, count in zip(present, counts) if count}


def _measures(
    session: Session, errand: Errand, asked: Mapping[int, Instructions]
) -> tuple[dict[int, Measures], dict[str, int]]:
    """What is fit to be summed, ascending by node, and how many nodes gave nothing, by reason."""
    measures: dict[int, Measures] = {}
    rejected: Counter[str] = Counter()
    undecided = dict.fromkeys(asked)
    for parcel in errand.answers(lambda: tuple(undecided)):
        undecided.pop(parcel.node)
        verdict = _judged(parcel.answer, asked[parcel.node])
        if isinstance(verdict, Measures):
            measures[parcel.node] = verdict
            session.roster.learn(parcel.node, verdict)
        else:
            rejected[verdict] += 1
            _log.warning("node %d is left out of an evaluation: %s", parcel.node, verdict)
    return dict(sorted(measures.items())), dict(rejected)


def _judged(answer: Answer | str, asked: Instructions) -> Measures | str:
    """The measures, or the reason why they are none."""
    match answer:
        case Refusal(fault):
            return fault
        case Measures(work, _, measured, sums):
            if work != asked.work:
                return "foreign work"
            if not 0 <= measured <= len(asked.positions):
                return "more users than asked for"
            if sums.keys() != set(MEASURES):
                return "other metrics"
            if not all(0 <= total <= LARGEST_LOSS * measured for total in sums.values()):
                return "a sum that is no measure"
            return answer
    return "no measures"


def _sums(measures: Mapping[int, Measures]) -> dict[str, float]:
    counted = [found.sums for found in measures.values() if found.measured]
    return {name: sum(sums[name] for sums in counted) for name in MEASURES}
