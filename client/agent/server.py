"""Where an agent listens, and how it stops."""

from __future__ import annotations

import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn, Self

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from client.agent import agent_pb2_grpc
from client.agent.calls import CallRules, Unfit
from client.agent.security import Address, TcpAddress, TlsFiles, UnixAddress, check_protected, new_token, private_files
from client.agent.service import AgentService
from federation.errors import ConfigError

CALLS = 32
"""Most calls at a time; each has a thread. With all lines full (`service.py`) there is room for short questions."""
GRACE_SECONDS = 10.0
"""What calls have to end by themselves when the agent is stopped."""
SERVICE_NAME = "fedquilt.agent.v1.Agent"
_CANCEL_SECONDS = 1.0
"""What calls that did not end by themselves have to notice that they were ended."""
_PROBE_SECONDS = 1.0
_SERVER_OPTIONS = [("grpc.so_reuseport", 0)]
"""Else a second agent would quietly share the port of the first."""


class AgentServer:
    """Answers at an address for a node, as long as the context lasts; calls under way get time to end by themselves.

    state: the folder for the token. address: with its port once it listens. working: whether, after the context, a
    call goes on that did not end in time: what it works on must not be closed under it.

    Raises ConfigError when strangers could call (`check_protected`), when someone listens there already, and when it is
    no address of this machine.
    """

    def __init__(self, service: AgentService, state: Path, address: Address, tls: TlsFiles | None = None) -> None:
        check_protected(address, tls)
        self.address, self.working = address, False
        self._service, self._credentials = service, _server_credentials(tls)
        token = new_token(state) if isinstance(address, TcpAddress) and tls is None else None
        self._threads = ThreadPoolExecutor(CALLS, "call", initializer=work_alone)
        self._health = _Health()
        rules = [CallRules(token)]
        self._server = grpc.server(self._threads, None, rules, _SERVER_OPTIONS, maximum_concurrent_rpcs=CALLS)
        agent_pb2_grpc.add_AgentServicer_to_server(service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def __enter__(self) -> Self:
        self.address = _bind(self._server, self.address, self._credentials)
        self._health.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._health.enter_graceful_shutdown()
        self._service.close()
        self._server.stop(GRACE_SECONDS).wait(GRACE_SECONDS + _CANCEL_SECONDS)
        ending = Thread(target=self._threads.shutdown, daemon=True)
        ending.start()
        ending.join(_CANCEL_SECONDS)
        self.working = ending.is_alive()


class _Health(health.HealthServicer):  # type: ignore[misc]
    """How the agent is, for those who ask. Each who watched instead would hold a thread for as long."""

    def Watch(self, request: Any, context: Any) -> NoReturn:
        raise Unfit(
            grpc.StatusCode.UNIMPLEMENTED, "an agent's health is asked for, not watched; call Check now and then"
        )


def work_alone() -> None:
    """In each thread that works: its sums have the same bits everywhere."""
    torch.set_num_threads(1)


def _server_credentials(tls: TlsFiles | None) -> Any:
    """For a server that shows its certificate, and wants its caller's."""
    if tls is None:
        return None
    certificate, key, authority = tls.read()
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)


def _bind(server: Any, address: Address, credentials: Any) -> Address:
    """Where the server listens then."""
    if isinstance(address, UnixAddress):
        _check_unused(address.path)
    try:
        protected = (credentials,) if credentials else ()
        add = server.add_secure_port if credentials else server.add_insecure_port
        with private_files():  # else anyone could connect before the socket is its owner's alone
            port = add(str(address), *protected)
    except RuntimeError as error:
        raise ConfigError(
            f"an agent listens at a free address of this machine, {address} is none, or the TLS key is not the "
            f"certificate's ({error}); give another"
        ) from error
    if isinstance(address, TcpAddress):
        return replace(address, port=port)
    address.path.chmod(0o600)
    return address


def _check_unused(path: Path) -> None:
    """gRPC replaces any socket that is there: that of an agent that was killed, and that of one which lives."""
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise ConfigError(f"an agent listens at a socket of its own, {path} is a file or a folder; give another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except OSError:  # someone is there, who is too busy, or is not for us
            pass
    raise ConfigError(f"an agent listens where nobody else does, someone has {path}; stop it, or give another path")
