"""Calls to an agent over real sockets, for a device that is made up: what travels, who may call, what goes wrong."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from client.agent import agent_pb2 as pb
from client.agent import agent_pb2_grpc
from client.agent.client import AgentClient
from client.agent.messages import instructions_message
from client.agent.security import Credentials, TlsFiles, UnixAddress
from client.agent.server import CALLS, SERVICE_NAME, AgentServer
from client.agent.service import WAITING, WRITING
from client.serving import BegunAnew, Forgotten, Personalised, Rebased, ServingStatus
from client.writing import Scored
from federation.errors import ConfigError, FedquiltError, NodeError, StoreError
from federation.exchange import FAULTS, Contribution, Instructions, Letter, Refusal
from federation.keys import CA, certificate, certificate_key, make_keys
from tests.client.agent import devices as agents
from tests.client.agent.devices import SECONDS, MadeUp, agent_at

HOUSE = Path(__file__).parents[3]
ASKED = Instructions("fed", 3, 2, "r2-00ff", "train", (0, 2), 1, '{"seed": 4}')


@pytest.fixture
def device() -> MadeUp:
    return MadeUp()


@pytest.fixture
def client(device: MadeUp, tmp_path: Path) -> Iterator[AgentClient]:
    """Of an agent at a Unix socket."""
    with agent_at(device, tmp_path) as server, AgentClient(str(server.address), Credentials()) as found:
        yield found


@contextmanager
def stub_at(server: AgentServer) -> Iterator[agent_pb2_grpc.AgentStub]:
    """Of a caller that keeps no rules."""
    with grpc.insecure_channel(str(server.address)) as channel:
        yield agent_pb2_grpc.AgentStub(channel)


def asked_aside(action: Callable[[], Any]) -> Future[Any]:
    """Asks from another thread."""
    return ThreadPoolExecutor(1).submit(action)


# ------------------------------------------------------------------------------------ what travels


def test_letters_are_answered_as_by_the_node_itself(client: AgentClient, device: MadeUp) -> None:
    letters = [Letter("describe"), Letter("train", ASKED), Letter("evaluate", ASKED)]
    answers = [client.answer(letter, SECONDS) for letter in letters]
    assert not device.wanted()  # any longer: the call is over
    assert device.asked == letters
    assert answers == [device.answer(letter) for letter in letters]
    assert client.describe(SECONDS) == device.described


def test_a_letters_pool_goes_before_its_instructions(client: AgentClient, device: MadeUp) -> None:
    assert isinstance(client.answer(Letter("train", ASKED, b"pool"), SECONDS), Contribution)
    assert device.asked == [b"pool", Letter("train", ASKED)]


def test_a_release_is_adopted(client: AgentClient, device: MadeUp) -> None:
    assert client.answer(Letter("release", ASKED, b"pool"), SECONDS) == device.described
    assert client.adopt("r1-a", SECONDS) == device.described
    assert device.asked == [b"pool", ASKED.version, "r1-a"]


def test_a_letter_without_its_instructions_is_refused(client: AgentClient) -> None:
    assert client.answer(Letter("train"), SECONDS) == Refusal(
        "failed", "a letter to train needs instructions, got none; send them"
    )


def test_payloads_beyond_grpcs_limit_of_a_message_travel_whole(client: AgentClient, device: MadeUp) -> None:
    device.payload = os.urandom(6 << 20)
    pool = os.urandom((5 << 20) + 1)
    answer = client.answer(Letter("train", ASKED, pool), SECONDS)
    assert answer == Contribution(ASKED.work, {"train": 5}, device.payload)
    assert device.asked[0] == pool


def test_a_pool_that_is_too_large_is_not_sent(
    client: AgentClient, device: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.agent.messages.MOST_BYTES", 4)
    answer = client.answer(Letter("train", ASKED, b"a pool"), SECONDS)
    assert isinstance(answer, Refusal)
    assert (answer.fault, answer.message[:42]) == ("failed", "a payload has at most 4 bytes, got 6; use ")
    assert device.asked == []


def test_apps_are_answered_as_by_the_device_itself(client: AgentClient, device: MadeUp) -> None:
    answers: list[Any] = [
        client.personalize("ann", SECONDS),
        client.score("ann", "a text", SECONDS),
        client.begin_anew("ann", SECONDS),
        client.forget("ann", SECONDS),
        client.rebase("r2-b", SECONDS, user="ann", margin=0.5),
        client.rebase("r2-b", SECONDS),
        client.status(SECONDS),
    ]
    assert device.asked == ["ann", ("ann", "a text"), "ann", "ann", ("r2-b", "ann", 0.5), ("r2-b", None, 0.0), "status"]
    for answer, own in zip(
        answers,
        (
            Personalised("r1-a", 40, 1234, 2.5, 1.25),
            Scored(7, 1.5, 2.25),
            BegunAnew(True),
            Forgotten(True, 2, ("copies",)),
            Rebased(3, 1),
            Rebased(3, 1),
            ServingStatus({"train": 5}, 2, 1, "r1-a", ("r1-a",), 4096),
        ),
        strict=True,
    ):
        fields = {field.name: getattr(answer, field.name) for field in answer.DESCRIPTOR.fields}
        plain = {
            n: tuple(v) if n in ("cannot_undo", "versions") else dict(v) if n == "users" else v
            for n, v in fields.items()
        }
        assert plain == vars(own)


def test_a_text_comes_in_pieces_while_it_is_written(client: AgentClient, device: MadeUp) -> None:
    pieces = client.generate("ann", "a prompt", SECONDS, max_tokens=3, temperature=0.5, seed=-7)
    assert list(pieces) == ["0é ", "1é ", "2é "]
    assert device.asked == [("ann", "a prompt", 3, 0.5, -7)]


def test_a_reader_that_stops_ends_the_writing(client: AgentClient, device: MadeUp) -> None:
    pieces = client.generate("ann", "a prompt", SECONDS, max_tokens=10**9)
    assert next(pieces) == "0é "
    assert not device.closed.is_set()
    pieces.close()
    assert device.closed.wait(SECONDS)


# ------------------------------------------------------------------------------------ turns


def test_a_device_trains_once_at_a_time_and_is_busy_beyond_its_line(device: MadeUp, tmp_path: Path) -> None:
    device.going_on.clear()
    with agent_at(device, tmp_path, waiting=0) as server, AgentClient(str(server.address), Credentials()) as client:
        first = asked_aside(lambda: client.answer(Letter("train", ASKED), SECONDS))
        assert device.working.acquire(timeout=SECONDS)
        for letter in (Letter("train", ASKED), Letter("evaluate", ASKED)):
            answer = client.answer(letter, SECONDS)
            assert isinstance(answer, Refusal)
            assert (answer.fault, answer.message[:40]) == ("busy", "such calls are worked on 1 at a time and")
        with pytest.raises(NodeError, match="worked on 1 at a time"):
            client.forget("ann", SECONDS)
        assert device.asked == [Letter("train", ASKED)]
        device.going_on.set()
        assert isinstance(first.result(SECONDS), Contribution)
        assert isinstance(client.answer(Letter("train", ASKED), SECONDS), Contribution)


def test_each_kind_of_work_has_a_line_of_its_own_and_short_questions_have_none(
    client: AgentClient, device: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many calls as work or wait at most; beyond them each kind is busy, and the agent still says how it is."""
    under_way, go_on = threading.Semaphore(0), threading.Event()

    def wait_in(kind: str, result: Any) -> Callable[..., Any]:
        def wait(*_: object) -> Any:
            working[kind] += 1
            under_way.release()
            assert go_on.wait(SECONDS)
            return result

        return wait

    working: Counter[str] = Counter()
    monkeypatch.setattr(device, "keep", wait_in("keep", "r9-kept"))
    monkeypatch.setattr(device, "personalize", wait_in("personalize", Personalised("r1-a", 1, 1, 1.0, 1.0)))
    monkeypatch.setattr(device, "score", wait_in("score", Scored(1, 1.0, 1.0)))
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "keep": (1 + WAITING, lambda: client.keep(b"pool", SECONDS)),
        "personalize": (1 + WAITING, lambda: client.personalize("ann", SECONDS)),
        "score": (WRITING + WAITING, lambda: client.score("ann", "a text", SECONDS)),
    }
    with ThreadPoolExecutor(CALLS) as aside:
        asked = [aside.submit(call) for most, call in calls.values() for _ in range(most)]
        for _ in range(2 + WRITING):
            assert under_way.acquire(timeout=SECONDS)
        for _, call in calls.values():
            wait_until(lambda call=call: fault_of(call) == "busy")
        assert fault_of(lambda: client.begin_anew("ann", SECONDS)) == "busy"
        with pytest.raises(NodeError, match=f"worked on {WRITING} at a time and {WAITING} may wait"):
            list(client.generate("ann", "a prompt", SECONDS, max_tokens=1))
        assert client.status(SECONDS).personalised == 2
        assert working == {"keep": 1, "personalize": 1, "score": WRITING}
        go_on.set()
        for future in asked:
            future.result(SECONDS)


