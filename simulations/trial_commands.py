"""What to type for a trial of Flower over TLS with the keys of `fedquilt keys`: a shell's text, in order."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from federation import keys

CONNECTION = "trial"
SERVER_PORT = 8000
FIRST_NODE_PORT = 9094
"""Nodes on one machine need a port each, on the loopback."""


def trial_commands(folder: Path, nodes: int, hosts: Sequence[str] = (), remote_agents: bool = False) -> str:
    """All commands, for the server's first host, or for one machine where there is none."""
    folder = folder.absolute()
    address = f"{_bracketed(hosts[0] if hosts else keys.LOOPBACK[0])}:{SERVER_PORT}"
    parts = [
        "# On the server, with ca.pem, server.pem and server.key. Whoever reaches its port may register nodes and run",
        "# apps on them: let only nodes and operators reach it.",
        _superlink(folder, _every_address(hosts[0]) if hosts else keys.LOOPBACK[1]),
        "",
        "# Where you operate it, with ca.pem and the public keys.",
        _connection(folder, address),
        *(_register(folder, node) for node in range(nodes)),
        "",
        "# On each node's machine, with ca.pem and the private key of that node alone.",
        *(_agent_certificate(folder) if remote_agents else ()),
        *(_supernode(folder, node, nodes, address) for node in range(nodes)),
        "",
        "# Where you operate it again: are all online? Then the federation, in the folder of the app.",
        f"flwr supernode list {CONNECTION}",
        f"flwr run . {CONNECTION} --stream",
    ]
    return "\n".join(parts)


def _superlink(folder: Path, listen: str) -> str:
    """Starts the server. Its database keeps the registered nodes when it starts again."""
    return _joined(
        ["flower-superlink", "--host", listen, "--port", SERVER_PORT],
        ["--ssl-ca-certfile", folder / keys.CA],
        ["--ssl-certfile", keys.certificate(folder, "server")],
        ["--ssl-keyfile", keys.certificate_key(folder, "server")],
        ["--enable-supernode-auth", "--disable-runtime-dependency-installation", "--database", "superlink.db"],
    )


def _supernode(folder: Path, node: int, nodes: int, address: str) -> str:
    """Starts one node."""
    return _joined(
        ["flower-supernode", "--superlink", address, "--port", FIRST_NODE_PORT + node],
        ["--root-certificates", folder / keys.CA],
        ["--auth-supernode-private-key", keys.private_key(folder, node)],
        ["--node-config", f"partition-id={node} num-partitions={nodes}"],
    )


def _agent_certificate(folder: Path) -> list[str]:
    """What a node shows to an agent on another machine; the agent is started with the same three files."""
    files = {
        "CERT": keys.certificate(folder, "agent"),
        "KEY": keys.certificate_key(folder, "agent"),
        "CA": folder / keys.CA,
    }
    return [f"export FEDQUILT_AGENT_{name}={shlex.quote(str(path))}" for name, path in files.items()]


def _connection(folder: Path, address: str) -> str:
    """Tells `flwr` of the server. Flower wants the certificate's path to be absolute."""
    return "\n".join(
        [
            'mkdir -p "${FLWR_HOME:=$HOME/.flwr}" && cat >> "$FLWR_HOME/config.toml" <<\'END\'',
            f"[superlink.{CONNECTION}]",
            f'address = "{address}"',
            f"root-certificates = {json.dumps(str(folder / keys.CA))}",
            "END",
        ]
    )


def _register(folder: Path, node: int) -> str:
    return _joined(["flwr", "supernode", "register", keys.public_key(folder, node), CONNECTION])


def _joined(*lines: Sequence[object]) -> str:
    """One command over several lines."""
    return " \\\n    ".join(shlex.join(str(word) for word in line) for line in lines)


def _every_address(host: str) -> str:
    """What a server listens to that is reached by this host: a socket is of one family of addresses."""
    return "::" if ":" in host else "0.0.0.0"


def _bracketed(host: str) -> str:
    """An IPv6 address as it is written before a port."""
    return f"[{host}]" if ":" in host else host
