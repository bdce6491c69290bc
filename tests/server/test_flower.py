"""Our strategies in a plain Flower app: beside Flower's own FedAvg, and among replies that are not as they must be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
from flwr.supercore.task_identity import TaskIdentity

from federation.update import Limits
from server.flower import PluginStrategy
from strategies import make_optimizer, make_strategy

SHAPES = {"weight": (4, 3), "bias": (4,), "scale": (), "kernel": (2, 2, 2)}
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's runtime says to a ServerApp's process before it starts: without it there are no messages."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class OneGrid:
    """Ten nodes that are always there."""

    def get_node_ids(self) -> Iterable[int]:
        return range(1, 11)


def arrays(seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    values = {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return values | {"steps": np.array(seed)}


def record(values: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in values.items()})


def reply(node: int, content: RecordDict | Error) -> Message:
    asked = Message(RecordDict(), node, "train")
    asked.metadata.__dict__["_message_id"] = f"m{node}"
    return Message(content, reply_to=asked)


def trained(node: int, values: Arrays, examples: float = 1.0) -> Message:
    metrics = MetricRecord({"num-examples": examples, "loss": float(node)})
    return reply(node, RecordDict({"arrays": record(values), "metrics": metrics}))


def plugin(name: str = "fedavg", **options: object) -> PluginStrategy:
    return PluginStrategy(make_strategy(name), **options)


def aggregated(strategy: FlowersFedAvg, start: Arrays, replies: list[Message]) -> tuple[Arrays, MetricRecord | None]:
    strategy.configure_train(1, record(start), ConfigRecord(), OneGrid())
    found, metrics = strategy.aggregate_train(1, replies)
    assert found is not None
    return {name: array.numpy() for name, array in found.items()}, metrics


def test_fedavg_is_flowers_fedavg() -> None:
    start, replies = arrays(0), [trained(n, arrays(n), examples=10.0 * n) for n in (1, 2, 3)]
    ours, our_metrics = aggregated(plugin(limits=Limits(max_weight=1e9)), start, replies)
    theirs, their_metrics = aggregated(FlowersFedAvg(), start, replies)
    for name in SHAPES:
        assert ours[name].shape == SHAPES[name]
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    assert our_metrics == their_metrics
    assert ours["steps"] == start["steps"]  # not of floating point: the server's


def test_by_default_all_clients_weigh_the_same() -> None:
    start = arrays(0)
    ours, _ = aggregated(plugin(), start, [trained(1, arrays(1), 5.0), trained(2, arrays(2), 5e6)])
    np.testing.assert_allclose(ours["bias"], (arrays(1)["bias"] + arrays(2)["bias"]) / 2, rtol=1e-5, atol=1e-6)


def test_a_row_is_averaged_over_those_who_trained_it() -> None:
    start = arrays(0)
    one, other = ({name: value.copy() for name, value in start.items()} for _ in range(2))
    one["weight"][0] += 1.0
    one["weight"][1] += 1.0
    other["weight"][1] += 3.0
    strategy = PluginStrategy(make_strategy("masked_mean", kappa=0.0))
    ours, _ = aggregated(strategy, start, [trained(1, one), trained(2, other)])
    np.testing.assert_allclose((ours["weight"] - start["weight"])[:, 0], [1.0, 2.0, 0.0, 0.0], atol=1e-6)


def test_an_optimizer_goes_on_from_round_to_round() -> None:
    strategy = plugin(optimizer=make_optimizer("momentum", learning_rate=1.0, beta=0.5))
    start = arrays(0)
    step = {name: (value + 1 if name != "steps" else value) for name, value in start.items()}
    after, _ = aggregated(strategy, start, [trained(1, step)])
    again = {name: (value + 1 if name != "steps" else value) for name, value in after.items()}
    twice, _ = aggregated(strategy, after, [trained(1, again)])
    np.testing.assert_allclose(twice["bias"] - after["bias"], 1.5, rtol=1e-5)


def with_array(name: str, array: Array) -> Callable[[Message], Message]:
    def change(message: Message) -> Message:
        message.content["arrays"][name] = array
        return message

    return change


def with_metric(value: object) -> Callable[[Message], Message]:
    def change(message: Message) -> Message:
        message.content["metrics"] = MetricRecord({} if value is None else {"num-examples": value})
        return message

    return change


def without_metrics(message: Message) -> Message:
    del message.content["metrics"]
    return message


def without_an_array(message: Message) -> Message:
    del message.content["arrays"]["bias"]
    return message


def whole(value: float, shape: tuple[int, ...] = (4, 3)) -> Array:
    return Array(np.full(shape, value, np.float32))


def declared(data: bytes) -> Array:
    return Array("float32", (4, 3), "numpy.ndarray", data)


BAD: dict[str, tuple[Callable[[Message], Message], str]] = {
    "an error": (lambda message: reply(9, Error(1, "out of memory")), "out of memory"),
    "NaN": (with_array("weight", whole(np.nan)), "not finite"),
    "infinity": (with_array("weight", whole(np.inf)), "not finite"),
    "another shape": (with_array("weight", whole(1.0, (4, 4))), "must be"),
    "a shape that broadcasts": (with_array("weight", whole(1.0, (1,))), "must be"),
    "another type": (with_array("weight", Array(np.zeros((4, 3), np.float64))), "must be"),
    "bytes of another shape": (with_array("weight", declared(whole(1.0, (2,)).data)), "holds"),
    "bytes that are none": (with_array("weight", declared(b"junk")), "cannot be read"),
    "pickled bytes": (with_array("weight", declared(b"\x80\x04N.")), "cannot be read"),
    "an array too many": (with_array("more", whole(1.0)), "has the arrays"),
    "an array too few": (without_an_array, "has the arrays"),
    "no metrics": (without_metrics, "one MetricRecord"),
    "no weight": (with_metric(None), "says its weight"),
    "weights": (with_metric([1.0, 2.0]), "says its weight"),
    "a NaN weight": (with_metric(float("nan")), "weight must be finite"),
    "a negative weight": (with_metric(-3.0), "weight must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("place", [1, 2, 3], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_left_out_alone(kind: str, place: int, caplog: pytest.LogCaptureFixture) -> None:
    change, said = BAD[kind]
    start = arrays(0)
    good = [trained(n, arrays(n)) for n in (1, 2, 3) if n != place]
    bad = change(trained(place, arrays(place)))
    expected, expected_metrics = aggregated(plugin("masked_mean"), start, good)
    with caplog.at_level(logging.WARNING):
        found, metrics = aggregated(plugin("masked_mean"), start, [*good, bad])
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert metrics == expected_metrics
    assert said in caplog.text


def test_nothing_changes_when_nobody_is_admitted() -> None:
    strategy = plugin()
    strategy.configure_train(1, record(arrays(0)), ConfigRecord(), OneGrid())
    assert strategy.aggregate_train(1, [with_metric(-1.0)(trained(1, arrays(1)))]) == (None, None)
    assert strategy.aggregate_train(1, []) == (None, None)


def test_the_order_of_replies_changes_no_bit() -> None:
    start, values = arrays(0), [arrays(n) for n in range(1, 7)]
    forth, _ = aggregated(plugin(), start, [trained(n, v) for n, v in enumerate(values)])
    back, _ = aggregated(plugin(), start, [trained(n, v) for n, v in reversed(list(enumerate(values)))])
    assert all(np.array_equal(forth[name], back[name]) for name in forth)


def test_half_precision_stays_half() -> None:
    strategy, start = plugin(), {"weight": np.ones((3, 2), np.float16)}
    sent = {"weight": np.full((3, 2), 1.5, np.float16)}
    for _ in range(2):
        found, _ = aggregated(strategy, start, [trained(1, sent)])
    assert found["weight"].dtype == np.float16
    np.testing.assert_array_equal(found["weight"], sent["weight"])


def test_a_clients_difference_is_clipped() -> None:
    start = {"weight": np.zeros((1, 2), np.float32)}
    sent = {"weight": np.array([[30.0, 40.0]], np.float32)}
    found, _ = aggregated(plugin(limits=Limits({"arrays": 5.0})), start, [trained(1, sent)])
    np.testing.assert_allclose(found["weight"], [[3.0, 4.0]], rtol=1e-6)
