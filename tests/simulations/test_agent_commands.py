"""The commands of a device: what they ask an agent, what they show, and what they refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from client.agent.security import TcpAddress, TlsFiles, UnixAddress
from client.node import NodeConfig
from client.serving import BegunAnew
from federation.config import PopulationConfig
from federation.errors import NodeError
from simulations.cli import app
from tests.client.agent.devices import MadeUp, agent_at

HOUSE = Path(__file__).parents[2]
TINY = Path(__file__).parent / "tiny.toml"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeUp]:
    """A device whose agent the environment names."""
    device = MadeUp()
    with agent_at(device, tmp_path) as server:
        monkeypatch.setenv("FEDQUILT_AGENT", str(server.address))
        yield device


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What an agent would have been started with."""
    calls: list[Any] = []
    monkeypatch.setattr(
        "client.agent.process.serve", lambda config, address, tls, say: calls.append((config, address, tls))
    )
    return calls


# ------------------------------------------------------------------------------------ asking


@pytest.mark.parametrize(
    ("arguments", "asked", "shown"),
    [
        (
            ["status"],
            ["status"],
            "users:        5 train\npersonalised: 2\nforgotten:    1\nrelease:      r1-a\npools kept:   r1-a\n"
            "on the disk:  4,096 bytes\n",
        ),
        (
            ["personalize", "ann"],
            ["ann"],
            "40 steps on r1-a: loss 2.5000 -> 1.2500 nats per target, 1,234 bytes kept\n",
        ),
        (["generate", "ann", "a prompt", "--max-tokens", 2], [("ann", "a prompt", 2, 0.0, 0)], "0é 1é \n"),
        (
            ["generate", "ann", "p", "--max-tokens", 1, "--temperature", 0.5, "--seed", -3],
            [("ann", "p", 1, 0.5, -3)],
            "0é \n",
        ),
        (
            ["score", "ann", "a text"],
            [("ann", "a text")],
            "1.5000 nats per token, 2.2500 bits per character, over 7 tokens\n",
        ),
        (
            ["forget", "ann"],
            ["ann"],
            "removed: its personal values, and its training state in 2 federations\nremains: copies\n",
        ),
        (["begin-anew", "ann"], ["ann"], "removed: what it remembers of its tasks\n"),
        (["rebase"], ["status", ("r1-a", None, 0.0)], "r1-a: 3 users moved, 1 stayed with their own release\n"),
        (
            ["rebase", "r2-b", "--user", "ann", "--margin", 0.5],
            [("r2-b", "ann", 0.5)],
            "r2-b: 3 users moved, 1 stayed with their own release\n",
        ),
    ],
)
def test_what_is_asked_and_shown(device: MadeUp, arguments: list[object], asked: list[object], shown: str) -> None:
    result = run("ask", *arguments)
    assert (result.exit_code, result.output) == (0, shown)
    assert device.asked == asked


def test_a_pools_file_is_adopted(device: MadeUp, tmp_path: Path) -> None:
    (tmp_path / "pool").write_bytes(b"a pool")
    result = run("ask", "adopt", tmp_path / "pool")
    assert (result.exit_code, result.output) == (0, "serving r9-kept\n")
    assert device.asked == [b"a pool", "r9-kept"]


@pytest.mark.parametrize(("name", "why"), [("gone", "No such file or directory"), (".", "Is a directory")])
def test_a_pools_file_that_cannot_be_read_is_named(device: MadeUp, tmp_path: Path, name: str, why: str) -> None:
    result = run("ask", "adopt", tmp_path / name)
    words = f"a release is one pool file, '{tmp_path / name}' cannot be read ({why}); name the file that"
    assert result.exit_code == 2
    assert result.stderr.startswith(f"fedquilt: {words}")
    assert device.asked == []


def test_nothing_in_a_text_commands_the_terminal(device: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "generate", lambda *_: (piece for piece in ("a\x1b]0;b\x07", "\r\n\té")))
    assert run("ask", "generate", "ann", "p").output == "a\ufffd]0;b\ufffd\ufffd\n\té\n"


