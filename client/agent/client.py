"""Calls to a resident agent, from a node's Flower process and from apps on the device. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import grpc

from client.agent import agent_pb2 as pb
from client.agent import agent_pb2_grpc
from client.agent.calls import STATUSES
from client.agent.messages import chunks, contribution_of, description_of, instructions_message, measures_of
from client.agent.security import (
    TOKEN_HEADER,
    TOKEN_NAME,
    Address,
    Credentials,
    TcpAddress,
    UnixAddress,
    check_owner,
    check_protected,
    parse_address,
    read_token,
    token_header,
)
from federation.errors import ConfigError, ExchangeError, NodeError
from federation.exchange import Answer, Description, Fault, Letter, Refusal

_FAULTS: dict[Any, Fault] = {status: fault for fault, status in STATUSES.items()}
_CHANNEL_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # a token is nobody else's business
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),  # an agent that is back is found at once
]


class AgentClient:
    """The agent at an address, and what to show it: by default what the environment says (`Credentials`).

    Every call takes the seconds that it may last. All but `answer` raise NodeError for what the agent refuses or fails
    to do: "no agent" where none answers, "late" when the seconds are over.

    Who answers is proved by a Unix socket, which is this user's or root's, and by TLS. A port of loopback proves
    nothing: where others use this machine too, one of them may listen there instead, and hear what is sent.

    Raises ConfigError for an address or credentials that cannot be used: beyond loopback there must be TLS.
    """

    def __init__(self, address: str, credentials: Credentials | None = None) -> None:
        credentials = Credentials.of_environment(os.environ) if credentials is None else credentials
        self._address = parse_address(address)
        self._token_file = _token_file(self._address, credentials)
        self._channel = _channel(self._address, credentials)
        self._stub = agent_pb2_grpc.AgentStub(self._channel)

    # For the federation

    def answer(self, letter: Letter, seconds: float) -> Answer:
        """What the node says to a letter; a Refusal instead of a NodeError."""
        deadline = time.monotonic() + seconds

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        try:
            if letter.pool is not None:
                self.keep(letter.pool, left())
            return self._answered(letter, left)
        except NodeError as error:
            return Refusal(cast(Fault, error.fault), str(error))

    def describe(self, seconds: float) -> Description:
        """What the node says of itself."""
        return description_of(self._asked(self._stub.Describe, pb.DescribeRequest(), seconds))

    def keep(self, payload: bytes, seconds: float) -> str:
        """Sends a pool file, and returns its version."""
        with self._as_node_errors():
            kept: pb.Version = self._stub.Keep(chunks(payload), **self._call(seconds))
        return kept.version

    def adopt(self, version: str, seconds: float) -> Description:
        """Has the agent serve this version, which it keeps, from now on."""
        return description_of(self._asked(self._stub.Adopt, pb.Version(version=version), seconds))

    # For the apps on the device

    def personalize(self, user: str, seconds: float) -> pb.Personalised:
        """Has the user's rows tuned on its data."""
        done: pb.Personalised = self._asked(self._stub.Personalize, pb.User(user=user), seconds)
        return done

    def generate(
        self, user: str, prompt: str, seconds: float, *, max_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """How the user's model continues a prompt, in pieces, as it writes. Dropping the iterator ends the writing."""
        asked = pb.Prompt(user=user, text=prompt, max_tokens=max_tokens, temperature=temperature, seed=seed)
        with self._as_node_errors():
            written = self._stub.Generate(asked, **self._call(seconds))
            try:
                for piece in written:
                    yield piece.text
            finally:
                written.cancel()

    def score(self, user: str, text: str, seconds: float) -> pb.Scored:
        """How well the user's model foretells a text."""
        scored: pb.Scored = self._asked(self._stub.Score, pb.Writing(user=user, text=text), seconds)
        return scored

    def begin_anew(self, user: str, seconds: float) -> pb.BegunAnew:
        """Has the user's next personalisation begin a course."""
        done: pb.BegunAnew = self._asked(self._stub.BeginAnew, pb.User(user=user), seconds)
        return done

    def forget(self, user: str, seconds: float) -> pb.Forgotten:
        """Has the device forget what it made of a user's data; the answer says what that cannot undo."""
        done: pb.Forgotten = self._asked(self._stub.Forget, pb.User(user=user), seconds)
        return done

    def rebase(self, version: str, seconds: float, *, user: str | None = None, margin: float = 0.0) -> pb.Rebased:
        """Has personal values, one user's or all users', refer to this version where that serves as well."""
        asked = pb.RebaseRequest(version=version, user=user, margin=margin)
        done: pb.Rebased = self._asked(self._stub.Rebase, asked, seconds)
        return done

    def status(self, seconds: float) -> pb.ServingStatus:
        """The device in numbers."""
        found: pb.ServingStatus = self._asked(self._stub.Status, pb.StatusRequest(), seconds)
        return found

    def close(self) -> None:
        """Ends calls under way."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answered(self, letter: Letter, left: Callable[[], float]) -> Answer:
        if letter.kind == "describe":
            return self.describe(left())
        asked = letter.instructions
        if asked is None:
            raise NodeError("failed", f"a letter to {letter.kind} needs instructions, got none; send them")
        if letter.kind == "release":
            return self.adopt(asked.version, left())
        if letter.kind == "evaluate":
            return measures_of(self._asked(self._stub.Evaluate, instructions_message(asked), left()))
        with self._as_node_errors():
            return contribution_of(self._stub.Train(instructions_message(asked), **self._call(left())))

    def _call(self, seconds: float) -> dict[str, Any]:
        """A call's deadline, and the token: read each time, since an agent that was restarted has another one.

        Raises ConfigError before anything is sent to a socket of someone else.
        """
        if isinstance(self._address, UnixAddress):
            check_owner(self._address)
        headers = [(TOKEN_HEADER, token_header(read_token(self._token_file)))] if self._token_file else []
        return {"timeout": seconds, "metadata": headers}

    def _asked(self, call: Callable[..., Any], request: Any, seconds: float) -> Any:
        with self._as_node_errors():
            return call(request, **self._call(seconds))

    @contextmanager
    def _as_node_errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            raise _node_error(error, self._address) from None
        except (ConfigError, ExchangeError) as error:
            raise NodeError("failed", str(error)) from error


def _node_error(error: Any, address: Address) -> NodeError:
    """What a call's status means."""
    fault, words = _FAULTS.get(error.code(), "failed"), error.details()
    if fault == "no agent":
        words = f"no agent answers at {address} ({words}); start one there with 'fedquilt agent', or name another"
    if fault == "late":
        words = (
            f"the agent at {address} did not answer in time ({words}); give it longer, or ask when it has less to do"
        )
    return NodeError(fault, words)


def _token_file(address: Address, credentials: Credentials) -> Path | None:
    """The token's file, where calls carry one."""
    if not isinstance(address, TcpAddress) or credentials.tls is not None:
        return None
    check_protected(address, None)
    if credentials.token_file is None:
        raise ConfigError(
            f"on loopback a call carries the agent's token, {address} needs one; set FEDQUILT_AGENT_TOKEN to the file "
            f"{TOKEN_NAME!r} in the agent's state folder"
        )
    return credentials.token_file


def _channel(address: Address, credentials: Credentials) -> Any:
    if not isinstance(address, TcpAddress) or credentials.tls is None:
        return grpc.insecure_channel(str(address), _CHANNEL_OPTIONS)
    certificate, key, authority = credentials.tls.read()
    shown = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(str(address), shown, _CHANNEL_OPTIONS)
