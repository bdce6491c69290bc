"""Running a piece of a test in a process of its own, which may die."""

import os
from collections.abc import Callable


def exit_code(action: Callable[[], object]) -> int:
    """The exit code of a forked child that runs `action`: 0, or 1 when it raised."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
