"""Agents of real nodes, also in a process of its own that is killed and stopped, against nodes without an agent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from client.agent.client import AgentClient
from client.agent.security import Credentials, UnixAddress, sole_agent
from client.agent.server import AgentServer
from client.agent.service import AgentService
from client.node import Node, NodeConfig
from client.serving import Serving
from federation.config import PopulationConfig, RunConfig, TaskConfig, parse
from federation.errors import ConfigError
from federation.exchange import Description, Instructions, Letter, Refusal
from federation.pool.file import PoolFile
from tests.bases import UNICODE_TEXT, save_base
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
def agent(users: Path, state: Path, ready: Callable[[], bool]) -> Iterator[subprocess.Popen[str]]:
    """A process of the second of two nodes; once `ready` is true."""
    words = ["--experiment", users, "--state", state, "--partition", "1/2", "--block", BLOCK]
    command = [sys.executable, "-c", COMMAND, "agent", *map(str, words)]
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
        AgentServer(AgentService(busy, Serving(busy)), tmp_path, UnixAddress(tmp_path / "agent.sock")) as server,
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
    users, state = experiment(config, tmp_path), tmp_path / "state"
    with AgentClient(f"unix:{state}/agent.sock", Credentials()) as client, ThreadPoolExecutor(1) as aside:

        def ready() -> bool:
            return isinstance(client.answer(Letter("describe"), SECONDS), Description)

        with agent(users, state, ready) as process:
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
        with agent(users, state, ready) as process:
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
