"""The resident agent: a process that owns a device's data, user store and model, and answers over gRPC.

It spares Flower's process, which is a new one for each message, the loading of the model, and serves each user's
personal model to the apps on the device meanwhile. In the node's state folder, besides what the node keeps:

    agent.lock   held while an agent works here; the number of its process
    agent.sock   where it listens by default
    token        what calls carry over loopback, a new one at each start
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from queue import SimpleQueue

from client.agent.security import Address, TlsFiles, check_protected, private_files, sole_agent
from client.agent.server import AgentServer, work_alone
from client.agent.service import AgentService
from client.node import Node, NodeConfig
from client.serving import Serving
from client.writing import Writer


def serve(
    config: NodeConfig, address: Address, tls: TlsFiles | None = None, say: Callable[[str], None] = print
) -> None:
    """Runs an agent until SIGTERM or SIGINT; another one ends the process at once, which harms nothing. So does the
    first when work under way does not end in time: closing a store that is being written to would do harm.

    say: is told what it does. Raises ConfigError when it cannot run so, and what `Node` raises.
    """
    check_protected(address, tls)
    with private_files(), sole_agent(config.state):
        work_alone()
        say(f"agent of {config.state}: loading its users and their model")
        with closing(Node(config)) as node:
            node.base_model()
            serving = Serving(node)
            service = AgentService(node, serving, Writer(node, serving))
            with AgentServer(service, config.state, address, tls) as agent, _stop_signals() as wait_for_one:
                say(f"agent of {config.state}: ready at {agent.address}")
                number = wait_for_one()
                say(f"agent of {config.state}: stopping")
            if agent.working:
                say(f"agent of {config.state}: leaves work that did not end in time")
                signal.raise_signal(number)


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """A function that waits for SIGTERM or SIGINT, and returns which. Afterwards they end the process at once."""
    came: SimpleQueue[int] = SimpleQueue()  # the one queue that a signal's handler may use
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: came.put(number))
    try:
        yield came.get
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
