"""What the user should know, though the work goes on."""

from __future__ import annotations

import logging
import warnings

from federation.errors import FedquiltWarning

_log = logging.getLogger("fedquilt")


def warn(message: str, stacklevel: int = 2) -> None:
    """A FedquiltWarning, which the log has too: of equal warnings from one place Python shows the first alone.

    stacklevel: 1 blames the caller of this function, 2 the caller's caller.
    """
    warnings.warn(FedquiltWarning(message), stacklevel=stacklevel + 1)
    _log.warning(message)