def fault_of(call: Callable[[], Any]) -> str:
    with pytest.raises(NodeError) as refused:
        call()
    return refused.value.fault


def test_apps_are_served_beside_a_training(client: AgentClient, device: MadeUp) -> None:
    device.going_on.clear()
    training = asked_aside(lambda: client.answer(Letter("train", ASKED), SECONDS))
    assert device.working.acquire(timeout=SECONDS)
    assert "".join(client.generate("ann", "a prompt", SECONDS, max_tokens=2)) == "0é 1é "
    assert client.score("ann", "a text", SECONDS).tokens == 7
    assert client.personalize("ann", SECONDS).steps == 40
    assert client.status(SECONDS).personalised == 2
    assert client.keep(b"pool", SECONDS) == "r9-kept"
    assert not training.done()
    device.going_on.set()
    assert isinstance(training.result(SECONDS), Contribution)


def test_who_left_the_line_is_never_worked_for(client: AgentClient, device: MadeUp) -> None:
    device.going_on.clear()
    first = asked_aside(lambda: client.answer(Letter("train", ASKED), SECONDS))
    assert device.working.acquire(timeout=SECONDS)
    late = client.answer(Letter("evaluate", ASKED), 0.2)
    assert isinstance(late, Refusal)
    assert late.fault == "late"
    assert "did not answer in time" in late.message
    assert "give it longer" in late.message
    device.going_on.set()
    first.result(SECONDS)
    client.describe(SECONDS)
    assert device.asked == [Letter("train", ASKED), Letter("describe")]


