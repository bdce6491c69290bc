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
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from federation.errors import ExchangeError
from federation.update import Limits, Schema, Section, SectionSpec, UpdateBlock, Values
from server.round import Rules, ServerState, begin, close, lift
from strategies.optimizers import Sgd
from strategies.protocol import Optimizer, Strategy

PREFIX = "arrays"
"""All arrays are clipped together, under this name in `Limits.max_norm`."""

_log = logging.getLogger("fedquilt")


class PluginStrategy(FedAvg):
    """Aggregates by a strategy and an optimizer of ours; samples, configures and evaluates as Flower's FedAvg.

    An array of the shape (rows, ..) is a section of that many rows, and a row that a client has left as it was is not
    part of its update: so a strategy for sparse updates counts those who trained a row. Arrays that are not of
    floating point keep the server's values.

    optimizer: applies the mean; by default it is added, as FedAvg does. limits: of one client; by default all clients
    weigh the same. flower_options: FedAvg's.
    """

    def __init__(
        self,
        strategy: Strategy[Any],
        optimizer: Optimizer | None = None,
        limits: Limits | None = None,
        **flower_options: Any,
    ) -> None:
        super().__init__(**flower_options)
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
        for reply in sorted(replies, key=lambda message: message.metadata.src_node_id):
            try:
                lifted = self._lifted(reply, state, rules)
            except ExchangeError as error:
                _log.warning("round %d, node %d left out: %s", server_round, reply.metadata.src_node_id, error)
                continue
            partial = lifted if partial is None else self._strategy.merge(partial, lifted)
            admitted.append(reply.content)
        if partial is None:
            return None, None
        self._state = close(state, partial, rules)
        return self._record(self._state.values), self.train_metrics_aggr_fn(admitted, self.weighted_by_key)

    def _rules_and_state(self) -> tuple[Rules, ServerState]:
        """The state goes on from round to round; its values are those that the clients were sent."""
        values = {name: _rows(array) for name, array in _floating(self._arrays).items()}
        schema = Schema({name: _section(rows) for name, rows in values.items()})
        rules = Rules(schema, self._strategy, {PREFIX: self._optimizer}, self._limits)
        return rules, begin(rules, values) if self._state is None else replace(self._state, values=values)

    def _lifted(self, reply: Message, state: ServerState, rules: Rules) -> Any:
        """The reply as a partial. Raises ExchangeError, which says why it is left out."""
        if reply.has_error():
            raise ExchangeError(reply.error.reason or f"error {reply.error.code}")
        update = self._update(reply.content, state.values)
        partial, rejections = lift(update, state.strategy, rules)
        if rejections:
            raise ExchangeError(rejections.reasons[0])
        return partial

    def _update(self, content: RecordDict, values: Values) -> UpdateBlock:
        if len(content.array_records) != 1 or len(content.metric_records) != 1:
            raise ExchangeError("a reply has one ArrayRecord and one MetricRecord, got others")
        (arrays,), (metrics,) = content.array_records.values(), content.metric_records.values()
        weight = metrics.get(self.weighted_by_key)
        if not isinstance(weight, int | float):
            raise ExchangeError(f"a reply says its weight under {self.weighted_by_key!r}, got {type(weight).__name__}")
        if list(arrays) != list(self._arrays):
            raise ExchangeError(f"a reply has the arrays {list(self._arrays)}, got {list(arrays)}")
        sent = {name: _sent(array, self._arrays[_own_name(name)]) for name, array in _floating(arrays).items()}
        sections = {name: _difference(sent[name], rows) for name, rows in values.items()}
        return UpdateBlock(sections, torch.tensor([float(weight)]), {}, 0, "")

    def _record(self, values: Values) -> ArrayRecord:
        """The new values in the shapes and types of the old ones."""
        record = dict(self._arrays.items())
        for name, rows in values.items():
            old = self._arrays[_own_name(name)]
            record[_own_name(name)] = Array(rows.numpy().reshape(old.shape).astype(old.dtype))
        return ArrayRecord(record)


def _floating(arrays: ArrayRecord) -> dict[str, Array]:
    """The arrays that are aggregated, by the name of their section."""
    trained = {name: array for name, array in arrays.items() if array.dtype.startswith("float")}
    return {f"{PREFIX}/{name}": array for name, array in trained.items() if math.prod(array.shape)}


def _own_name(section: str) -> str:
    return section.removeprefix(f"{PREFIX}/")


def _section(rows: torch.Tensor) -> SectionSpec:
    return SectionSpec(len(rows), {"values": rows.shape[1]}, len(rows))


def _sent(array: Array, wanted: Array) -> torch.Tensor:
    """A client's array as rows. Raises ExchangeError when what it holds is not what was sent to it."""
    if (array.shape, array.dtype, array.stype) != (wanted.shape, wanted.dtype, wanted.stype):
        raise ExchangeError(f"an array must be {wanted.shape} {wanted.dtype}, got {array.shape} {array.dtype}")
    try:
        return _rows(array)
    except (ValueError, EOFError, OSError) as error:
        raise ExchangeError(f"an array's bytes cannot be read ({error})") from error


def _rows(array: Array) -> torch.Tensor:
    """(rows, width) float32. Raises ValueError when the bytes are not of the declared shape and type."""
    values = array.numpy()
    if values.shape != tuple(array.shape) or str(values.dtype) != array.dtype:
        raise ValueError(f"declared {array.shape} {array.dtype}, holds {values.shape} {values.dtype}")
    return torch.from_numpy(values.reshape(values.shape[0] if values.ndim else 1, -1).astype(np.float32))


def _difference(sent: torch.Tensor, rows: torch.Tensor) -> Section:
    """What a client has changed, as a section of one user: rows it has left alone are padding."""
    difference = sent - rows
    changed = (difference != 0).any(1)
    return Section(torch.arange(len(rows), dtype=torch.int32)[None], changed[None], difference[None])
