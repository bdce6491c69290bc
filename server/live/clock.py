"""The time, as an argument."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    """now: seconds that only grow. sleep: waits so many seconds."""

    now: Callable[[], float]
    sleep: Callable[[float], None]


REAL_TIME = Clock(time.monotonic, time.sleep)