def test_who_hangs_up_gives_up_its_place(device: MadeUp, tmp_path: Path) -> None:
    device.going_on.clear()
    with (
        agent_at(device, tmp_path, waiting=1) as server,
        AgentClient(str(server.address), Credentials()) as client,
        stub_at(server) as stub,
    ):
        first = asked_aside(lambda: client.answer(Letter("train", ASKED), SECONDS))
        assert device.working.acquire(timeout=SECONDS)
        waiting: list[Any] = []

        def fault() -> str:
            """Of one more training: "late" when it waited, "busy" when the only place to wait is taken."""
            answer = client.answer(Letter("train", ASKED), 0.1)
            assert isinstance(answer, Refusal)
            return answer.fault

        def another_waits() -> bool:
            if not waiting or waiting[-1].done():  # it came while `fault` waited
                waiting.append(stub.Evaluate.future(instructions_message(ASKED), timeout=SECONDS))
            return fault() == "busy"

        wait_until(another_waits)
        waiting[-1].cancel()
        wait_until(lambda: fault() == "late")
        device.going_on.set()
        first.result(SECONDS)
    assert device.asked == [Letter("train", ASKED)]


# ------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("fault", FAULTS)
def test_a_refusal_arrives_as_it_was_said(client: AgentClient, device: MadeUp, fault: str) -> None:
    device.error = NodeError(fault, "why, and what to do")
    assert_refused = [
        lambda: client.keep(b"pool", SECONDS),
        lambda: client.adopt("r1-a", SECONDS),
        lambda: client.personalize("ann", SECONDS),
        lambda: client.begin_anew("ann", SECONDS),
        lambda: list(client.generate("ann", "a prompt", SECONDS, max_tokens=3)),
        lambda: client.status(SECONDS),
    ]
    for action in assert_refused:
        with pytest.raises(NodeError, match="why, and what to do") as refused:
            action()
        assert refused.value.fault == fault
    answer = client.answer(Letter("train", ASKED, b"pool"), SECONDS)
    assert isinstance(answer, Refusal)
    assert answer.fault == fault


