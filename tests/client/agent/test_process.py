"""Agents of real nodes, also in a process of its own that is killed and stopped, against nodes without an agent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from client.agent.client import AgentClient
from client.agent.security import Credentials, UnixAddress, sole_agent
from client.agent.server import AgentServer
from client.agent.service import AgentService
from client.node import Node, NodeConfig
from client.serving import Serving
from client.writing import Writer
from federation.config import PopulationConfig, RunConfig, TaskConfig
from federation.data.texts import user_id
from federation.errors import ConfigError, NodeError
from federation.exchange import Description, Instructions, Letter, Refusal
from federation.pool.file import PoolFile
from federation.settings import parse
from tests.bases import UNICODE_TEXT, save_base
from tests.client.served import equal, instructions, opened, released, rows_of, users_with_texts
from tests.simulations.tiny import tiny_config, tiny_setup

HOUSE = Path(__file__).parents[3]
SECONDS = 60.0
"""More than loading torch takes on a busy machine."""
COMMAND = "from simulations.cli import main; main()"
BLOCK = 2


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return tiny_config("gate.warmup=0")


@pytest.fixture(scope="module")
def pool(config: RunConfig) -> PoolFile:
    return PoolFile(0, tiny_setup(config).begin().values, config.task)


def experiment(config: RunConfig, folder: Path) -> Path:
    """A file with the users of a configuration."""
    options = "\n".join(f"{name} = {json.dumps(value)}" for name, value in config.population.options.items())
    path = folder / "users.toml"
    path.write_text(f'[population]\nname = "{config.population.name}"\n[population.options]\n{options}\n')
    return path


@contextmanager
def agent(
    users: Sequence[object], state: Path, ready: Callable[[], bool], code: str = COMMAND
) -> Iterator[subprocess.Popen[str]]:
    """A process, once `ready` is true. users: whose agent it is, in the command's words."""
    command = [sys.executable, "-c", code, "agent", "--state", *map(str, (state, *users))]
    process = subprocess.Popen(command, cwd=HOUSE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + SECONDS
        while not ready():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def letter(pool: PoolFile, round_index: int, users: int = 30) -> Letter:
    """Training for so many users of the node."""
    task = pool.task.model_dump_json()
    asked = Instructions("tiny", round_index, 1, pool.version, "train", tuple(range(users)), 0, task)
    return Letter("train", asked, pool.to_bytes())


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> PopulationConfig:
    """Two users with texts of their own, and a tiny model."""
    folder = tmp_path_factory.mktemp("texts")
    base = save_base(folder / "base")
    for user in ("ann", "bob"):
        (folder / "users" / user).mkdir(parents=True)
        lines = (f"{user}, line {number}: {UNICODE_TEXT[number:]}" for number in range(40))
        (folder / "users" / user / "diary.txt").write_text("".join(lines))
    return PopulationConfig(name="texts", options={"data": str(folder / "users"), "base": str(base), "window": 8})


def service_of(node: Node) -> AgentService:
    serving = Serving(node)
    return AgentService(node, serving, Writer(node, serving))


def test_generations_and_trainings_do_not_touch_each_other(texts: PopulationConfig, tmp_path: Path) -> None:
    config = parse(TaskConfig, {"pool": {"rank": 4}, "gate": {"budget": 2, "warmup": 0}, "local": {"steps": 20}})
    alone, busy = (Node(NodeConfig(population=texts, state=tmp_path / name, block=1)) for name in ("a", "b"))
    sections = alone.task(config).schema.sections
    random = torch.Generator().manual_seed(0)
    values = {name: 0.1 * torch.randn(spec.rows, spec.width, generator=random) for name, spec in sections.items()}
    pool = PoolFile(0, values, config)
    with (
        closing(alone),
        closing(busy),
        AgentServer(service_of(busy), tmp_path, UnixAddress(tmp_path / "agent.sock")) as server,
        AgentClient(str(server.address), Credentials()) as client,
        ThreadPoolExecutor(1) as aside,
    ):
        client.adopt(client.keep(pool.to_bytes(), SECONDS), SECONDS)
        client.personalize("ann", SECONDS)

        def text() -> str:
            return "".join(client.generate("ann", "hello", SECONDS, max_tokens=8, temperature=1.0, seed=3))

        undisturbed, beside, round_index = text(), 0, 0
        while not beside:
            round_index += 1
            assert round_index < 100
            training = aside.submit(client.answer, letter(pool, round_index, 2), SECONDS)
            while not training.done():
                assert text() == undisturbed
                beside += not training.done()
            assert training.result() == alone.answer(letter(pool, round_index, 2))


def test_a_killed_agent_is_missed_and_comes_back_with_its_users(
    config: RunConfig, pool: PoolFile, tmp_path: Path
) -> None:
    settings = NodeConfig(population=config.population, state=tmp_path / "own", partition=1, partitions=2, block=BLOCK)
    node = Node(settings)
    described = node.describe()
    own = [node.answer(letter(pool, round_index)) for round_index in (1, 2)]
    node.close()
    second = ["--experiment", experiment(config, tmp_path), "--partition", "1/2", "--block", BLOCK]
    state = tmp_path / "state"
    with AgentClient(f"unix:{state}/agent.sock", Credentials()) as client, ThreadPoolExecutor(1) as aside:

        def ready() -> bool:
            return isinstance(client.answer(Letter("describe"), SECONDS), Description)

        with agent(second, state, ready) as process:
            assert client.describe(SECONDS) == described
            assert client.answer(letter(pool, 1), SECONDS) == own[0]
            half_done = aside.submit(client.answer, letter(pool, 2), SECONDS)
            process.kill()
            process.wait(SECONDS)
            half_done.result(SECONDS)
        missed = client.answer(letter(pool, 2), SECONDS)
        assert isinstance(missed, Refusal)
        assert missed.fault == "no agent"
        assert (state / "agent.sock").is_socket()
        with agent(second, state, ready) as process:
            assert client.answer(letter(pool, 2), SECONDS) == own[1]
            with pytest.raises(ConfigError, match=f"process {process.pid} holds {state}"), sole_agent(state):
                pass
            assert not [path for path in (state, *state.rglob("*")) if path.stat().st_mode & 0o077]
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    assert not (state / "agent.sock").exists()
    assert f"ready at unix:{state}/agent.sock" in said
    assert "INFO fedquilt.agent: Train: done in " in said
    assert said.endswith("stopping\n")


# ------------------------------------------------------------------------------------ users with texts

TUNES_FOR_EVER = f"""
import time
import client.agent.server
import client.one_user
client.agent.server.GRACE_SECONDS = 0.2
client.one_user.personal_values = lambda *_: time.sleep({2 * SECONDS})
{COMMAND}
"""


def words_of(population: dict[str, object]) -> list[object]:
    """Whose agent it is, in the command's words."""
    options = population["options"]
    assert isinstance(options, dict)
    return ["--data", options["data"], "--base", options["base"], "--window", options["window"]]


def owned(population: dict[str, object], state: Path) -> Node:
    """The node that such an agent has."""
    options = population["options"]
    assert isinstance(options, dict)
    del options["target_modules"]
    return opened(state, population)


def answering(client: AgentClient) -> Callable[[], bool]:
    return lambda: isinstance(client.answer(Letter("describe"), SECONDS), Description)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_who_is_tuned_when_the_agent_ends_has_what_it_had(tmp_path: Path, number: signal.Signals) -> None:
    population, state = users_with_texts(tmp_path, "ann", "bob"), tmp_path / "state"
    with closing(owned(population, state)) as node:
        first = released(node)
        Serving(node).personalize("ann")
        had, rows = node.personal.get(user_id("ann")), rows_of(Serving(node), "ann")
        second = released(node, 4)
    with AgentClient(f"unix:{state}/agent.sock", Credentials()) as client, ThreadPoolExecutor(1) as aside:
        with agent(words_of(population), state, answering(client), TUNES_FOR_EVER) as process:
            tuning = aside.submit(client.personalize, "ann", SECONDS)
            while json.loads((state / "release.json").read_text())["pinned"] != sorted([first, second]):
                assert not tuning.done()
                time.sleep(0.01)
            process.send_signal(number)
            said, _ = process.communicate(timeout=SECONDS)
        with pytest.raises(NodeError):
            tuning.result(SECONDS)
    assert process.returncode == -number
    assert said.endswith("leaves work that did not end in time\n") == (number == signal.SIGTERM)
    with closing(opened(state, population)) as node:
        assert node.personal.get(user_id("ann")) == had
        assert equal(rows_of(Serving(node), "ann"), rows)


def test_what_an_agent_says_names_no_user_and_quotes_no_text(tmp_path: Path) -> None:
    """Whatever goes wrong: each name and each text here has a "hush" in it."""
    population, state = users_with_texts(tmp_path, "hush-name", "bob"), tmp_path / "state"
    (tmp_path / "data" / "hush-name" / "notes.txt").write_text("".join(f"hush-text {n} " for n in range(99)))
    with closing(owned(population, state)) as node:
        version = released(node)
        node.train(instructions(version, (0, 1)))
        pool = node.pool(version)
        Serving(node).personalize("hush-name")
        kept = node.personal.get(user_id("hush-name"))
        assert kept is not None
        node.personal.put(user_id("hush-name"), replace(kept, payload=kept.payload[:-1] + b"?"))
    for shard in (state / "federations" / "one" / "users").glob("shard-*/data.mdb"):
        with shard.open("r+b") as file:
            file.write(bytes(2 * 4096))
    alien = PoolFile(9, {"pool/hush-text": torch.zeros(2, 3)}, pool.task)
    with AgentClient(f"unix:{state}/agent.sock", Credentials()) as client:
        text = "hush-text " * 9
        with agent(words_of(population), state, answering(client)) as process:
            told = [
                client.answer(Letter("train", instructions(version, (0, 1), at=2)), SECONDS),
                client.answer(Letter("train", instructions("r7-0123456789abcdef", (0,), at=2)), SECONDS),
                client.answer(Letter("train", replace(instructions(version, (0,), at=2), task=text)), SECONDS),
                client.answer(Letter("release", instructions(alien.version, ()), alien.to_bytes()), SECONDS),
            ]
            refused = [answer.message for answer in told if isinstance(answer, Refusal)]
            assert len(refused) >= 2
            client.adopt(version, SECONDS)
            for call in (
                lambda: client.score("hush-nobody", text, SECONDS),
                lambda: client.score("hush-name", text, SECONDS),
                lambda: client.forget("hush-nobody", SECONDS),
                lambda: list(client.generate("hush-name", text, SECONDS, max_tokens=0)),
                lambda: client.rebase(version, SECONDS, user="hush-nobody"),
            ):
                with pytest.raises(NodeError) as error:
                    call()
                refused.append(str(error.value))
            client.personalize("hush-name", SECONDS)
            assert "".join(client.generate("hush-name", text, SECONDS, max_tokens=2, temperature=1.0))
            client.forget("hush-name", SECONDS)
            process.send_signal(signal.SIGTERM)
            said, _ = process.communicate(timeout=SECONDS)
    assert "hush" in "".join(refused)
    assert "begin anew" in said
    assert "prompt of" in said
    assert "Score: unknown users in" in said
    assert "hush" not in said
    assert process.returncode == 0
