"""A node's part in a round: its users read, trained in blocks, written back, and their updates encoded.

Doing it again changes nothing: a user's state of a round rests on the newest one before that round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from client.round import RoundState, local_round, round_data
from client.store import UserStore, mended
from client.task import Task
from federation.codec import encode
from federation.data.population import Examples
from federation.devices import CPU, making_tensors_on, moved
from federation.streams import UserIds
from federation.warn import warn

T = TypeVar("T")


class Source(Examples, Protocol):
    """Something that draws users' examples on a device."""

    device: torch.device


def begin_round(store: UserStore, round_index: int, durable_round: int) -> None:
    """Forgets what a server that goes back to this round has given up, and notes what it never goes back to."""

    def begin() -> None:
        if store.newest_round() >= round_index:
            store.rewind(round_index - 1)
        store.compact(durable_round)

    whole(store, begin)


def train_block(task: Task, state: RoundState, store: UserStore, source: Source, user_ids: UserIds) -> list[bytes]:
    """The encoded update of each user, whose new state is kept. state: on the source's device."""
    users = whole(store, lambda: store.read(user_ids, before_round=state.round_index))
    with making_tensors_on(source.device):
        streams = task.streams.at("round", state.round_index)
        data = round_data(source, user_ids, task.local, streams)
        update, trained = local_round(task.model, state, moved(users, source.device), data, task.local, streams)
    update, trained = moved(update, CPU), moved(trained, CPU)
    whole(store, lambda: store.write(trained, state.round_index))
    return [encode(update, position, task.schema, task.update_formats) for position in range(len(user_ids))]


def whole(store: UserStore, action: Callable[[], T]) -> T:
    """What an action on the store gives; damaged shards are set aside, with a warning, and their users begin anew."""
    found, aside = mended(store, action)
    for shard in aside:
        warn(
            f"shard {shard} of the user store {store.folder} is damaged and was set aside "
            f"(shard-{shard:04d}.damaged-..); its users begin anew"
        )
    return found
