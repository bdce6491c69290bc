"""One of our aggregation strategies in any Flower app.

    strategy = PluginStrategy(make_strategy("masked_mean"), limits=Limits({"arrays": 10.0}, max_weight=500))
    result = strategy.start(grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=3)

The app's clients are those of Flower's FedAvg: they send all arrays back, and `num-examples`. Admission, lift, merge
and finish are those of a fedquilt server; the loop is Flower's own, so its limits stay: it holds all replies of a round
in memory, and a run that dies begins anew. `server/live/loop.py` has neither limit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from federation.errors import ExchangeError
from federation.update import Limits, Schema, UpdateBlock, Values
from server.flower_arrays import FLOATS, difference, moved, numbers, read_npy, rows_of, spec_of, weighted_means
from server.round import Rules, ServerState, begin, close, lift
from strategies.optimizers import Sgd
from strategies.protocol import Optimizer, Strategy

PREFIX = "arrays"
"""All arrays are clipped together, under this name in `Limits.max_norm`."""

T = TypeVar("T")

_log = logging.getLogger("fedquilt")


class PluginStrategy(FedAvg):
    """Aggregates by a strategy and an optimizer of ours; samples, configures and evaluates as Flower's FedAvg.

    An array of the shape (rows, ..) is a section of that many rows, and a row that a client has left as it was is not
    part of its update: so a strategy for sparse updates counts those who trained a row. Rows are combined in float32.
    Arrays that are not of floating point keep the server's values.

    Metrics are averaged by the same capped weights, those that are single numbers and that all admitted clients have.

    optimizer: applies the mean; by default it is added, as FedAvg does. limits: of one client; by default all clients
    weigh the same. flower_options: FedAvg's. A function there that aggregates metrics gets admitted replies only.
    """

    def __init__(
        self,
        strategy: Strategy[Any],
        optimizer: Optimizer | None = None,
        limits: Limits | None = None,
        **flower_options: Any,
    ) -> None:
        by_default = dict.fromkeys(("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"), self._mean_metrics)
        super().__init__(**{**by_default, **flower_options})
        self._strategy, self._limits = strategy, limits or Limits()
        self._optimizer = optimizer or Sgd(learning_rate=1.0)
        self._arrays = ArrayRecord()
        self._state: ServerState | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As FedAvg. The arrays are what the replies are compared with."""
        self._arrays = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new arrays, and the metrics of the admitted clients. None of either when nobody was admitted.

        A reply that is not as it must be is left out alone, with a line in the log.
        """
        rules, state = self._rules_and_state()
        partial, admitted = None, []
        for content, lifted in self._admitted(server_round, replies, lambda reply: self._lifted(reply, state, rules)):
            partial = lifted if partial is None else self._strategy.merge(partial, lifted)
            admitted.append(content)
        if partial is None:
            return None, None
        self._state = close(state, partial, rules)
        return self._record(self._state.values), self.train_metrics_aggr_fn(admitted, self.weighted_by_key)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The metrics of the admitted clients, None when there are none. Replies are left out as in training."""
        admitted = [content for content, _ in self._admitted(server_round, replies, self._weight)]
        return self.evaluate_metrics_aggr_fn(admitted, self.weighted_by_key) if admitted else None

    def _admitted(
        self, server_round: int, replies: Iterable[Message], admit: Callable[[RecordDict], T]
    ) -> Iterator[tuple[RecordDict, T]]:
        """The replies that `admit` takes, in the order of their nodes, and what it makes of them."""
        for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
            try:
                content = _content(reply)
                taken = admit(content)
            except ExchangeError as error:
                _log.warning("round %d, node %d left out: %s", server_round, reply.metadata.src_node_id, error)
            else:
                yield content, taken

    def _rules_and_state(self) -> tuple[Rules, ServerState]:
        """The state goes on from round to round; its values are those that the clients were sent."""
        values = {name: rows_of(array.numpy()) for name, array in _floating(self._arrays).items()}
        schema = Schema({name: spec_of(rows) for name, rows in values.items()})
        rules = Rules(schema, self._strategy, {PREFIX: self._optimizer}, self._limits)
        return rules, begin(rules, values) if self._state is None else replace(self._state, values=values)

    def _lifted(self, content: RecordDict, state: ServerState, rules: Rules) -> Any:
        """A reply as a partial. Raises ExchangeError, which says why it is left out."""
        partial, rejections = lift(self._update(content, state.values), state.strategy, rules)
        if rejections:
            raise ExchangeError(rejections.reasons[0])
        return partial

    def _update(self, content: RecordDict, values: Values) -> UpdateBlock:
        weight = self._weight(content)
        if len(content.array_records) != 1:
            raise ExchangeError(f"a reply has one ArrayRecord, got {len(content.array_records)}")
        (arrays,) = content.array_records.values()
        if set(arrays) != set(self._arrays):
            raise ExchangeError(f"a reply has the arrays {list(self._arrays)}, got others")
        sections = {name: difference(self._sent(arrays, _own_name(name)), rows) for name, rows in values.items()}
        return UpdateBlock(sections, torch.tensor([weight]), {}, 0, "")

    def _sent(self, arrays: ArrayRecord, name: str) -> torch.Tensor:
        """A client's array as rows. Raises ExchangeError when it is not of the form of the one it was sent."""
        array, wanted = arrays[name], self._arrays[name]
        if (array.shape, array.dtype, array.stype) != (wanted.shape, wanted.dtype, wanted.stype):
            raise ExchangeError(f"the array {name!r} must be {wanted.shape} {wanted.dtype}, its reply says otherwise")
        return rows_of(read_npy(array.data, wanted.shape, wanted.dtype))

    def _weight(self, content: RecordDict) -> float:
        """What a reply claims to weigh. Raises ExchangeError for metrics that are not as they must be."""
        if len(content.metric_records) != 1:
            raise ExchangeError(f"a reply has one MetricRecord, got {len(content.metric_records)}")
        (metrics,) = content.metric_records.values()
        weight = numbers(metrics).get(self.weighted_by_key)
        if weight is None or weight < 0:
            raise ExchangeError(f"a reply says its weight under {self.weighted_by_key!r}, one number of at least 0")
        return weight

    def _mean_metrics(self, contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        """The mean of the metrics of admitted replies."""
        metrics = [numbers(record) for content in contents for record in content.metric_records.values()]
        weights = [min(own.pop(weighted_by_key), self._limits.max_weight) for own in metrics]
        return MetricRecord({**weighted_means(metrics, weights)})

    def _record(self, values: Values) -> ArrayRecord:
        """The new values in the shapes and types of the old ones."""
        record = dict(self._arrays.items())
        for name, rows in values.items():
            record[_own_name(name)] = Array(moved(self._arrays[_own_name(name)].numpy(), rows))
        return ArrayRecord(record)


def _content(reply: Message) -> RecordDict:
    """What a reply holds. Raises ExchangeError when it is an error: its words stay on the node."""
    if reply.has_error():
        raise ExchangeError(f"it answered with Flower's error {reply.error.code}; see the log of that node")
    return reply.content


def _floating(arrays: ArrayRecord) -> dict[str, Array]:
    """The arrays that are aggregated, by the name of their section."""
    trained = {name: array for name, array in arrays.items() if array.dtype in FLOATS}
    return {f"{PREFIX}/{name}": array for name, array in trained.items() if math.prod(array.shape)}


def _own_name(section: str) -> str:
    return section.removeprefix(f"{PREFIX}/")
