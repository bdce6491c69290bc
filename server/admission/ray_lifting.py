"""Blocks lifted as tasks of a Ray cluster that runs already: it is left as it was found."""

from __future__ import annotations

import logging
import platform
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from federation.errors import RunError
from server.admission.lifting import Lifted, Terms, lift_payloads

PATIENCE_SECONDS = 120.0
"""Longest wait for a block: it takes far less than a second, unless others keep the cluster busy."""

CONNECT_SECONDS = 10.0
TASKS_PER_CPU = 2
"""How many blocks are under way at most: one in work, one ready to follow."""


class RayLifter:
    """Lifts on a cluster (`server/admission/lifting.py`). A task that dies with its worker is done again: it is pure.

    address: HOST:PORT; tokens and certificates are Ray's own business. A process has one connection at a time.
    Raises RunError when there is no cluster there, when this process is connected already, and when blocks do not come
    back.
    """

    def __init__(self, address: str) -> None:
        if ray.is_initialized():
            raise RunError(
                "a lifter connects to Ray itself, this process is connected already; call ray.shutdown() first"
            )
        _join(address)
        self._task = ray.remote(_lift).options(num_cpus=1)
        self._under_way: deque[Any] = deque()

    def begin(self, terms: Terms) -> None:
        self._cancel()
        self._terms = ray.put(terms)
        self._most = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0)))

    def submit(self, payloads: Sequence[bytes], scales: Sequence[float]) -> list[Lifted]:
        self._under_way.append(self._task.remote(self._terms, payloads, scales))
        return self._results(self._most)

    def drain(self) -> list[Lifted]:
        return self._results(0)

    def close(self) -> None:
        self._cancel()
        ray.shutdown()

    def _results(self, most: int) -> list[Lifted]:
        """The oldest, until at most so many are under way."""
        return [_value(self._under_way.popleft()) for _ in range(len(self._under_way) - most)]

    def _cancel(self) -> None:
        while self._under_way:
            ray.cancel(self._under_way.popleft())


def _lift(terms: Terms, payloads: Sequence[bytes], scales: Sequence[float]) -> Lifted:
    torch.set_num_threads(1)  # other numbers of threads sum in other orders
    return lift_payloads(terms, payloads, scales)


def _value(reference: Any) -> Lifted:
    """What a task gave. An error that it raised, such as a plugin's, is raised as it was."""
    try:
        lifted: Lifted = ray.get(reference, timeout=PATIENCE_SECONDS)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise RunError(
            f"a block of updates must come back from the Ray cluster within {PATIENCE_SECONDS:g} s, this one did not "
            f"({error.__class__.__name__}); see `ray status`; nothing that was checkpointed is lost: run again"
        ) from error
    return lifted


def _join(address: str) -> None:
    try:
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()  # Ray would try for many minutes
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
    except (OSError, RuntimeError, ValueError) as error:
        ray.shutdown()
        raise RunError(
            f"compute.ray_address is HOST:PORT of a running cluster of Ray {ray.__version__} on Python "
            f"{platform.python_version()}, {address!r} is not ({error}); start one with `ray start --head`, or leave "
            "the address out to lift in this process"
        ) from error