def test_without_a_release_there_is_nothing_to_rebase_to(device: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = device.status().__class__({}, 0, 0, "", (), 0)
    monkeypatch.setattr(device, "status", lambda: nothing)
    result = run("ask", "rebase")
    assert (result.exit_code, result.stderr) == (
        2,
        "fedquilt: values move to a release, this agent serves none yet; name a version that it keeps\n",
    )


def test_without_a_course_there_is_nothing_to_remove(device: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "begin_anew", lambda user: BegunAnew(False))
    assert run("ask", "begin-anew", "ann").output == "nothing to remove: no course began\n"


def test_the_commands_that_errors_name_are_there() -> None:
    sources = (path.read_text() for path in (HOUSE / "client").rglob("*.py"))
    named = {name for source in sources for name in re.findall(r"`fedquilt ask ([a-z-]+)", source)}
    assert "begin-anew" in named
    for name in named:
        assert run("ask", name, "--help").exit_code == 0


def test_a_refusal_ends_with_its_words(device: MadeUp) -> None:
    device.error = NodeError("unknown users", "'bob' is none of them; name another")
    result = run("ask", "personalize", "bob")
    assert (result.exit_code, result.stderr) == (2, "fedquilt: 'bob' is none of them; name another\n")


def test_asking_needs_an_address_at_which_an_agent_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDQUILT_AGENT", raising=False)
    nameless = run("ask", "status")
    assert nameless.exit_code == 2
    assert "FEDQUILT_AGENT" in nameless.stderr
    nobody = run("ask", "status", "--agent", f"unix:{tmp_path}/agent.sock")
    assert nobody.exit_code == 2
    assert nobody.stderr.startswith(f"fedquilt: no agent answers at unix:{tmp_path}/agent.sock")


# ------------------------------------------------------------------------------------ the agent


def test_an_agent_of_users_texts(served: list[Any], tmp_path: Path) -> None:
    result = run("agent", "--data", tmp_path, "--base", "a/model", "--window", 32, "--state", tmp_path / "s")
    assert result.exit_code == 0, result.output
    options = {"data": str(tmp_path), "base": "a/model", "window": 32}
    config = NodeConfig(population=PopulationConfig(name="texts", options=options), state=tmp_path / "s")
    assert served == [(config, UnixAddress(tmp_path / "s" / "agent.sock"), None)]


def test_an_agent_of_an_experiments_users(served: list[Any], tmp_path: Path) -> None:
    options = ["--partition", "1/3", "--block", 4, "--precision", "bf16", "--device", "auto"]
    tls = ["--tls-cert", "a.pem", "--tls-key", "a.key", "--tls-ca", "ca.pem"]
    result = run("agent", "--experiment", TINY, "--state", tmp_path, "--listen", "10.0.0.1:7070", *options, *tls)
    assert result.exit_code == 0, result.output
    [(config, address, files)] = served
    assert (config.population.name, config.population.options["train_users"]) == ("synthetic", 40)
    assert (config.partition, config.partitions, config.block) == (1, 3, 4)
    assert (config.precision, config.device, config.state) == ("bf16", "auto", tmp_path)
    assert address == TcpAddress("10.0.0.1", 7070)
    assert files == TlsFiles(Path("a.pem"), Path("a.key"), Path("ca.pem"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs --data and --base, or --experiment; --data and --base missing"),
        (["--data", "texts"], "--base missing"),
        (["--experiment", TINY, "--base", "b", "--window", 8], "got --experiment and --base, --window; leave one out"),
        (["--experiment", "cod"], "did you mean 'code'?"),
        (["--experiment", TINY, "--partition", "2"], "--partition is I/N, part I of N counted from 0, such as 0/2"),
        (["--experiment", TINY, "--partition", "2/2"], "partitions are counted from 0, so 2 is none of 2"),
        (["--experiment", TINY, "--block", 0], "block: "),
        (["--experiment", TINY, "--precision", "fp8"], "precision: "),
        (["--experiment", TINY, "--device", "gpu"], "device: "),
        (["--experiment", TINY, "--listen", "7070"], "unix:PATH or HOST:PORT"),
        (["--experiment", TINY, "--listen", "0.0.0.0:7070"], "beyond loopback an agent speaks TLS alone"),
        (["--experiment", TINY, "--tls-cert", "a.pem"], "--tls-key and --tls-ca missing"),
        (["--experiment", TINY, "--listen", f"unix:/{'a' * 120}"], "1 to 107 bytes"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(
    served: list[Any], tmp_path: Path, arguments: list[object], words: str
) -> None:
    result = run("agent", "--state", tmp_path / "s", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("fedquilt: ")
    assert result.stderr.count("\n") == 1
    assert not served
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["agent"], "own its users' data"),
        (["ask"], "Show how many users"),
        (["ask", "status"], "takes on the disk"),
        (["ask", "personalize"], "on its own data"),
        (["ask", "generate"], "go on with a text"),
        (["ask", "score"], "foretells a text"),
        (["ask", "begin-anew"], "begin a course of tasks"),
        (["ask", "forget"], "cannot undo"),
        (["ask", "rebase"], "another release"),
        (["ask", "adopt"], "serve it from now on"),
    ],
)
def test_every_command_explains_itself(command: list[str], words: str) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert words in " ".join(result.output.split())
