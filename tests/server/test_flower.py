"""Our strategies in a plain Flower app: beside Flower's own FedAvg, and among replies that are not as they must be."""

from __future__ import annotations

import io
import logging
import struct
import tracemalloc
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


def with_loss(value: object) -> Callable[[Message], Message]:
    def change(message: Message) -> Message:
        message.content["metrics"] = MetricRecord({"num-examples": 1.0, "loss": value})
        return message

    return change


def with_two_metric_records(message: Message) -> Message:
    message.content["more"] = MetricRecord({"num-examples": 1.0})
    return message


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


def npy(header: str, values: bytes = b"\0" * 48, version: tuple[int, int] = (1, 0)) -> Array:
    """Declared as the schema wants it, whatever its bytes say."""
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return declared(b"\x93NUMPY" + bytes(version) + length + header.encode() + values)


def header(shape: object) -> str:
    return f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n"


def archive() -> Array:
    file = io.BytesIO()
    np.savez(file, np.zeros((4, 3), np.float32))
    return declared(file.getvalue())


BAD: dict[str, tuple[Callable[[Message], Message], str]] = {
    "an error": (lambda message: reply(9, Error(1, "a user's words")), "Flower's error 1"),
    "NaN": (with_array("weight", whole(np.nan)), "not finite"),
    "infinity": (with_array("weight", whole(np.inf)), "not finite"),
    "another shape": (with_array("weight", whole(1.0, (4, 4))), "must be"),
    "a shape that broadcasts": (with_array("weight", whole(1.0, (1,))), "must be"),
    "another type": (with_array("weight", Array(np.zeros((4, 3), np.float64))), "must be"),
    "bytes of another shape": (with_array("weight", declared(whole(1.0, (2,)).data)), "another array"),
    "bytes of another type": (with_array("weight", declared(Array(np.zeros((4, 3))).data)), "another array"),
    "bytes that are none": (with_array("weight", declared(b"junk")), "cannot be read"),
    "no bytes": (with_array("weight", declared(b"")), "cannot be read"),
    "the magic of an archive": (with_array("weight", declared(b"PK\x03\x04junk")), "cannot be read"),
    "an archive": (with_array("weight", archive()), "cannot be read"),
    "a header of many terabytes": (with_array("weight", npy(header((10**12, 3)))), "another array"),
    "a header beyond 64 bits": (with_array("weight", npy(header((10**23,)))), "another array"),
    "a header of brackets": (with_array("weight", npy("(" * 9000)), "cannot be read"),
    "a header of few brackets": (with_array("weight", npy("(" * 900)), "cannot be read"),
    "a header of signs": (with_array("weight", npy("-" * 9000)), "cannot be read"),
    "a header of few signs": (with_array("weight", npy("-" * 900)), "cannot be read"),
    "a header that is cut": (with_array("weight", npy(header((4, 3))[:30], b"")), "cannot be read"),
    "a header of an odd version": (with_array("weight", npy(header((4, 3)), version=(9, 0))), "cannot be read"),
    "too few bytes": (with_array("weight", npy(header((4, 3)), b"\0" * 47)), "48 bytes must follow"),
    "too many bytes": (with_array("weight", npy(header((4, 3)), b"\0" * 49)), "48 bytes must follow"),
    "pickled bytes": (with_array("weight", declared(b"\x80\x04N.")), "cannot be read"),
    "an array too many": (with_array("more", whole(1.0)), "has the arrays"),
    "an array too few": (without_an_array, "has the arrays"),
    "no metrics": (without_metrics, "one MetricRecord"),
    "metrics twice": (with_two_metric_records, "one MetricRecord, got 2"),
    "a NaN metric": (with_loss(float("nan")), "metric must be finite"),
    "an infinite metric": (with_loss(float("-inf")), "metric must be finite"),
    "no weight": (with_metric(None), "says its weight"),
    "weights": (with_metric([1.0, 2.0]), "says its weight"),
    "a NaN weight": (with_metric(float("nan")), "must be finite"),
    "a weight beyond float32": (with_metric(1e300), "weight must be finite"),
    "a negative weight": (with_metric(-3.0), "of at least 0"),
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
    assert "a user's words" not in caplog.text


def test_what_bytes_merely_declare_is_not_allocated() -> None:
    strategy, gibibyte = plugin(), header((2**28,))
    strategy.configure_train(1, record({"weight": np.zeros((4, 3), np.float32)}), ConfigRecord(), OneGrid())
    bad = with_array("weight", npy(gibibyte))(trained(1, {"weight": np.ones((4, 3), np.float32)}))
    tracemalloc.start()
    try:
        assert strategy.aggregate_train(1, [bad]) == (None, None)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_columns_may_come_first_in_memory() -> None:
    start, sent = {"weight": np.zeros((4, 3), np.float32)}, np.arange(12, dtype=np.float32).reshape(4, 3)
    found, _ = aggregated(plugin(), start, [trained(1, {"weight": np.asfortranarray(sent)})])
    np.testing.assert_array_equal(found["weight"], sent)


def test_nothing_changes_when_nobody_is_admitted() -> None:
    strategy = plugin()
    strategy.configure_train(1, record(arrays(0)), ConfigRecord(), OneGrid())
    assert strategy.aggregate_train(1, [with_metric(-1.0)(trained(1, arrays(1)))]) == (None, None)
    assert strategy.aggregate_train(1, []) == (None, None)


# -------------------------------------------------------------------------------- metrics


def evaluated(node: int, **metrics: object) -> Message:
    return reply(node, RecordDict({"metrics": MetricRecord(metrics)}))


def weighing(node: int, examples: float, **metrics: object) -> Message:
    return evaluated(node, **{"num-examples": examples}, **metrics)


def test_metrics_are_weighed_as_updates_are() -> None:
    strategy = plugin(limits=Limits(max_weight=10.0))
    found = strategy.aggregate_evaluate(1, [weighing(1, 1e15, loss=4.0), weighing(2, 30, loss=1.0)])
    assert found == MetricRecord({"loss": 2.5})
    strategy = plugin(limits=Limits(max_weight=10.0))
    _, metrics = aggregated(strategy, arrays(0), [trained(1, arrays(1), 1e15), trained(4, arrays(2), 5.0)])
    assert metrics is not None
    assert metrics["loss"] == pytest.approx((1 * 10 + 4 * 5) / 15)


def test_only_numbers_that_all_have_are_averaged() -> None:
    replies = [weighing(1, 1, loss=1.0, each=[1.0, 2.0], mine=3), weighing(2, 1, loss=3.0, each=1.0)]
    assert plugin().aggregate_evaluate(1, replies) == MetricRecord({"loss": 2.0})
    assert plugin().aggregate_evaluate(1, replies[::-1]) == MetricRecord({"loss": 2.0})


def test_nobody_with_a_weight_moves_nothing() -> None:
    start, replies = arrays(0), [trained(n, arrays(n), 0.0) for n in (1, 2)]
    found, metrics = aggregated(plugin(), start, replies)
    assert all(np.array_equal(found[name], start[name]) for name in start)
    assert metrics == MetricRecord({})


def test_evaluations_that_are_bad_are_left_out_alone(caplog: pytest.LogCaptureFixture) -> None:
    bad = [
        reply(3, Error(1, "a user's words")),
        reply(4, RecordDict()),
        weighing(5, 1, loss=float("nan")),
        weighing(6, -1, loss=1.0),
        weighing(7, float("inf"), loss=1.0),
        evaluated(8, loss=1.0),
    ]
    good = [weighing(1, 1, loss=1.0), weighing(9, 1, loss=2.0)]
    with caplog.at_level(logging.WARNING):
        assert plugin().aggregate_evaluate(1, [*bad, *good]) == MetricRecord({"loss": 1.5})
    assert [f"node {node} left out" in caplog.text for node in range(1, 10)] == [False] * 2 + [True] * 6 + [False]
    assert plugin().aggregate_evaluate(1, bad) is None


def test_a_function_of_the_app_gets_admitted_replies_only() -> None:
    seen: list[list[RecordDict]] = []

    def count(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
        seen.append(contents)
        return MetricRecord({"clients": len(contents)})

    strategy = plugin(train_metrics_aggr_fn=count, evaluate_metrics_aggr_fn=count)
    good, bad = trained(1, arrays(1)), with_metric(-1.0)(trained(2, arrays(2)))
    assert aggregated(strategy, arrays(0), [good, bad])[1] == MetricRecord({"clients": 1})
    assert strategy.aggregate_evaluate(1, [good, bad]) == MetricRecord({"clients": 1})
    assert seen == [[good.content]] * 2


# -------------------------------------------------------------------------------- laws and types


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


def test_rows_that_nobody_trained_keep_every_bit() -> None:
    start = {"weight": np.full((3, 2), 1 / 3)}
    assert start["weight"].dtype == np.float64
    sent = {"weight": start["weight"].copy()}
    sent["weight"][1] += 0.5
    found, _ = aggregated(plugin(), start, [trained(1, sent), trained(2, sent)])
    assert found["weight"].dtype == np.float64
    np.testing.assert_array_equal(found["weight"][[0, 2]], start["weight"][[0, 2]])
    np.testing.assert_allclose(found["weight"][1], sent["weight"][1], rtol=1e-6)


def test_a_clients_difference_is_clipped() -> None:
    start = {"weight": np.zeros((1, 2), np.float32)}
    sent = {"weight": np.array([[30.0, 40.0]], np.float32)}
    found, _ = aggregated(plugin(limits=Limits({"arrays": 5.0})), start, [trained(1, sent)])
    np.testing.assert_allclose(found["weight"], [[3.0, 4.0]], rtol=1e-6)