def test_a_nodes_own_refusal_of_a_letter_arrives_too(
    client: AgentClient, device: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = Refusal("lacks version", "this node does not keep it; send it with the instructions")
    monkeypatch.setattr(device, "answer", lambda letter, wanted: refusal)
    for letter in (Letter("train", ASKED), Letter("evaluate", ASKED), Letter("describe")):
        assert client.answer(letter, SECONDS) == refusal


@pytest.mark.parametrize("error", [StoreError("the disk is full"), FedquiltError("the disk is full")])
def test_other_errors_of_ours_are_failures_in_their_own_words(
    client: AgentClient, device: MadeUp, error: Exception
) -> None:
    device.error = error
    assert client.answer(Letter("train", ASKED), SECONDS) == Refusal("failed", "the disk is full")


def test_instructions_that_no_server_sends_reach_no_node(device: MadeUp, tmp_path: Path) -> None:
    with agent_at(device, tmp_path) as server, stub_at(server) as stub:
        with pytest.raises(grpc.RpcError) as refused:
            stub.Evaluate(pb.Instructions(federation="../up", attempt=1), timeout=SECONDS)
        assert refused.value.code() == grpc.StatusCode.INTERNAL
        assert "'../up'" in refused.value.details()
    assert device.asked == []


def test_words_that_are_too_long_for_a_status_are_cut(client: AgentClient, device: MadeUp) -> None:
    device.error = NodeError("lacks version", "é" * 100_000)
    answer = client.answer(Letter("train", ASKED), SECONDS)
    assert answer == Refusal("lacks version", "é" * 1000)


def test_the_log_names_calls_and_outcomes_and_nobody(
    client: AgentClient, device: MadeUp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedquilt.agent")
    client.score("ann-secret", "text-secret", SECONDS)
    device.error = NodeError("unknown users", "no user is called ann-secret")
    with pytest.raises(NodeError):
        client.forget("ann-secret", SECONDS)
    device.error = KeyError("ann-secret")
    with pytest.raises(NodeError, match="the agent raised KeyError in Personalize; its log says where") as failed:
        client.personalize("ann-secret", SECONDS)
    assert failed.value.fault == "failed"
    wait_until(lambda: len(caplog.records) == 4)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(" in ")[0] for line in said[:2]] == ["Score: done", "Forget: unknown users"]
    assert said[2].startswith("Personalize raised KeyError\n")
    assert str(Path(agents.__file__)) in said[2]
    assert said[3].split(" in ")[0] == "Personalize: KeyError"
    assert "secret" not in caplog.text


def wait_until(condition: Callable[[], bool]) -> None:
    """What a server does after it has answered need not be done when the answer is here."""
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_call_without_a_deadline_is_refused(device: MadeUp, tmp_path: Path) -> None:
    words = "a deadline of at most 86400 s, got none or a later one; set its timeout"
    with agent_at(device, tmp_path) as server, stub_at(server) as stub:
        calls: list[Callable[..., Any]] = [
            lambda **limit: stub.Describe(pb.DescribeRequest(), **limit),
            lambda **limit: list(stub.Train(pb.Instructions(), **limit)),
            lambda **limit: stub.Keep(iter([pb.Chunk()]), **limit),
        ]
        for call in calls:
            for limit in ({}, {"timeout": 100_000.0}):
                with pytest.raises(grpc.RpcError) as refused:
                    call(**limit)
                assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                assert words in refused.value.details()
    assert device.asked == []


def test_chunks_that_lie_are_refused(device: MadeUp, tmp_path: Path) -> None:
    with agent_at(device, tmp_path) as server, stub_at(server) as stub:
        for total, words in ((5, "5 bytes was announced, got 4"), (1 << 40, "at most 1073741824 bytes")):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Keep(iter([pb.Chunk(total_bytes=total, data=b"pool")]), timeout=SECONDS)
            assert words in refused.value.details()
    assert device.asked == []


# ------------------------------------------------------------------------------------ health, start and stop


def test_health_follows_the_agent(device: MadeUp, tmp_path: Path) -> None:
    request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
    device.going_on.clear()
    address = f"unix:{tmp_path}/agent.sock"
    with grpc.insecure_channel(address) as channel, AgentClient(address, Credentials()) as client:
        health = health_pb2_grpc.HealthStub(channel)
        with agent_at(device, tmp_path) as server:
            assert health.Check(request, timeout=SECONDS).status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError, match="a deadline of at most"):
                health.Check(request)
            training = asked_aside(lambda: client.answer(Letter("train", ASKED), SECONDS))
            assert device.working.acquire(timeout=SECONDS)
            waiting = asked_aside(lambda: client.answer(Letter("train", ASKED), SECONDS))
            wait_until(lambda: len(server._service._federated._line) == 2)
            assert device.wanted()

            def look_while_it_stops() -> None:
                wait_until(lambda: not device.wanted())
                device.going_on.set()

            looked = asked_aside(look_while_it_stops)
        looked.result(SECONDS)
        assert not server.working
        trained, given_up = training.result(SECONDS), waiting.result(SECONDS)
    assert isinstance(trained, Contribution)
    assert isinstance(given_up, Refusal)
    assert given_up.fault == "no agent"
    assert device.asked == [Letter("train", ASKED)]


