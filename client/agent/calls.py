"""What holds for every call to an agent: a token where one is needed, a deadline, a line in the log, and a status.

A node's refusals are gRPC statuses, the same on both sides:

    "lacks version"   FAILED_PRECONDITION
    "unknown users"   NOT_FOUND
    "busy"            RESOURCE_EXHAUSTED, which gRPC gives by itself beyond the most calls at a time
    "no agent"        UNAVAILABLE, which gRPC gives by itself where nobody answers
    "late"            DEADLINE_EXCEEDED, which gRPC gives by itself at the deadline
    "failed"          INTERNAL; any other status is read as this

The log names the call, its outcome and its seconds: never users, texts or what an error says.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc

from client.agent.security import TOKEN_HEADER, same_token
from federation.errors import FedquiltError, NodeError
from federation.exchange import Fault

log = logging.getLogger("fedquilt.agent")

MOST_SECONDS = 86_400.0
"""The longest deadline. To gRPC, a call without one has hundreds of billions of years left."""
STATUSES: Mapping[Fault, grpc.StatusCode] = {
    "lacks version": grpc.StatusCode.FAILED_PRECONDITION,
    "unknown users": grpc.StatusCode.NOT_FOUND,
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "no agent": grpc.StatusCode.UNAVAILABLE,
    "late": grpc.StatusCode.DEADLINE_EXCEEDED,
    "failed": grpc.StatusCode.INTERNAL,
}
_MOST_WORDS = 2000
"""Bytes of an error's text: a status travels in a header of a few KiB."""
_HANDLERS: Mapping[tuple[bool, bool], tuple[str, Callable[..., Any]]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


class CallRules(grpc.ServerInterceptor):  # type: ignore[misc]
    """Behaviours behind it raise `FedquiltError`s, and callers see statuses.

    token: what a call must carry; None where the transport itself knows the caller.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """The handler of a call, within the rules."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        kind, make = _HANDLERS[handler.request_streaming, handler.response_streaming]
        behaviour, name = getattr(handler, kind), handler_call_details.method.rpartition("/")[2]
        wrap = self._streaming if handler.response_streaming else self._single
        return make(wrap(behaviour, name), handler.request_deserializer, handler.response_serializer)

    def _single(self, behaviour: Callable[[Any, Any], Any], name: str) -> Callable[[Any, Any], Any]:
        def call(request: Any, context: Any) -> Any:
            with self._kept(name, context):
                return behaviour(request, context)

        return call

    def _streaming(self, behaviour: Callable[[Any, Any], Any], name: str) -> Callable[[Any, Any], Any]:
        def call(request: Any, context: Any) -> Iterator[Any]:
            with self._kept(name, context):
                yield from behaviour(request, context)

        return call

    @contextmanager
    def _kept(self, name: str, context: Any) -> Iterator[None]:
        started, outcome = time.perf_counter(), "done"
        try:
            self._check_caller(context)
            _check_deadline(context)
            yield
        except Unfit as error:
            outcome = "unfit"
            _end(context, error.status, str(error))
        except FedquiltError as error:
            fault: Fault = error.fault if isinstance(error, NodeError) else "failed"  # type: ignore[assignment]
            outcome = fault
            _end(context, STATUSES[fault], str(error))
        except Exception as error:  # populations and models run anyone's code, and its words may be a user's
            outcome = type(error).__name__
            log.error("%s raised %s\n%s", name, outcome, "".join(traceback.format_tb(error.__traceback__)))
            _end(context, STATUSES["failed"], f"the agent raised {outcome} in {name}; its log says where")
        finally:
            gone = outcome == "done" and not context.is_active()
            log.info("%s: %s in %.3f s", name, "gone" if gone else outcome, time.perf_counter() - started)

    def _check_caller(self, context: Any) -> None:
        headers = dict(context.invocation_metadata())
        if self._token is not None and not same_token(headers.get(TOKEN_HEADER, ""), self._token):
            raise Unfit(
                grpc.StatusCode.UNAUTHENTICATED,
                "on loopback a call carries the agent's token, got none or another; "
                "FEDQUILT_AGENT_TOKEN names its file, 'token' in the agent's state folder",
            )


class Unfit(Exception):
    """A call that no agent takes, whatever it asks. status: what it ends with."""

    def __init__(self, status: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.status = status


def _check_deadline(context: Any) -> None:
    if context.time_remaining() > MOST_SECONDS:
        raise Unfit(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"a call carries a deadline of at most {MOST_SECONDS:.0f} s, got none or a later one; set its timeout",
        )


def _end(context: Any, status: grpc.StatusCode, words: str) -> NoReturn:
    """Ends the call."""
    context.abort(status, words.encode()[:_MOST_WORDS].decode(errors="ignore"))
    raise AssertionError("abort raises")
