"""An agent over a real socket, for a device that is made up."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.agent.security import TlsFiles, parse_address
from client.agent.server import AgentServer
from client.agent.service import AgentService
from client.serving import BegunAnew, Forgotten, Personalised, Rebased, ServingStatus
from client.writing import Scored
from federation.exchange import Answer, Contribution, Description, Letter, Measures

SECONDS = 30.0
"""More than any call of a test takes."""


class MadeUp:
    """A node and what it serves, in one: answers at once with values that say what was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.described = Description({"train": 5, "new": 0}, 1, ("r1-a", "r2-b"), "r1-a", "0.1.0")
        self.payload = b"update"
        self.going_on = threading.Event()
        self.going_on.set()
        self.working = threading.Semaphore(0)
        self.error: Exception | None = None
        self.closed = threading.Event()

    def answer(self, letter: Letter, wanted: Callable[[], bool] = lambda: True) -> Answer:
        self._note(letter)
        self.wanted = wanted
        if letter.kind == "describe":
            return self.described
        assert letter.instructions is not None
        self.working.release()
        assert self.going_on.wait(SECONDS)
        if letter.kind == "evaluate":
            return Measures(letter.instructions.work, {"train": 5}, 2, {"base_loss": 1.5})
        return Contribution(letter.instructions.work, {"train": 5}, self.payload)

    def keep(self, payload: bytes) -> str:
        self._note(payload)
        return "r9-kept"

    def adopt(self, version: str) -> None:
        self._note(version)

    def describe(self) -> Description:
        return self.described

    def personalize(self, user: str) -> Personalised:
        self._note(user)
        return Personalised("r1-a", 40, 1234, 2.5, 1.25)

    def generate(
        self, user: str, prompt: str, max_tokens: int, temperature: float, seed: int
    ) -> Generator[str, None, None]:
        self._note((user, prompt, max_tokens, temperature, seed))
        try:
            for piece in range(max_tokens):
                yield f"{piece}é "
        finally:
            self.closed.set()

    def score(self, user: str, text: str) -> Scored:
        self._note((user, text))
        return Scored(7, 1.5, 2.25)

    def begin_anew(self, user: str) -> BegunAnew:
        self._note(user)
        return BegunAnew(True)

    def forget(self, user: str) -> Forgotten:
        self._note(user)
        return Forgotten(True, 2, ("copies",))

    def rebase(self, version: str, user: str | None, margin: float) -> Rebased:
        self._note((version, user, margin))
        return Rebased(3, 1)

    def status(self) -> ServingStatus:
        self._note("status")
        return ServingStatus({"train": 5}, 2, 1, "r1-a", ("r1-a",), 4096)

    def _note(self, asked: Any) -> None:
        self.asked.append(asked)
        if self.error is not None:
            raise self.error


@contextmanager
def agent_at(
    device: MadeUp, state: Path, address: str = "", tls: TlsFiles | None = None, waiting: int = 4
) -> Iterator[AgentServer]:
    """An agent for the device; by default at a socket in the state folder."""
    service = AgentService(device, device, device, waiting)  # type: ignore[arg-type]
    with AgentServer(service, state, parse_address(address or f"unix:{state}/agent.sock"), tls) as server:
        yield server