def test_watchers_hold_no_threads(client: AgentClient, device: MadeUp, tmp_path: Path) -> None:
    request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
    with grpc.insecure_channel(f"unix:{tmp_path}/agent.sock") as channel:
        watches = [health_pb2_grpc.HealthStub(channel).Watch(request, timeout=SECONDS) for _ in range(2 * CALLS)]
        for watch in watches:
            with pytest.raises(grpc.RpcError) as refused:
                next(watch)
            assert refused.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED)
        with pytest.raises(grpc.RpcError, match="asked for, not watched; call Check now and then"):
            next(health_pb2_grpc.HealthStub(channel).Watch(request, timeout=SECONDS))
    assert client.describe(SECONDS) == device.described


def test_work_that_does_not_end_in_time_is_told_and_left(
    device: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.agent.server.GRACE_SECONDS", 0.1)
    monkeypatch.setattr("client.agent.server._CANCEL_SECONDS", 0.1)
    device.going_on.clear()
    with agent_at(device, tmp_path) as server, AgentClient(str(server.address), Credentials()) as client:
        training = asked_aside(lambda: client.answer(Letter("train", ASKED), SECONDS))
        assert device.working.acquire(timeout=SECONDS)
    device.going_on.set()
    assert server.working
    assert isinstance(training.result(SECONDS), Refusal)


def test_where_no_agent_answers_is_said(tmp_path: Path) -> None:
    with AgentClient(f"unix:{tmp_path}/agent.sock", Credentials()) as client:
        answer = client.answer(Letter("describe"), SECONDS)
        assert isinstance(answer, Refusal)
        assert answer.fault == "no agent"
        assert answer.message.startswith(f"no agent answers at unix:{tmp_path}/agent.sock")
        assert answer.message.endswith("start one there with 'fedquilt agent', or name another")


def test_an_agent_that_is_back_is_found_by_the_same_client(device: MadeUp, tmp_path: Path) -> None:
    with AgentClient(f"unix:{tmp_path}/agent.sock", Credentials()) as client:
        for _ in range(2):
            assert isinstance(client.answer(Letter("describe"), SECONDS), Refusal)
            with agent_at(device, tmp_path):
                wait_until(lambda: client.answer(Letter("describe"), SECONDS) == device.described)
            assert not (tmp_path / "agent.sock").exists()


def test_a_dead_agents_socket_is_replaced_and_a_living_ones_is_not(device: MadeUp, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with agent_at(device, tmp_path) as server:
        with (
            pytest.raises(ConfigError, match=f"someone has {path}; stop it, or give another"),
            agent_at(device, tmp_path),
        ):
            pass
        with AgentClient(str(server.address), Credentials()) as client:
            assert client.describe(SECONDS) == device.described


def test_no_file_is_replaced_by_a_socket(device: MadeUp, tmp_path: Path) -> None:
    (tmp_path / "agent.sock").write_text("precious")
    with (
        pytest.raises(ConfigError, match=r"agent.sock is a file or a folder; give another path"),
        agent_at(device, tmp_path),
    ):
        pass
    assert (tmp_path / "agent.sock").read_text() == "precious"


def test_what_is_no_address_of_this_machine_is_refused(device: MadeUp, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"a free address of this machine, .*; give another"),
        agent_at(device, tmp_path, f"unix:{tmp_path}/gone/agent.sock"),
    ):
        pass


# ------------------------------------------------------------------------------------ who may call

CONNECT_AS_NOBODY = """
import os, socket, sys
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
except PermissionError:
    sys.exit(13)
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everyone on the machine may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def test_nobody_else_on_the_machine_reaches_the_socket(device: MadeUp, tmp_path: Path, open_folder: Path) -> None:
    with agent_at(device, tmp_path, f"unix:{open_folder}/agent.sock") as server:
        assert isinstance(server.address, UnixAddress)
        assert stat.S_IMODE(server.address.path.stat().st_mode) == 0o600
        if os.geteuid() == 0:
            assert connecting_as_nobody(server.address.path) == 13
            server.address.path.chmod(0o666)
            assert connecting_as_nobody(server.address.path) == 0


def test_nothing_is_sent_to_someone_elses_socket(
    client: AgentClient, device: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.describe(SECONDS) == device.described
    device.asked.clear()
    if os.geteuid() == 0:
        os.chown(client._address.path, 65534, 65534)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 65534)
    for call in (
        lambda: client.score("ann", "a diary", SECONDS),
        lambda: client.keep(b"pool", SECONDS),
        lambda: list(client.generate("ann", "a diary", SECONDS, max_tokens=1)),
    ):
        with pytest.raises(NodeError, match=r"agent.sock belongs to user .* nothing was sent. Run this as the user"):
            call()
    answer = client.answer(Letter("train", ASKED), SECONDS)
    assert isinstance(answer, Refusal)
    assert (answer.fault, "nothing was sent" in answer.message) == ("failed", True)
    assert device.asked == []


def connecting_as_nobody(path: Path) -> int:
    """13 where nobody's process may not connect."""
    return subprocess.run([sys.executable, "-c", CONNECT_AS_NOBODY, str(path)], check=False).returncode


def test_over_loopback_each_call_carries_the_token(device: MadeUp, tmp_path: Path) -> None:
    token = tmp_path / "token"
    with agent_at(device, tmp_path, "127.0.0.1:0") as server:
        address = str(server.address)
        assert not address.endswith(":0")
        with AgentClient(address, Credentials(token)) as client:
            assert client.describe(SECONDS) == device.described
            assert "".join(client.generate("ann", "a prompt", SECONDS, max_tokens=1)) == "0é "
        asked = len(device.asked)
        with stub_at(server) as stub:
            for headers in ([], [("authorization", "Bearer guess")]):
                with pytest.raises(grpc.RpcError) as refused:
                    stub.Status(pb.StatusRequest(), timeout=SECONDS, metadata=headers)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
                assert "FEDQUILT_AGENT_TOKEN names its file" in refused.value.details()
        assert len(device.asked) == asked


def test_a_client_reads_the_token_of_an_agent_that_was_restarted(device: MadeUp, tmp_path: Path) -> None:
    with agent_at(device, tmp_path, "127.0.0.1:0") as server:
        address, first = str(server.address), (tmp_path / "token").read_text()
        client = AgentClient(address, Credentials(tmp_path / "token"))
        assert client.describe(SECONDS) == device.described
    with agent_at(device, tmp_path, address):
        assert (tmp_path / "token").read_text() != first
        wait_until(lambda: client.answer(Letter("describe"), SECONDS) == device.described)
    client.close()


def test_a_client_without_a_token_is_told_before_it_calls(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"127.0.0.1:7 needs one; set FEDQUILT_AGENT_TOKEN to the file 'token'"):
        AgentClient("127.0.0.1:7", Credentials())
    with pytest.raises(ConfigError, match=r"beyond loopback an agent speaks TLS alone, 10.0.0.1:7"):
        AgentClient("10.0.0.1:7", Credentials(tmp_path / "token"))
    with AgentClient("127.0.0.1:7", Credentials(tmp_path / "token")) as client:
        answer = client.answer(Letter("describe"), SECONDS)
        assert isinstance(answer, Refusal)
        assert "cannot be read" in answer.message


def test_a_port_is_not_shared(device: MadeUp, tmp_path: Path) -> None:
    with (
        agent_at(device, tmp_path, "127.0.0.1:0") as server,
        pytest.raises(ConfigError, match=f"a free address of this machine, {server.address} is none, or"),
        agent_at(MadeUp(), tmp_path, str(server.address)),
    ):
        pass


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_beyond_loopback_without_tls_nothing_listens(
    device: MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(grpc, "server", lambda *_, **__: pytest.fail("it made a server"))
    with (
        pytest.raises(ConfigError, match="beyond loopback an agent speaks TLS alone"),
        agent_at(device, tmp_path, address),
    ):
        pass


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[TlsFiles]:
    """Of two authorities that know nothing of each other."""
    found = []
    for name in ("ours", "theirs"):
        folder = tmp_path_factory.mktemp("keys") / name
        make_keys(folder, nodes=1, agents=["127.0.0.1"])
        found.append(TlsFiles(certificate(folder, "agent"), certificate_key(folder, "agent"), folder / CA))
    return found


def test_with_tls_each_side_shows_a_certificate(device: MadeUp, tmp_path: Path, keys: list[TlsFiles]) -> None:
    ours, theirs = keys
    with agent_at(device, tmp_path, "0.0.0.0:0", ours) as server:
        address = str(server.address).replace("0.0.0.0", "127.0.0.1")
        with AgentClient(address, Credentials(tls=ours)) as client:
            assert client.describe(SECONDS) == device.described
        asked = len(device.asked)
        strangers = TlsFiles(theirs.certificate, theirs.key, ours.authority)
        impostors = TlsFiles(ours.certificate, ours.key, theirs.authority)
        for tls in (strangers, impostors):
            with AgentClient(address, Credentials(tls=tls)) as client:
                answer = client.answer(Letter("describe"), SECONDS)
                assert isinstance(answer, Refusal)
                assert answer.fault == "no agent"
        nameless = grpc.ssl_channel_credentials(ours.authority.read_bytes())
        with grpc.secure_channel(address, nameless) as channel, pytest.raises(grpc.RpcError) as refused:
            agent_pb2_grpc.AgentStub(channel).Describe(pb.DescribeRequest(), timeout=SECONDS)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert len(device.asked) == asked
    assert not (tmp_path / "token").exists()


def test_a_key_belongs_to_its_certificate(device: MadeUp, tmp_path: Path, keys: list[TlsFiles]) -> None:
    mixed = TlsFiles(keys[0].certificate, keys[1].key, keys[0].authority)
    with (
        pytest.raises(ConfigError, match="the TLS key is not the certificate's"),
        agent_at(device, tmp_path, "127.0.0.1:0", mixed),
    ):
        pass


def test_a_client_imports_nothing_heavy() -> None:
    code = f"""
import json, sys
sys.path.insert(0, {str(HOUSE)!r})
import client.agent.client
from federation.exchange import Letter
client.agent.client.AgentClient("unix:/nowhere").answer(Letter("describe"), 1.0)
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    loaded = set(json.loads(done.stdout))
    assert "grpc" in loaded
    assert not loaded & {
        "torch",
        "numpy",
        "transformers",
        "peft",
        "lmdb",
        "safetensors",
        "pydantic",
        "flwr",
    }
